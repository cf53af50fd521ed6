"""Negatives on Spark: pools, masks and expected numbers, made by the loops of `training_set.negatives`.

`populations` makes what pools are drawn from. `masks` finds which candidates are true, where the true edges are. Here
masks come together by the file of their chunk's positives, and the task of that file writes its pools. So no task
holds more than a slice of the true edges or a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.spark import masks, tables
from twhin_pipeline.spark.populations import Lookup, Shared, worker_folder, write_degrees
from twhin_pipeline.spark.session import expect, session
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives as sampling
from twhin_pipeline.training_set.known_edges import KnownEdges, ranges
from twhin_pipeline.training_set.negatives import Plan, Sampler

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest

Array = np.ndarray[Any, Any]


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
        shared: Shared | None = None
        for asset, source, plan in plans:
            if asset == "held_out/validation_negatives":
                known += ["held_out/validation", "held_out/test"]
            parents = store.versions(snapshot, [*known, *vocabularies])
            draft = drafts.enter_context(
                store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read)
            )
            if shared is None:
                shared = Shared(spark, config, store, snapshot, draft, sizes)
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


class _Table:
    """One table of negatives."""

    def __init__(self, shared: Shared, plan: Plan, source: str, known: list[str]) -> None:
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
            nothing = self.shared.spark.createDataFrame([], masks.MASKS).repartitionById(len(self.files), f.col("file"))
            return nothing.mapInArrow(write, tables.REPORT).collect()
        # As many tasks as files, also where one has no masks.
        found = masks.find(self.shared, self.plan, self.files, self.known)
        found = found.repartitionById(len(self.files), f.col("file"))
        return found.sortWithinPartitions("epoch", "chunk", "side").mapInArrow(write, tables.REPORT).collect()

    def _writes(self, place: tables.Place) -> Callable[[tables.Batches], tables.Batches]:
        """Return what writes the pools of the file of this task's number, with the masks that it gets."""
        config, plan, files, root = self.shared.config, self.plan, self.files, self.shared.store.root
        populations = self.shared.drawn_from()
        counted = None
        if plan.log_q:
            paths = [path for asset in self.known for path in self.shared.files(asset)]
            counted = write_degrees(self.shared, paths, plan.stream)

        def write(batches: tables.Batches) -> tables.Batches:
            number, folder = tables.part_number(), worker_folder()
            chunks = masks.chunks_of(Store(root), files[number])
            lookup = Lookup(counted.open(folder) if counted is not None else None)
            sampler = _Sampler(config, plan, chunks.edges, populations.open(folder), lookup, chunks.first)
            for epoch, found in _by_epoch(batches, plan, chunks.first):
                name = f"epoch-{epoch:05d}-{number:05d}.parquet"
                with place.file(name) as path:
                    pairs, masked = sampling.write_pools(path, sampler.of_epoch(epoch, found))
                    rows = sum(len(plan.sides[rel]) * (last - first) for rel, first, last in chunks.edges.runs())
                    made = tables.report(name, path, rows, [pairs, masked])
                yield made

        return write


class _Sampler(Sampler):
    """Makes the pools of a file's chunks, with masks that were found elsewhere."""

    known: Lookup

    def of_epoch(self, epoch: int, found: tuple[Array, Array, Array]) -> Iterator[tuple[pa.Table, int, int]]:
        """Yield parts of the table of an epoch; `found`: chunk * 2 + side (ascending), position and candidate `[M]`."""
        for rel, first, last in self.blocks():
            rows, listed, windows, position, candidate, offsets, pairs = self.drawn(epoch, rel, first, last)
            if not self.plan.own:
                sides = np.array(self.plan.sides[rel])
                units = (2 * np.arange(first, last)[:, None] + sides).ravel()
                begin, end = (np.searchsorted(found[0], units, side) for side in ("left", "right"))
                # A relation's sides may be one of two, so units need not follow one another.
                chosen = ranges(begin.astype(np.int64), (end - begin).astype(np.int64))
                position, candidate = found[1][chosen], found[2][chosen]
                offsets = np.concatenate([[0], np.cumsum(end - begin)])
            mine = position, candidate, offsets
            yield self.table(epoch, rel, first, last, rows, listed, windows, mine), pairs, len(position)

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
