"""The training set's positives and what is held out, on Spark: edges split, shuffled and cut into chunks.

Which edge goes where, and in which order edges are, follows from their hashes as in `training_set`; it does not depend
on the number of tasks. A relation of many edges is divided into buckets, each of which is cut into chunks by itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph.edge_file import NO_TIME
from twhin_pipeline.spark import tables
from twhin_pipeline.spark.encoding import Add, encoded, steps_of, unsigned
from twhin_pipeline.spark.session import expect, session
from twhin_pipeline.training_set import positives, split
from twhin_pipeline.training_set.held_edges import HELD
from twhin_pipeline.training_set.shuffle import Order
from twhin_pipeline.words import PARTS, REPEATS, TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest, Store

Array = np.ndarray[Any, Any]
EDGES_PER_FILE = 1_000_000
KNOWN = "lhs >= 0 AND rhs >= 0"
"""Both ends are in their vocabularies."""
COLLECTED, _DIGIT = 1 << 16, 16
PLACE = ["file", "bucket", "position"]
"""Where an edge is in the order of its part; as it is read, where it is if it is for training, as most are."""
EDGE_NAMES = ["rel", "ltype", "rtype", "lhs", "rhs", "h", "weight", *PLACE]
EDGE = (
    "rel int, ltype int, rtype int, lhs bigint, rhs bigint, h bigint, weight float, "
    "file int, bucket int, position bigint"
)


def build(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `training_set/positives`, `held_out/validation` and `held_out/test`, and with `split.repeats` the repeats.

    Rows and details are those of `training_set.positives.build_positives`, but for these: of edges whose hashes agree
    in their lower half the one with the smaller hash comes first, and a relation of more than `EDGES_PER_FILE` edges
    may have a chunk more for each of its files.

    Raises:
        UserError: Nothing is left to train on, or a table is missing.
    """
    names = config.model.table_names
    parents = store.versions(snapshot, ["raw_edges", *(f"vocabulary/{name}" for name in names)])
    raw = store.manifest("raw_edges", snapshot)
    with session(config) as spark:
        expect(spark, raw.rows)
        edges = _Split(spark, config, store, snapshot)
        try:
            return _write(spark, config, store, snapshot, edges, parents)
        finally:
            edges.close()


class _Split:
    """Edges by part: `train` and `held` have `part`, and `again` where an edge happens again in the test's time."""

    def __init__(self, spark: SparkSession, config: TwhinConfig, store: Store, snapshot: str) -> None:
        from pyspark.sql import functions as f

        self.kept: list[DataFrame] = []
        raw = store.manifest("raw_edges", snapshot).details["edges_per_relation"]
        sizes = np.array([raw.get(name, 0) for name in config.model.relation_names], np.int64)
        self.layout, self.order = _Layout.of(sizes), Order.of(config.negatives.seed, "chunks")
        """Of training edges, of which there are no more than all."""
        place = _places(self.layout, self.order)
        strategy: split.Strategy
        if config.split.strategy == "temporal":
            # Weights depend on when the held-out time begins, which the edges' times say.
            times = ["time", "first_time"]
            self.all = self._keep(encoded(spark, config, store, snapshot, times, None, place, PLACE))
            strategy = _temporal(config, self.all)
            if strategy.before is not None and steps_of(store, store.manifest("raw_edges", snapshot)):
                self.all = self._keep(encoded(spark, config, store, snapshot, times, strategy.before, place, PLACE))
            schema = f"{EDGE}, time bigint, first_time bigint, part tinyint, again boolean"
            assigned = self._keep(self.all.where(KNOWN).mapInArrow(_assigns(strategy), schema))
        else:
            strategy = (
                split.Given(config)
                if config.split.strategy == "given"
                else split.Random(config, validation=config.split.validation, test=config.split.test)
            )
            columns = ["split"] if config.split.strategy == "given" else []
            add = _places(self.layout, self.order, strategy)
            self.all = self._keep(encoded(spark, config, store, snapshot, columns, None, add, [*PLACE, "part"]))
            assigned = self.all.where(KNOWN).withColumn("again", f.lit(False))
        settled = self._keep(self._settled(strategy, assigned))
        self.held = settled.where(f"part <> {TRAIN}")
        plain = [*EDGE_NAMES, "part", "again"]
        self.train = assigned.where(f"part = {TRAIN}").select(plain).unionAll(
            settled.where(f"part = {TRAIN}").select(plain)
        )  # fmt: skip
        part = f.coalesce("split", f.lit(TRAIN)) if "split" in self.all.columns else f.lit(TRAIN)
        self.without_row = np.zeros((len(PARTS), len(config.model.relations)), np.int64)
        """Raw edges with an entity in no vocabulary, by part and relation."""
        for row in self.all.where(f"NOT ({KNOWN})").groupBy(part.alias("part"), "rel").count().collect():
            self.without_row[row["part"], row["rel"]] = row["count"]

    def _keep(self, frame: DataFrame) -> DataFrame:
        self.kept.append(frame.persist(tables.on_disk()))
        return self.kept[-1]

    def close(self) -> None:
        for frame in self.kept:
            frame.unpersist()

    def _settled(self, strategy: split.Strategy, assigned: DataFrame) -> DataFrame:
        """Return the edges that may be held out with the part of each: some are given back to training."""
        from pyspark.sql import functions as f

        proposed = assigned.where(f"part <> {TRAIN}")
        if isinstance(strategy, split.Temporal):
            of_held, of_test = (
                _last(proposed, count, time)
                for count, time in ((strategy.held, strategy.before), (strategy.test, strategy.test_from))
            )
            return proposed.mapInArrow(_divides(of_held, of_test), proposed.schema)
        open_part = f.col("part") != TRAIN
        result = proposed
        if isinstance(strategy, split.Given):
            carved = f.col("part") == split.CARVED
            if proposed.where(f"part = {VALIDATION}").limit(1).count():
                return proposed.withColumn(
                    "part", f.when(carved, f.lit(TRAIN)).otherwise(f.col("part")).cast("tinyint")
                )
            open_part = carved
        if isinstance(strategy, split.Random | split.Given) and strategy.connected:
            result = self._connected(assigned, proposed, open_part)
        return result.withColumn(
            "part",
            f.when(f.col("part") == split.CARVED, f.lit(VALIDATION)).otherwise(f.col("part")).cast("tinyint"),
        )

    def _connected(self, assigned: DataFrame, proposed: DataFrame, open_part: Column) -> DataFrame:
        """Give each entity without a training edge that edge back, of those that may be, whose hash is the largest."""
        from pyspark.sql import functions as f

        ends = assigned.select("ltype", "lhs", "rtype", "rhs", "h", (f.col("part") == TRAIN).alias("trained"),
                               f.when(open_part, f.col("h")).alias("held"))  # fmt: skip
        both = ends.selectExpr("ltype AS type", "lhs AS row", "trained", "held").unionAll(
            ends.selectExpr("rtype AS type", "rhs AS row", "trained", "held")
        )
        needy = both.groupBy("type", "row").agg(f.max("trained").alias("trained"), f.max("held").alias("largest"))
        needy = self._keep(needy.where("NOT trained AND largest IS NOT NULL"))
        result = proposed
        for side in ("l", "r"):
            named = needy.select(f.col("type").alias(f"{side}type"), f.col("row").alias(f"{side}hs"),
                                 f.col("largest").alias(f"{side}largest"))  # fmt: skip
            result = result.join(named, [f"{side}type", f"{side}hs"], "left")
        back = f.coalesce(f.col("llargest") == f.col("h"), f.lit(False)) | f.coalesce(
            f.col("rlargest") == f.col("h"), f.lit(False)
        )
        part = f.when(open_part & back, f.lit(TRAIN)).otherwise(f.col("part")).cast("tinyint")
        return result.withColumn("part", part).select(proposed.columns)


def _places(layout: _Layout, order: Order, strategy: split.Strategy | None = None) -> Add:
    """Return what adds to a relation's edges their places in training, and the part that a strategy proposes."""

    def add(rel: int, h: Array, columns: dict[str, Array]) -> dict[str, Array]:
        placed = layout.places(order, np.full(len(h), rel), h)
        return placed if strategy is None else placed | {"part": strategy.parts(rel, h, columns)}

    return add


def _assigns(strategy: split.Temporal) -> Callable[[tables.Batches], tables.Batches]:
    """Return what adds to edges the `part` that a strategy proposes, and `again`."""

    def assign(batches: tables.Batches) -> tables.Batches:
        for batch in batches:
            rel = batch.column("rel").to_numpy()
            h = unsigned(batch.column("h").to_numpy())
            times = {name: batch.column(name).to_numpy() for name in strategy.columns}
            part, again = np.zeros(len(batch), np.int8), np.zeros(len(batch), bool)
            for number in np.unique(rel).tolist():
                mine = np.flatnonzero(rel == number)
                own = {name: column[mine] for name, column in times.items()}
                part[mine] = strategy.parts(number, h[mine], own)
                again[mine] = strategy.repeated(number, own["time"], own["first_time"])
            names = [*EDGE_NAMES, *times]
            arrays = [*map(batch.column, names), pa.array(part), pa.array(again)]
            yield pa.RecordBatch.from_arrays(arrays, names=[*names, "part", "again"])

    return assign


def _temporal(config: TwhinConfig, edges: DataFrame) -> split.Temporal:
    """Find the times of a split by time."""
    chosen = np.flatnonzero(split.splittable(config)).tolist()
    dated = edges.where(f"{KNOWN} AND first_time <> {NO_TIME}")
    if len(chosen) < len(config.model.relations):
        dated = dated.where(f"rel IN ({', '.join(map(str, chosen)) or 'NULL'})")
    size = dated.count()
    return split.Temporal(config, size, lambda place: _nth(dated, "first_time", place, size)[0])


def _nth(frame: DataFrame, column: str, place: int, size: int) -> tuple[int, int]:
    """Return the value of an int64 column at a place among all `size` ones, ascending, and how many are smaller.

    Values are counted by 16 bits at a time, the upper ones first, until few are left; no more than `COLLECTED` numbers
    are ever collected.
    """
    from pyspark.sql import functions as f

    value, below, rest, shift = 0, 0, frame, 64
    while size > COLLECTED and shift:
        shift -= _DIGIT
        digit = f.shiftright(column, shift)
        counts = {row["digit"]: row["count"] for row in rest.groupBy(digit.alias("digit")).count().collect()}
        for number in sorted(counts):
            if below + counts[number] > place:
                value, size = number, counts[number]
                break
            below += counts[number]
        rest = rest.where(digit == value)
    if shift:
        values = sorted(row[0] for row in rest.select(column).collect())
        value = values[place - below]
        below += bisect_left(values, value)
    return value, below


def _last(held: DataFrame, count: int, time: int | None) -> split.Last:
    """Find where the last `count` edges begin, as `split.Temporal.settle` does."""
    if time is None:
        return split.Last(None)
    left = count - held.where(f"first_time > {time}").count()
    tied = held.where(f"first_time = {time}")
    h, below = _nth(tied, "h", left - 1, tied.count())
    close = sorted((row["lhs"], row["rhs"]) for row in tied.where(f"h = {h}").select("lhs", "rhs").collect())
    return split.Last(time, (unsigned(np.array([h]))[0], *close[left - below - 1]))


def _divides(of_held: split.Last, of_test: split.Last) -> Callable[[tables.Batches], tables.Batches]:
    def divide(batches: tables.Batches) -> tables.Batches:
        for batch in batches:
            records = np.zeros(len(batch), HELD)
            for name in ("lhs", "rhs", "first_time"):
                records[name] = batch.column(name).to_numpy()
            records["h"] = unsigned(batch.column("h").to_numpy())
            split.divide(records, of_held, of_test)
            place = batch.schema.get_field_index("part")
            arrays = [pa.array(records["part"]) if n == place else batch.column(n) for n in range(batch.num_columns)]
            yield pa.RecordBatch.from_arrays(arrays, names=batch.schema.names)

    return divide


@dataclass(frozen=True)
class _Layout:
    """Into which buckets and files edges are put: int64 `[R]`, `[R]` and `[B]`."""

    buckets: Array
    first: Array
    file: Array

    @classmethod
    def of(cls, sizes: Array) -> _Layout:
        """Return one for about so many edges of each relation; buckets are numbered relation by relation."""
        buckets = np.maximum(-(-sizes // EDGES_PER_FILE), 1)
        each = np.repeat(sizes / buckets, buckets)
        before = np.cumsum(each) - each
        file = (before // EDGES_PER_FILE).astype(np.int64)
        return cls(buckets, np.cumsum(buckets) - buckets, np.unique(file, return_inverse=True)[1])

    @property
    def files(self) -> int:
        return int(self.file[-1]) + 1

    def places(self, order: Order, rel: Array, h: Array) -> dict[str, Array]:
        """Return the file and the bucket of edges `[n]`, and their position in all of the order: bucket, then order.

        Spark compares 64 bits of the first key before it looks at any row, so that one number sorts faster than two.
        """
        within = order.positions((h & np.uint64(2**32 - 1)).astype(np.uint32)).astype(np.int64)
        bucket = self.first[rel] + (within * self.buckets[rel] >> 32)
        position = (bucket << 32) + within
        return {"file": self.file[bucket].astype(np.int32), "bucket": bucket.astype(np.int32), "position": position}


def _placed(edges: DataFrame, layout: _Layout, order: Order) -> DataFrame:
    """Return edges with their places in another part than that for training."""

    def place(batches: tables.Batches) -> tables.Batches:
        for batch in batches:
            rel, h = batch.column("rel").to_numpy(), unsigned(batch.column("h").to_numpy())
            columns = dict(zip(EDGE_NAMES, map(batch.column, EDGE_NAMES), strict=True))
            columns |= {name: pa.array(values) for name, values in layout.places(order, rel, h).items()}
            yield pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))

    return edges.select(EDGE_NAMES).mapInArrow(place, EDGE)


def _write(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    edges: _Split,
    parents: dict[str, str],
) -> dict[str, Manifest]:

    relations = config.model.relation_names
    held = np.zeros((len(PARTS), len(relations)), np.int64)
    for row in edges.held.groupBy("part", "rel").count().collect():
        held[row["part"], row["rel"]] = row["count"]
    parts = [_Part(edges.train, edges.layout, config)]
    for number in (VALIDATION, TEST):
        layout = _Layout.of(held[number])
        parts.append(_Part(_placed(edges.held.where(f"part = {number}"), layout, edges.order), layout, config))
    if not parts[TRAIN].counts.any():
        raise UserError(
            "training_set/positives: no edge is left to train on; lower split.validation, split.test or "
            "vocabulary.min_count"
        )
    total = sum(int(part.counts.sum()) for part in parts)
    details = _details(config, edges)
    read = settings(config, "sample")
    manifests = {}

    def write(asset: str, part: _Part, more: dict[str, Any]) -> None:
        with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read) as draft:
            reports = part.write(tables.Place.of(draft))
            if reports:
                tables.finish(draft, reports)
            else:
                draft.write(positives.SCHEMA.empty_table())
            draft.details = {
                "chunk_size": config.negatives.chunk_size,
                "num_chunks": int(part.chunks.sum()),
                "edges_per_relation": dict(zip(relations, part.counts.tolist(), strict=True)),
                "share": int(part.counts.sum()) / max(total, 1),
                "weight": float(sum(row["numbers"][0] for row in reports)),
                "engine": "spark",
            } | more
        manifests[asset] = store.manifest(asset, snapshot)

    for asset, part, more in zip(positives.ASSETS, parts, details, strict=True):
        write(asset, part, more)
    if config.split.repeats:
        write(REPEATS, _Part(edges.train.where("again"), edges.layout, config), {})
    return manifests


class _Part:
    """The edges of a part in their order, and how they are cut into chunks."""

    def __init__(self, placed: DataFrame, layout: _Layout, config: TwhinConfig) -> None:
        self.layout, self.placed = layout, placed
        self.in_bucket = np.zeros(len(layout.file), np.int64)
        """Edges by bucket, int64 `[B]`."""
        for row in self.placed.groupBy("bucket").count().collect():
            self.in_bucket[row["bucket"]] = row["count"]
        self.counts = np.add.reduceat(self.in_bucket, layout.first)
        """Edges by relation, int64 `[R]`."""
        self.chunks = -(-self.in_bucket // config.negatives.chunk_size)
        """Chunks by bucket, int64 `[B]`."""

    def write(self, place: tables.Place) -> list[Any]:
        """Write the files, and return the reports."""
        from pyspark.sql import functions as f

        keys = ["position", "h", "lhs", "rhs"]
        ordered = self.placed.repartitionById(self.layout.files, f.col("file")).sortWithinPartitions(*keys)
        write = _writes(place, self.in_bucket, self.chunks, self.layout.file)
        return ordered.select("bucket", "lhs", "rhs", "rel", "weight").mapInArrow(write, tables.REPORT).collect()


def _writes(
    place: tables.Place, in_bucket: Array, chunks: Array, file_of: Array
) -> Callable[[tables.Batches], tables.Batches]:
    first_chunk = np.cumsum(chunks) - chunks
    before = np.cumsum(in_bucket) - in_bucket

    def write(batches: tables.Batches) -> tables.Batches:
        filled = tables.first_filled(batches)
        if filled is None:
            return
        name = tables.part_name()
        # This file's edges follow one another among all.
        done = int(before[np.searchsorted(file_of, tables.part_number())])
        first, weight = done, 0.0
        waiting: list[pa.RecordBatch] = []
        with place.file(name) as path:
            with pq.ParquetWriter(
                path,
                positives.SCHEMA,
                compression="zstd",
                use_dictionary=["chunk", "rel", "weight"],
                column_encoding=positives.ENCODING,
            ) as writer:

                def flush(least: int) -> None:
                    if sum(map(len, waiting)) >= least:
                        writer.write_table(pa.Table.from_batches(waiting), row_group_size=positives.EDGES_PER_ROW_GROUP)
                        waiting.clear()

                for batch in filled:
                    bucket = batch.column("bucket").to_numpy()
                    position = np.arange(done, done + len(batch)) - before[bucket]
                    # Sizes of a bucket's chunks differ by at most one.
                    chunk = (first_chunk[bucket] + position * chunks[bucket] // in_bucket[bucket]).astype(np.int32)
                    done += len(batch)
                    weight += float(batch.column("weight").to_numpy().sum(dtype=np.float64))
                    columns = [pa.array(chunk), *(batch.column(name) for name in positives.SCHEMA.names[1:])]
                    waiting.append(pa.RecordBatch.from_arrays(columns, schema=positives.SCHEMA))
                    flush(positives.EDGES_PER_ROW_GROUP)
                flush(1)
            made = tables.report(name, path, done - first, [weight])
        yield made

    return write


def _details(config: TwhinConfig, edges: _Split) -> list[dict[str, Any]]:
    """Return what is said of each part besides, as `SplitEdges.details` does."""
    from pyspark.sql import functions as f

    relations, types = config.model.relation_names, config.model.table_names
    unseen = dict.fromkeys(types, 0)
    ends = _ends(edges.train, True).unionAll(_ends(edges.held, False))
    seen = ends.groupBy("type", "row").agg(f.max("trained").alias("trained"))
    for row in seen.where("NOT trained").groupBy("type").count().collect():
        unseen[types[row["type"]]] = row["count"]
    result: list[dict[str, Any]] = [
        {
            "without_row": dict(zip(relations, edges.without_row.sum(0).tolist(), strict=True)),
            "entities_without_training_edge": unseen,
            "left_out": 0,
        }
    ]
    leakage = _leakage(config, edges.held, edges.train)
    for part in (VALIDATION, TEST):
        counts = {
            name: {"reverse": int(leakage[1][part, rel]), "same_pair": int(leakage[0][part, rel])}
            for rel, name in enumerate(relations)
        }
        result.append({"leakage": counts, "dropped": int(edges.without_row[part].sum())})
    if config.split.strategy == "temporal":
        again = dict.fromkeys(relations, 0)
        for row in edges.train.where("again").groupBy("rel").count().collect():
            again[relations[row["rel"]]] = row["count"]
        result[TEST]["repeated_edges"] = again
    return result


def _ends(edges: DataFrame, trained: bool) -> DataFrame:
    """Return the entities at both ends of edges, which are trained on or held out."""
    left, right = (
        edges.selectExpr(f"{side}type AS type", f"{side}hs AS row", f"{trained} AS trained") for side in ("l", "r")
    )
    return left.unionAll(right)


def _leakage(config: TwhinConfig, held: DataFrame, train: DataFrame) -> tuple[Array, Array]:
    """Count held-out edges, by part and relation, whose pair, and whose reverse, training has: int64 `[3, R]` each."""
    ends = [(one.lhs, one.rhs) for one in config.model.relations]
    result = np.zeros((2, len(PARTS), len(ends)), np.int64)
    keys = ["ltype", "rtype", "lhs", "rhs"]
    # An edge is held out or trained on: the same pair is one of another relation.
    alike = [rel for rel, pair in enumerate(ends) if ends.count(pair) > 1]
    turned = [rel for rel, (left, right) in enumerate(ends) if (right, left) in ends]
    reverse = train.selectExpr("rel", "rtype AS ltype", "ltype AS rtype", "rhs AS lhs", "lhs AS rhs")
    # A self-loop is its own reverse.
    no_loop = held.where("NOT (ltype = rtype AND lhs = rhs)")
    for how, (chosen, wanted, trained) in enumerate(((alike, held, train), (turned, no_loop, reverse))):
        if chosen:
            listed = f"rel IN ({', '.join(map(str, chosen))})"
            found = wanted.where(listed).join(trained.where(listed).select(keys), keys, "left_semi")
            for row in found.groupBy("part", "rel").count().collect():
                result[how, row["part"], row["rel"]] = row["count"]
    return result[0], result[1]
