"""Negatives: for each chunk, side and epoch a pool of entities of the side's type, and which candidates are true edges.

A pool is part uniform over the ids that have an edge in the snapshot, part in proportion to degree^alpha (word2vec's
smoothing; PyTorch-BigGraph's mixture), and all of a chunk's positives share it. Pools come from a counter-based
generator keyed by seed, epoch, chunk and side, so they do not depend on threads or on the order of work.

A chunk's edges with the same kept entity are one query, which has the same true edges: a mask names a query by the
first position of its entity in the chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import scratch
from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.prefetch import in_order
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained
from twhin_pipeline.training_set.known_edges import ChunkedEdges, KnownEdges, index_edges
from twhin_pipeline.training_set.mapped_array import mapped_zeros
from twhin_pipeline.words import SIDES

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest, Store

LHS, RHS = 0, 1
NONE = np.zeros(0, np.int64)
SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("chunk", pa.int32()),
        ("side", pa.int8()),
        ("row", pa.list_(pa.int64())),
        ("mask_position", pa.list_(pa.int32())),
        ("mask_candidate", pa.list_(pa.int32())),
        ("log_q", pa.list_(pa.float32())),
    ]
)
# Positions ascend, and rows are small beside their 64 bits: a third smaller than by default, and faster to read.
ENCODING = {
    "mask_position.list.element": "DELTA_BINARY_PACKED",
    "row.list.element": "BYTE_STREAM_SPLIT",
    "log_q.list.element": "BYTE_STREAM_SPLIT",
}
# Bounds a row group, and with it the memory of the writer and of every reader.
MASKS_PER_ROW_GROUP, POOLS_PER_ROW_GROUP = 1_000_000, 512
# Chunks that a thread samples at a time.
CHUNKS_AT_ONCE = 64
# Looking a neighbor up costs about a sixteenth of finding a pair among an entity's neighbors by bisection.
PROBE_COST = 16


@dataclass(frozen=True)
class Plan:
    """What is asked for: `pool` candidates a chunk and side, `popular` of them by degree, and an in-batch `window`.

    `sides` has, for each relation, the numbers of the sides that are corrupted (`TwhinConfig.corrupted_sides`).
    `every`: all entities are candidates (1-vs-all), and there is nothing to sample. `own`: only true edges of the chunk
    are masked.
    """

    pool: int
    popular: int
    window: int
    epochs: int
    seed: int
    stream: int
    sides: list[tuple[int, ...]]
    log_q: bool
    every: bool
    own: bool


@dataclass(frozen=True)
class Population:
    """The entities of a type, and the running sum of degree^alpha over their rows (`[N]`, mapped)."""

    cumulative: np.ndarray
    present: np.ndarray | None = None
    """The rows that may be drawn, int64 `[P]`, ascending; None: all."""

    @property
    def size(self) -> int:
        """How many may be drawn."""
        return len(self.cumulative) if self.present is None else len(self.present)

    def expected(self, plan: Plan, rows: np.ndarray) -> np.ndarray:
        """Return how often each of `rows` [N] is expected in a pool: float64 [N].

        Where no entity of the type has a training edge, all are uniform.
        """
        total = float(self.cumulative[-1])
        popular = plan.popular if total > 0 else 0
        result = np.full(len(rows), (plan.pool - popular) / self.size)
        if self.present is not None:
            place = np.minimum(np.searchsorted(self.present, rows), self.size - 1)
            result[self.present[place] != rows] = 0.0
        if popular:
            mass = self.cumulative[rows] - np.where(rows > 0, self.cumulative[rows - 1], 0.0)
            result += popular * mass / total
        return result


def build(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `training_set/negatives` and `held_out/validation_negatives`; return their manifests by asset.

    For training a true edge is a training edge; for validation, a training or held-out one. With
    `train_data.global_negatives: all` the training's table is one file without rows: whoever scores every entity knows
    what is masked from the positives. Details: `pool` (a number, or "all"), `popular`, `in_batch`, `epochs`, `sides`
    (by relation), `candidates` (pairs of a query and a candidate) and `masked` ones in all, `alpha`, `degree_share`.

    Raises:
        UserError: A table that is needed is missing, or the memory limit is too low.
    """
    tables = config.model.table_names
    vocabularies = [f"vocabulary/{name}" for name in tables]
    sizes = [store.manifest(asset, snapshot).rows for asset in vocabularies]
    manifests = {}
    known = ["training_set/positives"]
    with database.connect(config, store) as con, scratch.folder("negatives") as folder:
        threads = database.threads(config)
        with explained("training_set/negatives"):
            read = [_positives(con, store, known[0], snapshot, f"{folder}/0")]
            present = [present_rows(store, snapshot, name) for name in tables]
            populations = _populations(config, read[0], sizes, present, folder)
        for asset, source, plan in plans(config):
            if asset == "held_out/validation_negatives":
                held_out = ("held_out/validation", "held_out/test")
                known += held_out
                with explained(asset):
                    read += [_positives(con, store, table, snapshot, f"{folder}/{table[9:]}") for table in held_out]
            parents = store.versions(snapshot, [*known, *vocabularies])
            positives = read[known.index(source)]
            known_edges: dict[tuple[int, int], KnownEdges] = {}
            # Without a chunk, or with every entity as candidate, nothing is searched.
            if len(positives.relation) and not plan.every:
                known_edges = index_edges(read, _sizes_of_sides(config, sizes), threads, f"{folder}/{plan.stream}")
            sampler = Sampler(config, plan, positives, populations, known_edges)
            with store.replace(
                asset, snapshot, config_hash=config.hash(), parents=parents, settings=settings(config, "sample")
            ) as draft:
                draft.details = sampler.write(draft, threads)
            manifests[asset] = store.manifest(asset, snapshot)
    return manifests


def plans(config: TwhinConfig) -> list[tuple[str, str, Plan]]:
    """Return each table of negatives, the table of its positives, and what is asked for."""
    jobs = (
        ("training_set/negatives", "training_set/positives", config.train_data, config.epochs_of_negatives),
        ("held_out/validation_negatives", "held_out/validation", config.validation_data, 1),
    )
    result = []
    for stream, (asset, source, data, epochs) in enumerate(jobs):
        pool = 0 if data.global_negatives == "all" else data.global_negatives
        plan = Plan(
            pool=pool,
            popular=round(pool * config.negatives.degree_share),
            window=data.in_batch_negatives,
            epochs=epochs,
            seed=config.negatives.seed & (2**64 - 1),
            stream=stream,
            sides=[tuple(SIDES.index(side) for side in sides) for sides in config.corrupted_sides.values()],
            log_q=config.loss.log_q,
            every=data.global_negatives == "all",
            # Validation ranks edges, and filters them.
            own=config.negatives.mask == "own" and asset == "training_set/negatives",
        )
        result.append((asset, source, plan))
    return result


def files_by_epoch(files: Sequence[str]) -> list[list[str]]:
    """Return a table's files, epoch by epoch: `epoch-00000.parquet`, or several such as `epoch-00000-00001.parquet`."""
    epoch_of = [path.rpartition("/")[2].removesuffix(".parquet").split("-")[1] for path in files]
    return [
        [path for path, of in zip(files, epoch_of, strict=True) if of == epoch] for epoch in dict.fromkeys(epoch_of)
    ]


class Sampler:
    """Makes the pools, masks and expected numbers of one table."""

    def __init__(
        self,
        config: TwhinConfig,
        plan: Plan,
        positives: ChunkedEdges,
        populations: list[Population],
        known: Mapping[tuple[int, int], KnownEdges],
        first_chunk: int = 0,
    ) -> None:
        """Take all positives, or some chunks of them, from `first_chunk` on."""
        self.config, self.plan, self.positives, self.known = config, plan, positives, known
        self.first_chunk = first_chunk
        index = {name: number for number, name in enumerate(config.model.table_names)}
        self.population = [
            (populations[index[relation.lhs]], populations[index[relation.rhs]]) for relation in config.model.relations
        ]

    def write(self, draft: Draft, threads: int) -> dict[str, Any]:
        """Write one file an epoch, made by `threads` threads; return what was counted."""
        with ThreadPoolExecutor(threads) as pool:
            try:
                counts = [self._write_epoch(draft, epoch, pool, threads + 1) for epoch in range(self.plan.epochs)]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return details(self.config, self.plan, counts)

    def _write_epoch(self, draft: Draft, epoch: int, pool: ThreadPoolExecutor, ahead: int) -> tuple[int, int]:
        with draft.local_file(f"epoch-{epoch:05d}.parquet") as path:
            blocks = ((epoch, *block) for block in self.blocks())
            return write_pools(path, in_order(pool, self._samples, blocks, ahead))

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Yield relations and a few of their chunks, from the first to before the last."""
        if self.plan.every:
            return
        for rel, first, last in self.positives.runs():
            if self.plan.sides[rel]:
                for begin in range(first, last, CHUNKS_AT_ONCE):
                    yield rel, begin, min(begin + CHUNKS_AT_ONCE, last)

    def _samples(self, epoch: int, rel: int, first: int, last: int) -> tuple[pa.Table, int, int]:
        """Return a part of the table, how many pairs of a query and a candidate it has, and how many are masked."""
        rows, listed, windows, position, candidate, offsets, pairs = self.drawn(epoch, rel, first, last)
        masks = position, candidate, offsets
        return self.table(epoch, rel, first, last, rows, listed, windows, masks), pairs, len(position)

    def drawn(self, epoch: int, rel: int, first: int, last: int) -> Any:
        """Return what `sampling_kernels.samples` does for some chunks."""
        plan = self.plan
        return sampling_kernels.samples(
            np.uint64(plan.seed),
            np.array([2 * plan.stream, 2 * plan.stream + 1]),
            epoch,
            self.first_chunk + first,
            self.positives.start[first : last + 1],
            np.array(plan.sides[rel]),
            (self.positives.lhs, self.positives.rhs),
            plan.window,
            plan.pool,
            plan.popular,
            np.array([population.size for population in self.population[rel]]),
            tuple(NONE if one.present is None else one.present for one in self.population[rel]),
            tuple(population.cumulative for population in self.population[rel]),
            tuple((side.neighbors, side.entities, side.start) for side in (self.known[rel, LHS], self.known[rel, RHS])),
            plan.own,
            PROBE_COST,
        )

    def table(
        self,
        epoch: int,
        rel: int,
        first: int,
        last: int,
        rows: np.ndarray,
        listed: np.ndarray,
        windows: np.ndarray,
        masks: tuple[np.ndarray, np.ndarray, np.ndarray],
    ) -> pa.Table:
        """Return some chunks' rows: of what `drawn` returns, and masks (positions, candidates, where each begins)."""
        plan, sides = self.plan, self.plan.sides[rel]
        chunks, (position, candidate, offsets) = last - first, masks
        units = chunks * len(sides)
        side = np.tile(np.array(sides, np.int8), chunks)
        numbers = np.arange(self.first_chunk + first, self.first_chunk + last, dtype=np.int32)
        columns = [
            np.full(units, epoch, np.int32),
            np.repeat(numbers, len(sides)),
            side,
            _lists(np.arange(units + 1) * plan.pool, rows),
            _lists(offsets, position),
            _lists(offsets, candidate),
            pa.nulls(units, SCHEMA.field("log_q").type),
        ]
        if plan.log_q:
            lengths = windows + plan.pool
            log_q = self._log_q(rel, np.repeat(side, lengths), listed, np.repeat(windows, lengths))
            columns[-1] = _lists(np.concatenate([[0], np.cumsum(lengths)]), log_q.astype(np.float32))
        return pa.table(columns, schema=SCHEMA)

    def _log_q(self, rel: int, side: np.ndarray, listed: np.ndarray, window: np.ndarray) -> np.ndarray:
        """Return the log of each candidate's expected number in its list, `[window | pool]`: float64 [L].

        Candidates of the window are ends of edges, so they come in proportion to their edges of the relation.
        """
        expected = np.empty(len(listed))
        for one in self.plan.sides[rel]:
            here = side == one
            edges = self._edges_of(rel, one)
            share = window[here] * edges.degrees(listed[here]) / len(edges)
            expected[here] = self.population[rel][one].expected(self.plan, listed[here]) + share
        return np.log(expected)

    def _edges_of(self, rel: int, side: int) -> KnownEdges:
        """Return a relation's true edges by the entity on a side."""
        return self.known[rel, side]


def details(config: TwhinConfig, plan: Plan, counts: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Return what a table's manifest says; `counts` has pairs of a query and a candidate, and masked ones, by file."""
    counts = list(counts)
    return {
        "pool": "all" if plan.every else plan.pool,
        "popular": plan.popular,
        "in_batch": plan.window,
        "epochs": plan.epochs,
        "sides": {name: list(sides) for name, sides in zip(config.model.relation_names, plan.sides, strict=True)},
        "alpha": config.negatives.alpha,
        "degree_share": config.negatives.degree_share,
        "mask": "own" if plan.own else "known",
        "candidates": sum(candidates for candidates, _ in counts),
        "masked": sum(masked for _, masked in counts),
    }


def write_pools(path: str, samples: Iterable[tuple[pa.Table, int, int]]) -> tuple[int, int]:
    """Write parts of the table, with their pairs and masked ones, to a file; return the sums of both."""
    candidates = masked = pools = masks = 0
    pending: list[pa.Table] = []
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=False, column_encoding=ENCODING) as writer:
        for table, pairs, result in samples:
            candidates, masked = candidates + pairs, masked + result
            pending.append(table)
            pools, masks = pools + len(table), masks + result
            if masks >= MASKS_PER_ROW_GROUP or pools >= POOLS_PER_ROW_GROUP:
                writer.write_table(pa.concat_tables(pending))
                pending, pools, masks = [], 0, 0
        if pending:
            writer.write_table(pa.concat_tables(pending))
    return candidates, masked


def _sizes_of_sides(config: TwhinConfig, sizes: list[int]) -> list[tuple[int, int]]:
    """Return, by relation, how many entities its left-hand and its right-hand type have."""
    index = {name: number for number, name in enumerate(config.model.table_names)}
    return [(sizes[index[r.lhs]], sizes[index[r.rhs]]) for r in config.model.relations]


def _positives(con: duckdb.DuckDBPyConnection, store: Store, asset: str, snapshot: str, prefix: str) -> ChunkedEdges:
    """Map a table of positives into memory, in files that begin with `prefix`."""
    scanned = database.scan(store, asset, snapshot)
    rows = store.manifest(asset, snapshot).rows
    lhs, rhs = (mapped_zeros(f"{prefix}-{side}.positives", rows, np.int64) for side in ("lhs", "rhs"))
    position = 0
    # Files are in the order of chunks, and so are their rows.
    for batch in con.sql(f"SELECT lhs, rhs FROM {scanned}").to_arrow_reader(1 << 18):
        part = slice(position, position + len(batch))
        lhs[part], rhs[part] = batch.column("lhs").to_numpy(), batch.column("rhs").to_numpy()
        position += len(batch)
    chunks = con.execute(
        f"SELECT chunk, any_value(rel), count(*) FROM {scanned} GROUP BY chunk ORDER BY chunk"
    ).fetchnumpy()
    start = np.concatenate([[0], np.cumsum(chunks["count_star()"])]).astype(np.int64)
    return ChunkedEdges(lhs, rhs, start, np.asarray(chunks["any_value(rel)"], dtype=np.int64))


def _populations(
    config: TwhinConfig, positives: ChunkedEdges, sizes: list[int], present: list[np.ndarray | None], folder: str
) -> list[Population]:
    """Count each type's degrees over the training positives, and sum degree^alpha along the rows."""
    populations = []
    for number, name in enumerate(config.model.table_names):
        cumulative = mapped_zeros(f"{folder}/{number}.cumulative", sizes[number], np.float64)
        for rel, first, last in positives.runs():
            part = slice(int(positives.start[first]), int(positives.start[last]))
            relation = config.model.relations[rel]
            for side, ends in ((relation.lhs, positives.lhs), (relation.rhs, positives.rhs)):
                if side == name:
                    sampling_kernels.count_rows(ends[part], cumulative)
        accumulate(cumulative, config.negatives.alpha)
        populations.append(Population(cumulative, present[number]))
    return populations


def accumulate(degrees: np.ndarray, alpha: float) -> None:
    """Replace degrees, float64 `[N]`, by the running sum of degree^alpha."""
    for begin in range(0, len(degrees), 1 << 20):
        degree = degrees[begin : begin + (1 << 20)]
        # Without an edge there is no mass, also where alpha is 0.
        degree[:] = np.where(degree > 0, degree**alpha, 0)
    np.cumsum(degrees, out=degrees)


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32, copy=False)), pa.array(values))
