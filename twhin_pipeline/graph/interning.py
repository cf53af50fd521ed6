"""Ids get codes (0, 1, …) in the order in which they come: a hash table in arrays, filled by a compiled loop.

A text costs its own bytes, in words of 8, 8 beside them, and 11 to 22 in the table; an integer 8 and as much in the
table. Half of all that is added while it grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.kernels.compiled import compiled, read_byte, read_word

Array = np.ndarray[Any, Any]

MOST_IDS = 2**32
FIRST_SLOTS, FIRST_WORDS = 1 << 16, 1 << 17
# A slot holds a place + 1 in its lower bits, and above them some of the id's hash, which tells most others apart.
_PLACE_BITS = 40
_PLACE = (1 << _PLACE_BITS) - 1
# A text is kept in words: first its code, and above these bits its length + 1; then its bytes, and zeros after them.
_LENGTH_BITS = 32
_CODE = (1 << _LENGTH_BITS) - 1
# So many ids are looked up at a time.
_BLOCK = 64
# From MurmurHash3 and the golden ratio: odd, with bits all over.
_MIX, _GOLDEN = 0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class LookedUp:
    """Ids with their hashes, uint64 `[n]`, and the codes of those that have one, int64 `[n]`; -1 for the others.

    Texts are in `data` between `cuts` `[n + 1]`; of integers, `cuts` `[n]` are themselves.
    """

    cuts: Array
    data: Array
    hashes: Array
    codes: Array


class Interner:
    """Gives codes to ids, which are texts or integers."""

    def __init__(self, texts: bool) -> None:
        """Begin without ids."""
        self.texts = texts
        self.count = 0
        """How many ids have a code."""
        # The hash table, and what its places are in: the texts, or the integers by code. Exchanged together, so that
        # threads have those that fit.
        self.table = (
            np.zeros(FIRST_SLOTS, np.uint64),
            np.zeros(FIRST_WORDS, np.uint64) if texts else np.zeros(_most(FIRST_SLOTS), np.int64),
        )
        # Of the texts.
        self.words = 0

    def look_up(self, ids: pa.Array) -> LookedUp:
        """Find the codes of ids (string or int64, none null), as far as they have one.

        Threads may do so while another one calls `codes`. They may miss a new id, but never take a wrong one, since the
        ids themselves are compared.
        """
        hashes, codes = np.empty(len(ids), np.uint64), np.empty(len(ids), np.int64)
        if self.texts:
            cuts, data = _buffers(ids)
            _hash_texts(cuts, data, hashes)
            _look_up_texts(cuts, data, hashes, *self.table, codes)
        else:
            cuts, data = ids.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), np.zeros(1, np.uint8)
            _hash_integers(cuts, hashes)
            _look_up_integers(cuts, hashes, *self.table, codes)
        return LookedUp(cuts, data, hashes, codes)

    def codes(self, ids: LookedUp) -> Array:
        """Return the code of each id, uint32 `[n]`; new ones get the next.

        Raises:
            UserError: There are more ids than codes.
        """
        done = 0
        while done < len(ids.codes):
            self._grow(ids.cuts, done)
            if self.texts:
                done, self.count, self.words = _intern_texts(
                    ids.cuts, ids.data, ids.hashes, done, *self.table, self.count, self.words, ids.codes
                )
            else:
                done, self.count = _intern_integers(ids.cuts, ids.hashes, done, *self.table, self.count, ids.codes)
            if self.count >= MOST_IDS:
                raise UserError(f"the source has {MOST_IDS:,} different ids or more; divide it into smaller graphs")
        return ids.codes.astype(np.uint32)

    def ids(self) -> pa.Array:
        """Return the ids in the order of their codes: large_string or int64."""
        _, held = self.table
        if not self.texts:
            return pa.array(held[: self.count])
        starts = np.zeros(self.count + 1, np.int64)
        _starts(held[: self.words], starts)
        data = np.empty(starts[-1], np.uint8)
        _copy_texts(held[: self.words], starts, data)
        return pa.Array.from_buffers(pa.large_string(), self.count, [None, pa.py_buffer(starts), pa.py_buffer(data)])

    def _grow(self, cuts: Array, done: int) -> None:
        """Enlarge what is too small for another id: the table, or the texts."""
        slots, held = self.table
        if self.count >= _most(len(slots)):
            slots = np.zeros(2 * len(slots), np.uint64)
            if self.texts:
                _place_texts(held[: self.words], slots)
            else:
                known, held = held[: self.count], np.zeros(_most(len(slots)), np.int64)
                held[: len(known)] = known
                _place_integers(known, slots)
        if self.texts:
            needed = self.words + _words_of(int(cuts[done + 1] - cuts[done]))
            if needed > len(held):
                before, held = held, np.zeros(max(2 * len(held), needed), np.uint64)
                held[: len(before)] = before
        self.table = slots, held


@compiled()
def _most(slots: int) -> Any:
    """Return how many ids a table takes. A fuller one is searched longer; a wider one misses the caches oftener."""
    return slots * 3 // 4


def _buffers(texts: pa.Array) -> tuple[Array, Array]:
    """Return where texts begin and end among bytes, int64 `[n + 1]`, and the bytes."""
    wide = pa.types.is_large_string(texts.type)
    if not wide and not pa.types.is_string(texts.type):
        texts, wide = texts.cast(pa.large_string()), True
    _, cuts, data = texts.buffers()
    ends = np.frombuffer(cuts, np.int64 if wide else np.int32)[texts.offset : texts.offset + len(texts) + 1]
    return ends.astype(np.int64), np.frombuffer(data, np.uint8) if data is not None else np.zeros(1, np.uint8)


@compiled()
def _mixed(value: Any) -> Any:
    value = (value ^ (value >> np.uint64(32))) * np.uint64(_GOLDEN)
    return value ^ (value >> np.uint64(29))


@compiled()
def _hash_integer(value: Any) -> Any:
    return _mixed(np.uint64(value) * np.uint64(_MIX))


@compiled()
def _hash_integers(ids: Array, into: Array) -> None:
    for i in range(len(ids)):
        into[i] = _hash_integer(ids[i])


@compiled()
def _few(address: Any, size: int) -> Any:
    """Return the bytes at an address, fewer than eight, as one number."""
    word = np.uint64(0)
    for i in range(size):
        word = (word << np.uint64(8)) | np.uint64(read_byte(address + i))
    return word


@compiled()
def _hash_text(address: Any, size: Any) -> Any:
    """Hash a text, 8 bytes at a time, in the way of MurmurHash2."""
    hashed = np.uint64(size) * np.uint64(_MIX)
    while size >= 8:
        word = read_word(address) * np.uint64(_MIX)
        word = (word ^ (word >> np.uint64(47))) * np.uint64(_MIX)
        hashed = (hashed ^ word) * np.uint64(_MIX)
        address, size = address + 8, size - 8
    if size:
        hashed = (hashed ^ _few(address, size)) * np.uint64(_MIX)
    return _mixed(hashed)


@compiled()
def _hash_texts(cuts: Array, data: Array, into: Array) -> None:
    address = np.int64(data.ctypes.data)
    for i in range(len(cuts) - 1):
        into[i] = _hash_text(address + cuts[i], cuts[i + 1] - cuts[i])


@compiled()
def _words_of(size: Any) -> Any:
    """Return how many words a text of so many bytes takes."""
    return 1 + (size + 7) // 8


@compiled()
def _length(header: Any) -> Any:
    return np.int64(header >> np.uint64(_LENGTH_BITS)) - 1


@compiled()
def _starts(texts: Array, into: Array) -> None:
    """Write where each text begins when they follow one another, and the last one's end."""
    at = 0
    for code in range(len(into) - 1):
        size = _length(texts[at])
        into[code + 1] = into[code] + size
        at += _words_of(size)


@compiled()
def _copy_texts(texts: Array, starts: Array, into: Array) -> None:
    """Write texts one after another."""
    address, at = np.int64(texts.ctypes.data), 0
    for code in range(len(starts) - 1):
        size = starts[code + 1] - starts[code]
        for k in range(size):
            into[starts[code] + k] = read_byte(address + 8 * (at + 1) + k)
        at += _words_of(size)


@compiled()
def _place(hashed: Any, place: Any, slots: Array) -> None:
    """Put an id that is not there into a table that is not full, by its hash and place."""
    last = np.uint64(len(slots) - 1)
    spot = hashed & last
    while slots[spot]:
        spot = (spot + np.uint64(1)) & last
    slots[spot] = _slot(hashed, place)


@compiled()
def _place_texts(texts: Array, slots: Array) -> None:
    address, at = np.int64(texts.ctypes.data), 0
    while at < len(texts):
        size = _length(texts[at])
        _place(_hash_text(address + 8 * (at + 1), size), at, slots)
        at += _words_of(size)


@compiled()
def _place_integers(known: Array, slots: Array) -> None:
    for code in range(len(known)):
        _place(_hash_integer(known[code]), code, slots)


@compiled()
def _slot(hashed: Any, place: Any) -> Any:
    return (hashed >> np.uint64(_PLACE_BITS) << np.uint64(_PLACE_BITS)) | np.uint64(place + 1)


@compiled()
def _same(one: Any, other: Any, size: int) -> Any:
    """Tell whether `size` bytes at two addresses are the same, eight at a time."""
    if size < 8:
        return _few(one, size) == _few(other, size)
    # The first and the last eight, some of them perhaps twice: of most ids that is all.
    if (read_word(one) ^ read_word(other)) | (read_word(one + size - 8) ^ read_word(other + size - 8)):
        return False
    different = np.uint64(0)
    for done in range(8, size - 8, 8):
        different |= read_word(one + done) ^ read_word(other + done)
    return different == 0


@compiled()
def _look_up_texts(cuts: Array, data: Array, hashes: Array, slots: Array, texts: Array, into: Array) -> None:
    """Write the codes of texts, or -1.

    Each of the inner loops reads places that do not depend on one another, so that it does not wait for memory once for
    each text and thing to read.
    """
    last = np.uint64(len(slots) - 1)
    one, other = np.int64(data.ctypes.data), np.int64(texts.ctypes.data)
    places, headers = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.uint64)
    for block in range(0, len(into), _BLOCK):
        stop = min(block + _BLOCK, len(into))
        for i in range(block, stop):
            spot = hashes[i] & last
            while slots[spot] and (slots[spot] ^ hashes[i]) >> np.uint64(_PLACE_BITS):
                spot = (spot + np.uint64(1)) & last
            places[i - block] = np.int64(slots[spot] & np.uint64(_PLACE)) - 1
        for i in range(block, stop):
            # What another thread has just added may be beyond these words.
            at = places[i - block]
            headers[i - block] = texts[at] if 0 <= at < len(texts) else np.uint64(0)
        for i in range(block, stop):
            at, header, size = places[i - block], headers[i - block], cuts[i + 1] - cuts[i]
            same = _length(header) == size and at + _words_of(size) <= len(texts)
            same = same and _same(one + cuts[i], other + 8 * (at + 1), size)
            into[i] = np.int64(header & np.uint64(_CODE)) if same else -1


@compiled()
def _look_up_integers(ids: Array, hashes: Array, slots: Array, known: Array, into: Array) -> None:
    """Write the codes of integers, or -1."""
    last = np.uint64(len(slots) - 1)
    for i in range(len(into)):
        spot = hashes[i] & last
        while slots[spot] and (slots[spot] ^ hashes[i]) >> np.uint64(_PLACE_BITS):
            spot = (spot + np.uint64(1)) & last
        code = np.int64(slots[spot] & np.uint64(_PLACE)) - 1
        into[i] = code if 0 <= code < len(known) and known[code] == ids[i] else -1


@compiled()
def _intern_texts(
    cuts: Array,
    data: Array,
    hashes: Array,
    first: int,
    slots: Array,
    texts: Array,
    count: int,
    words: int,
    into: Array,
) -> tuple[int, int, int]:
    """Give codes to texts without one, from the `first` on until a table is full.

    An id is written to its slot after all else, for those who look it up meanwhile.

    Returns:
        The next text, how many ids there are, and how many words they take.
    """
    last, most = np.uint64(len(slots) - 1), _most(len(slots))
    one, other = np.int64(data.ctypes.data), np.int64(texts.ctypes.data)
    for i in range(first, len(into)):
        if into[i] >= 0:
            continue
        size = cuts[i + 1] - cuts[i]
        spot = hashes[i] & last
        while slots[spot]:
            at = np.int64(slots[spot] & np.uint64(_PLACE)) - 1
            alike = slots[spot] == _slot(hashes[i], at) and _length(texts[at]) == size
            if alike and _same(one + cuts[i], other + 8 * (at + 1), size):
                into[i] = np.int64(texts[at] & np.uint64(_CODE))
                break
            spot = (spot + np.uint64(1)) & last
        if into[i] >= 0:
            continue
        if count >= most or words + _words_of(size) > len(texts):
            return i, count, words
        at, start = np.int64(words + 1), cuts[i]
        while start + 8 <= cuts[i + 1]:
            texts[at] = read_word(one + start)
            at, start = at + 1, start + 8
        word = np.uint64(0)
        for k in range(cuts[i + 1] - start):
            word |= np.uint64(data[start + k]) << np.uint64(8 * k)
        if start < cuts[i + 1]:
            texts[at] = word
        texts[words] = (np.uint64(size + 1) << np.uint64(_LENGTH_BITS)) | np.uint64(count)
        slots[spot] = _slot(hashes[i], words)
        into[i] = count
        count += 1
        words += _words_of(size)
    return len(into), count, words


@compiled()
def _intern_integers(
    ids: Array, hashes: Array, first: int, slots: Array, known: Array, count: int, into: Array
) -> tuple[int, int]:
    """Give codes to integers, as `_intern_texts` does to texts."""
    last = np.uint64(len(slots) - 1)
    for i in range(first, len(into)):
        if into[i] >= 0:
            continue
        spot = hashes[i] & last
        while slots[spot]:
            code = np.int64(slots[spot] & np.uint64(_PLACE)) - 1
            if slots[spot] == _slot(hashes[i], code) and known[code] == ids[i]:
                into[i] = code
                break
            spot = (spot + np.uint64(1)) & last
        if into[i] >= 0:
            continue
        if count >= len(known):
            return i, count
        known[count] = ids[i]
        slots[spot] = _slot(hashes[i], count)
        into[i] = count
        count += 1
    return len(into), count
