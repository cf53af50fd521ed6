"""Ids numbered in the order in which they are met: a hash table in arrays, filled by a compiled loop.

An id costs its own bytes, 8 for where they begin, and 11 to 22 in the table, and half of all that while it grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.compiled import compiled, read_byte, read_word
from twhin_pipeline.errors import UserError

Array = np.ndarray[Any, Any]

MOST_IDS = 2**32
FIRST_SLOTS, FIRST_BYTES = 1 << 16, 1 << 20
# A slot holds a number + 1 in its lower bits, and above them some of the id's hash, which tells most others apart.
_NUMBER_BITS = 40
_NUMBER = (1 << _NUMBER_BITS) - 1
# So many ids are looked up at a time.
_BLOCK = 64
# From MurmurHash3 and the golden ratio: odd, with bits all over.
_MIX, _GOLDEN = 0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class LookedUp:
    """Ids with their hashes, uint64 `[n]`, and the numbers of those found, int64 `[n]`; -1 where one was not found.

    Texts lie in `data` between `cuts` `[n + 1]`; of integers, `cuts` `[n]` are themselves.
    """

    cuts: Array
    data: Array
    hashes: Array
    found: Array


class Interner:
    """Numbers ids, which are texts or integers."""

    def __init__(self, texts: bool) -> None:
        """Begin with none."""
        self.texts = texts
        self.count = 0
        """How many ids have been met."""
        # The hash table; where each text begins among the bytes, and the last one's end, or the integers; the bytes.
        # They are exchanged together, so that threads have those that fit.
        self.table = (
            np.zeros(FIRST_SLOTS, np.uint64),
            np.zeros(_most(FIRST_SLOTS) + 1, np.int64),
            np.zeros(FIRST_BYTES if texts else 1, np.uint8),
        )

    def look_up(self, ids: pa.Array) -> LookedUp:
        """Find the numbers of ids (string or int64, none null), as far as they have one.

        Threads may do so while another one calls `numbers`: they may miss what is new, but find nothing wrong, since an
        id is compared before it is taken for found.
        """
        hashes, found = np.empty(len(ids), np.uint64), np.empty(len(ids), np.int64)
        if self.texts:
            cuts, data = _buffers(ids)
            _hash_texts(cuts, data, hashes)
            _look_up_texts(cuts, data, hashes, *self.table, found)
        else:
            cuts, data = ids.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), np.zeros(1, np.uint8)
            _hash_integers(cuts, hashes)
            _look_up_integers(cuts, hashes, *self.table[:2], found)
        return LookedUp(cuts, data, hashes, found)

    def numbers(self, ids: LookedUp) -> Array:
        """Return the number of each id, uint32 `[n]`; new ones get the next.

        Raises:
            UserError: There are more ids than numbers.
        """
        done = 0
        while done < len(ids.found):
            self._make_room(ids.cuts, done)
            if self.texts:
                done, self.count = _intern_texts(
                    ids.cuts, ids.data, ids.hashes, done, *self.table, self.count, ids.found
                )
            else:
                done, self.count = _intern_integers(ids.cuts, ids.hashes, done, *self.table[:2], self.count, ids.found)
            if self.count >= MOST_IDS:
                raise UserError(f"the source has {MOST_IDS:,} different ids or more; divide it into smaller graphs")
        return ids.found.astype(np.uint32)

    def ids(self) -> pa.Array:
        """Return the ids in the order of their numbers: large_string or int64."""
        _, starts, data = self.table
        if not self.texts:
            return pa.array(starts[: self.count])
        return pa.Array.from_buffers(pa.large_string(), self.count, [None, pa.py_buffer(starts), pa.py_buffer(data)])

    def _make_room(self, cuts: Array, done: int) -> None:
        """Grow what has no room for another id (the next one of all, where it is a text)."""
        slots, starts, data = self.table
        if self.count + 1 >= len(starts):
            wider = np.zeros(2 * len(slots), np.uint64)
            known, starts = starts[: self.count + 1], np.zeros(_most(len(wider)) + 1, np.int64)
            starts[: len(known)] = known
            hashes = np.empty(self.count, np.uint64)
            if self.texts:
                _hash_texts(known, data, hashes)
            else:
                _hash_integers(known[: self.count], hashes)
            _place(hashes, wider)
            slots = wider
        if self.texts:
            needed = int(starts[self.count] + cuts[done + 1] - cuts[done])
            if needed > len(data):
                held, data = data, np.zeros(max(2 * len(data), needed), np.uint8)
                data[: len(held)] = held
        self.table = slots, starts, data


def _most(slots: int) -> int:
    """Return how many ids a table has room for: fuller ones are searched longer, wider ones miss the caches oftener."""
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
def _mixed(number: Any) -> Any:
    number = (number ^ (number >> np.uint64(32))) * np.uint64(_GOLDEN)
    return number ^ (number >> np.uint64(29))


@compiled()
def _hash_integers(ids: Array, into: Array) -> None:
    for i in range(len(ids)):
        into[i] = _mixed(np.uint64(ids[i]) * np.uint64(_MIX))


@compiled()
def _few(address: Any, size: int) -> Any:
    """Return the bytes at an address, fewer than eight, as one number."""
    word = np.uint64(0)
    for i in range(size):
        word = (word << np.uint64(8)) | np.uint64(read_byte(address + i))
    return word


@compiled()
def _hash_texts(cuts: Array, data: Array, into: Array) -> None:
    """Hash texts, 8 bytes at a time, in the way of MurmurHash2."""
    address = np.int64(data.ctypes.data)
    for i in range(len(cuts) - 1):
        start, end = cuts[i], cuts[i + 1]
        found = np.uint64(end - start) * np.uint64(_MIX)
        while end - start >= 8:
            word = read_word(address + start) * np.uint64(_MIX)
            word = (word ^ (word >> np.uint64(47))) * np.uint64(_MIX)
            found = (found ^ word) * np.uint64(_MIX)
            start += 8
        if start < end:
            found = (found ^ _few(address + start, end - start)) * np.uint64(_MIX)
        into[i] = _mixed(found)


@compiled()
def _place(hashes: Array, slots: Array) -> None:
    """Put different ids, by their hashes `[n]`, into an empty table."""
    last = np.uint64(len(slots) - 1)
    for i in range(len(hashes)):
        spot = hashes[i] & last
        while slots[spot]:
            spot = (spot + np.uint64(1)) & last
        slots[spot] = _slot(hashes[i], i)


@compiled()
def _slot(found: Any, number: Any) -> Any:
    return (found >> np.uint64(_NUMBER_BITS) << np.uint64(_NUMBER_BITS)) | np.uint64(number + 1)


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
def _look_up_texts(
    cuts: Array, data: Array, hashes: Array, slots: Array, starts: Array, arena: Array, into: Array
) -> None:
    """Write the numbers of texts, or -1.

    Each of the inner loops reads places that do not depend on one another, so that it does not wait for memory once for
    each text and thing to read.
    """
    last = np.uint64(len(slots) - 1)
    one, other = np.int64(data.ctypes.data), np.int64(arena.ctypes.data)
    begin, end = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    for block in range(0, len(into), _BLOCK):
        stop = min(block + _BLOCK, len(into))
        for i in range(block, stop):
            spot = hashes[i] & last
            while slots[spot] and (slots[spot] ^ hashes[i]) >> np.uint64(_NUMBER_BITS):
                spot = (spot + np.uint64(1)) & last
            into[i] = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
        for i in range(block, stop):
            number = max(into[i], 0)
            begin[i - block], end[i - block] = starts[number], starts[number + 1]
        for i in range(block, stop):
            start, size = begin[i - block], end[i - block] - begin[i - block]
            # What another thread has just added may be beyond these bytes.
            there = size == cuts[i + 1] - cuts[i] and start + size <= len(arena)
            if not (there and _same(one + cuts[i], other + start, size)):
                into[i] = -1


@compiled()
def _look_up_integers(ids: Array, hashes: Array, slots: Array, known: Array, into: Array) -> None:
    """Write the numbers of integers, or -1."""
    last = np.uint64(len(slots) - 1)
    for i in range(len(into)):
        spot = hashes[i] & last
        while slots[spot] and (slots[spot] ^ hashes[i]) >> np.uint64(_NUMBER_BITS):
            spot = (spot + np.uint64(1)) & last
        number = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
        into[i] = number if number >= 0 and known[number] == ids[i] else -1


@compiled()
def _intern_texts(
    cuts: Array,
    data: Array,
    hashes: Array,
    first: int,
    slots: Array,
    starts: Array,
    arena: Array,
    count: int,
    into: Array,
) -> tuple[int, int]:
    """Number texts without one, from the `first` on while there is room; return the next, and how many ids there are.

    An id is written to its slot after all else, for those who look it up meanwhile.
    """
    last = np.uint64(len(slots) - 1)
    one, other = np.int64(data.ctypes.data), np.int64(arena.ctypes.data)
    for i in range(first, len(into)):
        if into[i] >= 0:
            continue
        size = cuts[i + 1] - cuts[i]
        spot = hashes[i] & last
        while slots[spot]:
            number = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
            start = starts[number]
            alike = slots[spot] == _slot(hashes[i], number) and starts[number + 1] - start == size
            if alike and _same(one + cuts[i], other + start, size):
                into[i] = number
                break
            spot = (spot + np.uint64(1)) & last
        if into[i] >= 0:
            continue
        start = starts[count]
        if count + 1 >= len(starts) or start + size > len(arena):
            return i, count
        for k in range(size):
            arena[start + k] = data[cuts[i] + k]
        starts[count + 1] = start + size
        slots[spot] = _slot(hashes[i], count)
        into[i] = count
        count += 1
    return len(into), count


@compiled()
def _intern_integers(
    ids: Array, hashes: Array, first: int, slots: Array, known: Array, count: int, into: Array
) -> tuple[int, int]:
    """Number integers, as `_intern_texts` does texts."""
    last = np.uint64(len(slots) - 1)
    for i in range(first, len(into)):
        if into[i] >= 0:
            continue
        spot = hashes[i] & last
        while slots[spot]:
            number = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
            if slots[spot] == _slot(hashes[i], number) and known[number] == ids[i]:
                into[i] = number
                break
            spot = (spot + np.uint64(1)) & last
        if into[i] >= 0:
            continue
        if count + 1 >= len(known):
            return i, count
        known[count] = ids[i]
        slots[spot] = _slot(hashes[i], count)
        into[i] = count
        count += 1
    return len(into), count
