"""Negatives: for each chunk, side and epoch a pool of entities of the side's type, and which candidates are true edges.

A pool is part uniform over the vocabulary, part in proportion to degree^alpha (word2vec's smoothing; PyTorch-BigGraph's
mixture), and all of a chunk's positives share it. Pools come from a counter-based generator keyed by seed, epoch, chunk
and side, so they do not depend on threads or on the order of work.

A chunk's edges with the same kept entity are one query, which has the same true edges: a mask names a query by the
first position of its entity in the chunk.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import database
from twhin_pipeline.database import explained
from twhin_pipeline.truth import Adjacency, adjacency, true_pairs, write_adjacency

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest, Store

LHS, RHS = 0, 1
SIDES = {"both": (LHS, RHS), "lhs": (LHS,), "rhs": (RHS,)}
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


@dataclass(frozen=True)
class Plan:
    """What is asked for: `pool` candidates a chunk and side, `popular` of them by degree, and an in-batch `window`.

    `sides` has, for each relation, the sides that are replaced. `every`: all entities are candidates (1-vs-all), and
    there is nothing to sample. `own`: only true edges of the chunk are masked.
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
class Positives:
    """Positives mapped into memory: `lhs`, `rhs` [E]; chunk i is `start[i]:start[i + 1]`, of relation `rel[i]`."""

    lhs: np.ndarray
    rhs: np.ndarray
    start: np.ndarray
    rel: np.ndarray

    def chunk(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `lhs` and `rhs` [c] of chunk i."""
        part = slice(int(self.start[i]), int(self.start[i + 1]))
        return np.asarray(self.lhs[part]), np.asarray(self.rhs[part])


@dataclass(frozen=True)
class Population:
    """The entities of a type: how many, and the running sum of degree^alpha over their rows ([N], mapped)."""

    size: int
    cumulative: np.ndarray

    def draw(self, plan: Plan, epoch: int, chunk: int, side: int) -> np.ndarray:
        """Return a pool, `[plan.pool]` rows with replacement: uniform ones first, then those by degree.

        Where no entity of the type has a training edge, all are uniform.
        """
        bits = np.random.Philox(key=[plan.seed, 2 * plan.stream + side], counter=[0, 0, chunk, epoch])
        unit = (bits.random_raw(plan.pool) >> np.uint64(11)) * 2.0**-53
        rows = np.minimum((unit * self.size).astype(np.int64), self.size - 1)
        total = float(self.cumulative[-1])
        if plan.popular and total > 0:
            split = plan.pool - plan.popular
            rows[split:] = np.searchsorted(self.cumulative, unit[split:] * total, side="right")
        return rows

    def expected(self, plan: Plan, rows: np.ndarray) -> np.ndarray:
        """Return how often each of `rows` [N] is expected in a pool: float64 [N]."""
        total = float(self.cumulative[-1])
        popular = plan.popular if total > 0 else 0
        found = np.full(len(rows), (plan.pool - popular) / self.size)
        if popular:
            mass = self.cumulative[rows] - np.where(rows > 0, self.cumulative[rows - 1], 0.0)
            found += popular * mass / total
        return found


@dataclass(frozen=True)
class Sample:
    """A chunk's candidates for one side: the pool's `row`s [K], masks [M], `log_q` [n + K], and how many `pairs` of a
    query and a candidate there are."""

    chunk: int
    side: int
    row: np.ndarray
    position: np.ndarray
    candidate: np.ndarray
    log_q: np.ndarray | None
    pairs: int


@dataclass
class Pools:
    """Rows of the table in the making, up to a row group."""

    epoch: list[int] = field(default_factory=list)
    chunk: list[int] = field(default_factory=list)
    side: list[int] = field(default_factory=list)
    row: list[np.ndarray] = field(default_factory=list)
    position: list[np.ndarray] = field(default_factory=list)
    candidate: list[np.ndarray] = field(default_factory=list)
    log_q: list[np.ndarray] = field(default_factory=list)
    masks: int = 0

    def add(self, epoch: int, sample: Sample) -> None:
        """Append one row."""
        self.epoch.append(epoch)
        self.chunk.append(sample.chunk)
        self.side.append(sample.side)
        self.row.append(sample.row)
        self.position.append(sample.position)
        self.candidate.append(sample.candidate)
        if sample.log_q is not None:
            self.log_q.append(sample.log_q)
        self.masks += len(sample.position)

    def table(self) -> pa.Table:
        """Return the rows as a table of `SCHEMA`."""
        lists = (_lists(self.row, np.int64), _lists(self.position, np.int32), _lists(self.candidate, np.int32))
        log_q = _lists(self.log_q, np.float32) if self.log_q else pa.nulls(len(self.row), SCHEMA.field("log_q").type)
        return pa.table([self.epoch, self.chunk, self.side, *lists, log_q], schema=SCHEMA)


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
    jobs = (
        ("training_set/negatives", "training_set/positives", config.train_data, config.epochs_of_negatives),
        ("held_out/validation_negatives", "held_out/validation", config.validation_data, 1),
    )
    with database.connect(config, store) as con, tempfile.TemporaryDirectory(prefix="twhin-negatives-") as folder:
        with explained("training_set/negatives"):
            populations = _populations(con, config, store, snapshot, sizes, folder)
        for stream, (asset, source, data, epochs) in enumerate(jobs):
            pool = 0 if data.global_negatives == "all" else data.global_negatives
            plan = Plan(
                pool=pool,
                popular=round(pool * config.negatives.degree_share),
                window=data.in_batch_negatives,
                epochs=epochs,
                seed=config.negatives.seed & (2**64 - 1),
                stream=stream,
                sides=sides_of(config),
                log_q=config.loss.log_q,
                every=data.global_negatives == "all",
                # Validation ranks edges, and filters them.
                own=config.negatives.mask == "own" and asset == "training_set/negatives",
            )
            if asset == "held_out/validation_negatives":
                known += ["held_out/validation", "held_out/test"]
            parents = store.versions(snapshot, [*known, *vocabularies])
            with explained(asset):
                positives = _positives(con, store, source, snapshot, f"{folder}/{stream}")
                files = [file for table in known for file in store.files(table, snapshot)]
                truth = write_adjacency(con, files, _ends(config, sizes), f"{folder}/{stream}")
            sampler = Sampler(config, plan, positives, populations, truth)
            with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents) as draft:
                draft.details = sampler.write(draft, _threads(config))
            manifests[asset] = store.manifest(asset, snapshot)
    return manifests


def sides_of(config: TwhinConfig) -> list[tuple[int, ...]]:
    """Return, by relation, the sides of its edges that are replaced."""
    return [SIDES[relation.sides or config.negatives.sides] for relation in config.model.relations]


class Sampler:
    """Makes the pools, masks and expected numbers of one table."""

    def __init__(
        self,
        config: TwhinConfig,
        plan: Plan,
        positives: Positives,
        populations: list[Population],
        truth: dict[tuple[int, int], Adjacency],
    ) -> None:
        self.config, self.plan, self.positives, self.truth = config, plan, positives, truth
        index = {name: number for number, name in enumerate(config.model.table_names)}
        self.population = [
            (populations[index[relation.lhs]], populations[index[relation.rhs]]) for relation in config.model.relations
        ]

    def write(self, draft: Draft, threads: int) -> dict[str, Any]:
        """Write one file an epoch, `threads` at a time; return what was counted."""
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(self._write_epoch, draft, epoch) for epoch in range(self.plan.epochs)]
            try:
                counts = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return {
            "pool": "all" if self.plan.every else self.plan.pool,
            "popular": self.plan.popular,
            "in_batch": self.plan.window,
            "epochs": self.plan.epochs,
            "sides": {
                name: list(sides) for name, sides in zip(self.config.model.relation_names, self.plan.sides, strict=True)
            },
            "alpha": self.config.negatives.alpha,
            "degree_share": self.config.negatives.degree_share,
            "candidates": sum(candidates for candidates, _ in counts),
            "masked": sum(masked for _, masked in counts),
        }

    def _write_epoch(self, draft: Draft, epoch: int) -> tuple[int, int]:
        candidates = masked = 0
        pools = Pools()
        with (
            draft.local_file(f"epoch-{epoch:05d}.parquet") as path,
            pq.ParquetWriter(
                path, SCHEMA, compression="zstd", use_dictionary=False, column_encoding=ENCODING
            ) as writer,
        ):
            for sample in () if self.plan.every else self._samples(epoch):
                pools.add(epoch, sample)
                candidates, masked = candidates + sample.pairs, masked + len(sample.position)
                if pools.masks >= MASKS_PER_ROW_GROUP or len(pools.chunk) >= POOLS_PER_ROW_GROUP:
                    writer.write_table(pools.table())
                    pools = Pools()
            if pools.chunk:
                writer.write_table(pools.table())
        return candidates, masked

    def _samples(self, epoch: int) -> Iterator[Sample]:
        for chunk in range(len(self.positives.rel)):
            ends = self.positives.chunk(chunk)
            rel = int(self.positives.rel[chunk])
            size = len(ends[0])
            # The window of the chunk's own entities moves on with the epochs.
            window = (epoch * self.plan.window + np.arange(min(self.plan.window, size))) % size
            for side in self.plan.sides[rel]:
                row = self.population[rel][side].draw(self.plan, epoch, chunk, side)
                listed = np.concatenate([ends[side][window], row])
                queries, first = np.unique(ends[1 - side], return_index=True)
                from_kept, from_listed = self.truth[rel, 1 - side], self.truth[rel, side]
                if self.plan.own:
                    from_kept = adjacency(ends[1 - side], ends[side], from_kept.width)
                    from_listed = adjacency(ends[side], ends[1 - side], from_listed.width)
                position, candidate = true_pairs(from_kept, from_listed, queries, first, listed)
                log_q = self._log_q(rel, side, listed, len(window)) if self.plan.log_q else None
                yield Sample(chunk, side, row, position, candidate, log_q, len(queries) * len(listed))

    def _log_q(self, rel: int, side: int, listed: np.ndarray, window: int) -> np.ndarray:
        """Return the log of each candidate's expected number in such a list, `[window | pool]`: float64 [N].

        Candidates of the window are ends of edges, so they come in proportion to their edges of the relation.
        """
        expected = self.population[rel][side].expected(self.plan, listed)
        if window:
            edges = self.truth[rel, side]
            expected += window * edges.spans(listed)[1] / len(edges.keys)
        return np.log(expected)


def _ends(config: TwhinConfig, sizes: list[int]) -> list[tuple[int, int]]:
    """Return, by relation, how many entities its left-hand and its right-hand type have."""
    index = {name: number for number, name in enumerate(config.model.table_names)}
    return [(sizes[index[r.lhs]], sizes[index[r.rhs]]) for r in config.model.relations]


def _positives(con: duckdb.DuckDBPyConnection, store: Store, asset: str, snapshot: str, prefix: str) -> Positives:
    """Map a table of positives into memory, in files that begin with `prefix`."""
    scanned = database.scan(store, asset, snapshot)
    rows = store.manifest(asset, snapshot).rows
    lhs, rhs = (_mapped(f"{prefix}-{side}.positives", rows, np.int64) for side in ("lhs", "rhs"))
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
    return Positives(lhs, rhs, start, np.asarray(chunks["any_value(rel)"], dtype=np.int64))


def _populations(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str, sizes: list[int], folder: str
) -> list[Population]:
    """Count each type's degrees over the training positives, and sum degree^alpha along the rows."""
    scanned = database.scan(store, "training_set/positives", snapshot)
    populations = []
    for number, name in enumerate(config.model.table_names):
        cumulative = _mapped(f"{folder}/{number}.cumulative", sizes[number], np.float64)
        ends = [
            f"SELECT {side} AS row FROM {scanned} WHERE rel IN ({', '.join(map(str, relations))})"
            for side in ("lhs", "rhs")
            if (relations := [rel for rel, r in enumerate(config.model.relations) if getattr(r, side) == name])
        ]
        query = f"SELECT row, count(*) AS degree FROM ({' UNION ALL '.join(ends)}) GROUP BY row"
        for batch in con.sql(query).to_arrow_reader(1 << 18):
            degree = batch.column("degree").to_numpy().astype(np.float64)
            cumulative[batch.column("row").to_numpy()] = degree**config.negatives.alpha
        np.cumsum(cumulative, out=cumulative)
        populations.append(Population(sizes[number], cumulative))
    return populations


def _mapped(path: str, length: int, kind: type) -> np.ndarray:
    """Return zeros in a new file mapped into memory (an empty file cannot be mapped)."""
    return np.memmap(path, dtype=kind, mode="w+", shape=(length,)) if length else np.zeros(0, kind)


def _lists(parts: list[np.ndarray], kind: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts).astype(kind, copy=False)))


def _threads(config: TwhinConfig) -> int:
    return config.launch.duckdb_threads or os.cpu_count() or 1
