"""Negatives on Spark: pools, masks and expected numbers, made by the loops of `training_set.negatives`.

What is true of a chunk's queries and its candidates is known where the true edges are. They are divided by relation,
corrupted side and kept entity into slices, each of which one task holds: 8 bytes an edge. A chunk's queries go to the
slices of their kept entities. There its pool is drawn again, from the counter-based generator, and masks are found.
Then masks come together by the file of the chunk's positives, and the task of that file writes its pools. So no task
holds more than a slice or a file, and what travels is each query's position and kept entity, each chunk's own entities,
and masks.

Each task maps the running sums of degree^alpha of a relation's types into memory, 8 bytes an entity, from files that
are made once: in the draft's folder, or copied once to each worker where the store is remote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.spark import tables
from twhin_pipeline.spark.session import expect, session
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives as sampling
from twhin_pipeline.training_set.known_edges import ChunkedEdges, KnownEdges, ranges
from twhin_pipeline.training_set.negatives import NONE, Plan, Population, Sampler
from twhin_pipeline.words import SIDES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest

Array = np.ndarray[Any, Any]
LEAST_SLICE, LARGEST_SLICE = 200_000, 8_000_000
"""Edges of a slice."""
EDGES_AT_ONCE = 1 << 16
WORK = "_work"
"""The folder of a draft with what tasks share; it is removed before the draft is committed."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
DEGREE = np.dtype([("unit", np.int32), ("entity", np.int64), ("degree", np.int64)])
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


def build(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `training_set/negatives` and `held_out/validation_negatives`; return their manifests by asset.

    Of the same positives both are those of `training_set.negatives.build`, in a file for each epoch and each file of
    positives.

    Raises:
        UserError: A table that is needed is missing.
    """
    vocabularies = [f"vocabulary/{name}" for name in config.model.table_names]
    sizes = [store.manifest(asset, snapshot).rows for asset in vocabularies]
    known = ["training_set/positives"]
    read = settings(config, "sample")
    plans = sampling.plans(config)
    made: list[tuple[Draft, list[Any]]] = []
    with session(config) as spark, ExitStack() as drafts:
        expect(spark, 2 * store.manifest(known[0], snapshot).rows)
        shared: _Shared | None = None
        for asset, source, plan in plans:
            if asset == "held_out/validation_negatives":
                known += ["held_out/validation", "held_out/test"]
            parents = store.versions(snapshot, [*known, *vocabularies])
            draft = drafts.enter_context(
                store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read)
            )
            if shared is None:
                shared = _Shared(spark, config, store, snapshot, draft, sizes)
            reports = _Table(shared, plan, source, list(known)).write(draft)
            counts = [(int(row["numbers"][0]), int(row["numbers"][1])) for row in reports]
            draft.details = sampling.details(config, plan, counts) | {"engine": "spark"}
            made.append((draft, reports))
        for draft, reports in made:  # now nothing reads what is shared any more
            if reports:
                tables.finish(draft, reports)
            else:
                _write_nothing(draft, draft.details["epochs"])
    return {asset: store.manifest(asset, snapshot) for asset, *_ in plans}


def _write_nothing(draft: Draft, epochs: int) -> None:
    """Write an epoch's file without rows for each."""
    tables.finish(draft, [])
    for epoch in range(epochs):
        with draft.local_file(f"epoch-{epoch:05d}.parquet") as path:
            sampling.write_pools(path, ())


class _Shared:
    """What the tables of negatives have in common."""

    def __init__(
        self, spark: SparkSession, config: TwhinConfig, store: Store, snapshot: str, draft: Draft, sizes: list[int]
    ) -> None:
        self.spark, self.config, self.store, self.snapshot, self.sizes = spark, config, store, snapshot, sizes
        self.place = tables.Place(store.root, f"{draft.location}/{WORK}")
        names = config.model.table_names
        self.types = np.array([(names.index(one.lhs), names.index(one.rhs)) for one in config.model.relations])
        """The entity types of each relation's ends, `[R, 2]`."""
        self.populations: _Populations | None = None

    def files(self, asset: str) -> list[str]:
        """Return the files of a table that have rows."""
        return tables.written(self.store, self.store.manifest(asset, self.snapshot))

    def counts(self, assets: Sequence[str]) -> Array:
        """Return how many edges of each relation some tables have together, int64 `[R]`."""
        found = [self.store.manifest(asset, self.snapshot).details["edges_per_relation"] for asset in assets]
        return np.array([sum(one[name] for one in found) for name in self.config.model.relation_names], np.int64)

    def drawn_from(self) -> _Populations:
        """Return what pools are drawn from; its files are made once."""
        if self.populations is None:
            self.populations = _write_populations(self)
        return self.populations


@dataclass(frozen=True)
class _Populations:
    """Files from which tasks map the populations of the entity types: names, and whether some rows only are present."""

    place: tables.Place
    sizes: list[int]
    some: list[bool]

    def open(self, folder: str) -> list[Population]:
        """Map them; `folder` is for copies."""
        result = []
        for number, (size, some) in enumerate(zip(self.sizes, self.some, strict=True)):
            cumulative = _mapped(self.place.local(f"{number}.cumulative", folder), np.float64, size)
            present = None
            if some:
                path = self.place.local(f"{number}.present", folder)
                present = _mapped(path, np.int64)
            result.append(Population(cumulative, present))
        return result


def _mapped(path: str, kind: Any, size: int | None = None) -> Array:
    """Map a file; a page that is written to would be a copy, so loops need no other form for what is only read."""
    if size == 0:
        return np.zeros(0, kind)
    return np.asarray(np.memmap(path, kind, "c"))


def _folder() -> str:
    """Return a folder of this worker that goes when Spark does."""
    from pyspark import SparkFiles

    return str(SparkFiles.getRootDirectory())


def _degrees(shared: _Shared, files: Sequence[str], unit: Callable[[int, int], int]) -> DataFrame:
    """Count edges by `unit` (a number that a relation and a side have) and entity: `unit`, `entity`, `degree`."""
    from pyspark.sql import functions as f

    units = np.array([[unit(rel, side) for side in (0, 1)] for rel in range(len(shared.types))], np.int32)

    def count(batch: pa.RecordBatch) -> tables.Batches:
        rel = batch.column("rel").to_numpy()
        ends = [pa.table({"unit": units[rel, n], "entity": batch.column(side)}) for n, side in enumerate(SIDES)]
        found = pa.concat_tables(ends).group_by(["unit", "entity"]).aggregate([([], "count_all")])
        yield from found.rename_columns(["unit", "entity", "degree"]).combine_chunks().to_batches()

    schema = "unit int, entity bigint, degree bigint"
    counted = tables.read(shared.spark, shared.store, files, ["lhs", "rhs", "rel"], schema, count)
    return counted.groupBy("unit", "entity").agg(f.sum("degree").alias("degree"))


def _write_populations(shared: _Shared) -> _Populations:
    """Sum degree^alpha of the training edges along the rows of each entity type: a task and a file for each."""
    from pyspark.sql import functions as f

    config, place, sizes, snapshot = shared.config, shared.place, shared.sizes, shared.snapshot
    names, root, alpha = config.model.table_names, shared.store.root, config.negatives.alpha
    view = shared.store.view
    degrees = _degrees(shared, shared.files("training_set/positives"), lambda rel, side: int(shared.types[rel, side]))

    def write(batches: tables.Batches) -> tables.Batches:
        number = tables.part_number()
        with place.file(f"{number}.cumulative") as path:
            cumulative = np.memmap(path, np.float64, "w+", shape=(sizes[number],)) if sizes[number] else np.zeros(0)
            for batch in batches:
                cumulative[batch.column("entity").to_numpy()] = batch.column("degree").to_numpy()
            sampling.accumulate(cumulative, alpha)
            if isinstance(cumulative, np.memmap):
                cumulative.flush()
            else:
                open(path, "wb").close()
        present = present_rows(Store(root, view), snapshot, names[number])
        if present is not None:
            with place.file(f"{number}.present") as path:
                present.tofile(path)
        yield pa.record_batch({"number": pa.array([number]), "some": pa.array([present is not None])})

    placed = degrees.repartitionById(len(names), f.col("unit"))
    rows = placed.mapInArrow(write, "number bigint, some boolean").collect()
    return _Populations(place, sizes, [row["some"] for row in sorted(rows)])


@dataclass(frozen=True)
class _Degrees:
    """Files of how many true edges entities have, by relation and side: for `log_q` alone."""

    place: tables.Place
    files: int
    totals: Array
    stream: int

    def open(self, folder: str) -> list[Array]:
        return [
            _mapped(self.place.local(f"{self.stream}.{number}.degrees", folder), DEGREE, int(self.totals[number]))
            for number in range(self.files)
        ]


def _write_degrees(shared: _Shared, files: Sequence[str], stream: int) -> _Degrees:
    from pyspark.sql import functions as f

    place = shared.place
    number = max(1, min(2 * len(shared.types), 2 * shared.spark.sparkContext.defaultParallelism))
    degrees = _degrees(shared, files, lambda rel, side: 2 * rel + side)

    def write(batches: tables.Batches) -> tables.Batches:
        part, total = tables.part_number(), 0
        with place.file(f"{stream}.{part}.degrees") as path, open(path, "wb") as file:
            for batch in batches:
                records = np.empty(len(batch), DEGREE)
                for name in DEGREE.names or ():
                    records[name] = batch.column(name).to_numpy()
                file.write(records.data)
                total += len(records)
        yield pa.record_batch({"part": pa.array([part]), "rows": pa.array([total])})

    ordered = degrees.repartitionById(number, (f.col("unit") % number).cast("int")).sortWithinPartitions(
        "unit", "entity"
    )
    totals = np.zeros(number, np.int64)
    for row in ordered.mapInArrow(write, "part bigint, rows bigint").collect():
        totals[row["part"]] = row["rows"]
    return _Degrees(place, number, totals, stream)


class _Counted(KnownEdges):
    """True edges of a relation of which only the degrees are known."""

    def __len__(self) -> int:
        return int(self.start[-1])


class _Lookup(Mapping[tuple[int, int], KnownEdges]):
    """By relation and side: no true edges to look up, since masks come from elsewhere, but degrees where there are."""

    def __init__(self, degrees: Sequence[Array] | None) -> None:
        self.degrees = degrees
        self.nothing = KnownEdges(NONE, np.zeros(1, np.int64), NONE)

    def __getitem__(self, key: tuple[int, int]) -> KnownEdges:
        return self.nothing

    def counted(self, rel: int, side: int) -> KnownEdges:
        """Return the degrees of the entities on a side."""
        assert self.degrees is not None
        unit = 2 * rel + side
        rows = self.degrees[unit % len(self.degrees)]
        first, last = np.searchsorted(rows["unit"], (unit, unit + 1))
        mine = rows[first:last]
        start = np.concatenate([[0], np.cumsum(mine["degree"])]).astype(np.int64)
        return _Counted(np.ascontiguousarray(mine["entity"]), start, NONE)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(())

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True)
class _Slices:
    """Into which slices the true edges of each relation and side are divided."""

    parts: Array
    """How many, int64 `[R, 2]`; 0 where the side is not corrupted."""
    first: Array
    """The number of the first of them, int64 `[R, 2]`."""
    task: Array
    """The task of each slice, int32 `[S]`, ascending: small ones share one."""

    @classmethod
    def of(cls, plan: Plan, counts: Array, cores: int) -> _Slices:
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
class _Chunks:
    """Some chunks of a file of positives: `edges.start` is of these, whose first is number `first`."""

    edges: ChunkedEdges
    first: int


def _chunks(store: Store, path: str) -> _Chunks:
    """Read a file of positives, which holds whole chunks."""
    with store.parquet(path) as file:
        table = file.read(columns=["chunk", "lhs", "rhs", "rel"])
    chunk, lhs, rhs, rel = (table[name].to_numpy() for name in ("chunk", "lhs", "rhs", "rel"))
    start = np.flatnonzero(np.diff(chunk, prepend=-1))
    bounds = np.append(start, len(chunk)).astype(np.int64)
    return _Chunks(ChunkedEdges(lhs, rhs, bounds, rel[start].astype(np.int64)), int(chunk[0]))


class _Table:
    """One table of negatives."""

    def __init__(self, shared: _Shared, plan: Plan, source: str, known: list[str]) -> None:
        self.shared, self.plan, self.known = shared, plan, known
        self.files = shared.files(source)
        """Of positives, in order."""

    def write(self, draft: Draft) -> list[Any]:
        """Write the files, and return the reports; none where there is no chunk or nothing to sample."""
        from pyspark.sql import functions as f

        if self.plan.every or not self.files:
            return []
        write = self._writes(tables.Place.of(draft))
        if self.plan.own:
            # Masks are those of the chunk: there is nothing to bring together.
            nothing = self.shared.spark.createDataFrame([], MASKS).repartitionById(len(self.files), f.col("file"))
            return nothing.mapInArrow(write, tables.REPORT).collect()
        # As many tasks as files, also where one has no masks.
        masks = self._masks().repartitionById(len(self.files), f.col("file"))
        return masks.sortWithinPartitions("epoch", "chunk", "side").mapInArrow(write, tables.REPORT).collect()

    def _masks(self) -> DataFrame:
        """Find all masks, by the file of their chunk."""
        from pyspark.sql import functions as f

        shared, plan = self.shared, self.plan
        counts = shared.counts(self.known)
        slices = _Slices.of(plan, counts, shared.spark.sparkContext.defaultParallelism)
        paths = [path for asset in self.known for path in shared.files(asset)]
        edges = tables.read(shared.spark, shared.store, paths, ["lhs", "rhs", "rel"], SEARCHED, _slicing(plan, slices))
        root = shared.store.root

        def queries(path: str) -> tables.Batches:
            yield from _queries(_chunks(Store(root), path), plan, slices)

        chunks = tables.each(shared.spark, self.files, queries, SEARCHED)
        together = edges.unionAll(chunks).repartitionById(slices.tasks, f.col("task"))
        search = _searches(plan, slices, shared.drawn_from(), shared.types, self._first_chunks())
        return together.sortWithinPartitions("slice", "kind", "chunk").mapInArrow(search, MASKS)

    def _first_chunks(self) -> Array:
        """Return the first chunk of each file, int64 `[F]`."""
        firsts = []
        for path in self.files:
            with self.shared.store.parquet(path) as file:
                firsts.append(next(file.iter_batches(1, columns=["chunk"])).column(0)[0].as_py())
        return np.array(firsts, np.int64)

    def _writes(self, place: tables.Place) -> Callable[[tables.Batches], tables.Batches]:
        """Return what writes the pools of the file of this task's number, with the masks that it gets."""
        config, plan, files, root = self.shared.config, self.plan, self.files, self.shared.store.root
        populations = self.shared.drawn_from()
        counted = None
        if plan.log_q:
            paths = [path for asset in self.known for path in self.shared.files(asset)]
            counted = _write_degrees(self.shared, paths, plan.stream)

        def write(batches: tables.Batches) -> tables.Batches:
            number, folder = tables.part_number(), _folder()
            chunks = _chunks(Store(root), files[number])
            lookup = _Lookup(counted.open(folder) if counted is not None else None)
            sampler = _Sampler(config, plan, chunks.edges, populations.open(folder), lookup, chunks.first)
            for epoch, masks in _by_epoch(batches, plan, chunks.first):
                name = f"epoch-{epoch:05d}-{number:05d}.parquet"
                with place.file(name) as path:
                    pairs, masked = sampling.write_pools(path, sampler.of_epoch(epoch, masks))
                    rows = sum(len(plan.sides[rel]) * (last - first) for rel, first, last in chunks.edges.runs())
                    made = tables.report(name, path, rows, [pairs, masked])
                yield made

        return write


class _Sampler(Sampler):
    """Makes the pools of a file's chunks, with masks that were found elsewhere."""

    known: _Lookup

    def of_epoch(self, epoch: int, masks: tuple[Array, Array, Array]) -> Iterator[tuple[pa.Table, int, int]]:
        """Yield parts of the table of an epoch; `masks`: chunk * 2 + side (ascending), position and candidate `[M]`."""
        for rel, first, last in self.blocks():
            rows, listed, windows, position, candidate, offsets, pairs = self.drawn(epoch, rel, first, last)
            if not self.plan.own:
                sides = np.array(self.plan.sides[rel])
                units = (2 * np.arange(first, last)[:, None] + sides).ravel()
                begin, end = (np.searchsorted(masks[0], units, side) for side in ("left", "right"))
                # A relation's sides may be one of two, so units need not follow one another.
                chosen = ranges(begin.astype(np.int64), (end - begin).astype(np.int64))
                position, candidate = masks[1][chosen], masks[2][chosen]
                offsets = np.concatenate([[0], np.cumsum(end - begin)])
            found = position, candidate, offsets
            yield self.table(epoch, rel, first, last, rows, listed, windows, found), pairs, len(position)

    def _edges_of(self, rel: int, side: int) -> KnownEdges:
        return self.known.counted(rel, side)


def _by_epoch(
    batches: tables.Batches, plan: Plan, first_chunk: int
) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
    """Yield each epoch with its masks, sorted; rows come epoch by epoch."""
    waiting: dict[int, list[pa.RecordBatch]] = {}
    rows = iter(batches)
    ended = False
    for epoch in range(plan.epochs):
        while not ended and not any(other > epoch for other in waiting):
            batch = next(rows, None)
            if batch is None:
                ended = True
                break
            column = batch.column("epoch").to_numpy()
            cuts = np.flatnonzero(np.diff(column, prepend=-1, append=-1))
            for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
                waiting.setdefault(int(column[start]), []).append(batch.slice(start, stop - start))
        yield epoch, _sorted(waiting.pop(epoch, []), first_chunk)


def _sorted(batches: list[pa.RecordBatch], first_chunk: int) -> tuple[Array, Array, Array]:
    """Return the masks of some rows by chunk and side, position, and candidate."""
    if not batches:
        return np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.int32)
    table = pa.Table.from_batches(batches).combine_chunks()
    lengths = pc.list_value_length(table["position"]).to_numpy()
    unit = 2 * (table["chunk"].to_numpy().astype(np.int64) - first_chunk) + table["side"].to_numpy()
    units = np.repeat(unit, lengths)
    position, candidate = (
        pc.list_flatten(table[name]).to_numpy().astype(np.int32) for name in ("position", "candidate")
    )
    order = np.lexsort((candidate, position, units))
    return units[order], position[order], candidate[order]


def _lists(offsets: Array, values: Array, kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values, kind))


def _batch(
    slices: _Slices, kind: int, number: Array, chunk: Array, size: Array, lists: Sequence[tuple[Array, Array]]
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


def _slicing(plan: Plan, slices: _Slices) -> Callable[[pa.RecordBatch], tables.Batches]:
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


def _queries(chunks: _Chunks, plan: Plan, slices: _Slices) -> tables.Batches:
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
    chunks: _Chunks, rel: int, side: int, first: int, last: int, plan: Plan, slices: _Slices
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
    plan: Plan, slices: _Slices, drawn_from: _Populations, types: Array, first_chunks: Array
) -> Callable[[tables.Batches], tables.Batches]:
    """Return what finds the masks of a slice: true edges come first, then chunks."""

    def search(batches: tables.Batches) -> tables.Batches:
        populations = drawn_from.open(_folder())
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
