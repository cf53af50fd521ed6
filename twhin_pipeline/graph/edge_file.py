"""Sorted edges, written as Parquet: numbers turned into ids, and all of it counted.

Beside the ids go their numbers, in the same order and row groups, for `numbered_edges` to read: who numbers entities or
encodes edges needs no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.kernels import radix
from twhin_pipeline.prefetch import in_order

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

NUMBERS = pa.schema([("lhs", pa.uint32()), ("rhs", pa.uint32())])
STEPS = pa.schema([("step_time", pa.list_(pa.int64())), ("step_weight", pa.list_(pa.float32()))])
IDS_AT_ONCE = 1 << 18
# Above so many ids a row group's right ends repeat seldom: written one by one they are sooner written, and smaller.
MOST_IN_DICTIONARY = 1 << 16


@dataclass
class Counts:
    """What was written, by relation: int64 `[R]` each."""

    edges: Array
    loops: Array
    """Edges from an entity to itself."""


class Ids:
    """All ids, texts or integers, ascending: an id's number is its place."""

    def __init__(self, array: pa.Array) -> None:
        """Take them: large_string or int64."""
        self.texts = not pa.types.is_integer(array.type)
        # Plain texts are gathered twice as fast.
        small = self.texts and array.nbytes < 2**31
        self.array = array.cast(pa.string()) if small else array

    def each(self, numbers: Array) -> pa.Array:
        """Return the ids of numbers, `[n]`, one by one."""
        return self._plain(self.array.take(pa.array(numbers)))

    def once(self, numbers: Array) -> pa.DictionaryArray:
        """Return the ids of numbers, `[n]`, each different one held once."""
        # Sorted edges have runs of one left end, far fewer than edges.
        new = np.concatenate([[True], numbers[1:] != numbers[:-1]])
        distinct, _, place = radix.unique(numbers[new].astype(np.int64))
        return _dictionary(place[np.cumsum(new) - 1], self.each(distinct))

    def write(self, path: str) -> None:
        """Write them to a Parquet file with the column `id`."""
        schema = pa.schema([("id", pa.string() if self.texts else pa.int64())])
        # Neighbours begin alike, so each is written as what differs from the one before.
        coding = {"id": "DELTA_BYTE_ARRAY" if self.texts else "DELTA_BINARY_PACKED"}
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, column_encoding=coding) as writer:
            for start in range(0, len(self.array), IDS_AT_ONCE):
                column = self._plain(self.array.slice(start, IDS_AT_ONCE))
                writer.write_table(pa.table([column], schema=schema))

    @staticmethod
    def _plain(column: pa.Array) -> pa.Array:
        return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def write(
    path: str,
    ends: str,
    pieces: Sequence[Callable[[], Columns]],
    relations: Sequence[str],
    ids: Ids,
    splits: Sequence[str],
    threads: int,
) -> Counts:
    """Write edges to `path`: `lhs`, `rel`, `rhs`, `time` and `first_time` if they have them, `weight`, and `split`.

    Args:
        path: A local file.
        ends: A local file for the numbers of `lhs` and `rhs` (uint32), in the same order and row groups; and for the
            steps of edges' weights, if there are any, as lists.
        pieces: Each returns a row group's edges, at least one, in order, as `edge_sort.merged` does: `rel` (a number),
            `lhs` and `rhs` (numbers of `ids`), `weight`, and if they have it `time` and `first_time` (microseconds; the
            least int64 is none), `split` (1, 2, …) and steps.
        relations: Names by number.
        ids: Ids by number.
        splits: Names; the first has number 1.
        threads: So many get pieces ready while others are written.

    Returns:
        Edges and loops of each relation.
    """
    counts = Counts(np.zeros(len(relations), np.int64), np.zeros(len(relations), np.int64))

    def made(piece: Callable[[], Columns]) -> tuple[pa.Table, pa.Table, Array, Array]:
        columns = piece()
        rel = columns["rel"]
        own = rel[columns["lhs"] == columns["rhs"]]
        return (
            _table(columns, relations, ids, splits),
            _numbers(columns),
            *(np.bincount(each, minlength=len(relations)) for each in (rel, own)),
        )

    with ThreadPoolExecutor(threads) as pool, ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        numbered: pq.ParquetWriter | None = None
        try:
            for table, numbers, edges, loops in in_order(pool, made, ((piece,) for piece in pieces), threads + 1):
                if writer is None or numbered is None:
                    writer = files.enter_context(_writer(path, table.schema))
                    numbered = files.enter_context(_numbers_writer(ends, numbers.schema))
                writer.write_table(table, row_group_size=len(table))
                numbered.write_table(numbers, row_group_size=len(table))
                counts.edges += edges
                counts.loops += loops
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return counts


def _numbers(columns: Columns) -> pa.Table:
    """Return the numbers of edges' ends, and the steps of their weights."""
    arrays = [pa.array(columns[side]) for side in ("lhs", "rhs")]
    if "steps" not in columns:
        return pa.table(arrays, schema=NUMBERS)
    bounds = pa.array(np.concatenate([[0], np.cumsum(columns["steps"])]).astype(np.int32))
    arrays += [pa.ListArray.from_arrays(bounds, pa.array(columns[name])) for name in STEPS.names]
    return pa.table(arrays, schema=pa.schema([*NUMBERS, *STEPS]))


def _numbers_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={"lhs": "BYTE_STREAM_SPLIT", "rhs": "BYTE_STREAM_SPLIT"},
    )


def _writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    repeated = [field.name for field in schema if pa.types.is_dictionary(field.type) or field.name in ("lhs", "weight")]
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        # Without Arrow's schema, so that ids are read as texts and not as a dictionary of them.
        store_schema=False,
        use_dictionary=repeated,
        column_encoding={"rhs": "BYTE_STREAM_SPLIT"} if pa.types.is_integer(schema.field("rhs").type) else None,
        # Right ends are in no order, so their least and largest say nothing of a row group.
        write_statistics=[name for name in schema.names if name != "rhs"],
    )


def _table(columns: Columns, relations: Sequence[str], ids: Ids, splits: Sequence[str]) -> pa.Table:
    found: dict[str, pa.Array]
    if ids.texts:
        few = len(ids.array) <= MOST_IN_DICTIONARY
        found = {"lhs": ids.once(columns["lhs"]), "rhs": (ids.once if few else ids.each)(columns["rhs"])}
    else:
        found = {side: ids.each(columns[side]) for side in ("lhs", "rhs")}
    found["rel"] = _dictionary(columns["rel"], pa.array(relations, pa.string()))
    for name in ("time", "first_time"):
        if name in columns:
            found[name] = pa.array(columns[name].view("datetime64[us]"))
    found["weight"] = pa.array(columns["weight"], pa.float32())
    if "split" in columns:
        found["split"] = _dictionary(columns["split"] - 1, pa.array(splits, pa.string()))
    order = ("lhs", "rel", "rhs", "time", "first_time", "weight", "split")
    return pa.table({name: found[name] for name in order if name in found})


def _dictionary(place: Array, texts: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32, copy=False)), texts)
