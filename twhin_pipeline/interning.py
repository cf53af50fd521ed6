"""Ids numbered in the order in which they are met: a hash table in arrays, filled by a compiled loop.

An id costs its own bytes, 8 for where they begin, and 16 to 32 in the table, and half of all that while it grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.compiled import compiled, read_word
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
class Hashed:
    """Ids with their hashes, uint64 `[n]`: texts, which lie in `data` between `cuts` `[n + 1]`, or integers `[n]`."""

    cuts: Array
    data: Array
    hashes: Array


class Interner:
    """Numbers ids, which are texts or integers."""

    def __init__(self, texts: bool) -> None:
        """Begin with none."""
        self.texts = texts
        self.count = 0
        """How many ids have been met."""
        self.slots = np.zeros(FIRST_SLOTS, np.uint64)
        self.starts = np.zeros(FIRST_SLOTS // 2 + 1, np.int64)
        """Texts: where each begins among the bytes, and the last one's end; integers: themselves."""
        self.bytes = np.zeros(FIRST_BYTES if texts else 1, np.uint8)

    def hashed(self, ids: pa.Array) -> Hashed:
        """Return ids (string or int64, none null) with their hashes, as `numbers` takes them. Another thread may."""
        hashes = np.empty(len(ids), np.uint64)
        if self.texts:
            cuts, data = _buffers(ids)
            _hash_texts(cuts, data, hashes)
        else:
            cuts, data = ids.to_numpy(zero_copy_only=False).astype(np.int64, copy=False), np.zeros(1, np.uint8)
            _hash_integers(cuts, hashes)
        return Hashed(cuts, data, hashes)

    def numbers(self, ids: Hashed) -> Array:
        """Return the number of each id, uint32 `[n]`; new ones get the next.

        Raises:
            UserError: There are more ids than numbers.
        """
        found = np.empty(len(ids.hashes), np.uint32)
        done = 0
        while done < len(found):
            self._make_room(ids.cuts, done)
            given = (ids.cuts, ids.data, ids.hashes, done, self.slots, self.starts, self.bytes, self.count, found)
            done, self.count = (_intern_texts if self.texts else _intern_integers)(*given)
            if self.count >= MOST_IDS:
                raise UserError(f"the source has {MOST_IDS:,} different ids or more; divide it into smaller graphs")
        return found

    def ids(self) -> pa.Array:
        """Return the ids in the order of their numbers: large_string or int64."""
        if not self.texts:
            return pa.array(self.starts[: self.count])
        buffers = [None, pa.py_buffer(self.starts), pa.py_buffer(self.bytes)]
        return pa.Array.from_buffers(pa.large_string(), self.count, buffers)

    def _make_room(self, cuts: Array, done: int) -> None:
        """Grow what has no room for another id (the next one of all, where it is a text)."""
        if 2 * (self.count + 1) > len(self.slots):
            slots = np.zeros(2 * len(self.slots), np.uint64)
            starts = np.zeros(len(self.slots) + 1, np.int64)
            starts[: self.count + 1] = self.starts[: self.count + 1]
            hashes = np.empty(self.count, np.uint64)
            if self.texts:
                _hash_texts(self.starts[: self.count + 1], self.bytes, hashes)
            else:
                _hash_integers(self.starts[: self.count], hashes)
            _place(hashes, slots)
            self.slots, self.starts = slots, starts
        if self.texts:
            needed = int(self.starts[self.count] + cuts[done + 1] - cuts[done])
            if needed > len(self.bytes):
                data = np.zeros(max(2 * len(self.bytes), needed), np.uint8)
                data[: len(self.bytes)] = self.bytes
                self.bytes = data


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
def _word(data: Array, start: int, end: int) -> Any:
    """Return the bytes from `start` to before `end`, fewer than eight, as one number."""
    word = np.uint64(0)
    for i in range(start, end):
        word = (word << np.uint64(8)) | np.uint64(data[i])
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
            found = (found ^ _word(data, start, end)) * np.uint64(_MIX)
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
def _same(data: Array, start: int, other: Array, begin: int, size: int) -> bool:
    """Tell whether `size` bytes from `start` in `data` and from `begin` in `other` are the same."""
    one, two = np.int64(data.ctypes.data) + start, np.int64(other.ctypes.data) + begin
    if size < 8:
        return _word(data, start, start + size) == _word(other, begin, begin + size)
    done = 0
    while size - done >= 8:
        if read_word(one + done) != read_word(two + done):
            return False
        done += 8
    # The last eight, some of them again.
    return read_word(one + size - 8) == read_word(two + size - 8)


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
    """Number texts from the `first` on while there is room; return which is the next, and how many ids there are."""
    last = np.uint64(len(slots) - 1)
    guess, begin, end = np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64), np.empty(_BLOCK, np.int64)
    block = first
    while block < len(into):
        stop = min(block + _BLOCK, len(into))
        # Most are known. Each of these loops reads places that do not depend on one another, so that it does not wait
        # for memory once for each id and thing to read.
        for i in range(block, stop):
            spot = hashes[i] & last
            while slots[spot] and (slots[spot] ^ hashes[i]) >> np.uint64(_NUMBER_BITS):
                spot = (spot + np.uint64(1)) & last
            guess[i - block] = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
        for k in range(stop - block):
            number = max(guess[k], 0)
            begin[k], end[k] = starts[number], starts[number + 1]
        for i in range(block, stop):
            k = i - block
            size = cuts[i + 1] - cuts[i]
            if guess[k] >= 0 and (end[k] - begin[k] != size or not _same(data, cuts[i], arena, begin[k], size)):
                guess[k] = -1
        for i in range(block, stop):
            number = guess[i - block]
            if number < 0:
                number = _find_text(cuts[i], cuts[i + 1], data, hashes[i], slots, starts, arena, count)
                if number < 0:
                    return i, count
                count = max(count, number + 1)
            into[i] = number
        block = stop
    return len(into), count


@compiled()
def _find_text(
    start: int, stop: int, data: Array, found: Any, slots: Array, starts: Array, arena: Array, count: int
) -> Any:
    """Return a text's number, the next where it is new; -1 where there is no room for it."""
    last, size = np.uint64(len(slots) - 1), stop - start
    spot = found & last
    while slots[spot]:
        number = np.int64(slots[spot] & np.uint64(_NUMBER)) - 1
        begin = starts[number]
        alike = slots[spot] == _slot(found, number) and starts[number + 1] - begin == size
        if alike and _same(data, start, arena, begin, size):
            return number
        spot = (spot + np.uint64(1)) & last
    if 2 * (count + 1) > len(slots) or starts[count] + size > len(arena):
        return -1
    begin = starts[count]
    for k in range(size):
        arena[begin + k] = data[start + k]
    starts[count + 1] = begin + size
    slots[spot] = _slot(found, count)
    return count


@compiled()
def _intern_integers(
    ids: Array,
    data: Array,
    hashes: Array,
    first: int,
    slots: Array,
    known: Array,
    arena: Array,
    count: int,
    into: Array,
) -> tuple[int, int]:
    """Number integers, as `_intern_texts` does texts."""
    last = np.uint64(len(slots) - 1)
    for i in range(first, len(into)):
        spot = hashes[i] & last
        while True:
            slot = slots[spot]
            if slot == 0:
                if 2 * (count + 1) > len(slots):
                    return i, count
                known[count] = ids[i]
                slots[spot] = _slot(hashes[i], count)
                into[i] = count
                count += 1
                break
            number = np.int64(slot & np.uint64(_NUMBER)) - 1
            if slot == _slot(hashes[i], number) and known[number] == ids[i]:
                into[i] = number
                break
            spot = (spot + np.uint64(1)) & last
    return len(into), count
