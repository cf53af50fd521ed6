"""Ingest on Spark: `raw_edges` and `raw_edges_rejected`, as `graph.raw_edges` writes them.

Tasks read pieces of the source and judge each row. Edges are divided by ranges of (relation, lhs, rhs) and sorted; each
task merges and writes its range, so the files together are in the table's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config import relations
from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import edge_file, edge_sort, file_facts, raw_edges, source
from twhin_pipeline.graph.scan import OUTSIDE_WINDOW, Reason, Rows, Scan
from twhin_pipeline.spark import sources, tables
from twhin_pipeline.spark.session import ROWS_AT_ONCE, session, tasks
from twhin_pipeline.store.database import explained
from twhin_pipeline.words import PARTS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.spark.sources import Piece
    from twhin_pipeline.store import Draft, Manifest, Store

Array = np.ndarray[Any, Any]
EDGES_PER_ROW_GROUP, REJECTED_PER_TASK = 1 << 18, 1_000_000
COLUMNS = {"time": "bigint", "weight": "double", "split": "tinyint"}
"""What edges may have besides their relation and ends."""
MALFORMED = -1
"""The fate of what is no row of a text file; a source's is this minus its number."""


def ingest(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Write `raw_edges` and `raw_edges_rejected` of a snapshot, and return the manifest of `raw_edges`.

    Edges, their order, rejected rows and details are those of `graph.raw_edges.ingest`, but for these: the table has as
    many files as tasks wrote, it has no `_numbers/` beside it and no `log_state` and `log_rows` in its details, and a
    rejected row of a table of Delta Lake or Iceberg names the data file, and its row there.

    Raises:
        UserError: As `graph.raw_edges.ingest` does.
    """
    with store.writing(snapshot, ["raw_edges", "raw_edges_rejected"]), session(config) as spark:
        inputs = source.inputs(config, snapshot)
        # Now: of one that changes while it is read, the time of the change is later than this.
        files = file_facts.facts(dict.fromkeys(file for one in inputs for file in one.files))
        fingerprint = source.fingerprint(config, snapshot)
        known = set(config.model.relation_names) if config.model.every_other is None else None
        scans, pieces = sources.scans_of(spark, config, inputs, known)
        names = []
        if config.model.every_other is not None:
            names = sources.relation_names(spark, config, scans, pieces)
        possible = relations.with_found(config, names)
        raw_edges.check_names(inputs, possible.model.relation_names)
        rows = Rows(scans, config, len(inputs), all(scan.integers for scan in scans), lambda _: "twhin_rows")
        columns = raw_edges.edge_columns(inputs)
        judged = _judged(spark, possible, scans, pieces, rows, columns).persist(tables.on_disk())
        try:
            counted = _counted(judged, rows, len(possible.model.relations), "time" in columns)
            edges_of = counted.edges.sum(0)
            if edges_of.any():
                used = np.flatnonzero(edges_of).tolist()
                config = relations.with_found(config, [possible.model.relation_names[rel] for rel in used])
            _write_rejected(spark, config, store, snapshot, judged, scans, counted)
            what = ", ".join(one.field for one in inputs)
            if not edges_of.any():
                raise UserError(raw_edges.nothing(what, inputs, store, snapshot, counted))
            weigh = raw_edges.repeat_weights(inputs, counted.edges, possible.model.relation_names)
            kept = _write_kept(spark, config, store, snapshot, judged, counted, possible, weigh, columns)
        finally:
            judged.unpersist()
        kept.details |= raw_edges.details(
            store, snapshot, inputs, scans, counted, possible.model.relation_names, kept.details
        )
        kept.details |= {"source_files": files, "source_fingerprint": fingerprint, "engine": "spark"}
        kept.commit(config_hash=config.hash(), parents={}, settings=settings(config, "ingest"))
    return store.manifest("raw_edges", snapshot)


def _judged(
    spark: SparkSession,
    config: TwhinConfig,
    scans: Sequence[Scan],
    pieces: Sequence[Piece],
    rows: Rows,
    columns: Sequence[str],
) -> DataFrame:
    """Return all rows: `fate` and `rel`, the ends and columns of edges, and the others as JSON in `rejected`.

    A row stands for `n` ones: those outside the window are only counted.
    """
    integers = all(scan.integers for scan in scans)
    parts, reasons, count = list(rows.parts), list(rows.reasons), rows.sources
    sections = {scan.source: scan.input.section for scan in scans}
    outside = [count + number for number, reason in enumerate(reasons) if reason.text == OUTSIDE_WINDOW]
    schema = _schema(integers, columns)
    arrow = _arrow(integers, columns)

    def read(piece: Piece) -> tables.Batches:
        scan = scans[piece.scan]
        with sources.connection(config) as con, explained(piece.origin), sources.opened(con, piece, scan) as opened:
            here = replace(scan, staged=[opened.staged])
            raw_edges.create_relations(con, config, config.model.relations)
            con.execute(f"CREATE TEMP VIEW twhin_rows AS SELECT * FROM {opened.sql}")
            con.execute(f"CREATE TEMP TABLE typed AS {parts[piece.scan]}")
            yield from _batches(con, _edges_sql(columns, count), arrow)
            yield from _batches(
                con, f"SELECT fate, count(*) AS n FROM typed WHERE fate IN ({_listed(outside)}) GROUP BY fate", arrow
            )
            # Rejected rows are few, and most pieces have none.
            raw_edges.create_malformed(con, [here])
            query = raw_edges.rejected_rows(con, [(0, here, "FROM typed")], reasons, count, sections)
            yield from _batches(con, _rejected_sql(query, reasons, count, scan.source), arrow)

    return tables.each(spark, pieces, read, schema)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "NULL"


def _edges_sql(columns: Sequence[str], count: int) -> str:
    time = f"coalesce(epoch_us(time), {edge_file.NO_TIME})"
    made = {"time": time, "weight": "weight", "split": "coalesce(split, 1)"}
    chosen = "".join(f", {made[column]} AS {column}" for column in columns)
    return f"SELECT fate, rel, lhs, rhs{chosen} FROM typed WHERE fate < {count}"


def _rejected_sql(query: str, reasons: Sequence[Reason], count: int, source_number: int) -> str:
    """Return the SQL of rejected rows with their fates, by reason and column; others are no rows of a text file."""
    fates = " ".join(
        f"WHEN reason = '{reason.text}' AND \"column\" IS NOT DISTINCT FROM {_text(reason.column)} "
        f"THEN {count + number}"
        for number, reason in enumerate(reasons)
        if reason.source == source_number
    )
    fate = f"CASE {fates} ELSE {MALFORMED - source_number} END" if fates else str(MALFORMED - source_number)
    return f"SELECT {fate} AS fate, CAST(to_json(r) AS VARCHAR) AS rejected FROM ({query}) r"


def _text(value: str | None) -> str:
    return "NULL" if value is None else "'" + value.replace("'", "''") + "'"


def _schema(integers: bool, columns: Sequence[str]) -> str:
    ids = "bigint" if integers else "string"
    more = "".join(f", {column} {COLUMNS[column]}" for column in columns)
    return f"fate int, rel int, lhs {ids}, rhs {ids}{more}, n bigint, rejected string"


def _arrow(integers: bool, columns: Sequence[str]) -> pa.Schema:
    ids = pa.int64() if integers else pa.string()
    kinds = {"time": pa.int64(), "weight": pa.float64(), "split": pa.int8()}
    return pa.schema(
        [("fate", pa.int32()), ("rel", pa.int32()), ("lhs", ids), ("rhs", ids)]
        + [(column, kinds[column]) for column in columns]
        + [("n", pa.int64()), ("rejected", pa.string())]
    )


def _batches(con: Any, query: str, schema: pa.Schema) -> tables.Batches:
    """Run a query, and fill in columns that it lacks: `n` is 1, others are null."""
    for batch in con.sql(query).to_arrow_reader(ROWS_AT_ONCE):
        arrays = []
        for field in schema:
            if field.name in batch.schema.names:
                arrays.append(batch.column(field.name).cast(field.type))
            elif field.name == "n":
                arrays.append(pa.array(np.ones(len(batch), np.int64)))
            else:
                arrays.append(pa.nulls(len(batch), field.type))
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _counted(judged: DataFrame, rows: Rows, number: int, timed: bool) -> raw_edges.Counted:
    """Count rows by fate, edges by source and relation, and their times."""
    from pyspark.sql import functions as f

    counted = raw_edges.Counted(rows.reasons, rows.sources, number)
    reason = f.when(f.col("fate") < 0, f.get_json_object("rejected", "$.reason")).alias("reason")
    time = f.when(f.col("time") != edge_file.NO_TIME, f.col("time")) if timed else f.lit(None).cast("bigint")
    found = (
        judged.groupBy("fate", "rel", reason)
        .agg(f.sum("n").alias("n"), f.count(time).alias("dated"), f.min(time).alias("first"), f.max(time).alias("last"))
        .collect()
    )
    for row in found:
        fate = row["fate"]
        if fate < 0:
            counted.malformed[MALFORMED - fate][row["reason"]] += row["n"]
            continue
        counted.fates[fate] += row["n"]
        if fate >= rows.sources:
            continue
        counted.edges[fate, row["rel"]] += row["n"]
        if timed:
            counted.undated[fate] += row["n"] - row["dated"]
            if row["dated"]:
                first, last = counted.times[fate]
                counted.times[fate] = min(first, row["first"]), max(last, row["last"])
    return counted


def _write_rejected(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    judged: DataFrame,
    scans: Sequence[Scan],
    counted: raw_edges.Counted,
) -> None:
    """Write what was rejected by source, file and row."""
    from pyspark.sql import functions as f

    total = sum(counted.rejected().values())
    sections = list(dict.fromkeys(scan.input.section for scan in scans))
    asset = "raw_edges_rejected"
    with store.replace(asset, snapshot, config_hash=config.hash()) as draft:
        place = tables.Place.of(draft)
        reports = []
        if total:
            order = f.array_position(f.array(*map(f.lit, sections)), f.get_json_object("rejected", "$.source"))
            keyed = judged.where("rejected IS NOT NULL").select(
                order.alias("source"),
                f.get_json_object("rejected", "$.file").alias("file"),
                f.get_json_object("rejected", "$.row").cast("bigint").alias("row"),
                "rejected",
            )
            parts = -(-total // REJECTED_PER_TASK)
            keys = ["source", "file", "row"]
            ordered = keyed.repartitionByRange(parts, *keys).sortWithinPartitions(*keys).select("rejected")
            reports = ordered.mapInArrow(_writes_rejected(place), tables.REPORT).collect()
        if not reports:
            with (
                draft.local_file("part-00000.parquet") as path,
                tables.parquet_writer(path, raw_edges.REJECTED) as writer,
            ):
                writer.write_table(raw_edges.REJECTED.empty_table())
        else:
            tables.finish(draft, reports)


def _writes_rejected(place: tables.Place) -> Callable[[tables.Batches], tables.Batches]:
    def write(batches: tables.Batches) -> tables.Batches:
        name, rows = tables.part_name(), 0
        filled = tables.first_filled(batches)
        if filled is None:
            return
        with place.file(name) as path:
            with tables.parquet_writer(path, raw_edges.REJECTED) as writer:
                for batch in filled:
                    records = [json.loads(text) for text in batch.column(0).to_pylist()]
                    writer.write_table(pa.Table.from_pylist(records, schema=raw_edges.REJECTED))
                    rows += len(records)
            made = tables.report(name, path, rows)
        yield made

    return write


def _write_kept(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    judged: DataFrame,
    counted: raw_edges.Counted,
    possible: TwhinConfig,
    weigh: Array,
    columns: Sequence[str],
) -> Draft:
    """Write the edges to a draft of `raw_edges`, and return it with what can be counted there in its details."""
    names = config.model.relation_names
    number = {name: rel for rel, name in enumerate(names)}
    # Relations that are left out have no edge, and the others keep their order: edges are sorted by either index.
    relations_now = np.array([number.get(name, -1) for name in possible.model.relation_names], np.int32)
    most = np.ones(len(names))
    most[relations_now[relations_now >= 0]] = weigh[relations_now >= 0]
    edges = judged.where(f"fate BETWEEN 0 AND {len(counted.edges) - 1}").select("rel", "lhs", "rhs", *columns)
    keys = ["rel", "lhs", "rhs"]
    parts = tasks(spark, int(counted.edges.sum()), 1_000_000)
    ordered = edges.repartitionByRange(parts, *keys).sortWithinPartitions(*keys)
    draft = store.begin("raw_edges", snapshot)
    try:
        merge = _merges(tables.Place.of(draft), names, relations_now, most, columns)
        reports = ordered.mapInArrow(merge, tables.REPORT).collect()
        tables.finish(draft, reports)
    except BaseException:
        draft.discard()
        raise
    counts = np.sum([row["numbers"] for row in reports if row["numbers"]], axis=0).astype(np.int64)
    edges_of, loops = counts[: len(names)], counts[len(names) :]
    same_type = [relation.lhs == relation.rhs for relation in config.model.relations]
    draft.details = {
        "kept": int(edges_of.sum()),
        "edges_per_relation": dict(zip(names, edges_of.tolist(), strict=True)),
        "relations": names,
        "self_loops": int(loops[same_type].sum()),
    }
    return draft


def _merges(
    place: tables.Place, names: Sequence[str], relations_now: Array, most: Array, columns: Sequence[str]
) -> Callable[[tables.Batches], tables.Batches]:
    """Return what merges and writes sorted rows: the table's file, and beside it how weights grew, if they did."""

    def write(batches: tables.Batches) -> tables.Batches:
        filled = tables.first_filled(batches)
        if filled is None:
            return
        name, rows = tables.part_name(), 0
        steps_name = f"{edge_file.STEPS_FOLDER}/{name}"
        counts = np.zeros((2, len(names)), np.int64)
        writer = steps = None
        with ExitStack() as files:
            path = files.enter_context(place.file(name))
            for rel, lhs, rhs, merged in _groups(filled, relations_now, most, columns):
                table = edge_file.arranged(merged, lhs, rhs, names, PARTS)
                if writer is None:
                    writer = edge_file.writer_of(path, table.schema)
                    if "steps" in merged:
                        steps_path = files.enter_context(place.file(steps_name))
                        steps = edge_file.writer_of_steps(steps_path)
                writer.write_table(table, row_group_size=len(table))
                if steps is not None:
                    steps.write_table(edge_file.steps_table(merged), row_group_size=len(table))
                rows += len(table)
                own = pc.equal(lhs, rhs).to_numpy(zero_copy_only=False)
                counts += [np.bincount(each, minlength=len(names)) for each in (rel, rel[own])]
            assert writer is not None
            writer.close()
            made = [tables.report(name, path, rows, counts.ravel().tolist())]
            if steps is not None:
                steps.close()
                made.append(tables.report(steps_name, steps_path, rows))
        yield from made

    return write


def _groups(
    batches: tables.Batches, relations_now: Array, most: Array, columns: Sequence[str]
) -> Iterator[tuple[Array, pa.Array, pa.Array, dict[str, Array]]]:
    """Yield merged edges, a row group at a time: relations, ends, and columns as `edge_sort.merged` returns them."""
    for table in _whole_edges(batches):
        rel = relations_now[table["rel"].to_numpy()]
        lhs, rhs = (table[side].combine_chunks() for side in ("lhs", "rhs"))
        new = np.ones(len(rel), bool)
        new[1:] = rel[1:] != rel[:-1]
        for side in (lhs, rhs):
            new[1:] |= pc.not_equal(side.slice(1), side.slice(0, len(side) - 1)).to_numpy(zero_copy_only=False)
        records = np.empty(
            len(rel), [("key", np.uint64), ("rel", np.int32), *((c, edge_sort.KINDS[c]) for c in columns)]
        )
        records["rel"] = rel
        # An edge's number here stands for its ends, which have the same order.
        records["key"] = np.cumsum(new).astype(np.uint64) - np.uint64(1)
        for column in columns:
            records[column] = table[column].to_numpy()
        merged = edge_sort.merged(records, most)
        first = pa.array(np.flatnonzero(new))
        yield merged["rel"], lhs.take(first), rhs.take(first), merged


def _whole_edges(batches: tables.Batches) -> Iterator[pa.Table]:
    """Yield rows about `EDGES_PER_ROW_GROUP` at a time, such that all rows of an edge come together."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        waiting.append(batch)
        size += len(batch)
        if size < EDGES_PER_ROW_GROUP:
            continue
        table = pa.Table.from_batches(waiting).combine_chunks()
        last = table.slice(len(table) - 1).to_pylist()[0]
        same = np.ones(len(table), bool)
        for name in ("rel", "lhs", "rhs"):
            same &= pc.equal(table[name], pa.scalar(last[name], table[name].type)).to_numpy()
        cut = int(np.argmax(same))
        if cut:
            yield table.slice(0, cut)
        waiting, size = table.slice(cut).to_batches(), len(table) - cut
    if size:
        yield pa.Table.from_batches(waiting)
