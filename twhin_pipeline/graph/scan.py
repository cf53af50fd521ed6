"""The source's files as Parquet, and the SQL that makes typed rows of them and says which are no edges, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, time, timedelta
from typing import TYPE_CHECKING, Any

from twhin_pipeline.config.data import TIME_UNITS, duration
from twhin_pipeline.config.model import names_relation
from twhin_pipeline.errors import UserError, nearest
from twhin_pipeline.graph import delimited, lake, query
from twhin_pipeline.graph.source import TABLES, check_snapshot, stem
from twhin_pipeline.remote import fetch, local_path
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, literal, name
from twhin_pipeline.words import PARTS, SIDES

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.graph.source import Input

FIELDS = ("lhs", "rel", "rhs", "time", "weight", "split")
# Reasons why a row is no edge; the first is why it does not count for this snapshot.
OUTSIDE_WINDOW = "outside window"
OUT_OF_RANGE = "index out of range"
BAD_TIME = "bad time"
INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT"}
# What the scan calls a row's file and its number in it; the second is DuckDB's own name.
FILE_COLUMN, ROW_COLUMN = "twhin_file", "file_row_number"
DEFAULT_REL = "rel"
_NUMBER = re.compile(r"U?(TINY|SMALL|BIG|HUGE)INT|U?INTEGER|FLOAT|DOUBLE|DECIMAL.*")


@dataclass(frozen=True)
class Scan:
    """Files of an input as Parquet, with the files that staged ones were made from, and the columns' SQL types.

    `source` is the input's number. `rel` is the relation column; where it is None, all rows are of `relation`.
    """

    input: Input
    source: int
    files: list[str]
    staged: list[delimited.Staged]
    types: dict[str, str]
    rel: str | None
    relation: str | None

    @property
    def named_by_file(self) -> bool:
        """Whether the relation is the files' name."""
        return self.rel is None and self.input.source.relation is None

    @property
    def integers(self) -> bool:
        """Whether ids are integers: indexed ones always are."""
        columns = self.input.columns
        return self.input.indexed or (self.types[columns.lhs] in INTEGERS and self.types[columns.rhs] in INTEGERS)


@dataclass(frozen=True)
class Reason:
    """Why rows are no edges: what is wrong, in which field and in which column of the source (None: it has none)."""

    source: int
    text: str
    field: str
    column: str | None


def open_input(
    con: duckdb.DuckDBPyConnection, spec: Input, source: int, prefix: str, known: Collection[str] | None
) -> list[Scan]:
    """Make an input readable, and check that its files have the columns that the configuration names.

    Args:
        con: The connection.
        spec: The input.
        source: Its number.
        prefix: How the paths of temporary files begin.
        known: Names of relations, where the model lists all of them.

    Returns:
        One scan, or, where files of the input have no relation column and different names, one for each name.

    Raises:
        UserError: A file cannot be read, lacks a column, or has one of a wrong type.
    """
    staged: dict[tuple[str | None, str | None], list[delimited.Staged]] = {}
    texts: dict[tuple[str | None, str | None, tuple[str, ...]], list[tuple[str, str]]] = {}
    types: dict[str, dict[str, str]] = {}
    if spec.format == "parquet":
        files = [_reachable(con, file, f"{prefix}-{number}") for number, file in enumerate(spec.files)]
        types = described(con, spec, files)
    for number, origin in enumerate(spec.files):
        path = f"{prefix}-{number}.parquet"
        if spec.format == "csv":
            file = local_path(origin) or fetch(origin, f"{prefix}-{number}")
            names = delimited.header(file, spec.delimiter)
        elif spec.format == "parquet":
            file = files[number]
            names = list(types[file])
        elif spec.format == "sql":
            assert spec.sql is not None
            query.stage(con, spec.sql, spec.source.folder, path, origin)
            file, types = path, described(con, spec, [path])
            names = list(types[path])
        else:
            file, names = path, lake.names(origin, spec.format)
        check_columns(origin, spec, names)
        rel, relation = relation_of(spec, origin, names, known)
        if spec.format == "csv":
            texts.setdefault((rel, relation, tuple(names)), []).append((origin, file))
            continue
        if spec.format in TABLES:
            lake.stage(origin, spec.format, path, [column for _, column in named(spec, rel)])
        staged.setdefault((rel, relation), []).append(delimited.Staged(file, [(origin, 0)]))
    for number, ((rel, relation, listed), same) in enumerate(texts.items()):
        wanted = [column for _, column in named(spec, rel)]
        made = delimited.stage(con, same, spec.delimiter, f"{prefix}-text-{number}", wanted, listed)
        staged.setdefault((rel, relation), []).extend(made)
    return [_scan(con, spec, source, parts, rel, relation, types) for (rel, relation), parts in staged.items()]


def described(con: duckdb.DuckDBPyConnection, spec: Input, files: list[str]) -> dict[str, dict[str, str]]:
    """Return the columns of Parquet files and their SQL types: one file is asked for each schema that there is."""
    fields: dict[str, list[Any]] = {file: [] for file in files}
    try:
        with explained(spec.field):
            listed = ", ".join(literal(file) for file in files)
            rows = con.execute(f"SELECT * FROM parquet_schema([{listed}])").fetchall()
        for file, *described in rows:
            fields[str(file)].append(tuple(described))
    except UserError:
        fields = {file: [file] for file in files}  # so that the one that cannot be read is named
    known: dict[tuple[Any, ...], dict[str, str]] = {}
    types = {}
    for file, origin in zip(files, spec.files, strict=True):
        schema = tuple(fields[file])
        if schema not in known:
            with explained(origin):
                columns = con.execute(f"DESCRIBE SELECT * FROM {parquet([file], numbered=False)}").fetchall()
            known[schema] = {str(row[0]): str(row[1]) for row in columns}
        types[file] = known[schema]
    return types


def relation_of(
    spec: Input, origin: str, names: list[str], known: Collection[str] | None
) -> tuple[str | None, str | None]:
    """Return the relation column of a file, or the relation of all of its rows."""
    source = spec.source
    if source.relation is not None:
        return None, source.relation
    if source.columns.rel is not None or DEFAULT_REL in names:
        return source.columns.rel or DEFAULT_REL, None
    remedy = f"set {spec.section}.relation, or {spec.section}.columns.rel to the column that has it"
    missing = f"{origin}: has no column {DEFAULT_REL!r} (columns there: {', '.join(names) or 'none'})"
    if spec.format == "sql":
        raise UserError(f"{missing}; {remedy}")
    relation = stem(origin, source, spec.snapshot)
    if not names_relation(relation) or (known is not None and relation not in known):
        raise UserError(
            f"{missing}{_hint(DEFAULT_REL, names)}, and its name, {relation!r}, is none of model.relations; {remedy}"
        )
    return None, relation


def _scan(
    con: duckdb.DuckDBPyConnection,
    spec: Input,
    source: int,
    staged: list[delimited.Staged],
    rel: str | None,
    relation: str | None,
    types_of: dict[str, dict[str, str]],
) -> Scan:
    files = [part.path for part in staged]
    types: dict[str, str] = {}
    for part in staged:
        types_of_part = (
            types_of.get(part.path) or described(con, replace(spec, files=[part.origin]), [part.path])[part.path]
        )
        add_types(types, part.origin, spec, types_of_part, rel)
    if spec.format == "csv" and not spec.indexed:
        for column in (spec.columns.lhs, spec.columns.rhs):
            test = con.execute(f"SELECT {all_integers(column)} FROM {parquet(files)}").fetchall()
            types[column] = "BIGINT" if test[0][0] else "VARCHAR"
    return Scan(spec, source, files, staged, types, rel, relation)


def add_types(types: dict[str, str], origin: str, spec: Input, found: dict[str, str], rel: str | None) -> None:
    """Add the types of a file's columns to those of the files before. Raises UserError where one cannot be read."""
    if taken := [column for column in found if column.lower() in (FILE_COLUMN, ROW_COLUMN)]:
        raise UserError(f"{origin}: a column is named {taken[0]!r}, as that of row numbers is; rename it")
    check_types(origin, spec, found, rel)
    for column, kind in found.items():
        # Files of one table may differ in width (INTEGER, BIGINT); the widest sort of value rules.
        both = {types.get(column, kind), kind}
        types[column] = kind if len(both) == 1 else "BIGINT" if both <= INTEGERS else "VARCHAR"


def all_integers(column: str) -> str:
    """Return the SQL of whether all values of a column of texts are integers; null where there is none.

    Text files have no types: ids are integers where every one of them is written as one.
    """
    text = name(column)
    integer = f"regexp_full_match({text}, '0|-?[1-9][0-9]*') AND TRY_CAST({text} AS BIGINT) IS NOT NULL"
    return f"bool_and({integer}) FILTER ({text} IS NOT NULL)"


class Rows:
    """The SQL of all inputs' typed rows, and what its numbers mean."""

    def __init__(
        self,
        scans: list[Scan],
        config: TwhinConfig,
        sources: int,
        integers: bool,
        read: Callable[[Scan], str] | None = None,
    ) -> None:
        """Write it.

        Args:
            scans: The files.
            config: The configuration.
            sources: How many inputs there are.
            integers: Whether ids are integers or texts.
            read: Returns the SQL of a scan's own columns, with those of file and row; left out, of all its files.
        """
        self.sources = sources
        self.read = read or (lambda scan: parquet(scan.files))
        self.reasons: list[Reason] = []
        """Why rows are no edges: `fate` is a source's number for its edges, else `sources` and a place here."""
        self.parts = [self._part(scan, config, integers) for scan in scans]
        """The SQL of each scan: lhs, rel, rhs, time, weight, split, fate, and for a row that is no edge its text
        (`raw_lhs` and so on), `file` and `row`."""

    def all(self, columns: Sequence[str]) -> str:
        """Return the SQL of some columns of all rows."""
        return " UNION ALL ".join(f"SELECT {', '.join(columns)} FROM ({part})" for part in self.parts)

    def _part(self, scan: Scan, config: TwhinConfig, integers: bool) -> str:
        spec, columns = scan.input, scan.input.columns
        fields = dict(named(spec, scan.rel))
        taken = [f"{ROW_COLUMN} AS row", f"{FILE_COLUMN} AS file"]
        taken += [f"{name(column)} AS raw_{field}" for field, column in fields.items()]
        if scan.rel is None:
            taken.append(f"{literal(scan.relation or '')} AS raw_rel")
        rows = f"SELECT {', '.join(taken)} FROM {self.read(scan)}"
        if spec.limit is not None or spec.offset is not None:
            rows += f" LIMIT {spec.limit if spec.limit is not None else 2**62} OFFSET {spec.offset or 0}"
        identity = "BIGINT" if integers else "VARCHAR"
        by_index = spec.indexed and scan.rel is not None
        key = "r.index = TRY_CAST(raw_rel AS BIGINT)" if by_index else "r.name = CAST(raw_rel AS VARCHAR)"
        time_sql = (
            time_sql_of(scan.types[columns.time], columns.time_unit) if columns.time is not None else "NULL::TIMESTAMP"
        )
        split_sql = (
            "lower(trim(CAST(raw_split AS VARCHAR)))" if columns.split is not None else literal(spec.split or "")
        )
        typed = (
            f"SELECT {_id(spec, 'lhs', identity)} AS lhs, r.index AS rel, {_id(spec, 'rhs', identity)} AS rhs, "
            f"{time_sql} AS time, {split_sql} AS split, p.*, r.lhs_rows, r.rhs_rows, r.name "
            f"FROM ({rows}) p LEFT JOIN relations r ON {key}"
        )
        weighted = f"SELECT *, {_weight(spec)} AS weight FROM ({typed})"
        order = f"list_position([{', '.join(literal(s) for s in PARTS)}], split)"
        texts = [
            f"CAST({f'raw_{field}' if field in fields or field == 'rel' else 'NULL'} AS VARCHAR) AS raw_{field}"
            for field in FIELDS
        ]
        return (
            f"SELECT lhs, rel, rhs, time, weight, {order} AS split, {', '.join(texts)}, file, row, "
            f"{self._fate(scan, config, fields, identity)} AS fate FROM ({weighted})"
        )

    def _fate(self, scan: Scan, config: TwhinConfig, fields: dict[str, str], identity: str) -> str:
        """Return the SQL of `fate`: the first test that is true says why a row is no edge."""
        spec = scan.input
        both = {side: f"CAST(raw_{side} AS VARCHAR)" for side in SIDES}
        # A row without a time is an edge of no date.
        cases = [(f"raw_{field} IS NULL", "null", field) for field in fields if field != "time"]
        if identity == "VARCHAR":
            cases += [(_blank(both[side]), "empty id", side) for side in SIDES]
        unknown = "unknown relation" if config.model.every_other is None else "bad relation name"
        cases.append(("rel IS NULL", unknown, "rel"))
        if spec.indexed:
            index = {side: f"TRY_CAST(raw_{side} AS HUGEINT)" for side in SIDES}
            # A cast alone would round 1.5 to an integer.
            cases += [(f"NOT regexp_full_match({both[s]}, '-?[0-9]+')", "not an index", s) for s in SIDES]
            cases += [(f"{index[side]} < 0", "negative index", side) for side in SIDES]
            cases += [(f"{index[s]} >= coalesce({s}_rows, {2**62})", OUT_OF_RANGE, s) for s in SIDES]
        elif identity == "BIGINT":
            cases += [(f"{side} IS NULL", "id beyond 64 bits", side) for side in SIDES]
        if "weight" in fields:
            raw = "TRY_CAST(raw_weight AS DOUBLE)"
            wrong = f"{raw} IS NULL OR NOT isfinite({raw}) OR {raw} < 0 OR NOT isfinite(weight) OR weight > 3e38"
            cases.append((wrong, "bad weight", "weight"))
        if "split" in fields:
            cases.append((f"split NOT IN ({', '.join(literal(s) for s in PARTS)})", "bad split", "split"))
        if "time" in fields:
            text = scan.types[fields["time"]] == "VARCHAR"
            undated = f"raw_time IS NULL{' OR ' + _blank('raw_time') if text else ''}"
            cases.append((f"time IS NULL AND NOT ({undated})", BAD_TIME, "time"))
            start, end = window(spec)
            bounds = [f"time >= TIMESTAMP '{end}'"] + ([f"time < TIMESTAMP '{start}'"] if start is not None else [])
            cases.append((" OR ".join(bounds), OUTSIDE_WINDOW, "time"))
        tests = []
        for test, reason, field in cases:
            tests.append(f"WHEN {test} THEN {self.sources + len(self.reasons)}")
            self.reasons.append(Reason(scan.source, reason, field, fields.get(field)))
        return f"CAST(CASE {' '.join(tests)} ELSE {scan.source} END AS INTEGER)"


def _id(spec: Input, side: str, identity: str) -> str:
    """Return the SQL of an id, normalized where it is text."""
    sql = f"TRY_CAST(raw_{side} AS {identity})"
    if identity == "VARCHAR":
        for form in ("nfc", "trim", "lower"):
            if form in spec.source.normalize_ids:
                sql = f"{'nfc_normalize' if form == 'nfc' else form}({sql})"
    return sql


def _weight(spec: Input) -> str:
    """Return the SQL of a row's weight: that of its column, times its relation's, less with age."""
    factors = ["TRY_CAST(raw_weight AS DOUBLE)" if spec.columns.weight is not None else "1.0::DOUBLE"]
    if spec.source.weights:
        tests = " ".join(f"WHEN {literal(n)} THEN {w!r}::DOUBLE" for n, w in spec.source.weights.items())
        factors.append(f"CASE name {tests} ELSE 1.0::DOUBLE END")
    if spec.source.half_life is not None:
        half_life = duration(spec.source.half_life) // timedelta(microseconds=1)
        _, end = window(spec)
        age = f"(epoch_us(TIMESTAMP '{end}') - epoch_us(time))"
        factors.append(f"coalesce(pow(0.5::DOUBLE, {age} / {half_life}::DOUBLE), 1.0::DOUBLE)")
    return " * ".join(factors)


def _blank(text: str) -> str:
    """Return the SQL test of whether a text has nothing but spaces; only those that begin like one are trimmed."""
    return f"(({text} < '!' OR {text} >= chr(128)) AND trim({text}) = '')"


def window(spec: Input) -> tuple[datetime | None, datetime]:
    """Return the first instant that counts (None: no bound) and the first that does not: the end of the day (UTC)."""
    end = datetime.combine(check_snapshot(spec.snapshot), time()) + timedelta(days=1)
    length = spec.source.window
    try:
        return (None if length is None else end - duration(length)), end
    except OverflowError:  # it begins before year 1
        return None, end


_MOST_SECONDS = 253_402_300_800
"""Seconds from 1970 to the year 10,000."""


def time_sql_of(kind: str, unit: str) -> str:
    """Return the SQL that reads `raw_time` as a timestamp; null where it is none (or is beyond year 9999)."""
    text = "CAST(raw_time AS VARCHAR)"
    parts = TIME_UNITS[unit]
    number = f"TRY_CAST({text} AS DOUBLE)"
    integer = f"TRY_CAST({text} AS BIGINT)"
    # Integers stay exact; a fraction of a second comes as a decimal number.
    micros = f"CAST({number} / {parts} * 1000000 AS BIGINT)"
    if kind in INTEGERS:
        micros = f"{integer} * {10**6 // parts}" if parts <= 10**6 else f"{integer} // {parts // 10**6}"
    moment = f"CASE WHEN abs({number}) < {_MOST_SECONDS * parts} THEN make_timestamp({micros}) END"
    if _NUMBER.fullmatch(kind):
        return moment
    if kind == "VARCHAR":
        # A text with an offset (+02:00, Z) is an instant; one without is taken as UTC, which is the session's zone.
        return f"coalesce(CAST(TRY_CAST({text} AS TIMESTAMPTZ) AS TIMESTAMP), {moment})"
    if "TIME ZONE" in kind or "TZ" in kind:
        # Nanoseconds with a time zone go to microseconds by way of a text only.
        return "CAST(TRY_CAST(CAST(raw_time AS VARCHAR) AS TIMESTAMPTZ) AS TIMESTAMP)"
    return "TRY_CAST(raw_time AS TIMESTAMP)"


def time_unit(value: str, unit: str) -> str | None:
    """Return the unit by which a number that is no time in `unit` is one from 1979 to 2039; None if there is none."""
    try:
        number = float(value)
    except ValueError:
        return None
    fitting = [one for one, parts in TIME_UNITS.items() if one != unit and 3e8 <= number / parts < 2.2e9]
    return fitting[0] if fitting else None


def _reachable(con: duckdb.DuckDBPyConnection, file: str, path: str) -> str:
    """Let DuckDB read a URL; what comes by HTTP is fetched once, since it is read more than once."""
    if (local := local_path(file)) is not None:
        return local
    if file.startswith(("http://", "https://")):
        return fetch(file, path)
    database.register(con, file)
    return file


def named(spec: Input, rel: str | None) -> list[tuple[str, str]]:
    """Return the fields of `columns` that are read, and the columns' names; `rel` is the relation column's."""
    names = {field: getattr(spec.columns, field) for field in FIELDS} | {"rel": rel}
    return [(field, names[field]) for field in FIELDS if names[field] is not None]


def _hint(column: str, names: list[str]) -> str:
    close = nearest(column, names)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_columns(origin: str, spec: Input, names: list[str]) -> None:
    for field, column in named(spec, spec.columns.rel):
        if column in names:
            continue
        remedy = (
            f"name its columns like this in {spec.field}"
            if spec.split is not None
            else f"set {spec.section}.columns.{field}"
        )
        if len(names) == 1 and spec.format == "csv":
            remedy = (
                f"if another mark than {spec.delimiter!r} parts its columns, set {spec.section}.delimiter; else "
                f"{remedy}"
            )
        raise UserError(
            f"{origin}: has no column {column!r} (columns there: {', '.join(names) or 'none'}){_hint(column, names)}; "
            f"{remedy}"
        )


def check_types(origin: str, spec: Input, types: dict[str, str], rel: str | None) -> None:
    for field, column in named(spec, rel):
        kind = types[column]
        if field == "time" and not (
            _NUMBER.fullmatch(kind) or kind.startswith(("TIMESTAMP", "DATE", "VARCHAR", "ENUM"))
        ):
            raise UserError(
                f"{origin}: column {column!r} is of type {kind}; times must be timestamps, dates, numbers or text, so "
                "cast it"
            )
        if field not in ("lhs", "rhs", "rel"):
            continue
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
