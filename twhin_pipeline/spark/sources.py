"""A source's files in pieces, each of which a task reads with the SQL of `graph.scan`: rows typed, and judged alike.

A piece is some row groups of a Parquet file, a CSV file, or a data file of a table of Delta Lake or Iceberg, which the
table's own library reads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from twhin_pipeline import scratch
from twhin_pipeline.config.model import names_relation
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import delimited, lake
from twhin_pipeline.graph.raw_edges import MOST_RELATIONS
from twhin_pipeline.graph.scan import (
    ROW_COLUMN,
    Scan,
    add_types,
    all_integers,
    check_columns,
    described,
    named,
    parquet,
    relation_of,
)
from twhin_pipeline.graph.source import TABLES
from twhin_pipeline.remote import fetch, local_path
from twhin_pipeline.spark import tables
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, name

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.graph.source import Input

ROWS_PER_PIECE = 500_000


@dataclass(frozen=True)
class Piece:
    """What a task reads: of the scan of this number a file, or its rows from `first` to before `last`.

    `part` is a data file of the table `origin` in this `version`.
    """

    scan: int
    origin: str
    first: int = 0
    last: int | None = None
    version: str = ""
    part: str = ""


@dataclass(frozen=True)
class Opened:
    """A piece in a task: the SQL of its columns, with those of file and row, and what lines of it are."""

    sql: str
    staged: delimited.Staged


def connection(config: TwhinConfig) -> duckdb.DuckDBPyConnection:
    """Open DuckDB for a task: with one thread."""
    con = database.connect(config)
    con.execute("SET threads = 1")
    return con


@contextmanager
def opened(con: duckdb.DuckDBPyConnection, piece: Piece, scan: Scan) -> Iterator[Opened]:
    """Make a piece readable; what is temporary goes when the block ends."""
    spec = scan.input
    wanted = [column for _, column in named(spec, scan.rel)]
    with scratch.folder("piece") as folder:
        if spec.format == "parquet":
            file = local_path(piece.origin) or piece.origin
            database.register(con, file)
            query = parquet([file])
            if piece.last is not None:
                query = f"(FROM {query} WHERE {ROW_COLUMN} >= {piece.first} AND {ROW_COLUMN} < {piece.last})"
            yield Opened(query, delimited.Staged(file, [(piece.origin, 0)]))
        elif spec.format == "csv":
            file = local_path(piece.origin) or fetch(piece.origin, f"{folder}/fetched")
            names = delimited.header(file, spec.delimiter)
            (staged,) = delimited.stage(con, [(piece.origin, file)], spec.delimiter, f"{folder}/staged", wanted, names)
            yield Opened(parquet([staged.path]), staged)
        else:
            target = f"{folder}/part.parquet"
            lake.stage_part(piece.origin, spec.format, piece.version, piece.part, target, wanted)
            yield Opened(parquet([target]), delimited.Staged(target, [(piece.part, 0)]))


def scans_of(
    spark: SparkSession, config: TwhinConfig, inputs: Sequence[Input], known: Collection[str] | None
) -> tuple[list[Scan], list[Piece]]:
    """Return the scans of all inputs, as `scan.open_input` does, and their pieces.

    Raises:
        UserError: A file cannot be read, lacks a column, or has one of a wrong type.
    """
    scans: list[Scan] = []
    pieces: list[Piece] = []
    with database.connect(config) as con:
        for number, spec in enumerate(inputs):
            found = _csv(spark, config, spec, known) if spec.format == "csv" else _typed(con, spec, known)
            for (rel, relation), files in found.items():
                types: dict[str, str] = {}
                for one in files:
                    add_types(types, one.origin, spec, one.types, rel)
                if spec.format == "csv":
                    types |= {column: _kind(files, side) for side, column in enumerate(_ends(spec))}
                origins = [delimited.Staged(one.origin, [(one.origin, 0)]) for one in files]
                pieces += [replace(piece, scan=len(scans)) for one in files for piece in one.pieces]
                scans.append(Scan(spec, number, [], origins, types, rel, relation))
    return scans, pieces


@dataclass(frozen=True)
class _File:
    """What is known of a file: its columns' types, its pieces, and whether all its ids are integers (None: none is)."""

    origin: str
    types: dict[str, str]
    pieces: list[Piece]
    integers: tuple[bool | None, bool | None] = (None, None)


def _ends(spec: Input) -> tuple[str, str]:
    return spec.columns.lhs, spec.columns.rhs


def _kind(files: Sequence[_File], side: int) -> str:
    tests = [one.integers[side] for one in files if one.integers[side] is not None]
    return "BIGINT" if tests and all(tests) else "VARCHAR"


_Found = dict[tuple[str | None, str | None], list[_File]]


def _typed(con: duckdb.DuckDBPyConnection, spec: Input, known: Collection[str] | None) -> _Found:
    """Describe files of Parquet, or tables."""
    found: _Found = {}
    files = [local_path(file) or file for file in spec.files]
    for file in files if spec.format == "parquet" else ():
        database.register(con, file)
    types_of = described(con, spec, files) if spec.format == "parquet" else {}
    for file, origin in zip(files, spec.files, strict=True):
        names = lake.names(origin, spec.format) if spec.format in TABLES else list(types_of[file])
        check_columns(origin, spec, names)
        rel, relation = relation_of(spec, origin, names, known)
        if spec.format in TABLES:
            types = _types_of_table(con, spec, origin, rel)
            version, parts = lake.parts(origin, spec.format)
            pieces = [Piece(0, origin, version=version, part=part) for part in parts]
        else:
            types, pieces = types_of[file], _row_groups(con, origin, file)
        found.setdefault((rel, relation), []).append(_File(origin, types, pieces))
    return found


def _types_of_table(con: duckdb.DuckDBPyConnection, spec: Input, origin: str, rel: str | None) -> dict[str, str]:
    """Return the SQL types of a table's columns that are read."""
    empty = lake.schema(origin, spec.format, [column for _, column in named(spec, rel)]).empty_table()  # noqa: F841
    return {str(row[0]): str(row[1]) for row in con.execute("DESCRIBE SELECT * FROM empty").fetchall()}


def _row_groups(con: duckdb.DuckDBPyConnection, origin: str, file: str) -> list[Piece]:
    with explained(origin):
        sizes = con.execute(
            "SELECT any_value(row_group_num_rows) FROM parquet_metadata(?) GROUP BY row_group_id ORDER BY row_group_id",
            [file],
        ).fetchall()
    pieces: list[Piece] = []
    first = last = 0
    for (size,) in sizes:
        if last > first and last + size - first > ROWS_PER_PIECE:
            pieces.append(Piece(0, origin, first, last))
            first = last
        last += size
    return [*pieces, Piece(0, origin, first, last)] if last > first else pieces


def _csv(spark: SparkSession, config: TwhinConfig, spec: Input, known: Collection[str] | None) -> _Found:
    """Describe text files, each in a task: their columns, and whether all ids are integers."""

    def look(origin: str) -> tables.Batches:
        with connection(config) as con, scratch.folder("header") as folder:
            file = local_path(origin) or fetch(origin, f"{folder}/fetched")
            names = delimited.header(file, spec.delimiter)
            check_columns(origin, spec, names)
            rel, relation = relation_of(spec, origin, names, known)
            (staged,) = delimited.stage(
                con, [(origin, file)], spec.delimiter, f"{folder}/staged", list(dict.fromkeys(_ends(spec))), names
            )
            tests = ", ".join(all_integers(column) for column in _ends(spec))
            left, right = con.execute(f"SELECT {tests} FROM {parquet([staged.path])}").fetchall()[0]
        yield pa.record_batch(
            {
                "origin": pa.array([origin]),
                "names": pa.array([names], pa.list_(pa.string())),
                "rel": pa.array([rel], pa.string()),
                "relation": pa.array([relation], pa.string()),
                "integers": pa.array([[left, right]], pa.list_(pa.bool_())),
            }
        )

    schema = "origin string, names array<string>, rel string, relation string, integers array<boolean>"
    found: _Found = {}
    for row in tables.each(spark, spec.files, look, schema).collect():
        types = {column: "VARCHAR" for _, column in named(spec, row["rel"])}
        one = _File(row["origin"], types, [Piece(0, row["origin"])], tuple(row["integers"]))
        found.setdefault((row["rel"], row["relation"]), []).append(one)
    return found


def relation_names(
    spark: SparkSession, config: TwhinConfig, scans: Sequence[Scan], pieces: Sequence[Piece]
) -> list[str]:
    """Return the source's names of relations, those that can be one.

    Raises:
        UserError: There are more than `MOST_RELATIONS`.
    """
    names = {scan.relation or "" for scan in scans if scan.rel is None}

    def look(piece: Piece) -> tables.Batches:
        scan = scans[piece.scan]
        assert scan.rel is not None
        column = name(scan.rel)
        with connection(config) as con, explained(piece.origin), opened(con, piece, scan) as rows:
            found = con.execute(
                f"SELECT DISTINCT CAST({column} AS VARCHAR) FROM {rows.sql} WHERE {column} IS NOT NULL "
                f"LIMIT {MOST_RELATIONS + 1}"
            ).fetchall()
        texts = [str(row[0]) for row in found]
        yield pa.record_batch(
            {"scan": pa.array([piece.scan] * len(texts), pa.int32()), "name": pa.array(texts, pa.string())}
        )

    with_column = [piece for piece in pieces if scans[piece.scan].rel is not None]
    found = tables.each(spark, with_column, look, "scan int, name string").distinct()
    for number in sorted({piece.scan for piece in with_column}):
        scan = scans[number]
        rows = found.where(f"scan = {number}").limit(MOST_RELATIONS + 1).collect()
        if len(rows) > MOST_RELATIONS:
            raise UserError(
                f"{scan.input.field}: column {scan.rel!r} has more than {MOST_RELATIONS:,} different values, too many "
                f"to be names of relations; set {scan.input.section}.columns.rel to the relations' column, or list "
                "relations without '*'"
            )
        names |= {row["name"] for row in rows}
    return [text for text in names if names_relation(text)]
