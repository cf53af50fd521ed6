"""Vocabularies on Spark: which row an entity has, as `graph.vocabulary` gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import directions, pairs
from twhin_pipeline.graph import vocabulary as numbering
from twhin_pipeline.spark import tables
from twhin_pipeline.spark.session import ROWS_AT_ONCE, ROWS_PER_TASK, expect, session, tasks
from twhin_pipeline.spark.tables import sql_type
from twhin_pipeline.store import Store, database

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest

ROWS_PER_GROUP = 122_880


def build(config: TwhinConfig, store: Store, snapshot: str, *, compact: bool = False) -> dict[str, Manifest]:
    """Write `vocabulary/<entity>` of every entity type, and return the manifests by entity type.

    Each row is the one that `graph.vocabulary.build` gives its id.

    Raises:
        UserError: As `graph.vocabulary.build` does.
    """
    edges = store.manifest("raw_edges", snapshot)
    parents = store.versions(snapshot, ["raw_edges"])
    of_graph = {
        directions.FIRST: directions.at_first(config, store, snapshot),
        pairs.PAIRS: pairs.count(config, store, snapshot),
    }
    manifests = {}
    with session(config) as spark:
        from pyspark.sql import functions as f

        expect(spark, 2 * edges.rows)
        degrees = _degrees(spark, config, store, edges).persist(tables.on_disk())
        try:
            counts = degrees.groupBy("type").agg(f.count("*").alias("used"), f.max("degree").alias("largest"))
            found = {row["type"]: (row["used"], row["largest"]) for row in counts.collect()}
            for number, entity in enumerate(config.model.table_names):
                mine, of_type = degrees.where(f"type = {number}").select("id", "degree"), found.get(number, (0, 0))
                manifests[entity] = _build_one(
                    spark, config, store, snapshot, entity, mine, of_type, of_graph, parents, compact
                )
        finally:
            degrees.unpersist()
    return manifests


def _degrees(spark: SparkSession, config: TwhinConfig, store: Store, edges: Manifest) -> DataFrame:
    """Return how many edges each id has as an entity of each type: `type` (its number), `id` and `degree`."""
    from pyspark.sql import functions as f

    types = {name: number for number, name in enumerate(config.model.table_names)}
    ends = {one.name: (types[one.lhs], types[one.rhs]) for one in config.model.relations}
    schema = pa.schema([("type", pa.int32()), ("id", _arrow(edges.schema["lhs"])), ("degree", pa.int64())])

    def count(batch: pa.RecordBatch) -> tables.Batches:
        table = pa.Table.from_batches([batch])
        counts = []
        for side, place in (("lhs", 0), ("rhs", 1)):
            found = table.group_by(["rel", side]).aggregate([([], "count_all")])
            kinds = [ends[name][place] if name in ends else -1 for name in found["rel"].to_pylist()]
            counts.append(
                pa.table(
                    {
                        "type": pa.array(kinds, pa.int32()),
                        "id": found[side].cast(schema.field("id").type),
                        "degree": found["count_all"].cast(pa.int64()),
                    }
                )
            )
        made = pa.concat_tables(counts).cast(schema).combine_chunks()
        yield from made.filter(pc.greater_equal(made["type"], 0)).to_batches()

    ddl = f"type int, id {sql_type(edges.schema['lhs'])}, degree bigint"
    counted = tables.read(spark, store, tables.written(store, edges), ["lhs", "rel", "rhs"], ddl, count)
    return counted.groupBy("type", "id").agg(f.sum("degree").alias("degree"))


def _arrow(kind: str) -> pa.DataType:
    return pa.string() if sql_type(kind) == "string" else pa.int64()


def _known(
    spark: SparkSession, config: TwhinConfig, store: Store, snapshot: str, entity: str, before: Manifest | None
) -> DataFrame:
    """Return the rows that are given: `id`, `row`, `first_snapshot`, `last_snapshot` and `evicted`."""
    with database.connect(config, store) as con:
        earlier = numbering.earlier_rows(con, config, store, snapshot, entity, before)
        kind = str(con.execute(f"DESCRIBE SELECT id FROM {earlier.sql}").fetchall()[0][1])
        items = []
        for path in earlier.files:
            rows = int(con.execute("SELECT num_rows FROM parquet_file_metadata(?)", [path]).fetchall()[0][0])
            items += [(path, first, min(first + ROWS_PER_TASK, rows)) for first in range(0, rows, ROWS_PER_TASK)]
    ids = "bigint" if kind == "BIGINT" else "string"
    root, columns = store.root, earlier.columns

    def read(item: tuple[str, int, int]) -> tables.Batches:
        path, first, last = item
        with database.connect(config, Store(root)) as con:
            con.execute("SET threads = 1")
            if "://" in path:
                database.register(con, path)
            scanned = database.parquet([path], "file_row_number = true")
            inner = f"SELECT {columns} FROM {scanned} WHERE file_row_number >= {first} AND file_row_number < {last}"
            made = f"SELECT CAST(id AS {kind}) AS id, CAST(row AS BIGINT) AS row, * EXCLUDE (id, row) FROM ({inner})"
            yield from con.sql(made).to_arrow_reader(ROWS_AT_ONCE)

    schema = f"id {ids}, row bigint, first_snapshot string, last_snapshot string, evicted boolean"
    return tables.each(spark, items, read, schema)


def _build_one(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    entity: str,
    degrees: DataFrame,
    of_type: tuple[int, int],
    of_graph: dict[str, Any],
    parents: dict[str, str],
    compact: bool,
) -> Manifest:
    from pyspark.sql import functions as f

    asset = f"vocabulary/{entity}"
    before, compact = numbering.grown_from(store, snapshot, asset, compact)
    parents = dict(parents)
    if before is not None:
        parents[f"{asset}@{before.snapshot}"] = before.version
    known = _known(spark, config, store, snapshot, entity, before)
    # Either all ids are integers or none.
    if "string" in (dict(known.dtypes)["id"], dict(degrees.dtypes)["id"]):
        known, degrees = (each.withColumn("id", f.col("id").cast("string")) for each in (known, degrees))
    chain = numbering.chain_of(before)
    since = numbering.kept_since(config, chain, snapshot)
    joined = known.withColumnRenamed("row", "row_before").join(degrees, "id", "full_outer")
    is_new = f.col("row_before").isNull()
    degree = f.coalesce("degree", f.lit(0)).cast("bigint")
    every = joined.where(~is_new | (f.col("degree") >= config.vocabulary.min_count)).select(
        "id",
        "row_before",
        degree.alias("degree"),
        f.coalesce("first_snapshot", f.lit(snapshot)).alias("first_snapshot"),
        f.when(degree > 0, f.lit(snapshot)).otherwise(f.col("last_snapshot")).alias("last_snapshot"),
        f.coalesce("evicted", f.lit(False)).alias("was_evicted"),
    )
    last_seen = f.coalesce("last_snapshot", "first_snapshot")
    # An eviction lasts, whatever keep_departed is later, until the id returns.
    evicted = (f.col("degree") == 0) & (f.col("was_evicted") | (last_seen < since))
    rows = every.select("*", evicted.alias("evicted"))
    if compact:
        rows = rows.where(~(f.col("was_evicted") & (f.col("degree") == 0)))
    # Known rows in their order, then new ones by degree, the largest first, then by id: positions are rows.
    order = [f.col("row_before").asc_nulls_last(), f.col("degree_of_new").desc(), f.col("id").asc()]
    keyed = rows.withColumn("degree_of_new", f.when(f.col("row_before").isNull(), f.col("degree")).otherwise(f.lit(0)))
    size = (0 if before is None else before.rows) + of_type[0]
    ordered = keyed.repartitionByRange(tasks(spark, size, 1_000_000), *order).sortWithinPartitions(*order)
    ordered = ordered.persist(tables.on_disk())
    try:
        counts = {row["part"]: row for row in ordered.groupBy(f.spark_partition_id().alias("part")).agg(
            f.count("*").alias("rows"),
            f.count("row_before").alias("known"),
            f.count(f.when(f.col("degree") > 0, 1)).alias("counted"),
            f.count(f.when(f.col("evicted"), 1)).alias("evicted"),
        ).collect()}  # fmt: skip
        total = {name: sum(row[name] for row in counts.values()) for name in ("rows", "known", "counted", "evicted")}
        used, largest = of_type
        below = used - total["counted"]
        # Only a table that is compacted leaves known ids out.
        left_out = known.count() - total["known"] if compact else 0
        numbering.check_size(config, entity, total["rows"], below)
        starts, start = {}, 0
        for part in sorted(counts):
            starts[part] = start
            start += counts[part]["rows"]
        _refuse_conflict(spark, config, store, asset, snapshot, ordered, starts)
        read = settings(config, "vocabulary")
        with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read) as draft:
            write = _writes(tables.Place.of(draft), dict(degrees.dtypes)["id"], starts, compact)
            tables.finish(draft, ordered.mapInArrow(write, tables.REPORT).collect())
            draft.details = {
                "known": total["known"],
                "new": total["rows"] - total["known"],
                "below_min_count": below,
                "largest_degree": largest,
                "earlier_snapshot": before.snapshot if before else None,
                "departed": total["rows"] - total["counted"],
                "evicted": total["evicted"],
                "grown_through": chain,
                "left_out": left_out,
                **of_graph,
                "compacted": snapshot if compact else before.details.get("compacted") if before else None,
                "engine": "spark",
            }
    finally:
        ordered.unpersist()
    return store.manifest(asset, snapshot)


def _refuse_conflict(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    asset: str,
    snapshot: str,
    ordered: DataFrame,
    starts: dict[int, int],
) -> None:
    """Refuse rows that contradict those of a later snapshot (`graph.vocabulary.refuse_conflict`)."""
    later = numbering.later_version(store, asset, snapshot)
    if later is None:
        return

    def number(batches: tables.Batches) -> tables.Batches:
        row = starts.get(tables.part_number(), 0)
        for batch in batches:
            rows = np.arange(row, row + len(batch))
            row += len(batch)
            yield pa.record_batch([batch.column("id").cast(pa.string()), pa.array(rows)], names=["id", "row"])

    now = ordered.mapInArrow(number, "id string, row bigint")
    kind = sql_type(later.schema["id"])
    there = tables.read(spark, store, tables.written(store, later), ["id", "row"], f"id {kind}, row bigint")
    there = there.selectExpr("CAST(id AS string) AS id", "row AS later")
    conflicts = now.join(there, "id").where("row <> later").count()
    if conflicts:
        raise UserError(numbering.conflict_message(later, snapshot, conflicts))


def _writes(
    place: tables.Place, kind: str, starts: dict[int, int], compact: bool
) -> Callable[[tables.Batches], tables.Batches]:
    schema = pa.schema(
        [("id", pa.string() if kind == "string" else pa.int64()), *list(numbering.COLUMNS)[1:]]
        + ([("row_before", pa.int64())] if compact else [])
    )

    def write(batches: tables.Batches) -> tables.Batches:
        filled = tables.first_filled(batches)
        if filled is None:
            return
        name, first = tables.part_name(), starts[tables.part_number()]
        row = first
        with place.file(name) as path:
            with tables.parquet_writer(path, schema) as writer:
                for batch in filled:
                    columns = {field: batch.column(field) for field in batch.schema.names}
                    columns["row"] = pa.array(np.arange(row, row + len(batch)))
                    row += len(batch)
                    arrays = [columns[field.name].cast(field.type) for field in schema]
                    writer.write_table(pa.table(arrays, schema=schema), row_group_size=ROWS_PER_GROUP)
            made = tables.report(name, path, row - first)
        yield made

    return write
