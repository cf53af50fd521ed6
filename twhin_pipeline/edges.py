"""Raw edges: read from the source, typed, cleaned, merged and sorted; rows that cannot be edges are kept apart.

It is SQL over Parquet, which DuckDB streams once. Ids are numbered as they come (`interning`), edges are sorted by
their numbers out of memory (`edge_sort`) and written as they come (`edge_file`), so the graph may be larger than
memory; its ids must fit.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline import database, edge_file, id_order, numbered_edges, relations, source
from twhin_pipeline.database import explained, literal, name
from twhin_pipeline.edge_sort import EdgeSorter
from twhin_pipeline.errors import UserError
from twhin_pipeline.interning import Interner, LookedUp
from twhin_pipeline.prefetch import Prefetcher, in_order
from twhin_pipeline.scan import OUTSIDE_WINDOW, SIDES, Scan, open_input, parquet, typed_rows, window
from twhin_pipeline.sections.model import Relation, names_relation
from twhin_pipeline.split import PARTS

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest, Store

Array = np.ndarray[Any, Any]

MALFORMED = "malformed line"
MOST_RELATIONS = 100_000
"""With `"*"` in model.relations, more names than this are taken for a mistake: an id's column for the relations'."""
ROWS_AT_ONCE, BATCHES_AHEAD = 1 << 17, 4
REJECTED = pa.schema(
    [(column, pa.string()) for column in ("lhs", "rel", "rhs", "reason", "file")] + [("row", pa.int64())]
)


def ingest(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Write `raw_edges` and `raw_edges_rejected` of a snapshot, and return the manifest of `raw_edges`.

    Its details: rows `read`, edges `kept`, `rejected`, `rejected_share`, `rejected_by_reason`, `duplicates_merged`,
    `outside_window`, `self_loops`, `edges_per_relation`, `relations` (names, in the order that numbers them), and the
    `files`. A row whose time is not before the end of the snapshot's day (UTC), or before the window, is left out and
    counted; it is no rejected row. Duplicates (equal lhs, rel and rhs) become one edge: weights added, the earliest
    split, the latest time. Where `model.relations` has a `"*"`, each relation that has an edge is one of the model's.

    Raises:
        UserError: Files or columns are missing or of a wrong type, a field names a relation that is not found, or the
            memory limit is too low; names the remedy.
    """
    with (
        database.connect(config, store) as con,
        tempfile.TemporaryDirectory(prefix="twhin-ingest-") as folder,
    ):
        scans = [
            open_input(con, given, f"{folder}/{number}") for number, given in enumerate(source.inputs(config, snapshot))
        ]
        possible = relations.with_found(config, _names(con, config, scans))
        _create_relations(con, possible, possible.model.relations)
        integers = all(scan.integers for scan in scans)
        rows = " UNION ALL ".join(typed_rows(scan, config, snapshot, integers) for scan in scans)
        what = ", ".join(scan.input.field for scan in scans)
        with explained(what), EdgeSorter(folder, _columns(scans)) as sorter:
            interner = Interner(texts=not integers)
            number = len(possible.model.relations)
            counts, edges_of = _meet(con, rows, sorter, interner, number, database.threads(config))
            good = int(edges_of.sum())
            if good:
                config = _settle(con, config, possible, np.flatnonzero(edges_of).tolist())
            malformed = _create_malformed(con, scans)
            if malformed:
                counts[MALFORMED] = malformed
            outside = counts.pop(OUTSIDE_WINDOW, 0)
            _write_rejected(con, config, store, snapshot, rows if sum(counts.values()) > malformed else None)
            if good == 0:
                raise UserError(_nothing(what, config, store, snapshot, counts, outside))
            met = interner.ids()
            del interner
            ids, ranks = _ranked(met)
            del met
            kept = _write_kept(config, store, snapshot, sorter, possible, ids, ranks)
        read = good + outside + sum(counts.values())
        kept.details.update(
            read=read,
            rejected=sum(counts.values()),
            rejected_share=sum(counts.values()) / max(read, 1),
            rejected_by_reason=counts,
            duplicates_merged=good - kept.details["kept"],
            outside_window=outside,
            files=[file for scan in scans for file in scan.input.files],
        )
        kept.commit(config_hash=config.hash(), parents={})
    return store.manifest("raw_edges", snapshot)


def _nothing(what: str, config: TwhinConfig, store: Store, snapshot: str, counts: dict[str, int], outside: int) -> str:
    """Say why no row is an edge."""
    if not counts and not outside:
        return f"{what}: no edge for snapshot {snapshot}: the files have no rows; mend the path"
    told = [f"{reason} {count:,}" for reason, count in counts.items()]
    remedies = []
    if outside:
        start, end = window(config, snapshot)
        since = "" if start is None else f"from {start:%Y-%m-%d %H:%M} "
        told.append(f"{OUTSIDE_WINDOW} ({since}before {end:%Y-%m-%d}) {outside:,}")
        remedies.append("choose another snapshot or a longer source.window")
    if counts:
        first = store.read("raw_edges_rejected", snapshot).slice(0, 1).to_pylist()[0]
        told.append(f"the first is row {first['row']} of {first['file']}, {first['reason']}")
        remedies.append("mend source.columns, model.relations or the file")
    return f"{what}: no edge for snapshot {snapshot}: {', '.join(told)}; {', or '.join(remedies)}"


def _names(con: duckdb.DuckDBPyConnection, config: TwhinConfig, scans: list[Scan]) -> list[str]:
    """Return the source's names of relations, those that can be one, where `model.relations` has a `"*"`."""
    if config.model.every_other is None:
        return []
    found: set[str] = set()
    for scan in scans:
        column = scan.input.columns.rel
        with explained(scan.input.field):
            rows = con.execute(
                f"SELECT DISTINCT CAST({name(column)} AS VARCHAR) FROM {parquet(scan.files)} "
                f"WHERE {name(column)} IS NOT NULL LIMIT {MOST_RELATIONS + 1}"
            ).fetchall()
        if len(rows) > MOST_RELATIONS:
            raise UserError(
                f"{scan.input.field}: column {column!r} has more than {MOST_RELATIONS:,} different values, too many to "
                "be names of relations; set source.columns.rel to the relations' column, or list relations without '*'"
            )
        found |= {str(row[0]) for row in rows}
    return [text for text in found if names_relation(text)]


def _create_relations(con: duckdb.DuckDBPyConnection, config: TwhinConfig, ordered: list[Relation]) -> None:
    """Create the table `relations`: index, name, and the number of rows of each side's table where it is given."""
    table_of = {table.name: table for table in config.model.embeddings.tables}
    rows_of = [[table_of[getattr(r, side)].num_embeddings for r in ordered] for side in SIDES]
    relations_found = pa.table(  # noqa: F841 (DuckDB reads it by its name)
        {
            "index": pa.array(range(len(ordered)), pa.int64()),
            "name": pa.array([r.name for r in ordered], pa.string()),
            "lhs_rows": pa.array(rows_of[0], pa.int64()),
            "rhs_rows": pa.array(rows_of[1], pa.int64()),
        }
    )
    con.execute("CREATE OR REPLACE TABLE relations AS SELECT * FROM relations_found")


def _settle(con: duckdb.DuckDBPyConnection, config: TwhinConfig, possible: TwhinConfig, used: list[int]) -> TwhinConfig:
    """Return the configuration with the relations that have an edge (numbers in `possible`), and number them anew.

    Names that occur in rejected rows or outside the window alone come last in the table, so that their rows keep the
    reason that they were given.
    """
    names = possible.model.relation_names
    settled = relations.with_found(config, [names[rel] for rel in used])
    kept = set(settled.model.relation_names)
    rest = [relation for relation in possible.model.relations if relation.name not in kept]
    _create_relations(con, settled, [*settled.model.relations, *rest])
    return settled


def _create_malformed(con: duckdb.DuckDBPyConnection, scans: list[Scan]) -> int:
    """Create the tables `malformed` (lines that are no rows) and `origins` (the files that staged ones stand for)."""
    con.execute("CREATE TABLE malformed (origin VARCHAR, line BIGINT, text VARCHAR, shift BIGINT)")
    con.execute("CREATE TABLE origins (path VARCHAR, origin VARCHAR, delimited BOOL)")
    count = 0
    for scan in scans:
        for part in scan.staged:
            con.execute("INSERT INTO origins VALUES (?, ?, ?)", [part.path, part.origin, scan.input.format == "csv"])
            if part.malformed:
                lines = [line for line, _, _ in part.malformed]
                lines_found = pa.table(  # noqa: F841 (DuckDB reads it by its name)
                    {
                        "origin": [part.origin] * len(lines),
                        "line": lines,
                        "text": [text for _, text, _ in part.malformed],
                        "shift": [line - before for before, line in enumerate(lines)],
                    }
                )
                con.execute("INSERT INTO malformed SELECT * FROM lines_found")
                count += len(lines)
    return count


def _write_rejected(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str, rows: str | None
) -> None:
    """Write what was rejected, by file and row: Parquet rows from 1, delimited ones by their line in the file."""
    parts = [
        f"SELECT NULL AS lhs, NULL AS rel, text AS rhs, {literal(MALFORMED)} AS reason, origin AS file, line AS row "
        "FROM malformed"
    ]
    if rows is not None:
        # Lines before a row are the header, the rows, and the malformed lines among them.
        before = "(SELECT count(*) FROM malformed m WHERE m.origin = o.origin AND m.shift <= x.row + 2)"
        parts.append(
            "SELECT raw_lhs, raw_rel, raw_rhs, fate, o.origin, "
            f"CASE WHEN o.delimited THEN x.row + 2 + {before} ELSE x.row + 1 END "
            f"FROM ({rows}) x JOIN origins o ON o.path = x.file "
            f"WHERE fate IS NOT NULL AND fate <> {literal(OUTSIDE_WINDOW)}"
        )
    columns = ", ".join(f"CAST({f.name} AS {'BIGINT' if f.name == 'row' else 'VARCHAR'}) AS {f.name}" for f in REJECTED)
    with (
        store.replace("raw_edges_rejected", snapshot, config_hash=config.hash()) as draft,
        draft.local_file("part-00000.parquet") as path,
    ):
        con.execute(
            f"COPY (SELECT {columns} FROM ({' UNION ALL '.join(parts)}) ORDER BY file, row) "
            f"TO {literal(path)} (FORMAT parquet, COMPRESSION zstd)"
        )


def _columns(scans: list[Scan]) -> list[str]:
    """Return what edges have besides their relation and ends."""
    columns = [scan.input.columns for scan in scans]
    taken = []
    if any(c.time is not None for c in columns):
        taken.append("time")
    if any(c.weight is not None for c in columns):
        taken.append("weight")
    if any(c.split is not None for c in columns) or any(scan.input.split for scan in scans):
        taken.append("split")
    return taken


def _meet(
    con: duckdb.DuckDBPyConnection, rows: str, sorter: EdgeSorter, interner: Interner, relations: int, threads: int
) -> tuple[dict[str, int], Array]:
    """Read all rows once, and number the ids of those that are edges.

    Returns:
        The rows that are none, by fate, and how many are edges, by relation, int64 `[R]`.
    """
    fates: Counter[str] = Counter()
    edges_of = np.zeros(relations, np.int64)
    names = ["rel", "lhs", "rhs", "fate", *sorter.columns]
    reader = con.sql(f"SELECT {', '.join(names)} FROM ({rows})").to_arrow_reader(ROWS_AT_ONCE)

    def batches() -> Iterator[tuple[pa.RecordBatch]]:
        for batch in reader:
            fate = batch.column("fate")
            if fate.null_count < len(batch):
                for told in pc.value_counts(fate.drop_null()).to_pylist():
                    fates[told["values"]] += told["counts"]
                batch = batch.filter(pc.is_null(fate))
            if len(batch):
                yield (batch,)

    def looked_up(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, LookedUp, LookedUp]:
        return batch, interner.look_up(batch.column("lhs")), interner.look_up(batch.column("rhs"))

    # While rows are read, threads look their ids up; what they have not found is numbered by one.
    with Prefetcher(batches(), BATCHES_AHEAD) as ahead, ThreadPoolExecutor(threads) as pool:
        for batch, lhs, rhs in in_order(pool, looked_up, ahead, threads + 1):
            found = {"rel": batch.column("rel").to_numpy(), "lhs": interner.numbers(lhs), "rhs": interner.numbers(rhs)}
            edges_of += np.bincount(found["rel"], minlength=relations)
            if "time" in sorter.columns:
                time = batch.column("time").cast(pa.timestamp("us")).cast(pa.int64())
                found["time"] = pc.fill_null(time, numbered_edges.NO_TIME).to_numpy()
            if "weight" in sorter.columns:
                found["weight"] = batch.column("weight").to_numpy()
            if "split" in sorter.columns:
                found["split"] = pc.fill_null(batch.column("split"), 1).to_numpy()
            sorter.add(found)
    return dict(sorted(fates.items())), edges_of


def _ranked(met: pa.Array) -> tuple[edge_file.Ids, Array]:
    """Return the ids in order, and the place there of each as it was met, uint32."""
    order = id_order.order(met)
    ranks = np.empty(len(met), np.uint32)
    ranks[order] = np.arange(len(met), dtype=np.uint32)
    return edge_file.Ids(met.take(pa.array(order))), ranks


def _write_kept(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    sorter: EdgeSorter,
    possible: TwhinConfig,
    ids: edge_file.Ids,
    ranks: Array,
) -> Any:
    """Write the edges to a draft of `raw_edges`, and return it with what can be counted there in its details."""
    names = config.model.relation_names
    number = {name: rel for rel, name in enumerate(names)}
    relations_now = np.array([number.get(name, -1) for name in possible.model.relation_names], np.int32)
    draft = store.begin("raw_edges", snapshot)
    try:
        pieces = sorter.pieces(relations_now, ranks, database.threads(config))
        with draft.local_file("part-00000.parquet") as path, draft.local_file(numbered_edges.ENDS) as ends:
            counts = edge_file.write(path, ends, pieces, names, ids, PARTS, database.threads(config))
        with draft.local_file(numbered_edges.IDS) as path:
            ids.write(path)
    except BaseException:
        draft.discard()
        raise
    same_type = [relation.lhs == relation.rhs for relation in config.model.relations]
    draft.details = {
        "kept": int(counts.edges.sum()),
        "edges_per_relation": dict(zip(names, counts.edges.tolist(), strict=True)),
        "relations": names,
        "self_loops": int(counts.loops[same_type].sum()),
    }
    return draft
