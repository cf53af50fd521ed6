"""What pools are drawn from, on Spark: the running sums of degree^alpha of each entity type, and degrees for `log_q`.

Both are files that are made once, in the draft's folder, or copied once to each worker where the store is remote. Tasks
map them into memory: 8 bytes an entity, which are not on a heap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.spark import tables
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives as sampling
from twhin_pipeline.training_set.known_edges import KnownEdges
from twhin_pipeline.training_set.mapped_array import mapped_zeros
from twhin_pipeline.training_set.negatives import NONE, Population
from twhin_pipeline.words import SIDES

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft

Array = np.ndarray[Any, Any]
WORK = "_work"
"""The folder of a draft with what tasks share; it is removed before the draft is committed."""
DEGREE = np.dtype([("unit", np.int32), ("entity", np.int64), ("degree", np.int64)])


class Shared:
    """What the tables of negatives have in common."""

    def __init__(
        self, spark: SparkSession, config: TwhinConfig, store: Store, snapshot: str, draft: Draft, sizes: list[int]
    ) -> None:
        self.spark, self.config, self.store, self.snapshot, self.sizes = spark, config, store, snapshot, sizes
        self.place = tables.Place(store.root, f"{draft.location}/{WORK}")
        names = config.model.table_names
        self.types = np.array([(names.index(one.lhs), names.index(one.rhs)) for one in config.model.relations])
        """The entity types of each relation's ends, `[R, 2]`."""
        self.populations: Populations | None = None

    def files(self, asset: str) -> list[str]:
        """Return the files of a table that have rows."""
        return tables.written(self.store, self.store.manifest(asset, self.snapshot))

    def counts(self, assets: Sequence[str]) -> Array:
        """Return how many edges of each relation some tables have together, int64 `[R]`."""
        found = [self.store.manifest(asset, self.snapshot).details["edges_per_relation"] for asset in assets]
        return np.array([sum(one[name] for one in found) for name in self.config.model.relation_names], np.int64)

    def drawn_from(self) -> Populations:
        """Return what pools are drawn from; its files are made once."""
        if self.populations is None:
            self.populations = _write_populations(self)
        return self.populations


@dataclass(frozen=True)
class Populations:
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


def worker_folder() -> str:
    """Return a folder of this worker that goes when Spark does."""
    from pyspark import SparkFiles

    return str(SparkFiles.getRootDirectory())


def _degrees(shared: Shared, files: Sequence[str], unit: Callable[[int, int], int]) -> DataFrame:
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


def _write_populations(shared: Shared) -> Populations:
    """Sum degree^alpha of the training edges along the rows of each entity type: a task and a file for each."""
    from pyspark.sql import functions as f

    config, place, sizes, snapshot = shared.config, shared.place, shared.sizes, shared.snapshot
    names, root, alpha = config.model.table_names, shared.store.root, config.negatives.alpha
    view = shared.store.view
    degrees = _degrees(shared, shared.files("training_set/positives"), lambda rel, side: int(shared.types[rel, side]))

    def write(batches: tables.Batches) -> tables.Batches:
        number = tables.part_number()
        with place.file(f"{number}.cumulative") as path:
            cumulative = mapped_zeros(path, sizes[number], np.float64)
            for batch in batches:
                cumulative[batch.column("entity").to_numpy()] = batch.column("degree").to_numpy()
            sampling.accumulate(cumulative, alpha)
            if not sizes[number]:
                open(path, "wb").close()
        present = present_rows(Store(root, view), snapshot, names[number])
        if present is not None:
            with place.file(f"{number}.present") as path:
                present.tofile(path)
        yield pa.record_batch({"number": pa.array([number]), "some": pa.array([present is not None])})

    placed = degrees.repartitionById(len(names), f.col("unit"))
    rows = placed.mapInArrow(write, "number bigint, some boolean").collect()
    return Populations(place, sizes, [row["some"] for row in sorted(rows)])


@dataclass(frozen=True)
class Degrees:
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


def write_degrees(shared: Shared, files: Sequence[str], stream: int) -> Degrees:
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
    return Degrees(place, number, totals, stream)


class _Counted(KnownEdges):
    """True edges of a relation of which only the degrees are known."""

    def __len__(self) -> int:
        return int(self.start[-1])


class Lookup(Mapping[tuple[int, int], KnownEdges]):
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
