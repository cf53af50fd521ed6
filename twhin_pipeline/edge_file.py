"""Sorted edges, written as one Parquet file: repeats merged, numbers turned into ids, and all of it counted."""

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
    """All ids, in the order of their numbers, mapped from files in `folder`: memory does not grow with them."""

    def __init__(self, con: duckdb.DuckDBPyConnection, query: str, folder: str) -> None:
        """Write the texts that `query` gives, in its order."""
        base = Path(folder)
        count, end = 0, 0
        with (base / "ids.bytes").open("wb") as texts, (base / "ids.ends").open("wb") as ends:
            ends.write(np.zeros(1, np.int64).tobytes())
            for batch in con.sql(query).to_arrow_reader(BATCH_ROWS):
                column = batch.column(0).cast(pa.large_string())
                _, cuts, data = column.buffers()
                cut = np.frombuffer(cuts, np.int64)[column.offset : column.offset + len(column) + 1]
                if data is not None:
                    texts.write(data.slice(int(cut[0]), int(cut[-1] - cut[0])))
                ends.write((cut[1:] - cut[0] + end).tobytes())
                count, end = count + len(column), end + int(cut[-1] - cut[0])
        buffers = [pa.memory_map(str(base / name)).read_buffer() for name in ("ids.ends", "ids.bytes")]
        self.array: pa.Array = pa.Array.from_buffers(pa.large_string(), count, [None, *buffers])

    def each(self, numbers: Array) -> pa.StringArray:
        """Return the ids of numbers, int64 `[n]`, one by one."""
        return self.array.take(pa.array(numbers)).cast(pa.string())

    def once(self, numbers: Array) -> pa.DictionaryArray:
        """Return the ids of numbers, int64 `[n]`, each different one held once."""
        distinct, _, place = radix.unique(numbers)
        return _dictionary(place, self.each(distinct))


def write(
    path: str, reader: Iterable[pa.RecordBatch], relations: Sequence[str], ids: Ids | None, splits: Sequence[str]
) -> Counts:
    """Write edges to `path`: `lhs`, `rel` and `rhs`, `time` if they have one, `weight`, `split` if they have one.

    Args:
        path: A local file.
        reader: Batches sorted by their columns `rel` (a number), `lhs` and `rhs` (numbers of `ids`, or ids that are
            integers), and, where they have it, by `weight`; besides, if they have it, `time` and `split` (1, 2, …).
        relations: Names by number.
        ids: Texts by number; None where ids are integers.
        splits: Names; the first has number 1.

    Returns:
        Edges and loops of each relation. Equal (rel, lhs, rhs) are one edge: weights (1 where there are none) added,
        the latest time, the earliest split.
    """
    counts = Counts(np.zeros(len(relations), np.int64), np.zeros(len(relations), np.int64))

    def tables() -> Iterator[pa.Table]:
        for columns in merged(reader):
            counts.edges += np.bincount(columns["rel"], minlength=len(relations))
            own = columns["lhs"] == columns["rhs"]
            counts.loops += np.bincount(columns["rel"][own], minlength=len(relations))
            yield _table(columns, relations, ids, splits)

    # Edges are merged while others are written; each takes about as long.
    with Prefetcher(tables(), GROUPS_AHEAD) as ahead:
        writer: pq.ParquetWriter | None = None
        try:
            for table in ahead:
                writer = writer or _writer(path, table.schema)
                writer.write_table(table)
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


def _table(columns: Columns, relations: Sequence[str], ids: Ids | None, splits: Sequence[str]) -> pa.Table:
    if ids is None:
        found = {side: pa.array(columns[side], pa.int64()) for side in ("lhs", "rhs")}
    else:
        few = len(ids.array) <= MOST_IN_DICTIONARY
        found = {"lhs": ids.once(columns["lhs"]), "rhs": (ids.once if few else ids.each)(columns["rhs"])}
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
