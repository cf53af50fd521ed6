"""The lines of a delimited file: counted, and examined where there are more of them than records were read.

A quotation mark that is never closed, or that a later one closes by chance, makes one value of all lines between. A
parser cannot tell, so the lines are counted apart from it, and none is lost unseen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError

Array = np.ndarray[Any, Any]

BLOCK = 1 << 20
MOST_TEXT = 1_000
"""Characters of a line that are kept for whoever looks for the cause."""
_NEWLINE, _RETURN, _QUOTE = b"\n", b"\r", b'"'


@dataclass(frozen=True)
class Lost:
    """Lines that one quotation mark made part of a value: the first, its text, and how many they are."""

    line: int
    text: str
    lines: int


@dataclass
class Layout:
    """What is no record of one line. A record's number is its place among records and blank lines, from 1."""

    blank: list[int] = field(default_factory=list)
    """Numbers of blank lines."""
    tall: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of records of several lines, which a quoted value has, and how many more than one they take."""
    lost: list[Lost] = field(default_factory=list)


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """Open a plain, .gz or .zst file (path or URL) for reading bytes. Raises UserError where there is none."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(Path(file).suffix)
    try:
        with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as raw:
            if compression is None:
                yield raw
            else:
                yield pa.CompressedInputStream(pa.PythonFile(raw, "r"), compression)
    except FileNotFoundError as error:
        raise UserError(f"{file}: there is no such file; correct the path") from error


def blocks(file: str) -> Iterator[bytes]:
    """Yield a file's bytes."""
    with opened(file) as stream:
        while block := stream.read(BLOCK):
            yield block


def count(file: str) -> int:
    """Return how many lines a file has, the last one also where no newline ends it."""
    total, last = 0, _NEWLINE
    for block in blocks(file):
        total, last = total + block.count(_NEWLINE), block[-1:]
    return total + (last != _NEWLINE)


def whole_lines(file: str) -> Iterator[bytes]:
    """Yield a file's bytes in blocks that end where a line does."""
    rest = b""
    for block in blocks(file):
        head, newline, tail = block.rpartition(_NEWLINE)
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            rest += block
    if rest:
        yield rest


def examine(file: str, delimiter: str, width: int, quoted: bool) -> Layout:
    """Find blank lines, records of several lines, and lines that are lost to a quotation mark.

    Args:
        file: A plain, .gz or .zst file.
        delimiter: The delimiter.
        width: How many columns the header has.
        quoted: Whether a quotation mark begins a quoted value.
    """
    scan = _Scan(delimiter.encode(), width)
    for block in whole_lines(file):
        if not scan.inside and not (quoted and _QUOTE in block):
            scan.plain(block)
            continue
        for line in block.removesuffix(_NEWLINE).split(_NEWLINE):
            scan.line_of_quotes(line)
    scan.end()
    return scan.layout


class _Scan:
    """Goes through lines, and knows whether it is inside a quoted value."""

    def __init__(self, delimiter: bytes, width: int) -> None:
        self.delimiter, self.width = delimiter, width
        self.layout = Layout()
        self.line = self.number = 0
        """The line, and the number of the record, that were read last."""
        self.inside = False
        self.first = 0, b""
        """The line in which the present record began, and its text."""
        self.values = 0
        """Delimiters of the present record so far."""
        self.like_rows = self.is_lost = False
        """Whether each line of the present value could be a row, and whether one of the record's values is such."""
        one = b'(?:"(?:[^"]|"")*"|[^"D][^D]*|)'.replace(b"D", re.escape(delimiter))
        self.complete = re.compile(one + b"(?:" + re.escape(delimiter) + one + b")*\r?")

    def plain(self, block: bytes) -> None:
        """Read lines without quoted values, all at once."""
        text = np.frombuffer(block, np.uint8)
        ends = np.flatnonzero(text == _NEWLINE[0])
        if not len(ends) or ends[-1] != len(text) - 1:
            ends = np.append(ends, len(text))
        lengths = np.diff(ends, prepend=-1) - 1
        begins = ends - lengths
        is_blank = (lengths == 0) | ((lengths == 1) & (text[np.minimum(begins, len(text) - 1)] == _RETURN[0]))
        self.layout.blank += (self.number + 1 + np.flatnonzero(is_blank)).tolist()
        self.line, self.number = self.line + len(ends), self.number + len(ends)

    def line_of_quotes(self, line: bytes) -> None:
        """Read a line, without its newline."""
        self.line += 1
        if not self.inside:
            self.number += 1
            self.first, self.values, self.is_lost = (self.line, line[: 4 * MOST_TEXT]), 0, False
            if not line.strip(_RETURN):
                self.layout.blank.append(self.number)
                return
            if _QUOTE not in line or self.complete.fullmatch(line):
                return
        elif _QUOTE not in line:
            self.like_rows = self.like_rows and line.count(self.delimiter) == self.width - 1
            return
        is_sound = self._walk(line)
        if not self.inside and (extra := self.line - self.first[0]):
            if self.is_lost or not is_sound or self.values != self.width - 1:
                self._lose()
            else:
                self.layout.tall.append((self.number, extra))

    def end(self) -> None:
        """Reach the file's end: a value that is still open has lost the lines."""
        if self.inside:
            self._lose()

    def _lose(self) -> None:
        line, text = self.first
        self.layout.lost.append(Lost(line, text.decode(errors="replace")[:MOST_TEXT], self.line - line + 1))

    def _walk(self, line: bytes) -> bool:
        """Go through the values of a line. Returns whether each quoted one that ends here ends at a delimiter."""
        at, is_sound = 0, True
        while True:
            if self.inside:
                end = self._closing(line, at)
                if end < 0:
                    if at == 0:  # a line in the midst of a value
                        self.like_rows = self.like_rows and line.count(self.delimiter) == self.width - 1
                    return is_sound
                if at == 0 and self.line > self.first[0]:
                    # The value began in an earlier line, and ends in what is a row's last part.
                    self.is_lost |= self.like_rows and line.count(self.delimiter, 0, end) == self.values
                self.inside, at = False, end + 1
                is_sound = is_sound and (line.startswith(self.delimiter, at) or not line[at:].strip(_RETURN))
            elif line.startswith(_QUOTE, at):
                self.inside, at = True, at + 1
                self.like_rows = self.values + line.count(self.delimiter, at) == self.width - 1
                continue
            cut = line.find(self.delimiter, at)
            if cut < 0:
                return is_sound
            self.values, at = self.values + 1, cut + len(self.delimiter)

    @staticmethod
    def _closing(line: bytes, at: int) -> int:
        """Return where the quotation mark is that closes a value; -1 where none does. Two of them stand for one."""
        while (at := line.find(_QUOTE, at)) >= 0 and line.startswith(_QUOTE, at + 1):
            at += 2
        return at


def without(file: str, lost: list[Lost], target: str) -> None:
    """Write a file to `target`, plain, with lost lines left blank."""
    waiting, line = list(reversed(lost)), 0
    with open(target, "wb") as out:
        for block in whole_lines(file):
            size = block.count(_NEWLINE) + (not block.endswith(_NEWLINE))
            if not waiting or waiting[-1].line > line + size:
                out.write(block)
                line += size
                continue
            for text in block.removesuffix(_NEWLINE).split(_NEWLINE):
                line += 1
                while waiting and line >= waiting[-1].line + waiting[-1].lines:
                    waiting.pop()
                is_lost = bool(waiting) and waiting[-1].line <= line
                out.write(_NEWLINE if is_lost else text + _NEWLINE)


def with_newlines(file: str, target: str) -> None:
    """Write a file to `target`, plain, with each line ended by a newline alone."""
    with open(target, "wb") as out:
        for block in whole_lines(file):
            out.write(block.replace(b"\r\n", _NEWLINE))


def first_return(file: str) -> int:
    """Return the first line with a carriage return that is not its end; 0 where there is none."""
    line = 0
    for block in whole_lines(file):
        if b"\r" in block.replace(b"\r\n", _NEWLINE):
            for text in block.split(_NEWLINE):
                line += 1
                if b"\r" in text.removesuffix(_RETURN):
                    return line
            continue
        line += block.count(_NEWLINE)
    return 0
