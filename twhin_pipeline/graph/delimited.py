"""CSV and TSV files, made Parquet once: every value as text, lines that have another number of values set aside."""

from __future__ import annotations

import csv
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import lines
from twhin_pipeline.store.database import explained, literal, name

Array = np.ndarray[Any, Any]

# As PostgreSQL and Hive write a missing value; an empty field is an empty text, which is another value.
NULL_TEXT = "\\N"
LONGEST_HEADER = 1 << 20
MALFORMED, UNCLOSED = "malformed line", "unclosed quotation mark"
SMALL, TOGETHER = 1 << 20, 1 << 26
"""Files of up to `SMALL` bytes are read together, up to `TOGETHER` bytes: each reading costs tens of milliseconds."""
_MIXED = "state machine reached an invalid state"
"""What DuckDB says where lines end in different ways."""


@dataclass(frozen=True)
class Malformed:
    """A line of a file that is no row, or the first of several; a line counts from 1."""

    origin: str
    line: int
    text: str
    reason: str = MALFORMED
    lines: int = 1


@dataclass(frozen=True)
class Staged:
    """A Parquet file at `path`, and where its rows are from."""

    path: str
    origins: list[tuple[str, int]]
    """The files that it was made of, and for each the line of the text read in which its second line is."""
    malformed: list[Malformed] = field(default_factory=list)
    shifts: tuple[Array, Array] = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    """Rows from which on so many more lines come before than rows and the header; int64 `[n]` each, ascending."""

    @property
    def origin(self) -> str:
        """The (first) file that it was made of."""
        return self.origins[0][0]


def header(file: str, delimiter: str) -> list[str]:
    """Return the names in the first line of a plain, .gz or .zst file. Raises UserError where there is none."""
    with lines.opened(file) as stream:
        try:
            line, newline, _ = stream.read(LONGEST_HEADER).partition(b"\n")
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error}); correct the path, or make the file anew") from error
    if not newline and len(line) >= LONGEST_HEADER:
        raise UserError(
            f"{file}: line 1 is longer than {LONGEST_HEADER:,} bytes; it must name the columns, and a newline end it"
        )
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
    con: duckdb.DuckDBPyConnection,
    files: Sequence[tuple[str, str]],
    delimiter: str,
    prefix: str,
    wanted: Sequence[str],
    names: Sequence[str],
) -> list[Staged]:
    """Write the `wanted` columns of files as Parquet, each in its own order, small files together.

    Args:
        con: The connection.
        files: What users call each file, and where it is: a local path.
        delimiter: The delimiter.
        prefix: How the paths of temporary files begin.
        wanted: Columns to write.
        names: The columns of each of the files.

    Raises:
        UserError: A file cannot be read, or a wanted column is there twice (DuckDB's names know no case).
    """
    origin = files[0][0]
    for column in wanted:
        twins = [other for other in names if other.lower() == column.lower()]
        if len(twins) > 1:
            both = " and ".join(repr(twin) for twin in twins)
            raise UserError(f"{origin}: columns {both} have one name, upper and lower case apart; rename one in line 1")
    reader = _Reader(con, delimiter, wanted, names)
    staged = []
    for number, (origins, file) in enumerate(_together(files, delimiter, len(names), prefix)):
        staged.append(reader.stage(file, origins, f"{prefix}-{number}.parquet"))
        if file.startswith(prefix):
            os.unlink(file)
    return staged


class _Reader:
    """Stages text files of the same columns."""

    def __init__(
        self, con: duckdb.DuckDBPyConnection, delimiter: str, wanted: Sequence[str], names: Sequence[str]
    ) -> None:
        self.con, self.delimiter, self.width = con, delimiter, len(names)
        # By position, so that whatever the other columns are called does no harm.
        columns = ", ".join(f"c{number}: 'VARCHAR'" for number in range(len(names)))
        self.taken = ", ".join(f"c{names.index(column)} AS {name(column)}" for column in dict.fromkeys(wanted))
        # Tab-separated files quote nothing by custom, so a quotation mark there is part of the value.
        self.quoted = delimiter != "\t"
        quote = "quote = '\"', escape = '\"'" if self.quoted else "quote = '', escape = ''"
        self.options = (
            f"auto_detect = false, header = true, columns = {{{columns}}}, delim = {literal(delimiter)}, {quote}, "
            f"nullstr = {literal(NULL_TEXT)}, store_rejects = true, max_line_size = 16777216"
        )

    def stage(self, file: str, origins: list[tuple[str, int]], path: str) -> Staged:
        """Write a file as Parquet to `path`, and account for each of its lines."""
        origin, others = origins[0][0], []
        try:
            with explained(origin), ThreadPoolExecutor(1) as pool:
                counting = pool.submit(lines.count, file)
                try:
                    rows, rejects = self._copy(file, path)
                    total = counting.result()
                except duckdb.InvalidInputException as error:
                    if _MIXED not in str(error):
                        raise
                    others.append(f"{path}.ends")
                    lines.with_newlines(file, others[-1])
                    file = others[-1]
                    rows, rejects = self._copy_alike(file, path, origin)
                    total = lines.count(file)
            layout = lines.Layout()
            lost: list[lines.Lost] = []
            if total != 1 + rows + len(rejects):
                layout = lines.examine(file, self.delimiter, self.width, self.quoted)
                if lost := layout.lost:
                    if lost[0].line == 1:
                        raise UserError(f"{origin}: line 1 has a quotation mark that is never closed; close it")
                    others.append(f"{path}.kept")
                    lines.without(file, lost, others[-1])
                    file = others[-1]
                    layout = lines.examine(file, self.delimiter, self.width, self.quoted)
                rows, rejects = self._copy_all(file, path, origin, total, layout, again=bool(lost))
        finally:
            for other in others:
                with suppress(OSError):
                    os.unlink(other)
        return Staged(path, origins, _malformed(origins, rejects, layout, lost), _shifts(rejects, layout))

    def _copy(self, file: str, path: str, more: str = "") -> tuple[int, list[tuple[int, str]]]:
        """Write what are rows; return their count, and number (`lines.Layout`) and text of records that are none."""
        try:
            done = self.con.execute(
                f"COPY (SELECT {self.taken} FROM read_csv({literal(file)}, {self.options}{more})) TO {literal(path)} "
                "(FORMAT parquet, COMPRESSION snappy)"
            ).fetchall()
            result = self.con.execute(
                f"SELECT line, left(ltrim(any_value(csv_line), chr(13) || chr(10)), {lines.MOST_TEXT}) "
                "FROM reject_errors GROUP BY line ORDER BY line"
            ).fetchall()
        finally:
            # They are kept over all files that a connection reads.
            self.con.execute("DROP TABLE IF EXISTS reject_errors")
            self.con.execute("DROP TABLE IF EXISTS reject_scans")
        return int(done[0][0]), [(int(number), str(text)) for number, text in result]

    def _copy_alike(self, file: str, path: str, origin: str) -> tuple[int, list[tuple[int, str]]]:
        """Write what are rows of a file whose lines all end in a newline."""
        try:
            return self._copy(file, path)
        except duckdb.InvalidInputException as error:
            if _MIXED not in str(error) or not (line := lines.first_return(file)):
                raise
            raise UserError(
                f"{origin}: line {line} has a carriage return within it, and other lines end in a newline; end all "
                "lines alike (dos2unix and mac2unix do)"
            ) from error

    def _copy_all(
        self, file: str, path: str, origin: str, total: int, layout: lines.Layout, again: bool
    ) -> tuple[int, list[tuple[int, str]]]:
        """Write what are rows, until each line of the file is accounted for."""
        known = 1 + len(layout.blank) + sum(extra for _, extra in layout.tall)
        missing = 0
        for more in ("", ", parallel = false"):
            with explained(origin):
                rows, rejects = self._copy(file, path, more)
            if not (missing := total - known - rows - len(rejects)):
                return rows, rejects
        raise UserError(
            f"{origin}: {abs(missing):,} of {total:,} lines cannot be accounted for; look for quotation marks that are "
            "not closed, or convert the file to Parquet"
        )


def _together(
    files: Sequence[tuple[str, str]], delimiter: str, width: int, prefix: str
) -> Iterator[tuple[list[tuple[str, int]], str]]:
    """Yield files to stage, each with what it is made of (see `Staged.origins`): itself, or several small ones."""
    text = f"{prefix}.text"
    group: list[tuple[str, int]] = []
    line, size = 2, 0
    for origin, file in files:
        body = _body(file, delimiter, width) if len(files) > 1 else None
        if body is None:
            yield [(origin, 2)], file
            continue
        with open(text, "ab" if group else "wb") as out:
            if not group:
                with lines.opened(file) as stream:
                    out.write(stream.read(SMALL).partition(b"\n")[0].rstrip(b"\r") + b"\n")
            out.write(body)
        group.append((origin, line))
        line, size = line + body.count(b"\n"), size + len(body)
        if size > TOGETHER:
            yield group, text
            group, line, size = [], 2, 0
    if group:
        yield group, text


def _body(file: str, delimiter: str, width: int) -> bytes | None:
    """Return a small file's lines but the first, if no quoted value goes beyond a line; else None."""
    if os.path.getsize(file) > SMALL:
        return None
    with lines.opened(file) as stream:
        text = stream.read(SMALL + 1)
    if len(text) > SMALL:
        return None
    body = text.partition(b"\n")[2].replace(b"\r\n", b"\n")
    if b"\r" in body:
        return None
    if delimiter != "\t" and b'"' in text:
        layout = lines.examine(file, delimiter, width, quoted=True)
        if layout.tall or layout.lost:
            return None
    return body if body.endswith(b"\n") or not body else body + b"\n"


def _malformed(
    origins: list[tuple[str, int]], rejects: list[tuple[int, str]], layout: lines.Layout, lost: list[lines.Lost]
) -> list[Malformed]:
    """Return lines that are no rows, by their file and line in it."""
    tall = np.array(layout.tall, np.int64).reshape(-1, 2)
    before = np.concatenate([[0], np.cumsum(tall[:, 1])])
    place = np.searchsorted(tall[:, 0], [number for number, _ in rejects]).tolist()
    own = dict(layout.tall)
    result = [
        (number + int(before[at]), text, MALFORMED, 1 + own.get(number, 0))
        for (number, text), at in zip(rejects, place, strict=True)
    ]
    result += [(one.line, one.text, UNCLOSED, one.lines) for one in lost]
    begins = [first for _, first in origins]
    malformed = []
    for line, text, reason, count in sorted(result):
        origin, first = origins[max(0, bisect_right(begins, line) - 1)]
        malformed.append(Malformed(origin, line - first + 2, text, reason, count))
    return malformed


def _shifts(rejects: list[tuple[int, str]], layout: lines.Layout) -> tuple[Array, Array]:
    """Return `Staged.shifts`: each blank line, each record that is no row, and each row of several lines adds some."""
    none = np.sort(np.array([number for number, _ in rejects] + layout.blank, np.int64))
    tall = np.array(layout.tall, np.int64).reshape(-1, 2)
    is_row = ~np.isin(tall[:, 0], none)
    rows = np.concatenate(
        [none - 2 - np.arange(len(none)), tall[:, 0] - 2 - np.searchsorted(none, tall[:, 0]) + is_row]
    )
    extra = np.concatenate([np.ones(len(none), np.int64), tall[:, 1]])
    order = np.argsort(rows, kind="stable")
    rows, extra = rows[order], np.cumsum(extra[order])
    last = np.append(rows[1:] != rows[:-1], [True] * bool(len(rows))).astype(bool)
    return rows[last], extra[last]
