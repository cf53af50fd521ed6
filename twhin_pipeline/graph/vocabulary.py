"""Vocabularies: which row of its table an entity has. A known id keeps its row for ever.

An id without an edge in a snapshot has *departed*: its row and its vector stay, and nothing draws it. After
`vocabulary.keep_departed` such snapshots it is *evicted*: it has no vector any more, but the vocabulary still has its
row, which no other id gets. Where it returns, it has that row again and starts like a new id. Only `twhin compact`
takes evicted rows away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import directions, pairs
from twhin_pipeline.graph.edge_file import Array, IndexedEdges
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, literal

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest, Store

CHAIN = 1_000
"""So many of the snapshots that a vocabulary has grown through are noted with it."""
# Indexed ids may leave rows unused, but hardly more than this many for each one used.
SPARSEST = 100


COLUMNS = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("degree", pa.int64()),
        ("first_snapshot", pa.string()),
        ("last_snapshot", pa.string()),
        ("evicted", pa.bool_()),
    ]
)
"""Of a vocabulary whose ids are texts; a compacted one also has `row_before`."""


def build(config: TwhinConfig, store: Store, snapshot: str, *, compact: bool = False) -> dict[str, Manifest]:
    """Write `vocabulary/<entity>` of every entity type, and return the manifests by entity type.

    A vocabulary begins with the newest earlier snapshot's (else with the table's `vocab` file), rows unchanged; new ids
    follow by degree, the largest first, then by id. An id below `vocabulary.min_count` edges gets no row, unless it has
    one already. Indexed ids are rows themselves: every index up to the largest (or `num_embeddings`) has its row.

    Args:
        config: Its `vocabulary` and tables say who gets a row.
        store: Has `raw_edges` of the snapshot, and earlier vocabularies.
        snapshot: The snapshot.
        compact: Leave out the ids that the earlier vocabulary had evicted and that have not returned, and number the
            others anew, in order. The column `row_before` says which row an id had there.

    Raises:
        UserError: A vocabulary is empty or outgrows `num_embeddings`, a `vocab` file is not one, or rows are to be
            compacted and ids are rows themselves or there is no earlier vocabulary.
    """
    if compact and indexed(config):
        raise UserError("indexed ids are rows themselves, so their tables cannot be compacted; use named ids")
    parents = store.versions(snapshot, ["raw_edges"])
    edges = IndexedEdges(store, snapshot)
    of_graph = {
        directions.FIRST: directions.at_first(config, store, snapshot),
        pairs.PAIRS: pairs.count(config, store, snapshot),
    }
    manifests = {}
    with database.connect(config, store) as con, explained("vocabulary"):
        for entity in config.model.table_names:
            manifests[entity] = _build_one(con, config, store, snapshot, entity, edges, of_graph, parents, compact)
    return manifests


def _build_one(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    entity: str,
    edges: IndexedEdges,
    of_graph: dict[str, Any],
    parents: dict[str, str],
    compact: bool,
) -> Manifest:
    asset = f"vocabulary/{entity}"
    before, compact = grown_from(store, snapshot, asset, compact)
    earlier, parents = earlier_rows(con, config, store, snapshot, entity, before).sql, dict(parents)
    if before is not None:
        parents[f"{asset}@{before.snapshot}"] = before.version
    # Either all of raw_edges' ids are integers or none.
    kind = "VARCHAR" if edges.texts or _type(con, earlier, "id") == "VARCHAR" else "BIGINT"
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE known AS SELECT CAST(id AS {kind}) AS id, row, first_snapshot, last_snapshot, "
        f"evicted FROM {earlier}"
    )
    degree = _degrees(config, edges, entity)
    used = np.flatnonzero(degree)
    counted = pa.table({"id_index": used, "degree": degree[used]})  # noqa: F841 (DuckDB reads it by its name)
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE degrees AS SELECT CAST(id AS {kind}) AS id, id_index, degree FROM {edges.ids} "
        "JOIN counted ON id_index = file_row_number"
    )
    if indexed(config):
        new = _every_index(con, config, entity)
    else:
        # An id's index is its position in their order.
        new = (
            "SELECT id, degree, row_number() OVER (ORDER BY degree DESC, id_index) - 1 AS position FROM degrees "
            f"ANTI JOIN known USING (id) WHERE degree >= {config.vocabulary.min_count}"
        )
    chain = chain_of(before)
    since = kept_since(config, chain, snapshot)
    con.execute(
        "CREATE OR REPLACE TEMP TABLE every AS "
        "SELECT id, row, row AS row_before, coalesce(degree, 0) AS degree, first_snapshot, "
        f"CASE WHEN degree > 0 THEN {literal(snapshot)} ELSE last_snapshot END AS last_snapshot, "
        "evicted AS was_evicted "
        "FROM known LEFT JOIN degrees USING (id) "
        "UNION ALL SELECT id, (SELECT count(*) FROM known) + position, NULL, degree, "
        f"{literal(snapshot)}, CASE WHEN degree > 0 THEN {literal(snapshot)} END, false FROM ({new})"
    )
    row = "row_number() OVER (ORDER BY row) - 1" if compact else "row"
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE rows AS SELECT id, CAST({row} AS BIGINT) AS row, row_before, degree, "
        "first_snapshot, last_snapshot, "
        # An eviction lasts, whatever keep_departed is later, until the id returns.
        f"degree = 0 AND (was_evicted OR coalesce(last_snapshot, first_snapshot) < {literal(since)}) AS evicted "
        f"FROM every WHERE NOT ({compact} AND was_evicted AND degree = 0)"
    )
    rows, known, counted_rows, evicted, left_out = con.execute(
        "SELECT count(*), count(row_before), count(*) FILTER (degree > 0), count(*) FILTER (evicted), "
        "(SELECT count(*) FROM every) - count(*) FROM rows"
    ).fetchall()[0]
    below = len(used) - counted_rows
    check_size(config, entity, rows, below)
    conflict = later_version(store, asset, snapshot)
    if conflict is not None:
        refuse_conflict(con, store, conflict, "rows", snapshot)
    read = settings(config, "vocabulary")
    with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read) as draft:
        with draft.local_file("part-00000.parquet") as path:
            con.execute(
                "COPY (SELECT id, CAST(row AS BIGINT) AS row, CAST(degree AS BIGINT) AS degree, "
                "CAST(first_snapshot AS VARCHAR) AS first_snapshot, CAST(last_snapshot AS VARCHAR) AS last_snapshot, "
                f"evicted{', CAST(row_before AS BIGINT) AS row_before' if compact else ''} FROM rows ORDER BY row) "
                f"TO {literal(path)} (FORMAT parquet, COMPRESSION zstd)"
            )
        draft.details = {
            "known": known,
            "new": rows - known,
            "below_min_count": below,
            "largest_degree": int(degree.max(initial=0)),
            "earlier_snapshot": before.snapshot if before else None,
            "departed": rows - counted_rows,
            "evicted": evicted,
            "grown_through": chain,
            "left_out": left_out,
            **of_graph,
            "compacted": snapshot if compact else before.details.get("compacted") if before else None,
        }
    return store.manifest(asset, snapshot)


def chain_of(before: Manifest | None) -> list[str]:
    """Return the snapshots that a vocabulary grows through, up to `before`, oldest first; the last `CHAIN` of them."""
    if before is None:
        return []
    return [*before.details.get("grown_through", []), before.snapshot][-CHAIN:]


def _degrees(config: TwhinConfig, edges: IndexedEdges, entity: str) -> Array:
    """Count each id's edges as an entity of the type: int64 `[ids]`."""
    degree = np.zeros(edges.size, np.int64)
    relations = {relation.name: relation for relation in config.model.relations}
    for piece in edges.pieces():
        relation = relations.get(piece.relation)
        for side, ends in (("lhs", piece.lhs), ("rhs", piece.rhs)):
            if relation is not None and getattr(relation, side) == entity:
                sampling_kernels.count_rows(ends, degree)
    return degree


def indexed(config: TwhinConfig) -> bool:
    """Tell whether ids are rows themselves."""
    return all(source.ids == "indexed" for source in config.all_sources)


def later_version(store: Store, asset: str, snapshot: str) -> Manifest | None:
    """Return the vocabulary of a later snapshot that was made without this one, and has the same numbers of rows."""
    for at in store.snapshots(asset, accepted=True):
        later = store.last_accepted(asset, at)
        if at <= snapshot or later is None or f"{asset}@{snapshot}" in later.parents:
            continue
        # Compacted rows have other numbers from there on.
        return None if (later.details.get("compacted") or "") > snapshot else later
    return None


def refuse_conflict(con: duckdb.DuckDBPyConnection, store: Store, later: Manifest, rows: str, snapshot: str) -> None:
    """Refuse `rows` (SQL) that contradict those of a later snapshot.

    Rows are handed on from snapshot to snapshot. Made in another order, an id would have two rows.
    """
    files = database.parquet(store.files_of(later))
    conflicts = con.execute(
        f"SELECT count(*) FROM {rows} own JOIN {files} later ON CAST(own.id AS VARCHAR) = CAST(later.id AS VARCHAR) "
        "WHERE own.row <> later.row"
    ).fetchall()[0][0]
    if conflicts:
        raise UserError(conflict_message(later, snapshot, conflicts))


def conflict_message(later: Manifest, snapshot: str, conflicts: int) -> str:
    """Return what is said of rows that contradict those of a later snapshot."""
    return (
        f"{later.asset} of snapshot {snapshot}: {conflicts:,} entities would get other rows than in snapshot "
        f"{later.snapshot}, which was made before it; a vocabulary grows from older snapshots to newer ones, so make "
        "snapshots oldest first, in another store (--home) where later ones are there already"
    )


def grown_from(store: Store, snapshot: str, asset: str, compact: bool) -> tuple[Manifest | None, bool]:
    """Return the vocabulary that this one grows from, and whether its rows are compacted.

    Raises:
        UserError: There is none to be compacted.
    """
    before = store.latest_before(asset, snapshot)
    made = store.last_accepted(asset, snapshot)
    compact = compact or (made is not None and made.details.get("compacted") == snapshot)  # the same rows once more
    if compact and before is None:
        raise UserError(f"{asset}: there is no snapshot before {snapshot} whose rows could be compacted")
    return before, compact


def kept_since(config: TwhinConfig, chain: list[str], snapshot: str) -> str:
    """Return the snapshot before which an id was last seen that is evicted; empty: none is."""
    # Ids that are rows themselves cannot be left out.
    keep = None if indexed(config) else config.vocabulary.keep_departed
    return sorted([*chain, snapshot])[-keep - 1] if keep is not None and len(chain) >= keep else ""


@dataclass(frozen=True)
class Earlier:
    """Rows that are given: Parquet files, and the SQL of `id`, `row`, `first_snapshot`, `last_snapshot`, `evicted`."""

    files: list[str]
    columns: str

    @property
    def sql(self) -> str:
        """The SQL of all of them."""
        if not self.files:
            return (
                "(SELECT NULL::BIGINT AS id, NULL::BIGINT AS row, NULL::VARCHAR AS first_snapshot, "
                "NULL::VARCHAR AS last_snapshot, false AS evicted WHERE false)"
            )
        return f"(SELECT {self.columns} FROM {database.parquet(self.files)})"


def earlier_rows(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    entity: str,
    before: Manifest | None,
) -> Earlier:
    """Return the rows that are given: those of the snapshot `before`, or those of the `vocab` file."""
    if before is not None:
        files = store.files_of(before)
        with store.parquet(files[0]) as file:
            known = file.schema_arrow.names
        # An earlier version of this package wrote neither: whom it kept is taken for one of its snapshot.
        last = "last_snapshot" if "last_snapshot" in known else f"{literal(before.snapshot)} AS last_snapshot"
        evicted = "evicted" if "evicted" in known else "false AS evicted"
        return Earlier(files, f"id, row, first_snapshot, {last}, {evicted}")
    path = config.model.table(entity).vocab
    if path is None:
        return Earlier([], "")
    number = config.model.table_names.index(entity)
    field = f"model.embeddings.tables[{number}].vocab"
    if "://" in path:
        database.register(con, path)
    try:
        described = con.execute(f"DESCRIBE SELECT * FROM {database.parquet([path])}").fetchall()
        kinds = {str(row[0]): str(row[1]) for row in described}
        if not {"id", "row"} <= set(kinds):
            raise UserError(
                f"{field}: {path}: needs the columns id and row (columns there: {', '.join(kinds)}); add them"
            )
        total, ids, least, most, distinct = con.execute(
            "SELECT count(*), count(DISTINCT id), min(row), max(row), count(DISTINCT row) "
            f"FROM {database.parquet([path])}"
        ).fetchall()[0]
    except duckdb.Error as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{field}: {path}: cannot be read as Parquet ({first}); mend the path") from error
    if not total == ids == distinct or (total and (least, most) != (0, total - 1)):
        raise UserError(
            f"{field}: {path}: must give each id one row and use the rows 0 to {total - 1} once each (found {ids} ids, "
            f"{distinct} rows from {least} to {most}); number them anew"
        )
    integers = kinds["id"] != "VARCHAR"
    return Earlier(
        [path],
        f"CAST(id AS {'BIGINT' if integers else 'VARCHAR'}) AS id, row, {literal(snapshot)} AS first_snapshot, "
        "NULL::VARCHAR AS last_snapshot, false AS evicted",
    )


def compactions(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, str | None]:
    """Return, by entity type, the last snapshot up to this one in which rows were compacted; None: in none."""
    return {
        name: store.manifest(f"vocabulary/{name}", snapshot).details.get("compacted")
        for name in config.model.table_names
    }


def _every_index(con: duckdb.DuckDBPyConnection, config: TwhinConfig, entity: str) -> str:
    odd = con.execute("SELECT count(*) FROM known WHERE TRY_CAST(id AS BIGINT) IS DISTINCT FROM row").fetchall()[0][0]
    if odd:
        raise UserError(
            f"vocabulary/{entity}: an earlier vocabulary has ids that are not their rows, so its ids were not indexed; "
            "use another TWHIN_HOME for indexed edges"
        )
    known, used, most = con.execute(
        "SELECT (SELECT count(*) FROM known), count(*), coalesce(max(id), -1) FROM degrees"
    ).fetchall()[0]
    size = config.model.table(entity).num_embeddings or int(most) + 1
    if config.model.table(entity).num_embeddings is None and size > SPARSEST * int(used) + 1_000_000:
        raise UserError(
            f"vocabulary/{entity}: {int(used):,} entities with edges would need {size:,} rows, so their ids are hardly "
            "rows; set source.ids to named, or give num_embeddings"
        )
    return (
        f"SELECT range AS id, coalesce(degree, 0) AS degree, range - {int(known)} AS position "
        f"FROM range({int(known)}, {max(size, int(known))}) LEFT JOIN degrees ON id = range"
    )


def check_size(config: TwhinConfig, entity: str, rows: int, below: int) -> None:
    """Raise UserError where a vocabulary is empty or outgrows `num_embeddings`; `below` ids had too few edges."""
    number = config.model.table_names.index(entity)
    limit = config.model.table(entity).num_embeddings
    if rows == 0:
        cause = (
            f"all {below:,} have fewer edges than vocabulary.min_count ({config.vocabulary.min_count}); lower it"
            if below
            else "no edge of its relations was kept; see raw_edges_rejected for the reasons and mend source.columns or "
            "model.relations"
        )
        raise UserError(f"vocabulary/{entity}: no entity of this type: {cause}")
    if limit is not None and rows > limit:
        raise UserError(
            f"model.embeddings.tables[{number}].num_embeddings: {entity} has {rows:,} entities, more than {limit:,}; "
            "raise it, leave it out, or raise vocabulary.min_count"
        )


def _type(con: duckdb.DuckDBPyConnection, scanned: str, column: str) -> str:
    return str(con.execute(f"DESCRIBE SELECT {column} FROM {scanned}").fetchall()[0][1])
