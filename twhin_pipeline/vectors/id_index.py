"""An index of ids in files that are mapped into memory: which row an id has, found without reading the table.

    keys.npy    of integers the ids themselves, else a hash of each id, ascending: int64 or uint64 `[N]`
    rows.npy    the row of each: int64 `[N]`
    ids.arrow   the ids in the order of rows, as Arrow IPC

A hash says where to look; the id that is found there is compared, so two ids of one hash are no mistake.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Array = np.ndarray[Any, Any]
_SEED, _FACTOR = np.uint64(0xCBF29CE484222325), np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(29)
_WORD = 8


def hashes(ids: pa.Array) -> Array:
    """Hash texts, a word of 8 bytes at a time: uint64 `[N]`. The same text has the same hash everywhere.

    Args:
        ids: `large_string`, without nulls.
    """
    _, offsets_buffer, data_buffer = ids.buffers()
    if not len(ids):
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offsets_buffer, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    data = np.zeros(last - first + _WORD, np.uint8)
    if last > first:
        data[: last - first] = np.frombuffer(data_buffer, np.uint8)[first:last]
    words = np.ndarray((len(data) - _WORD + 1,), np.dtype("<u8"), data, strides=(1,))
    start, length = offsets[:-1] - first, np.diff(offsets)
    result = _SEED ^ length.astype(np.uint64)
    left = np.arange(len(ids))
    for at in range(0, int(length.max()), _WORD):
        left = left[length[left] > at]
        used = np.minimum(length[left] - at, _WORD).astype(np.uint64)
        mask = np.uint64(2**64 - 1) >> (np.uint64(64) - np.uint64(8) * used)
        mixed = (result[left] ^ (words[start[left] + at] & mask)) * _FACTOR
        result[left] = mixed ^ (mixed >> _SHIFT)
    return result


def write(folder: Path, batches: list[pa.Array], kind: pa.DataType) -> None:
    """Write the index of ids, given in batches in the order of rows; `kind` is int64 or large_string."""
    # One array: whoever maps it finds each column in one piece.
    column = pa.concat_arrays([pa.array([], kind), *batches])
    if pa.types.is_integer(kind):
        keys = column.to_numpy()
    else:
        keys = np.concatenate([np.zeros(0, np.uint64), *map(hashes, batches)])
    rows = np.argsort(keys, kind="stable").astype(np.int64)
    np.save(folder / "keys.npy", keys[rows])
    np.save(folder / "rows.npy", rows)
    schema = pa.schema([("id", kind)])
    with pa.ipc.new_file(str(folder / "ids.arrow"), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([column], schema=schema))


class IdIndex:
    """The index in a folder. Opening it reads nothing but its first pages."""

    def __init__(self, folder: Path) -> None:
        # Plain arrays over the same memory: to take a part of `np.memmap` costs many times as much.
        self.keys: Array = np.asarray(np.load(folder / "keys.npy", mmap_mode="r"))
        self.by_key: Array = np.asarray(np.load(folder / "rows.npy", mmap_mode="r"))
        # The reader keeps its mapping open as long as its arrays are.
        table = pa.ipc.open_file(pa.memory_map(str(folder / "ids.arrow"))).read_all()
        self.ids: pa.Array = table.column("id").chunk(0)
        self.integer = pa.types.is_integer(self.ids.type)

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, wanted: list[Any]) -> Array:
        """Return the rows of ids, int64 `[n]`, -1 where there is none; ids are int or str as the table has them."""
        if self.integer or not wanted:
            return self.find_array(pa.array(wanted, self.ids.type))
        try:
            requested = pa.array(wanted, pa.large_string())
        except (UnicodeEncodeError, pa.ArrowInvalid):  # half a character is no id of any table
            rows = np.full(len(wanted), -1, np.int64)
            return rows if len(wanted) == 1 else np.concatenate([self.find([one]) for one in wanted])
        return self.find_array(requested)

    def find_array(self, requested: pa.Array) -> Array:
        """Return the rows of ids, int64 `[n]`, -1 where there is none; the array is of the type of `ids`, no nulls."""
        rows = np.full(len(requested), -1, np.int64)
        if not len(self) or not len(requested):
            return rows
        if self.integer:
            wanted = requested.to_numpy()
            at = np.searchsorted(self.keys, wanted)
            at[at == len(self)] = 0
            return np.where(self.keys[at] == wanted, self.by_key[at], -1)
        keys = hashes(requested)
        at, left = np.searchsorted(self.keys, keys), np.arange(len(requested))
        while True:  # more than once where ids share a hash
            left = left[at[left] < len(self)]
            left = left[self.keys[at[left]] == keys[left]]
            if not len(left):
                return rows
            there = self.by_key[at[left]]
            same = pc.equal(self.ids.take(pa.array(there)), requested.take(pa.array(left)))
            same = same.to_numpy(zero_copy_only=False)
            rows[left[same]] = there[same]
            left = left[~same]
            at[left] += 1
