"""Files that `twhin init` looks at: which of them are one source, and what a sample of their rows holds."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime

import duckdb

from twhin_pipeline.config.data import TIME_UNITS
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import delimited, source
from twhin_pipeline.operations.init_columns import Column
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, literal, name

SAMPLE_ROWS = 2_000_000
"""So many rows of a source are looked at, the first ones of its newest file."""
TYPE_ROWS = 200_000
"""So many rows of a sample say what the values of a column are."""
MOST_VALUES = 30
"""A column with at most so many different values has them listed."""
DATE = re.compile(r"(?<!\d)" + source.DATE + r"(?!\d)")
FORMATS = (".parquet", ".csv", ".csv.gz", ".csv.zst", ".tsv", ".tsv.gz", ".tsv.zst")
TAB = "\t"
DELIMITERS = (",", TAB, ";", "|")
INTEGER, NUMBER = r"-?[0-9]+", r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?"


@dataclass(frozen=True)
class Source:
    """Files that are one source: a path or pattern that names them, the newest file, and their snapshots if any."""

    path: str
    newest: str
    snapshots: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """Return the name that the files have in common, without the ending, dates and numbers."""
        path = self.path.partition("?")[0] if "://" in self.path else self.path
        for part in reversed(path.split("/")):
            for ending in FORMATS:
                part = part.removesuffix(ending)
            words = re.sub(r"\{snapshot\}|\*|\d+", "", part).strip("-_. ")
            if words and words not in ("part", "data", "edges"):
                return words
        return "edge"


@dataclass(frozen=True)
class Sample:
    """The first rows of a source, as the table `table` of a database, with what its columns hold."""

    source: Source
    table: str
    rows: int
    complete: bool
    """Whether these are all of the newest file's rows."""
    columns: list[Column]
    delimiter: str | None
    """The delimiter of a text file, where it is not the one that its ending stands for."""


def group(paths: Sequence[str]) -> list[Source]:
    """Return the sources that files, globs and URLs make, in order.

    A date in a file's name stands for its snapshot. So does one in a folder's name where files differ by it alone.
    Files that differ by numbers alone, and are all there are of their kind, become one pattern.

    Raises:
        UserError: A path names no file, or a file of another kind.
    """
    files: dict[str, str] = {}  # each after the path that named it
    for path in paths:
        is_file = "://" not in path and os.path.isfile(path)
        named = [path] if is_file else source.list_files(path)
        if not named:
            raise UserError(f"{path}: there is no such file; give the paths of Parquet, CSV or TSV files")
        for file in named:
            if not _plain(file).lower().endswith(FORMATS):
                known = ", ".join(FORMATS)
                raise UserError(f"{file}: its kind is not known ({known} are); convert it, or rename it")
            files.setdefault(file, path if path != file else escaped(path))
    dated: dict[str, list[str]] = {}
    for file in files:
        dated.setdefault(_dated(file), []).append(file)
    patterns = {}
    for file, path in files.items():
        if len(dated[_dated(file)]) > 1 or DATE.search(_plain(file).rpartition("/")[2]):
            patterns[file] = escaped(_dated(file) if len(dated[_dated(file)]) > 1 else _dated_name(file))
        else:
            patterns[file] = path
    shards: dict[str, list[str]] = {}
    for file, pattern in patterns.items():
        shards.setdefault(_shards(pattern), []).append(file)
    sources: dict[str, list[str]] = {}
    for file, pattern in patterns.items():
        numbered = shards[_shards(pattern)]
        there = "://" not in file and sorted(source.list_files(_shards(pattern).replace("{snapshot}", "????-??-??")))
        together = len(set(map(patterns.get, numbered))) > 1 and sorted(numbered) == there
        sources.setdefault(_shards(pattern) if together else pattern, []).append(file)
    return [_source(pattern, those) for pattern, those in sources.items()]


def _source(pattern: str, files: list[str]) -> Source:
    dates = {text for file in files for text in DATE.findall(file) if "{snapshot}" in pattern}
    return Source(pattern, max(files), tuple(sorted(dates)))


def _plain(file: str) -> str:
    return file.partition("?")[0] if "://" in file else file


def escaped(path: str) -> str:
    """Return the pattern that a path alone matches."""
    return path if "://" in path else glob.escape(path)


def _dated(file: str) -> str:
    """Return the path with each date in it replaced by `{snapshot}`."""
    return DATE.sub(lambda match: "{snapshot}" if _is_date(match[0]) else match[0], file)


def _dated_name(file: str) -> str:
    folder, slash, last = file.rpartition("/")
    return folder + slash + _dated(last)


def _is_date(text: str) -> bool:
    try:
        return bool(date.fromisoformat(text))
    except ValueError:
        return False


def _shards(pattern: str) -> str:
    """Return the pattern with the last number of the file's name replaced by `*`."""
    folder, slash, last = pattern.rpartition("/")
    numbers = list(re.finditer(r"\d+", last))
    if not numbers or "*" in last:
        return pattern
    return f"{folder}{slash}{last[: numbers[-1].start()]}*{last[numbers[-1].end() :]}"


def sample(con: duckdb.DuckDBPyConnection, source: Source, number: int) -> Sample:
    """Read the first rows of a source's newest file into the table `sample_<number>`.

    Raises:
        UserError: The file cannot be read, has no rows, or its first line does not name its columns.
    """
    file, table = source.newest, f"sample_{number}"
    database.register(con, file)
    delimiter = None
    if _plain(file).lower().endswith(".parquet"):
        scan = f"read_parquet({literal(file)}, binary_as_string = true)"
        usual = None
    else:
        usual = "\t" if ".tsv" in _plain(file).lower().rpartition("/")[2] else ","
        delimiter = _delimiter(file, usual)
        scan = _text(file, delimiter, delimited.header(file, delimiter))
    with explained(file):
        con.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM {scan} LIMIT {SAMPLE_ROWS}")
        rows = _count(con, table)
        if rows == 0:
            raise UserError(f"{file}: has no rows; give a file with edges")
        if delimiter is not None:
            _refuse_headerless(con, table, file, delimiter)
        columns = [_column(con, table, str(row[0]), str(row[1])) for row in con.execute(f"DESCRIBE {table}").fetchall()]
    return Sample(source, table, rows, rows < SAMPLE_ROWS, columns, None if delimiter == usual else delimiter)


def _text(file: str, delimiter: str, names: Sequence[str]) -> str:
    """Return the SQL that reads a text file, each value as text, and empty ones as null."""
    twins = [one for one in names if [other.lower() for other in names].count(one.lower()) > 1]
    if twins:  # DuckDB's names know no upper and lower case
        raise UserError(f"{file}: two columns are named {twins[0]!r}; rename one in line 1")
    columns = ", ".join(f"{literal(column)}: 'VARCHAR'" for column in names)
    quote = "quote = '', escape = ''" if delimiter == "\t" else "quote = '\"', escape = '\"'"
    return (
        f"read_csv({literal(file)}, auto_detect = false, header = true, columns = {{{columns}}}, "
        f"delim = {literal(delimiter)}, {quote}, nullstr = ['', {literal(delimited.NULL_TEXT)}], ignore_errors = true, "
        "max_line_size = 16777216)"
    )


def _delimiter(file: str, usual: str) -> str:
    """Return the delimiter of a text file: the usual one of its ending, unless only another parts the first line."""
    if len(delimited.header(file, usual)) > 1:
        return usual
    counts = {mark: len(delimited.header(file, mark)) for mark in DELIMITERS}
    best = max(DELIMITERS, key=lambda mark: counts[mark])
    if counts[best] == 1:
        raise UserError(f"{file}: its first line has one column; an edge needs two, parted by a comma or a tab")
    return best


def _refuse_headerless(con: duckdb.DuckDBPyConnection, table: str, file: str, delimiter: str) -> None:
    """Raise UserError where the first line holds values, not names: numbers, or texts that the rows repeat."""
    names = [str(row[0]) for row in con.execute(f"DESCRIBE {table}").fetchall()]
    for column in names:
        form = re.sub(r"\d+", "9", column)
        total, repeated, alike = con.execute(
            f"SELECT count({name(column)}), count(*) FILTER ({name(column)} = ?), "
            f"count(*) FILTER (regexp_replace({name(column)}, '[0-9]+', '9', 'g') = ?) FROM {table}",
            [column, form],
        ).fetchall()[0]
        number = re.fullmatch(NUMBER, column) is not None
        # Ids that are numbered look alike: u_17 in the first line and u_18 below.
        if number or repeated or (form != column and total and alike >= 0.9 * total):
            names = ["lhs", "rel", "rhs"] if len(names) == 3 else [f"column{n + 1}" for n in range(len(names))]
            line = delimiter.join(names).replace("\t", "\\t")
            raise UserError(
                f"{file}: its first line does not name the columns: it has {column!r}, a value like those below; put a "
                f"line of names above it, such as: (printf '{line}\\n'; cat {os.path.basename(file)}) > "
                f"named.{'tsv' if delimiter == TAB else 'csv'}"
            )


def _column(con: duckdb.DuckDBPyConnection, table: str, column: str, sql_type: str) -> Column:
    """Return what a column's values are."""
    text = f"CAST({name(column)} AS VARCHAR)"
    number = f"TRY_CAST({text} AS DOUBLE)"
    count, distinct, integers, numbers, times, low, high = con.execute(
        f"SELECT count({name(column)}), approx_count_distinct({text}), "
        f"count(*) FILTER (regexp_full_match({text}, '{INTEGER}')), "
        f"count(*) FILTER (regexp_full_match({text}, '{NUMBER}')), "
        f"count(*) FILTER (TRY_CAST({text} AS TIMESTAMPTZ) IS NOT NULL), min({number}), max({number}) "
        f"FROM (FROM {table} LIMIT {TYPE_ROWS})"
    ).fetchall()[0]
    if sql_type.startswith(("TIMESTAMP", "DATE")):
        kind = "time"
    elif sql_type in ("VARCHAR", "UUID") or sql_type.startswith("ENUM"):
        # A few values may be dirty.
        few = 0.99 * count
        kind = "text"
        if count and integers == count:
            kind = "integer"
        elif count and numbers == count:
            kind = "float"
        elif count and times >= few and integers < few:
            kind = "time"
    elif sql_type.endswith(("INT", "INTEGER")):
        kind = "integer"
    elif sql_type in ("FLOAT", "DOUBLE") or sql_type.startswith("DECIMAL"):
        kind = "float"
    else:
        kind = "other"
    values: tuple[str, ...] = ()
    if distinct <= 2 * MOST_VALUES:
        distinct_values = con.execute(
            f"SELECT DISTINCT {text} FROM {table} WHERE {name(column)} IS NOT NULL ORDER BY 1 LIMIT {MOST_VALUES + 1}"
        ).fetchall()
        values = tuple(str(row[0]) for row in distinct_values) if len(distinct_values) <= MOST_VALUES else ()
    return Column(column, kind, int(distinct), low, high, values)


def _count(con: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(con.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0])


def span(con: duckdb.DuckDBPyConnection, table: str, column: str, unit: str) -> tuple[date, date] | None:
    """Return the days (UTC) of a column's earliest and latest time (numbers are in `unit`); None where it has none."""
    text = f"CAST({name(column)} AS VARCHAR)"
    seconds = f"make_timestamp(CAST(TRY_CAST({text} AS DOUBLE) / {TIME_UNITS[unit]} * 1000000 AS BIGINT))"
    time = f"coalesce(CAST(TRY_CAST({text} AS TIMESTAMPTZ) AS TIMESTAMP), {seconds})"
    first, last = con.execute(f"SELECT min({time}), max({time}) FROM {table}").fetchall()[0]
    return (first.date(), last.date()) if isinstance(first, datetime) and isinstance(last, datetime) else None
