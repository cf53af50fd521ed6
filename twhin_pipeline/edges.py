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
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline import database, delimited, edge_file, numbered_edges, relations, source
from twhin_pipeline.database import explained, literal, name
from twhin_pipeline.edge_sort import EdgeSorter
from twhin_pipeline.errors import UserError, nearest
from twhin_pipeline.interning import Interner, LookedUp
from twhin_pipeline.prefetch import Prefetcher, in_order
from twhin_pipeline.sections.model import Relation, names_relation

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.source import Input
    from twhin_pipeline.store import Manifest, Store

Array = np.ndarray[Any, Any]

SIDES = ("lhs", "rhs")
SPLITS = ("train", "validation", "test")
OUTSIDE_WINDOW = "outside window"
MALFORMED = "malformed line"
OUT_OF_RANGE = "index out of range"
MOST_RELATIONS = 100_000
"""With `"*"` in model.relations, more names than this are taken for a mistake: an id's column for the relations'."""
ROWS_AT_ONCE, BATCHES_AHEAD = 1 << 17, 4
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
# What the scan calls a row's file and its number in it; the second is DuckDB's own name.
FILE_COLUMN, ROW_COLUMN = "twhin_file", "file_row_number"
REJECTED = pa.schema(
    [(column, pa.string()) for column in ("lhs", "rel", "rhs", "reason", "file")] + [("row", pa.int64())]
)


@dataclass(frozen=True)
class Scan:
    """An input as Parquet: its files, what they stand for (delimited ones were staged), and its columns' SQL types."""

    input: Input
    files: list[str]
    staged: list[delimited.Staged]
    types: dict[str, str]

    @property
    def integers(self) -> bool:
        """Whether ids are integers: indexed ones always are."""
        columns = self.input.columns
        return self.input.indexed or (self.types[columns.lhs] in INTEGERS and self.types[columns.rhs] in INTEGERS)


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
            _open(con, given, f"{folder}/{number}") for number, given in enumerate(source.inputs(config, snapshot))
        ]
        possible = relations.with_found(config, _names(con, config, scans))
        _create_relations(con, possible, possible.model.relations)
        integers = all(scan.integers for scan in scans)
        rows = " UNION ALL ".join(_rows(scan, config, snapshot, integers) for scan in scans)
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
            ids, ranks = _ranked(con, interner.ids())
            del interner
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


def _open(con: duckdb.DuckDBPyConnection, given: Input, prefix: str) -> Scan:
    """Make the input readable, and check that its files have the columns that the configuration names."""
    staged: list[delimited.Staged] = []
    files = [_reachable(con, file, f"{prefix}-{number}") for number, file in enumerate(given.files)]
    if given.format == "csv":
        for number, (file, origin) in enumerate(zip(files, given.files, strict=True)):
            names = delimited.header(file, given.delimiter)
            _check_columns(origin, given, names)
            wanted = [column for _, column in _named(given)]
            told = delimited.stage(con, file, given.delimiter, f"{prefix}-{number}.parquet", wanted)
            staged.append(delimited.Staged(origin, told.path, told.malformed))
        files = [part.path for part in staged]
    else:
        staged = [delimited.Staged(origin, file) for origin, file in zip(given.files, files, strict=True)]
    types: dict[str, str] = {}
    for file, part in zip(files, staged, strict=True):
        with explained(part.origin):
            described = con.execute(f"DESCRIBE SELECT * FROM {_parquet([file], numbered=False)}").fetchall()
        found = {str(row[0]): str(row[1]) for row in described}
        if taken := [column for column in found if column.lower() in (FILE_COLUMN, ROW_COLUMN)]:
            raise UserError(f"{part.origin}: a column is named {taken[0]!r}, as that of row numbers is; rename it")
        _check_columns(part.origin, given, list(found))
        _check_types(part.origin, given, found)
        for column, kind in found.items():
            # Files of one table may differ in width (INTEGER, BIGINT); the widest sort of value rules.
            both = {types.get(column, kind), kind}
            types[column] = kind if len(both) == 1 else "BIGINT" if both <= INTEGERS else "VARCHAR"
    if given.format == "csv" and not given.indexed:
        # Text files have no types: ids are integers where every one of them is written as one.
        for column in (given.columns.lhs, given.columns.rhs):
            text = name(column)
            whole = f"regexp_full_match({text}, '0|-?[1-9][0-9]*') AND TRY_CAST({text} AS BIGINT) IS NOT NULL"
            test = con.execute(
                f"SELECT coalesce(bool_and({whole}) FILTER ({name(column)} IS NOT NULL), false) FROM {_parquet(files)}"
            ).fetchall()
            types[column] = "BIGINT" if test[0][0] else "VARCHAR"
    return Scan(given, files, staged, types)


def _reachable(con: duckdb.DuckDBPyConnection, file: str, path: str) -> str:
    """Let DuckDB read a URL; what comes by HTTP is fetched once, since it is read more than once."""
    if "://" not in file:
        return file
    import fsspec

    fs, inner = fsspec.core.url_to_fs(file)
    if file.startswith(("http://", "https://")):
        ending = file.partition("?")[0].rpartition("/")[2]
        local = f"{path}-{ending}"
        try:
            fs.get_file(inner, local)
        except OSError as error:
            raise UserError(f"{file}: cannot be fetched ({error}); mend the URL") from error
        return local
    database.register(con, file)
    return file


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


def _named(given: Input) -> list[tuple[str, str]]:
    """Return the fields of `source.columns` that are set, and the columns' names."""
    fields = ("lhs", "rel", "rhs", "time", "weight", "split")
    return [(field, column) for field in fields if (column := getattr(given.columns, field)) is not None]


def _check_columns(origin: str, given: Input, names: list[str]) -> None:
    for field, column in _named(given):
        if column in names:
            continue
        close = nearest(column, names)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        remedy = (
            f"set source.columns.{field}"
            if given.field == "source.path"
            else f"name its columns like this in {given.field}"
        )
        if len(names) == 1 and given.format == "csv":
            remedy = f"if another mark than {given.delimiter!r} parts its columns, set source.delimiter; else {remedy}"
        raise UserError(
            f"{origin}: has no column {column!r} (columns there: {', '.join(names) or 'none'}){hint}; {remedy}"
        )


def _check_types(origin: str, given: Input, types: dict[str, str]) -> None:
    columns = given.columns
    for field in ("lhs", "rhs", "rel"):
        column = getattr(columns, field)
        kind = types[column]
        plain = (
            kind in INTEGERS or kind in ("VARCHAR", "UUID", "HUGEINT", "UHUGEINT", "DATE") or kind.startswith("ENUM")
        )
        if not plain:
            raise UserError(
                f"{origin}: column {column!r} is of type {kind}; ids and relations must be text or integers, so cast it"
            )


def _names(con: duckdb.DuckDBPyConnection, config: TwhinConfig, scans: list[Scan]) -> list[str]:
    """Return the source's names of relations, those that can be one, where `model.relations` has a `"*"`."""
    if config.model.every_other is None:
        return []
    found: set[str] = set()
    for scan in scans:
        column = scan.input.columns.rel
        with explained(scan.input.field):
            rows = con.execute(
                f"SELECT DISTINCT CAST({name(column)} AS VARCHAR) FROM {_parquet(scan.files)} "
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


def _rows(scan: Scan, config: TwhinConfig, snapshot: str, integers: bool) -> str:
    """Return the SQL of typed rows: lhs, rel, rhs, time, weight, split, their raw text, origin and `fate`.

    `fate` is null for an edge, else the reason why the row is none.
    """
    given, columns = scan.input, scan.input.columns
    taken = [f"{ROW_COLUMN} AS row", f"{FILE_COLUMN} AS file"]
    taken += [f"{name(getattr(columns, side))} AS raw_{side}" for side in ("lhs", "rel", "rhs")]
    taken += [
        f"{name(column)} AS raw_{field}"
        for field in ("time", "weight", "split")
        if (column := getattr(columns, field)) is not None
    ]
    part = f"SELECT {', '.join(taken)} FROM {_parquet(scan.files)}"
    if given.limit is not None or given.offset is not None:
        part += f" LIMIT {given.limit if given.limit is not None else 2**62} OFFSET {given.offset or 0}"
    identity = "BIGINT" if integers else "VARCHAR"
    key = "r.index = TRY_CAST(raw_rel AS BIGINT)" if given.indexed else "r.name = CAST(raw_rel AS VARCHAR)"
    time_sql = _time(scan.types[columns.time]) if columns.time is not None else "NULL::TIMESTAMP"
    weight_sql = "TRY_CAST(raw_weight AS DOUBLE)" if columns.weight is not None else "1.0::DOUBLE"
    split_sql = "lower(trim(CAST(raw_split AS VARCHAR)))" if columns.split is not None else literal(given.split or "")
    typed = (
        f"SELECT TRY_CAST(raw_lhs AS {identity}) AS lhs, r.index AS rel, TRY_CAST(raw_rhs AS {identity}) AS rhs, "
        f"{time_sql} AS time, {weight_sql} AS weight, {split_sql} AS split, p.*, r.lhs_rows, r.rhs_rows "
        f"FROM ({part}) p LEFT JOIN relations r ON {key}"
    )
    fate = _fate(scan, config, snapshot, identity)
    order = f"list_position([{', '.join(literal(s) for s in SPLITS)}], split)"
    return (
        f"SELECT lhs, rel, rhs, time, weight, {order} AS split, CAST(raw_lhs AS VARCHAR) AS raw_lhs, "
        f"CAST(raw_rel AS VARCHAR) AS raw_rel, CAST(raw_rhs AS VARCHAR) AS raw_rhs, file, row, "
        f"{fate} AS fate FROM ({typed})"
    )


def _fate(scan: Scan, config: TwhinConfig, snapshot: str, identity: str) -> str:
    given, columns = scan.input, scan.input.columns
    raw = ["raw_lhs", "raw_rel", "raw_rhs"]
    raw += [f"raw_{field}" for field in ("time", "weight", "split") if getattr(columns, field) is not None]
    cases = [(" OR ".join(f"{column} IS NULL" for column in raw), "null")]
    if identity == "VARCHAR":
        cases.append((" OR ".join(_blank(f"CAST(raw_{side} AS VARCHAR)") for side in SIDES), "empty id"))
    cases.append(("rel IS NULL", "unknown relation" if config.model.every_other is None else "bad relation name"))
    if given.indexed:
        left, right = (f"TRY_CAST(raw_{side} AS HUGEINT)" for side in SIDES)
        cases += [
            # A cast alone would round 1.5 to an integer.
            (
                " OR ".join(f"NOT regexp_full_match(CAST(raw_{s} AS VARCHAR), '-?[0-9]+')" for s in SIDES),
                "not an index",
            ),
            (f"{left} < 0 OR {right} < 0", "negative index"),
            (
                " OR ".join(f"{i} >= coalesce({n}, {2**62})" for i, n in ((left, "lhs_rows"), (right, "rhs_rows"))),
                OUT_OF_RANGE,
            ),
        ]
    elif identity == "BIGINT":
        cases.append(("lhs IS NULL OR rhs IS NULL", "id beyond 64 bits"))
    if columns.weight is not None:
        cases.append(("weight IS NULL OR NOT isfinite(weight) OR weight < 0 OR weight > 3e38", "bad weight"))
    if columns.split is not None:
        cases.append((f"split NOT IN ({', '.join(literal(s) for s in SPLITS)})", "bad split"))
    if columns.time is not None:
        cases.append(("time IS NULL", "bad time"))
        start, end = window(config, snapshot)
        bounds = [f"time >= TIMESTAMP '{end}'"] + ([f"time < TIMESTAMP '{start}'"] if start is not None else [])
        cases.append((" OR ".join(bounds), OUTSIDE_WINDOW))
    return "CASE " + " ".join(f"WHEN {test} THEN {literal(reason)}" for test, reason in cases) + " END"


def _blank(text: str) -> str:
    """Return the SQL test of whether a text has nothing but spaces; only those that begin like one are trimmed."""
    return f"(({text} < '!' OR {text} >= chr(128)) AND trim({text}) = '')"


def window(config: TwhinConfig, snapshot: str) -> tuple[datetime | None, datetime]:
    """Return the first instant that counts (None: no bound) and the first that does not: the end of the day (UTC)."""
    end = datetime.combine(source.check_snapshot(snapshot), time()) + timedelta(days=1)
    told = config.source.window if config.source is not None else None
    if told is None:
        return None, end
    unit = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}[told[-1]]
    return end - int(told[:-1]) * unit, end


def _time(kind: str) -> str:
    """Return the SQL that reads `raw_time` as a timestamp; null where it is none (or is beyond year 9999)."""
    text = "CAST(raw_time AS VARCHAR)"
    seconds = f"TRY_CAST({text} AS DOUBLE)"
    moment = f"CASE WHEN abs({seconds}) < 253402300800 THEN make_timestamp(CAST({seconds} * 1000000 AS BIGINT)) END"
    if kind in INTEGERS or kind in ("FLOAT", "DOUBLE", "HUGEINT") or kind.startswith("DECIMAL"):
        return moment
    if kind == "VARCHAR":
        # A text with an offset (+02:00, Z) is an instant; one without is taken as UTC, which is the session's zone.
        return f"coalesce(CAST(TRY_CAST({text} AS TIMESTAMPTZ) AS TIMESTAMP), {moment})"
    return "TRY_CAST(raw_time AS TIMESTAMP)"


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


def _ranked(con: duckdb.DuckDBPyConnection, met: pa.Array) -> tuple[edge_file.Ids, Array]:
    """Return the ids in order, and the place there of each as it was met, uint32."""
    numbered = pa.table({"id": met, "number": np.arange(len(met), dtype=np.uint32)})  # noqa: F841 (DuckDB reads it)
    order = con.sql("SELECT number FROM numbered ORDER BY id").fetchnumpy()["number"]
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
            counts = edge_file.write(path, ends, pieces, names, ids, SPLITS, database.threads(config))
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


def _parquet(files: list[str], numbered: bool = True) -> str:
    options = f"filename = '{FILE_COLUMN}', file_row_number = true, " if numbered else ""
    # Old writers leave text as plain bytes.
    return database.parquet(files, f"{options}union_by_name = true, binary_as_string = true")
