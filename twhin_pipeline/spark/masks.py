"""Masks on Spark: which candidates of a chunk's pools make true edges, found where the true edges are.

True edges are divided by relation, corrupted side and kept entity into slices, each of which one task holds: 8 bytes an
edge. A chunk's queries go to the slices of their kept entities. There its pool is drawn again, from the counter-based
generator, and masks are found. What travels is each query's position and kept entity, each chunk's own entities, and
masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.spark import tables
from twhin_pipeline.spark.populations import Populations, Shared, worker_folder
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives as sampling
from twhin_pipeline.training_set.known_edges import ChunkedEdges, KnownEdges, ranges
from twhin_pipeline.training_set.negatives import NONE, Plan, Population
from twhin_pipeline.words import SIDES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

Array = np.ndarray[Any, Any]
LEAST_SLICE, LARGEST_SLICE = 200_000, 8_000_000
"""Edges of a slice."""
EDGES_AT_ONCE = 1 << 16
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SEARCHED = (
    "task int, slice int, kind tinyint, chunk int, size int, positions array<int>, kept array<bigint>, "
    "ends array<bigint>"
)
_SEARCHED = pa.schema(
    [
        ("task", pa.int32()),
        ("slice", pa.int32()),
        ("kind", pa.int8()),
        ("chunk", pa.int32()),
        ("size", pa.int32()),
        ("positions", pa.list_(pa.int32())),
        ("kept", pa.list_(pa.int64())),
        ("ends", pa.list_(pa.int64())),
    ]
)
KNOWN, QUERIES = 0, 1
"""Kinds of rows that a slice gets: true edges first, then chunks."""
MASKS = "file int, epoch int, chunk int, side int, position array<int>, candidate array<int>"


def find(shared: Shared, plan: Plan, files: list[str], known: Sequence[str]) -> DataFrame:
    """Find all masks: `MASKS`, a row for each chunk, side and slice that has some.

    Args:
        shared: What the tables of negatives have in common.
        plan: What is asked for.
        files: Of positives; a mask comes with the number of its chunk's file.
        known: The tables of true edges.
    """
    from pyspark.sql import functions as f

    slices = Slices.of(plan, shared.counts(known), shared.spark.sparkContext.defaultParallelism)
    paths = [path for asset in known for path in shared.files(asset)]
    edges = tables.read(shared.spark, shared.store, paths, ["lhs", "rhs", "rel"], SEARCHED, _slicing(plan, slices))
    root = shared.store.root

    def queries(path: str) -> tables.Batches:
        yield from _queries(chunks_of(Store(root), path), plan, slices)

    chunks = tables.each(shared.spark, files, queries, SEARCHED)
    together = edges.unionAll(chunks).repartitionById(slices.tasks, f.col("task"))
    search = _searches(plan, slices, shared.drawn_from(), shared.types, _first_chunks(shared.store, files))
    return together.sortWithinPartitions("slice", "kind", "chunk").mapInArrow(search, MASKS)


def _first_chunks(store: Store, files: Sequence[str]) -> Array:
    """Return the first chunk of each file, int64 `[F]`."""
    firsts = []
    for path in files:
        with store.parquet(path) as file:
            firsts.append(next(file.iter_batches(1, columns=["chunk"])).column(0)[0].as_py())
    return np.array(firsts, np.int64)


@dataclass(frozen=True)
class Slices:
    """Into which slices the true edges of each relation and side are divided."""

    parts: Array
    """How many, int64 `[R, 2]`; 0 where the side is not corrupted."""
    first: Array
    """The number of the first of them, int64 `[R, 2]`."""
    task: Array
    """The task of each slice, int32 `[S]`, ascending: small ones share one."""

    @classmethod
    def of(cls, plan: Plan, counts: Array, cores: int) -> Slices:
        """Return enough of them for all cores, and none of too many edges."""
        chosen = np.array([[side in sides for side in (0, 1)] for sides in plan.sides])
        edges = np.where(chosen, counts[:, None], 0)
        size = min(max(int(edges.sum()) // (2 * cores), LEAST_SLICE), LARGEST_SLICE)
        parts = np.where(chosen, np.maximum(-(-edges // size), 1), 0).ravel()
        each = np.repeat(edges.ravel() / np.maximum(parts, 1), parts)
        task = np.unique(((np.cumsum(each) - each) // size).astype(np.int64), return_inverse=True)[1]
        first = np.cumsum(parts) - parts
        return cls(parts.reshape(edges.shape), first.reshape(edges.shape), task.astype(np.int32))

    @property
    def tasks(self) -> int:
        """How many tasks there are."""
        return int(self.task[-1]) + 1

    def of_entities(self, rel: int, side: int, kept: Array) -> Array:
        """Return the slices of kept entities, int32 `[n]`."""
        mixed = (kept.view(np.uint64) * _GOLDEN) >> np.uint64(32)
        return (self.first[rel, side] + (mixed % np.uint64(self.parts[rel, side])).astype(np.int64)).astype(np.int32)

    def owner(self, number: int) -> tuple[int, int]:
        """Return the relation and the side of a slice."""
        flat = np.flatnonzero((self.first.ravel() <= number) & (number < (self.first + self.parts).ravel()))
        return divmod(int(flat[0]), 2)


@dataclass(frozen=True)
class Chunks:
    """Some chunks of a file of positives: `edges.start` is of these, whose first is number `first`."""

    edges: ChunkedEdges
    first: int


def chunks_of(store: Store, path: str) -> Chunks:
    """Read a file of positives, which holds whole chunks."""
    with store.parquet(path) as file:
        table = file.read(columns=["chunk", "lhs", "rhs", "rel"])
    chunk, lhs, rhs, rel = (table[name].to_numpy() for name in ("chunk", "lhs", "rhs", "rel"))
    start = np.flatnonzero(np.diff(chunk, prepend=-1))
    bounds = np.append(start, len(chunk)).astype(np.int64)
    return Chunks(ChunkedEdges(lhs, rhs, bounds, rel[start].astype(np.int64)), int(chunk[0]))


def _lists(offsets: Array, values: Array, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))


def _batch(
    slices: Slices, kind: int, number: Array, chunk: Array, size: Array, lists: Sequence[tuple[Array, Array]]
) -> pa.RecordBatch:
    """Return rows for slices; `lists` has offsets and values of positions, kept entities and ends."""
    kinds = [pa.int32(), pa.int64(), pa.int64()]
    columns = [
        pa.array(slices.task[number]),
        pa.array(number.astype(np.int32)),
        pa.array(np.full(len(number), kind, np.int8)),
        pa.array(chunk.astype(np.int32)),
        pa.array(size.astype(np.int32)),
        *(_lists(offsets, values, one) for (offsets, values), one in zip(lists, kinds, strict=True)),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_SEARCHED)


def _slicing(plan: Plan, slices: Slices) -> Callable[[pa.RecordBatch], tables.Batches]:
    """Return what divides true edges: a row for each slice, with kept entities and, as `ends`, the others."""

    def divide(batch: pa.RecordBatch) -> tables.Batches:
        ends = [batch.column(side).to_numpy() for side in SIDES]
        rels = batch.column("rel").to_numpy()
        for rel in np.unique(rels).tolist():
            mine = np.flatnonzero(rels == rel)
            for side in plan.sides[rel]:
                kept, other = ends[1 - side][mine], ends[side][mine]
                number = slices.of_entities(rel, side, kept)
                order = np.argsort(number, kind="stable")
                cuts = np.flatnonzero(np.diff(number[order], prepend=-1))
                offsets = np.append(cuts, len(order))
                empty = np.zeros(len(offsets), np.int64), np.zeros(0, np.int32)
                lists = [empty, (offsets, kept[order]), (offsets, other[order])]
                nothing = np.zeros(len(cuts), np.int32)
                yield _batch(slices, KNOWN, number[order][cuts], nothing, nothing, lists)

    return divide


def _queries(chunks: Chunks, plan: Plan, slices: Slices) -> tables.Batches:
    """Yield, for each chunk, side and slice, the positions and the kept entities that are in it, and first ends."""
    edges = chunks.edges
    for rel, begin, end in edges.runs():
        reach = [int(edges.start[begin])]
        cut = begin
        while cut < end:
            last = max(int(np.searchsorted(edges.start, reach[-1] + EDGES_AT_ONCE, side="right")) - 1, cut + 1)
            last = min(last, end)
            for side in plan.sides[rel]:
                yield _queries_of(chunks, rel, side, cut, last, plan, slices)
            cut = last
            reach.append(int(edges.start[cut]))


def _queries_of(
    chunks: Chunks, rel: int, side: int, first: int, last: int, plan: Plan, slices: Slices
) -> pa.RecordBatch:
    start = chunks.edges.start[first : last + 1]
    ends = (chunks.edges.lhs, chunks.edges.rhs)
    part = slice(int(start[0]), int(start[-1]))
    kept, sizes = ends[1 - side][part], np.diff(start)
    chunk = np.repeat(np.arange(last - first), sizes)
    position = (np.arange(part.start, part.stop) - np.repeat(start[:-1], sizes)).astype(np.int32)
    number = slices.of_entities(rel, side, kept)
    # Positions ascend within a chunk and slice.
    order = np.lexsort((position, number, chunk))
    chunk, number = chunk[order], number[order]
    new = np.ones(len(order), bool)
    new[1:] = (chunk[1:] != chunk[:-1]) | (number[1:] != number[:-1])
    cuts = np.flatnonzero(new)
    offsets = np.append(cuts, len(order))
    chunk, number = chunk[cuts], number[cuts]
    reach = np.minimum(sizes, plan.epochs * plan.window)
    firsts = ends[side][ranges(start[:-1][chunk], reach[chunk])]
    lists = [
        (offsets, position[order]),
        (offsets, kept[order]),
        (np.concatenate([[0], np.cumsum(reach[chunk])]), firsts),
    ]
    return _batch(slices, QUERIES, number, chunks.first + first + chunk, sizes[chunk], lists)


def _searches(
    plan: Plan, slices: Slices, drawn_from: Populations, types: Array, first_chunks: Array
) -> Callable[[tables.Batches], tables.Batches]:
    """Return what finds the masks of a slice: true edges come first, then chunks."""

    def search(batches: tables.Batches) -> tables.Batches:
        populations = drawn_from.open(worker_folder())
        now, edges, known = -1, _Pairs(), None
        for batch in batches:
            for number, kind, part in _of_kinds(batch):
                if number != now:
                    now, edges, known = number, _Pairs(), None
                if kind == KNOWN:
                    edges.add(part)
                    continue
                rel, side = slices.owner(number)
                if known is None:
                    known = edges.by_end(drawn_from.sizes[types[rel, 1 - side]])
                yield _masks_of(part, plan, side, populations[types[rel, side]], known, first_chunks)

    return search


def _of_kinds(batch: pa.RecordBatch) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Yield the rows of each slice and kind, which follow one another."""
    number, kind = (batch.column(name).to_numpy() for name in ("slice", "kind"))
    both = 2 * number.astype(np.int64) + kind
    cuts = np.flatnonzero(np.diff(both, prepend=-1, append=-1))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        yield int(number[start]), int(kind[start]), batch.slice(start, stop - start)


class _Pairs:
    """The true edges of a slice."""

    def __init__(self) -> None:
        self.kept: list[Array] = [NONE]
        self.ends: list[Array] = [NONE]

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows of edges."""
        self.kept.append(rows.column("kept").flatten().to_numpy())
        self.ends.append(rows.column("ends").flatten().to_numpy())

    def by_end(self, width: int) -> KnownEdges:
        """Return them by the ends that are replaced; kept entities are below `width`."""
        return KnownEdges.from_keys(np.concatenate(self.ends) * max(width, 1) + np.concatenate(self.kept), width)


def _masks_of(
    batch: pa.RecordBatch, plan: Plan, side: int, population: Population, known: KnownEdges, first_chunks: Array
) -> pa.RecordBatch:
    chunk = batch.column("chunk").to_numpy().astype(np.int64)

    def lists(name: str) -> tuple[Array, Array]:
        column = batch.column(name)
        lengths = pc.list_value_length(column).to_numpy()
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), column.flatten().to_numpy()

    start, positions = lists("positions")
    _, kept = lists("kept")
    ends_start, ends = lists("ends")
    position, candidate, offsets = sampling_kernels.masks_of_part(
        np.uint64(plan.seed),
        2 * plan.stream + side,
        plan.epochs,
        chunk,
        batch.column("size").to_numpy().astype(np.int64),
        start,
        np.ascontiguousarray(positions, np.int32),
        np.ascontiguousarray(kept, np.int64),
        ends_start,
        np.ascontiguousarray(ends, np.int64),
        plan.window,
        plan.pool,
        plan.popular,
        population.size,
        NONE if population.present is None else population.present,
        population.cumulative,
        (known.neighbors, known.entities, known.start),
        sampling.PROBE_COST,
    )
    filled = np.flatnonzero(np.diff(offsets))
    bounds = np.append(offsets[:-1][filled], offsets[-1])
    chunks = chunk[filled // plan.epochs]
    columns = [
        np.searchsorted(first_chunks, chunks, side="right").astype(np.int32) - np.int32(1),
        (filled % plan.epochs).astype(np.int32),
        chunks.astype(np.int32),
        np.full(len(filled), side, np.int32),
    ]
    arrays = [*map(pa.array, columns), _lists(bounds, position, pa.int32()), _lists(bounds, candidate, pa.int32())]
    return pa.RecordBatch.from_arrays(arrays, names=["file", "epoch", "chunk", "side", "position", "candidate"])
