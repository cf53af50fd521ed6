"""Sorted edges, written as Parquet: repeats merged, numbers turned into ids, and all of it counted.

Beside the ids go their numbers, in the same order and row groups, for `numbered_edges` to read: who numbers entities or
encodes edges needs no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import radix
from twhin_pipeline.prefetch import Prefetcher

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

KEY = ("rel", "lhs", "rhs")
BATCH_ROWS, ROWS_PER_GROUP, GROUPS_AHEAD = 1 << 17, 1 << 18, 2
# Above so many ids a row group's right ends repeat seldom: written one by one they are sooner written, and smaller.
MOST_IN_DICTIONARY = 1 << 16


@dataclass
class Counts:
    """What was written, by relation: int64 `[R]` each."""

    edges: Array
    loops: Array
    """Edges from an entity to itself."""


class Ids:
    """All ids, texts or integers, ascending: an id's number is its place. They are mapped from files in `folder`, so
    that memory does not grow with them."""

    def __init__(self, con: duckdb.DuckDBPyConnection, query: str, folder: str) -> None:
        """Write the ids that `query` gives, in its order."""
        base = Path(folder)
        reader = con.sql(query).to_arrow_reader(BATCH_ROWS)
        self.texts = not pa.types.is_integer(reader.schema.field(0).type)
        count, end = 0, 0
        with (base / "ids.bytes").open("wb") as values, (base / "ids.ends").open("wb") as ends:
            ends.write(np.zeros(1, np.int64).tobytes())
            for batch in reader:
                count += len(batch)
                if not self.texts:
                    values.write(_numbers(batch.column(0)).tobytes())
                    continue
                column = batch.column(0).cast(pa.large_string())
                _, cuts, data = column.buffers()
                cut = np.frombuffer(cuts, np.int64)[column.offset : column.offset + len(column) + 1]
                if data is not None:
                    values.write(data.slice(int(cut[0]), int(cut[-1] - cut[0])))
                ends.write((cut[1:] - cut[0] + end).tobytes())
                end += int(cut[-1] - cut[0])
        buffers = [pa.memory_map(str(base / name)).read_buffer() for name in ("ids.ends", "ids.bytes")]
        kind = pa.large_string() if self.texts else pa.int64()
        self.array: pa.Array = pa.Array.from_buffers(kind, count, [None, *(buffers if self.texts else buffers[1:])])
        if self.texts and end < 2**31:
            # Plain texts are gathered twice as fast.
            self.array = self.array.cast(pa.string())

    def each(self, numbers: Array) -> pa.Array:
        """Return the ids of numbers, `[n]`, one by one."""
        return self._plain(self.array.take(pa.array(numbers)))

    def once(self, numbers: Array) -> pa.DictionaryArray:
        """Return the ids of numbers, int64 `[n]`, each different one held once."""
        # Sorted edges have runs of one left end, far fewer than edges.
        new = np.concatenate([[True], numbers[1:] != numbers[:-1]])
        distinct, _, place = radix.unique(numbers[new])
        return _dictionary(place[np.cumsum(new) - 1], self.each(distinct))

    def write(self, path: str) -> None:
        """Write them to a Parquet file with the column `id`."""
        schema = pa.schema([("id", pa.string() if self.texts else pa.int64())])
        # Neighbours begin alike, so each is written as what differs from the one before.
        coding = {"id": "DELTA_BYTE_ARRAY" if self.texts else "DELTA_BINARY_PACKED"}
        with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, column_encoding=coding) as writer:
            for start in range(0, len(self.array), ROWS_PER_GROUP):
                column = self._plain(self.array.slice(start, ROWS_PER_GROUP))
                writer.write_table(pa.table([column], schema=schema))

    def _plain(self, column: pa.Array) -> pa.Array:
        return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def write(
    path: str, ends: str, reader: Iterable[pa.RecordBatch], relations: Sequence[str], ids: Ids, splits: Sequence[str]
) -> Counts:
    """Write edges to `path`: `lhs`, `rel` and `rhs`, `time` if they have one, `weight`, `split` if they have one.

    Args:
        path: A local file.
        ends: A local file for the numbers of `lhs` and `rhs` (uint32; uint64 where there are more ids than that), in
            the same order and row groups.
        reader: Batches sorted by their columns `rel` (a number), `lhs` and `rhs` (numbers of `ids`), and, where they
            have it, by `weight`; besides, if they have it, `time` and `split` (1, 2, …).
        relations: Names by number.
        ids: Ids by number.
        splits: Names; the first has number 1.

    Returns:
        Edges and loops of each relation. Equal (rel, lhs, rhs) are one edge: weights (1 where there are none) added,
        the latest time, the earliest split.
    """
    counts = Counts(np.zeros(len(relations), np.int64), np.zeros(len(relations), np.int64))
    number = pa.uint32() if len(ids.array) <= 2**32 else pa.uint64()
    numbers = pa.schema([("lhs", number), ("rhs", number)])

    def tables() -> Iterator[tuple[pa.Table, pa.Table]]:
        for columns in merged(reader):
            counts.edges += np.bincount(columns["rel"], minlength=len(relations))
            own = columns["lhs"] == columns["rhs"]
            counts.loops += np.bincount(columns["rel"][own], minlength=len(relations))
            two = [pa.array(columns[side].astype(number.to_pandas_dtype())) for side in ("lhs", "rhs")]
            yield _table(columns, relations, ids, splits), pa.table(two, schema=numbers)

    # Edges are merged while others are written; each takes about as long.
    with (
        Prefetcher(tables(), GROUPS_AHEAD) as ahead,
        pq.ParquetWriter(
            ends,
            numbers,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
            column_encoding={"lhs": "BYTE_STREAM_SPLIT", "rhs": "BYTE_STREAM_SPLIT"},
        ) as numbered,
    ):
        writer: pq.ParquetWriter | None = None
        try:
            for table, two in ahead:
                writer = writer or _writer(path, table.schema)
                for each, rows in ((writer, table), (numbered, two)):
                    each.write_table(rows, row_group_size=len(rows))
        finally:
            if writer is not None:
                writer.close()
    return counts


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


def merged(reader: Iterable[pa.RecordBatch]) -> Iterator[Columns]:
    """Yield sorted rows with equal (rel, lhs, rhs) made one, some `ROWS_PER_GROUP` rows at a time, as `write` says."""
    waiting: list[Columns] = []
    count = 0
    for batch in reader:
        waiting.append({name: _numbers(batch.column(i)) for i, name in enumerate(batch.schema.names)})
        count += len(batch)
        if count < ROWS_PER_GROUP:
            continue
        rows = _joined(waiting)
        start = _starts(rows)
        # The last edge may go on in the next batch.
        last = int(start[-1])
        if last:
            yield _sums({name: values[:last] for name, values in rows.items()}, start[:-1])
        waiting, count = [{name: values[last:] for name, values in rows.items()}], count - last
    if count:
        rows = _joined(waiting)
        yield _sums(rows, _starts(rows))


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _starts(rows: Columns) -> Array:
    """Return where each edge's rows begin, int64."""
    new = np.ones(len(rows["rel"]), bool)
    new[1:] = False
    for name in KEY:
        new[1:] |= rows[name][1:] != rows[name][:-1]
    return np.flatnonzero(new)


def _sums(rows: Columns, start: Array) -> Columns:
    """Make one edge of the rows from each start to the next."""
    found = {name: rows[name][start] for name in KEY}
    if "time" in rows:
        found["time"] = np.maximum.reduceat(rows["time"], start)
    if "weight" in rows:
        found["weight"] = np.add.reduceat(rows["weight"], start).astype(np.float32)
    else:
        found["weight"] = np.diff(start, append=len(rows["rel"])).astype(np.float32)
    if "split" in rows:
        found["split"] = np.minimum.reduceat(rows["split"], start)
    return found


def _numbers(column: pa.Array) -> Array:
    """Return a column as NumPy has it; numbers of ids as int64."""
    values: Array = column.to_numpy(zero_copy_only=False)
    return values.astype(np.int64) if values.dtype.kind in "iu" else values


def _table(columns: Columns, relations: Sequence[str], ids: Ids, splits: Sequence[str]) -> pa.Table:
    found: dict[str, pa.Array]
    if ids.texts:
        few = len(ids.array) <= MOST_IN_DICTIONARY
        found = {"lhs": ids.once(columns["lhs"]), "rhs": (ids.once if few else ids.each)(columns["rhs"])}
    else:
        found = {side: ids.each(columns[side]) for side in ("lhs", "rhs")}
    found["rel"] = _dictionary(columns["rel"], pa.array(relations, pa.string()))
    if "time" in columns:
        found["time"] = pa.array(columns["time"], pa.timestamp("us"))
    found["weight"] = pa.array(columns["weight"], pa.float32())
    if "split" in columns:
        found["split"] = _dictionary(columns["split"] - 1, pa.array(splits, pa.string()))
    order = ("lhs", "rel", "rhs", "time", "weight", "split")
    return pa.table({name: found[name] for name in order if name in found})


def _dictionary(place: Array, texts: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32, copy=False)), texts)
