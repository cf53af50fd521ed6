"""CSV and TSV files, made Parquet once: every value as text, lines that have another number of values set aside."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.store.database import explained, literal, name

# As PostgreSQL and Hive write a missing value; an empty field is an empty text, which is another value.
NULL_TEXT = "\\N"
# Characters of a malformed line that are kept for whoever looks for the cause.
MOST_TEXT = 1_000


@dataclass(frozen=True)
class Staged:
    """A delimited file as Parquet at `path`; `malformed` are (line, text, error) of lines that are no rows."""

    origin: str
    path: str
    malformed: list[tuple[int, str, str]] = field(default_factory=list)


def header(file: str, delimiter: str) -> list[str]:
    """Return the names in the first line of a plain, .gz or .zst file. Raises UserError where there is none."""
    with _opened(file) as stream:
        try:
            line = stream.read(1 << 20).partition(b"\n")[0]
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
    try:
        text = line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 text; convert it or correct the path") from error
    if not text:
        raise UserError(f"{file}: is empty, or begins with an empty line; its first line must name the columns")
    if "\r" in text:
        raise UserError(f"{file}: its lines end in a carriage return alone; end them in a newline (mac2unix does)")
    if delimiter == "\t":
        return text.split(delimiter)
    return next(csv.reader([text], delimiter=delimiter))


def stage(
    con: duckdb.DuckDBPyConnection, file: str, origin: str, delimiter: str, path: str, wanted: Sequence[str]
) -> Staged:
    """Write the `wanted` columns of `file` as Parquet to `path`, in its own order; `origin` is what users call it.

    Raises:
        UserError: The file cannot be read, or a wanted column is there twice (DuckDB's names know no case).
    """
    names = header(file, delimiter)
    for column in wanted:
        twins = [other for other in names if other.lower() == column.lower()]
        if len(twins) > 1:
            both = " and ".join(repr(twin) for twin in twins)
            raise UserError(f"{origin}: columns {both} have one name, upper and lower case apart; rename one in line 1")
    # By position, so that whatever the other columns are called does no harm.
    columns = ", ".join(f"c{number}: 'VARCHAR'" for number in range(len(names)))
    taken = ", ".join(f"c{names.index(column)} AS {name(column)}" for column in dict.fromkeys(wanted))
    # Tab-separated files quote nothing by custom, so a quotation mark there is part of the value.
    quote = "quote = '', escape = ''" if delimiter == "\t" else "quote = '\"', escape = '\"'"
    with explained(origin):
        con.execute(
            f"COPY (SELECT {taken} FROM read_csv({literal(file)}, auto_detect = false, header = true, "
            f"columns = {{{columns}}}, delim = {literal(delimiter)}, {quote}, nullstr = {literal(NULL_TEXT)}, "
            f"store_rejects = true, max_line_size = 16777216)) TO {literal(path)} (FORMAT parquet, COMPRESSION snappy)"
        )
        # A quotation mark that is never closed makes one line of the rest of the file.
        rows = con.execute(
            f"SELECT line, left(any_value(csv_line), {MOST_TEXT}), any_value(error_message) FROM reject_errors "
            "GROUP BY line ORDER BY line"
        ).fetchall()
        # They are kept over all files that a connection reads.
        con.execute("DROP TABLE reject_errors")
        con.execute("DROP TABLE reject_scans")
    return Staged(origin, path, [(int(line), str(text), str(error)) for line, text, error in rows])


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(file).suffix)
    try:
        with fsspec.open(file, "rb") as raw:
            if compression is None:
                yield raw
            else:
                yield pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; correct the path") from error
