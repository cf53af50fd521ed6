"""Ids put in order: texts by their bytes, as DuckDB and Parquet's statistics have them, eight bytes at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.kernels.compiled import compiled, read_byte, read_word
from twhin_pipeline.kernels.radix import in_order

Array = np.ndarray[Any, Any]

_WORD = 8
# Fewer are sooner sorted by insertion than by digits.
_FEW = 64


def order(ids: pa.Array) -> Array:
    """Return the places of different ids (large_string or int64, none null, fewer than 2^32) in ascending order.

    Texts are sorted by eight bytes after those that all begin with, and those that are alike again by the next eight:
    radix sorts, mostly within the caches. It takes 24 bytes an id besides.

    Returns:
        uint32 `[n]`.
    """
    places = np.arange(len(ids), dtype=np.uint32)
    if not len(ids):
        return places
    if pa.types.is_integer(ids.type):
        # The sign's bit the other way round, so that what is below 0 comes first.
        return in_order(ids.to_numpy().view(np.uint64) ^ np.uint64(1 << 63), places)[1]
    _, cuts, held = ids.buffers()
    starts = np.frombuffer(cuts, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(held, np.uint8) if held is not None else np.zeros(1, np.uint8)
    _sort_texts(starts, data, _alike(starts, data), places)
    return places


@compiled()
def _sort_texts(starts: Array, data: Array, alike: int, places: Array) -> None:
    """Sort the places of texts, of which so many first bytes are alike, by the texts."""
    # Runs of texts that are alike so far: first, last + 1, and how many bytes are.
    runs, left = np.empty((64, 3), np.int64), 1
    runs[0] = 0, len(places), alike
    while left:
        left -= 1
        first, last, depth = runs[left]
        members, words = places[first:last], np.empty(last - first, np.uint64)
        longest = _words(starts, data, members, depth, words)
        ended = longest <= depth
        if ended:
            # All bytes are equal, but for zeros at the end.
            for i in range(len(members)):
                words[i] = np.uint64(starts[members[i] + 1] - starts[members[i]])
        if len(members) < _FEW:
            _insert(words, members)
        else:
            words, members = in_order(words, members.copy())
            places[first:last] = members
        begin = 0
        for i in range(1, len(words) + 1):
            if i < len(words) and words[i] == words[begin]:
                continue
            if i - begin > 1 and not ended:
                if left == len(runs):
                    more = np.empty((2 * left, 3), np.int64)
                    more[:left] = runs
                    runs = more
                runs[left] = first + begin, first + i, depth + _WORD
                left += 1
            begin = i


@compiled()
def _insert(keys: Array, order: Array) -> None:
    """Sort keys, and `order` with them, in place."""
    for i in range(1, len(keys)):
        key, one, k = keys[i], order[i], i
        while k > 0 and keys[k - 1] > key:
            keys[k], order[k] = keys[k - 1], order[k - 1]
            k -= 1
        keys[k], order[k] = key, one


@compiled()
def _alike(starts: Array, data: Array) -> Any:
    """Return how many bytes all texts begin with alike."""
    alike = starts[1] - starts[0]
    for i in range(1, len(starts) - 1):
        alike = min(alike, starts[i + 1] - starts[i])
        for k in range(alike):
            if data[starts[i] + k] != data[starts[0] + k]:
                alike = k
                break
    return alike


@compiled()
def _words(starts: Array, data: Array, members: Array, depth: int, into: Array) -> Any:
    """Write eight bytes of each text from `depth` on as a number, the first byte highest, zeros after its end.

    Returns:
        The longest text's length.
    """
    address, longest = np.int64(data.ctypes.data), np.int64(0)
    for i in range(len(members)):
        start, end = starts[members[i]] + depth, starts[members[i] + 1]
        longest = max(longest, end - start + depth)
        word, size = np.uint64(0), max(min(end - start, _WORD), 0)
        if size == _WORD:
            word = _swapped(read_word(address + start))
        else:
            for k in range(size):
                word |= np.uint64(read_byte(address + start + k)) << np.uint64(56 - 8 * k)
        into[i] = word
    return longest


@compiled(inline="always")
def _swapped(word: Any) -> Any:
    """Return a number with its bytes the other way round."""
    low, byte = np.uint64(0x00FF00FF00FF00FF), np.uint64(8)
    word = ((word >> byte) & low) | ((word & low) << byte)
    low, byte = np.uint64(0x0000FFFF0000FFFF), np.uint64(16)
    word = ((word >> byte) & low) | ((word & low) << byte)
    return (word >> np.uint64(32)) | (word << np.uint64(32))
