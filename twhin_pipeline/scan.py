"""The source's files as Parquet, and the SQL that makes typed rows of them and says which are no edges, and why."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING

from twhin_pipeline import database, delimited, source
from twhin_pipeline.database import explained, literal, name
from twhin_pipeline.errors import UserError, nearest
from twhin_pipeline.split import PARTS

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.source import Input

SIDES = ("lhs", "rhs")
OUTSIDE_WINDOW = "outside window"
OUT_OF_RANGE = "index out of range"
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
# What the scan calls a row's file and its number in it; the second is DuckDB's own name.
FILE_COLUMN, ROW_COLUMN = "twhin_file", "file_row_number"


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


def open_input(con: duckdb.DuckDBPyConnection, given: Input, prefix: str) -> Scan:
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
            described = con.execute(f"DESCRIBE SELECT * FROM {parquet([file], numbered=False)}").fetchall()
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
                f"SELECT coalesce(bool_and({whole}) FILTER ({name(column)} IS NOT NULL), false) FROM {parquet(files)}"
            ).fetchall()
            types[column] = "BIGINT" if test[0][0] else "VARCHAR"
    return Scan(given, files, staged, types)


def typed_rows(scan: Scan, config: TwhinConfig, snapshot: str, integers: bool) -> str:
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
    part = f"SELECT {', '.join(taken)} FROM {parquet(scan.files)}"
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
    order = f"list_position([{', '.join(literal(s) for s in PARTS)}], split)"
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
        cases.append((f"split NOT IN ({', '.join(literal(s) for s in PARTS)})", "bad split"))
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


def parquet(files: list[str], numbered: bool = True) -> str:
    options = f"filename = '{FILE_COLUMN}', file_row_number = true, " if numbered else ""
    # Old writers leave text as plain bytes.
    return database.parquet(files, f"{options}union_by_name = true, binary_as_string = true")
