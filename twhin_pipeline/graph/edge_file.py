"""The files of `raw_edges`: the table, and beside it every edge's ends as indices of ids.

An id's index is its position among all ids of the snapshot in order, whatever its entity types. The indices are in the
table's order and row groups. So vocabularies and the training set are made without reading the texts again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twhin_pipeline.errors import UserError
from twhin_pipeline.kernels import radix
from twhin_pipeline.prefetch import in_order
from twhin_pipeline.store import database
from twhin_pipeline.store.array_cache import cached
from twhin_pipeline.words import PARTS, TRAIN

if TYPE_CHECKING:
    from twhin_pipeline.store import Manifest, Store

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

# Files beside the table's; their names begin with `_`, so that nobody takes them for its rows.
IDS, ENDS = "_numbers/ids.parquet", "_numbers/ends.parquet"
STEPS_FOLDER = "_steps"
"""Of a table of Spark's in place of both: for each of its files, one of the steps of its edges' weights."""
INDICES = pa.schema([("lhs", pa.uint32()), ("rhs", pa.uint32())])
STEPS = pa.schema([("step_time", pa.list_(pa.int64())), ("step_weight", pa.list_(pa.float32()))])
NO_TIME = -(2**63)
"""The time of an edge without one: the least int64, as in NumPy."""
IDS_AT_ONCE = 1 << 18
MOST_IDS = 1 << 32
"""An index is a uint32."""
# With more ids than this, the right ends of a row group seldom repeat. Writing them without a dictionary is then faster
# and smaller.
MOST_IN_DICTIONARY = 1 << 16


@dataclass
class Counts:
    """How many edges were written, by relation: int64 `[R]` each."""

    edges: Array
    loops: Array
    """Edges from an entity to itself."""


class Ids:
    """All ids, texts or integers, ascending: an id's index is its position."""

    def __init__(self, array: pa.Array) -> None:
        """Take the ids: large_string or int64."""
        self.texts = not pa.types.is_integer(array.type)
        # Plain texts are gathered twice as fast.
        small = self.texts and array.nbytes < 2**31
        self.array = array.cast(pa.string()) if small else array

    def each(self, index: Array) -> pa.Array:
        """Return the ids at `index` `[n]`, one by one."""
        return self._plain(self.array.take(pa.array(index)))

    def once(self, index: Array) -> pa.DictionaryArray:
        """Return the ids at `index` `[n]` as a dictionary array, which holds each distinct id once."""
        # Sorted edges have runs of one left end, far fewer than edges.
        new = np.concatenate([[True], index[1:] != index[:-1]])
        distinct, _, place = radix.unique(index[new].astype(np.int64))
        return _dictionary(place[np.cumsum(new) - 1], self.each(distinct))

    def write(self, path: str) -> None:
        """Write the ids to a Parquet file with the column `id`."""
        schema = pa.schema([("id", pa.string() if self.texts else pa.int64())])
        # Ids that follow one another begin alike, so each is written as its difference from the one before.
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
    pieces: Iterable[Callable[[], Columns]],
    relations: Sequence[str],
    ids: Ids,
    splits: Sequence[str],
    threads: int,
) -> Counts:
    """Write edges to `path`: `lhs`, `rel`, `rhs`, `time` and `first_time` if they have them, `weight`, and `split`.

    Args:
        path: A local file.
        ends: A local file for the indices of `lhs` and `rhs` (uint32), in the same order and row groups; and for the
            steps of edges' weights, if there are any, as lists.
        pieces: Each returns a row group's edges, at least one, in order, as `edge_sort.merged` does: `rel` (its index),
            `lhs` and `rhs` (indices of `ids`), `weight`, and if they have it `time` and `first_time` (microseconds; the
            least int64 is none), `split` (1, 2, …) and steps.
        relations: Names.
        ids: All ids.
        splits: Names; the first is number 1 in `split`.
        threads: How many threads prepare pieces while others are written.

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
            _indices(columns),
            *(np.bincount(each, minlength=len(relations)) for each in (rel, own)),
        )

    with ThreadPoolExecutor(threads) as pool, ExitStack() as files:
        writer: pq.ParquetWriter | None = None
        index_writer: pq.ParquetWriter | None = None
        try:
            for table, indices, edges, loops in in_order(pool, made, ((piece,) for piece in pieces), threads + 1):
                if writer is None or index_writer is None:
                    writer = files.enter_context(writer_of(path, table.schema))
                    index_writer = files.enter_context(_index_writer(ends, indices.schema))
                writer.write_table(table, row_group_size=len(table))
                index_writer.write_table(indices, row_group_size=len(table))
                counts.edges += edges
                counts.loops += loops
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return counts


@dataclass(frozen=True)
class Piece:
    """Edges of one relation that follow one another: indices of ids `[n]`, and columns of `raw_edges`."""

    relation: str
    lhs: Array
    rhs: Array
    columns: dict[str, Array]


class IndexedEdges:
    """The edges of a snapshot's `raw_edges`, in its order.

    A table that lacks the indices of its ids, such as Spark's, gets them once, in a local copy (`array_cache`).
    """

    def __init__(self, store: Store, snapshot: str) -> None:
        """Open them. Raises UserError where the table is not there."""
        manifest = store.manifest("raw_edges", snapshot)
        self.store, self.snapshot = store, snapshot
        self.files = store.files_of(manifest)
        self.open: Callable[[str], Any] = store.parquet
        folder = store.path("raw_edges", snapshot, manifest.version)
        if not {IDS, ENDS} <= {file["path"] for file in manifest.files}:
            folder = str(cached(store, manifest, partial(_number, store, manifest), "_indexed"))
            self.open = pq.ParquetFile
        self.ends = f"{folder}/{ENDS}"
        self.ids = database.parquet([f"{folder}/{IDS}"], "file_row_number = true")
        """The SQL that scans `id` and its index, `file_row_number`."""
        with self.open(f"{folder}/{IDS}") as file:
            self.size = int(file.metadata.num_rows)
            """How many ids there are."""
            self.texts = str(file.schema_arrow.field("id").type) == "string"
        self.counts: dict[str, int] = manifest.details["edges_per_relation"]
        """Edges by relation, in the table's order."""

    def pieces(self, columns: Sequence[str] = (), before: int | None = None) -> Iterator[Piece]:
        """Yield all edges, a row group or less at a time, with some columns.

        These are `weight`, `time` and `first_time` in microseconds (`NO_TIME` where they are null), and `split` as the
        index of the part (training where it is null). With `before` (microseconds), the weight of an edge that was
        there at that time is the one that its rows before it give it, and, where it was new then, those of that time.
        """
        names = [name for name, count in self.counts.items() if count]
        cuts = np.cumsum([self.counts[name] for name in names])
        position = 0
        for pairs, more in self._groups(columns, before):
            size, start = len(pairs["lhs"]), 0
            while start < size:
                relation = int(np.searchsorted(cuts, position, side="right"))
                stop = min(size, start + int(cuts[relation]) - position)
                yield Piece(
                    names[relation],
                    pairs["lhs"][start:stop],
                    pairs["rhs"][start:stop],
                    {name: values[start:stop] for name, values in more.items()},
                )
                position, start = position + stop - start, stop

    def _groups(self, columns: Sequence[str], before: int | None) -> Iterator[tuple[Columns, Columns]]:
        """Yield the indices of each row group's ends, and its columns, as `pieces` says."""
        number = 0
        with self.open(self.ends) as ends:
            for path in self.files:
                with self.store.parquet(path) as edges:
                    if missing := [name for name in columns if name not in edges.schema_arrow.names]:
                        raise UserError(
                            f"raw_edges of snapshot {self.snapshot} has no column {missing[0]!r}: it was made by an "
                            "earlier version or configuration; make it again with "
                            f"`twhin ingest --snapshot {self.snapshot}`"
                        )
                    for group in range(edges.metadata.num_row_groups):
                        more = columns_of(edges, group, list(columns)) if columns else {}
                        if before is not None and "step_time" in ends.schema_arrow.names:
                            more["weight"] = known_weight(ends, number, more["weight"], more["first_time"], before)
                        yield columns_of(ends, number, ["lhs", "rhs"]), more
                        number += 1


def _number(store: Store, manifest: Manifest, folder: Path) -> None:
    """Write the indices of a table's ids, row group by row group, and with them the steps of weights beside the table.

    Raises:
        UserError: There are more ids than an index can number.
    """
    files = store.files_of(manifest)
    names = {file["path"] for file in manifest.files}
    (folder / IDS).parent.mkdir()
    with database.connect(store=store) as con, ExitStack() as opened:
        table = database.parquet(files)
        con.execute(
            f"COPY (SELECT DISTINCT unnest([lhs, rhs]) AS id FROM {table} ORDER BY id) "
            f"TO {database.literal(str(folder / IDS))} (FORMAT parquet, COMPRESSION zstd)"
        )
        ids = database.parquet([str(folder / IDS)], "file_row_number = true")
        with pq.ParquetFile(folder / IDS) as written:
            count = int(written.metadata.num_rows)
        if count > MOST_IDS:
            raise UserError(f"raw_edges has {count:,} ids, and the embedded engine numbers {MOST_IDS:,}; use Spark")
        writer: pq.ParquetWriter | None = None
        for path in files:
            query = (
                "SELECT CAST(l.file_row_number AS UINTEGER) AS lhs, CAST(r.file_row_number AS UINTEGER) AS rhs "
                f"FROM {database.parquet([path], 'file_row_number = true')} e JOIN {ids} l ON e.lhs = l.id "
                f"JOIN {ids} r ON e.rhs = r.id ORDER BY e.file_row_number"
            )
            steps_path = f"{STEPS_FOLDER}/{path.rpartition('/')[2]}"
            base = store.path(manifest.asset, manifest.snapshot, manifest.version)
            with store.parquet(path) as edges, ExitStack() as beside:
                steps = beside.enter_context(store.parquet(f"{base}/{steps_path}")) if steps_path in names else None
                sizes = [edges.metadata.row_group(group).num_rows for group in range(edges.metadata.num_row_groups)]
                for group, pairs in enumerate(_cut(con.sql(query).to_arrow_reader(), sizes)):
                    if steps is not None:
                        grown = steps.read_row_group(group)
                        pairs = pa.table([*pairs.columns, *grown.columns], names=[*pairs.schema.names, *STEPS.names])
                    if writer is None:
                        writer = opened.enter_context(_index_writer(str(folder / ENDS), pairs.schema))
                    writer.write_table(pairs, row_group_size=len(pairs))


def _cut(batches: Iterable[pa.RecordBatch], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Cut batches into tables of these sizes."""
    waiting = pa.Table.from_batches([], INDICES)
    batches = iter(batches)
    for size in sizes:
        while len(waiting) < size:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([next(batches)]).cast(INDICES)])
        yield waiting.slice(0, size)
        waiting = waiting.slice(size)


def _indices(columns: Columns) -> pa.Table:
    """Return the indices of edges' ends, and the steps of their weights."""
    indices = pa.table([pa.array(columns[side]) for side in ("lhs", "rhs")], schema=INDICES)
    if "steps" not in columns:
        return indices
    steps = steps_table(columns)
    return pa.table([*indices.columns, *steps.columns], schema=pa.schema([*INDICES, *STEPS]))


def steps_table(columns: Columns) -> pa.Table:
    """Return the steps of edges' weights (see `edge_sort.merged`), a list for each edge."""
    bounds = pa.array(np.concatenate([[0], np.cumsum(columns["steps"])]).astype(np.int32))
    return pa.table([pa.ListArray.from_arrays(bounds, pa.array(columns[name])) for name in STEPS.names], schema=STEPS)


def writer_of_steps(path: str) -> pq.ParquetWriter:
    """Return a writer of `steps_table`."""
    return pq.ParquetWriter(path, STEPS, compression="zstd", use_dictionary=False, write_statistics=False)


def _index_writer(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        column_encoding={"lhs": "BYTE_STREAM_SPLIT", "rhs": "BYTE_STREAM_SPLIT"},
    )


def writer_of(path: str, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer of `arranged` edges."""
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
    if not ids.texts:
        return arranged(columns, ids.each(columns["lhs"]), ids.each(columns["rhs"]), relations, splits)
    few = len(ids.array) <= MOST_IN_DICTIONARY
    rhs = (ids.once if few else ids.each)(columns["rhs"])
    return arranged(columns, ids.once(columns["lhs"]), rhs, relations, splits)


def arranged(
    columns: Columns, lhs: pa.Array, rhs: pa.Array, relations: Sequence[str], splits: Sequence[str]
) -> pa.Table:
    """Return edges as `raw_edges` has them: their ends, and the columns of `edge_sort.merged`."""
    arrays: dict[str, pa.Array] = {"lhs": lhs, "rhs": rhs}
    arrays["rel"] = _dictionary(columns["rel"], pa.array(relations, pa.string()))
    for name in ("time", "first_time"):
        if name in columns:
            arrays[name] = pa.array(columns[name].view("datetime64[us]"))
    arrays["weight"] = pa.array(columns["weight"], pa.float32())
    if "split" in columns:
        arrays["split"] = _dictionary(columns["split"] - 1, pa.array(splits, pa.string()))
    order = ("lhs", "rel", "rhs", "time", "first_time", "weight", "split")
    return pa.table({name: arrays[name] for name in order if name in arrays})


def _dictionary(place: Array, texts: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32, copy=False)), texts)


def columns_of(file: pq.ParquetFile, group: int, names: list[str]) -> dict[str, Array]:
    """Return columns of a row group, as `IndexedEdges.pieces` does."""
    table = file.read_row_group(group, columns=names)
    columns = {}
    for name in names:
        column = table[name]
        if name == "split":
            column = pc.fill_null(pc.index_in(column, pa.array(PARTS)), TRAIN).cast(pa.int8())
        elif name in ("time", "first_time"):
            column = pc.fill_null(column.cast(pa.timestamp("us")).cast(pa.int64()), NO_TIME)
        columns[name] = column.to_numpy()
    return columns


def known_weight(file: pq.ParquetFile, group: int, weight: Array, first_time: Array, before: int) -> Array:
    """Return the weights that edges of a row group had before a time; `file` has their steps (`edge_sort.merged`)."""
    table = file.read_row_group(group, columns=["step_time", "step_weight"]).combine_chunks()
    steps = pc.list_value_length(table["step_time"]).to_numpy()
    edge = np.repeat(np.arange(len(steps)), steps)
    time, then = (pc.list_flatten(table[name]).to_numpy() for name in ("step_time", "step_weight"))
    known = np.flatnonzero((first_time[edge] <= before) & ((time < before) | (time == first_time[edge])))
    weight = weight.copy()
    # Steps ascend, and of several values for one place numpy keeps the last.
    weight[edge[known]] = then[known]
    return weight
