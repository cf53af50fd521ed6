"""The training set's positives and what is held out: edges split, encoded as rows, shuffled, and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import database, edges, source, split
from twhin_pipeline.database import explained, literal
from twhin_pipeline.errors import UserError
from twhin_pipeline.prefetch import Prefetcher

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest, Store

ASSETS = ("training_set/positives", "held_out/validation", "held_out/test")
SCHEMA = pa.schema(
    [
        ("chunk", pa.int32()),
        ("lhs", pa.int64()),
        ("rhs", pa.int64()),
        ("rel", pa.int32()),
        ("weight", pa.float32()),
    ]
)
# A file holds whole chunks: many enough for ranks to divide, and large enough to read well.
LEAST_FILES, EDGES_PER_FILE, EDGES_PER_ROW_GROUP = 16, 2_000_000, 131_072
BATCHES_AHEAD = 8
# Rows are small beside their 64 bits, and random: a third smaller than by default, and four times as fast to write.
ENCODING = {"lhs": "BYTE_STREAM_SPLIT", "rhs": "BYTE_STREAM_SPLIT"}


def build_positives(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `training_set/positives`, `held_out/validation` and `held_out/test`; return their manifests by asset.

    Positives of a relation are in a seeded random order and cut into chunks of nearly equal size, at most
    `negatives.chunk_size`. Details of each: `chunk_size`, `num_chunks`, `edges_per_relation`, `weight`; of positives
    also edges `without_row` (an entity is in no vocabulary) by relation, `entities_without_training_edge` by type, and
    edges `left_out` by `limit` and `offset`; of held-out edges `leakage` by relation (the reverse, or the same pair
    under another relation, is in training) and `dropped` ones (an entity is in no vocabulary).

    Raises:
        UserError: Nothing is left to train on, or `split.later_snapshot` is not later.
    """
    names = config.model.table_names
    parents = store.versions(snapshot, ["raw_edges", *(f"vocabulary/{name}" for name in names)])
    later = config.split.later_snapshot
    if later is not None:
        parents[f"raw_edges@{later}"] = _ingested_later(config, store, snapshot, later)
    with database.connect(config, store) as con, explained("training_set/positives"):
        _create_vocabulary(con, config, store, snapshot)
        dropped = _create_edges(con, config, store, snapshot)
        given = config.source is None or config.split.strategy == "given"
        split.assign(con, config, given)
        dropped_later = 0 if later is None else _add_later_test(con, config, store, later)
        left_out = _limit(con, config)
        manifests = {}
        for part, asset in enumerate(ASSETS):
            details = _details(con, config, part, dropped)
            if part == split.TRAIN:
                details["left_out"] = left_out
            elif part == split.TEST:
                details["dropped"] += dropped_later
            with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents) as draft:
                _write(con, config, part, draft, details)
            manifests[asset] = store.manifest(asset, snapshot)
    return manifests


def _ingested_later(config: TwhinConfig, store: Store, snapshot: str, later: str) -> str:
    source.check_snapshot(later)
    if later <= snapshot:
        raise UserError(f"split.later_snapshot: {later} must be later than the snapshot, {snapshot}; choose another")
    if not store.exists("raw_edges", later):
        edges.ingest(config, store, later)
    return store.manifest("raw_edges", later).version


def _create_vocabulary(con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str) -> None:
    """Create a table `vocabulary_<n>` (id, row, hash) for each entity type n, and `relations` (name, index, hash)."""
    # Rows of 32 bits, where they suffice, are sorted and joined faster.
    sizes = [store.manifest(f"vocabulary/{name}", snapshot).rows for name in config.model.table_names]
    kind = "INTEGER" if max(sizes) < 2**31 else "BIGINT"
    for number, name in enumerate(config.model.table_names):
        scanned = database.scan(store, f"vocabulary/{name}", snapshot)
        hashed = split.text_hash("CAST(id AS VARCHAR)")
        con.execute(
            f"CREATE TABLE vocabulary_{number} AS "
            f"SELECT id, CAST(row AS {kind}) AS row, {hashed} AS hash FROM {scanned}"
        )
    con.execute("CREATE TABLE relations (name VARCHAR, index INTEGER, hash UBIGINT)")
    seeded = split.text_hash(f"concat_ws('/', {config.split.seed}, $1::VARCHAR)")
    for rel, name in enumerate(config.model.relation_names):
        con.execute(f"INSERT INTO relations SELECT $1::VARCHAR, $2::INTEGER, {seeded}", [name, rel])


def _encoded(con: duckdb.DuckDBPyConnection, config: TwhinConfig, scanned: str, extra: str) -> str:
    """Return the SQL of raw edges as rows (null where an entity has none), one query a pair of entity types."""
    tables = config.model.table_names
    pairs: dict[tuple[int, int], list[str]] = {}
    for relation in config.model.relations:
        pairs.setdefault((tables.index(relation.lhs), tables.index(relation.rhs)), []).append(relation.name)
    queries = []
    for (left, right), names in pairs.items():
        joins = []
        for side, table in (("lhs", left), ("rhs", right)):
            kinds = {
                str(con.execute(f"DESCRIBE SELECT {column} AS x FROM {what}").fetchall()[0][1])
                for column, what in ((side, scanned), ("id", f"vocabulary_{table}"))
            }
            # A vocabulary that once met a text id is of text; integers are then compared as they are written.
            ids = (
                (f"{side[0]}.id", f"e.{side}")
                if len(kinds) == 1
                else (f"CAST({side[0]}.id AS VARCHAR)", f"CAST(e.{side} AS VARCHAR)")
            )
            joins.append(f"LEFT JOIN vocabulary_{table} {side[0]} ON {ids[0]} = {ids[1]}")
        queries.append(
            f"SELECT CAST(n.index AS INTEGER) AS rel, l.row AS lhs, r.row AS rhs, e.weight{extra}, "
            "l.hash AS lhs_hash, r.hash AS rhs_hash, n.hash AS rel_hash "
            f"FROM {scanned} e JOIN relations n ON n.name = e.rel {' '.join(joins)} "
            f"WHERE e.rel IN ({', '.join(literal(name) for name in names)})"
        )
    columns = "rel, lhs, rhs, weight" + extra.replace("e.", "")
    return split.numbered(" UNION ALL ".join(queries), columns)


def _create_edges(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str
) -> list[dict[str, int]]:
    """Create the table `edges`, and count the edges that have no row, by part (as far as it is given) and relation."""
    extra = ""
    by = str(split.TRAIN)
    if config.source is None or config.split.strategy == "given":
        extra, by = ", e.split", f"[{', '.join(map(str, range(3)))}][list_position({list(split.PARTS)}, split)]"
    elif config.split.strategy == "temporal" and config.split.later_snapshot is None:
        extra = ", e.time"
    rows = _encoded(con, config, database.scan(store, "raw_edges", snapshot), extra)
    con.execute(f"CREATE TABLE edges AS {rows}")
    lost = "lhs IS NULL OR rhs IS NULL"
    counted = con.execute(f"SELECT {by} AS part, rel, count(*) FROM edges WHERE {lost} GROUP BY ALL").fetchall()
    dropped = [dict.fromkeys(config.model.relation_names, 0) for _ in split.PARTS]
    for part, rel, count in counted:
        dropped[int(part)][config.model.relation_names[int(rel)]] = int(count)
    if counted:
        con.execute(f"DELETE FROM edges WHERE {lost}")
    return dropped


def _add_later_test(con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, later: str) -> int:
    """Add the later snapshot's new edges between known entities as the test; return how many have an unknown one."""
    rows = _encoded(con, config, database.scan(store, "raw_edges", later), "")
    con.execute(f"CREATE TABLE later AS SELECT * FROM ({rows}) WHERE {split.splittable(config)}")
    lost = "lhs IS NULL OR rhs IS NULL"
    dropped = int(con.execute(f"SELECT count(*) FROM later WHERE {lost}").fetchall()[0][0])
    con.execute(
        f"INSERT INTO assigned BY NAME SELECT rel, lhs, rhs, weight, h, CAST({split.TEST} AS TINYINT) AS part "
        f"FROM later ANTI JOIN assigned USING (rel, lhs, rhs) WHERE NOT ({lost})"
    )
    con.execute("DROP TABLE later")
    return dropped


def _limit(con: duckdb.DuckDBPyConnection, config: TwhinConfig) -> int:
    """Keep `limit` edges after `offset`, in a seeded random order, of training and of validation; return how many went.

    Where there is no `source`, both have counted rows of the files already.
    """
    before = _size(con)
    for part, data in ((split.TRAIN, config.train_data), (split.VALIDATION, config.validation_data)):
        if config.source is None or (data.limit is None and data.offset is None):
            continue
        first = data.offset or 0
        last = first + data.limit if data.limit is not None else 1 << 62
        order = f"{split.shuffled(config.split.seed, 'limit')}, rel, lhs, rhs"
        con.execute(
            f"CREATE OR REPLACE TABLE assigned AS SELECT * EXCLUDE place FROM (SELECT *, CASE WHEN part = {part} THEN "
            f"row_number() OVER (PARTITION BY part ORDER BY {order}) - 1 END AS place FROM assigned) "
            f"WHERE place IS NULL OR (place >= {first} AND place < {last})"
        )
    return before - _size(con)


def _size(con: duckdb.DuckDBPyConnection) -> int:
    return int(con.execute("SELECT count(*) FROM assigned").fetchall()[0][0])


def _details(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, part: int, dropped: list[dict[str, int]]
) -> dict[str, Any]:
    names = config.model.relation_names
    counted = con.execute(
        f"SELECT rel, count(*), fsum(weight) FROM assigned WHERE part = {part} GROUP BY rel"
    ).fetchall()
    edges_of = {int(rel): int(count) for rel, count, _ in counted}
    total = sum(edges_of.values())
    if part == split.TRAIN and total == 0:
        raise UserError(
            "training_set/positives: no edge is left to train on; lower split.validation, split.test, "
            "vocabulary.min_count or train_data.offset"
        )
    size = config.negatives.chunk_size
    details: dict[str, Any] = {
        "chunk_size": size,
        "num_chunks": sum(-(-count // size) for count in edges_of.values()),
        "edges_per_relation": {name: edges_of.get(rel, 0) for rel, name in enumerate(names)},
        "share": total / max(_size(con), 1),
        "weight": float(sum(weight for _, _, weight in counted)),
    }
    if part == split.TRAIN:
        details["without_row"] = {name: sum(p[name] for p in dropped) for name in names}
        details["entities_without_training_edge"] = split.unseen(con, config)
    else:
        details["leakage"] = split.leakage(con, config, part)
        details["dropped"] = sum(dropped[part].values())
    return details


def _write(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, part: int, draft: Draft, details: dict[str, Any]
) -> None:
    """Write one part in the order relation, then random; chunks counted on through the relations."""
    draft.details = details
    sizes = np.array(list(details["edges_per_relation"].values()), dtype=np.int64)
    chunks = -(-sizes // config.negatives.chunk_size)
    first_edge, first_chunk = np.cumsum(sizes) - sizes, np.cumsum(chunks) - chunks
    per_file = max(config.negatives.chunk_size, min(EDGES_PER_FILE, -(-int(sizes.sum()) // LEAST_FILES)))
    # Relation and random key as one number: the fewer bytes, the faster they are sorted.
    key = f"(CAST(rel AS UBIGINT) << 32) | {split.shuffled(config.negatives.seed, 'chunks')}"
    reader = con.sql(
        "SELECT CAST(lhs AS BIGINT) AS lhs, CAST(rhs AS BIGINT) AS rhs, CAST(key >> 32 AS INTEGER) AS rel, weight FROM "
        f"(SELECT lhs, rhs, weight, {key} AS key FROM assigned WHERE part = {part}) ORDER BY key, lhs, rhs"
    ).to_arrow_reader(EDGES_PER_ROW_GROUP)

    def numbered() -> Iterator[pa.RecordBatch]:
        position = 0
        for batch in reader:
            rel = batch.column("rel").to_numpy()
            place = np.arange(position, position + len(rel)) - first_edge[rel]
            # Sizes of a relation's chunks differ by at most one, so that none is left with few edges and candidates.
            chunk = first_chunk[rel] + place * chunks[rel] // sizes[rel]
            position += len(rel)
            yield pa.record_batch([pa.array(chunk, pa.int32()), *batch.columns], schema=SCHEMA)

    pending: list[pa.RecordBatch] = []
    waiting = number = 0
    # Edges are sorted while others are written.
    with Prefetcher(numbered(), BATCHES_AHEAD) as ahead:
        for batch in ahead:
            pending.append(batch)
            waiting += len(batch)
            while waiting > per_file + config.negatives.chunk_size:
                table = pa.Table.from_batches(pending).combine_chunks()
                ends = table["chunk"].to_numpy()
                cut = int(np.searchsorted(ends, ends[per_file], side="right"))
                _write_file(draft, number, table.slice(0, cut))
                pending, waiting, number = table.slice(cut).to_batches(), waiting - cut, number + 1
        if waiting or number == 0:
            _write_file(draft, number, pa.Table.from_batches(pending, schema=SCHEMA))


def _write_file(draft: Draft, number: int, table: pa.Table) -> None:
    with (
        draft.local_file(f"part-{number:05d}.parquet") as path,
        pq.ParquetWriter(
            path, SCHEMA, compression="zstd", use_dictionary=["chunk", "rel", "weight"], column_encoding=ENCODING
        ) as writer,
    ):
        writer.write_table(table, row_group_size=EDGES_PER_ROW_GROUP)
