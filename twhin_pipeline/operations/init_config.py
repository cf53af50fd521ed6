"""`twhin init`: a minimal configuration from files, with what was guessed and why."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import duckdb
import yaml

from twhin_pipeline.config.model import names_relation
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import init_columns, init_files, init_types
from twhin_pipeline.operations.init_columns import Choose, Roles
from twhin_pipeline.operations.init_files import Sample, Source
from twhin_pipeline.operations.init_types import Place
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, name

MOST_LISTED = 30
"""Above so many relations of one pair of types, they are not listed but stand under the name `*`."""
FEW = 0.005
"""Relations with a smaller share of a file's rows are pointed out."""
ACCEPTED = 0.01
"""The default of `max_rejected_share`."""
VALIDATION, TEST = 0.05, 0.1
ENDED_DAYS = 7
"""A log whose latest time is older than that is taken for one that does not grow."""


@dataclass(frozen=True)
class Guess:
    """A configuration, and lines for whoever checks it."""

    data: dict[str, Any]
    text: str
    lines: list[str]


@dataclass
class _Table:
    """A source with its columns' roles, and rows by relation."""

    sample: Sample
    roles: Roles
    relations: dict[str, int]
    relation: str | None
    """The relation of all rows, where there is no column for it."""
    rejected: float
    """Share of rows without an id or of a relation that is left out."""
    newest: date | None
    """The day (UTC) of the latest time; None where there is none, or the sample may not have it."""

    @property
    def file(self) -> str:
        return self.sample.source.path.rpartition("/")[2]


def guess(paths: Sequence[str], out: str, *, min_share: float = 0.0, choose: Choose | None = None) -> Guess:
    """Guess the configuration that trains on files.

    Args:
        paths: Files, patterns or URLs of Parquet, CSV or TSV.
        out: Where the configuration will be written; relative paths in it are relative to its folder.
        min_share: Relations with a smaller share of their file's rows are left out.
        choose: Answers questions where a guess is doubtful. Left out: the likeliest answers, each with a line.

    Raises:
        UserError: A file is missing, unreadable, or has no columns for two entities.
    """
    lines: list[str] = []

    def likeliest(question: str, options: Sequence[str], default: str) -> str:
        lines.append(f"  in doubt: {question} Taken: {default}")
        return default

    choose = choose or likeliest
    with database.connect() as con:
        tables = []
        for number, source in enumerate(init_files.group(paths)):
            sample = init_files.sample(con, source, number)
            tables.append(_table(con, sample, min_share, choose, lines))
        _name_relations(tables)
        types, type_lines = _types(con, tables, choose)
    relations = _relations(tables, types)
    lines += [f"type {line}" for line in type_lines]
    split = _split(tables, lines)
    data: dict[str, Any] = {}
    sources = [_source(table, out) for table in tables]
    data |= {"source": sources[0]} if len(sources) == 1 else {"sources": sources}
    entities = dict.fromkeys(end for pair in relations.values() for end in pair)
    listed = [{"name": relation, "lhs": lhs, "rhs": rhs} for relation, (lhs, rhs) in relations.items()]
    data["model"] = {"embeddings": {"tables": [{"name": entity} for entity in entities]}, "relations": listed}
    if split is not None:
        data["split"] = split
    return Guess(data, _text(data, tables), lines)


def _table(
    con: duckdb.DuckDBPyConnection, sample: Sample, min_share: float, choose: Choose, lines: list[str]
) -> _Table:
    file, start = sample.source.path.rpartition("/")[2], len(lines)
    roles = init_columns.guess(file, sample.columns, choose)
    lines.insert(start, f"{file}: {_described(sample, roles)}")
    source, note = _snapshots(con, sample, roles)
    sample = replace(sample, source=source)
    lines += [f"  {text}" for text in (*roles.notes, *([note] if note else []))]
    counts, relation, rejected = _count(con, sample, roles)
    if relation is None:
        lines.append(f"  relations {_named(counts)}")
    rare = {text: count for text, count in counts.items() if count < min_share * sample.rows}
    few = [text for text, count in counts.items() if count < FEW * sample.rows]
    if len(rare) == len(counts):
        raise UserError(f"{file}: --min-share {min_share} leaves out all relations ({_named(counts)}); lower it")
    if rare:
        lines.append(f"  left out for --min-share {min_share}: {_named(rare)}")
    elif few and len(counts) <= MOST_LISTED:
        lines.append(f"  few rows have {', '.join(few)}; --min-share {FEW} leaves out what is rarer")
    rejected += sum(rare.values()) / sample.rows
    if rejected > ACCEPTED:
        lines.append(f"  {rejected:.1%} of the rows have no id or no listed relation: max_rejected_share accepts them")
    counts = {text: count for text, count in counts.items() if text not in rare}
    span = None
    if roles.time is not None and sample.complete:
        with explained(sample.source.newest):
            span = init_files.span(con, sample.table, roles.time, roles.time_unit or "s")
    return _Table(sample, roles, counts, relation, rejected, span[1] if span is not None else None)


def _described(sample: Sample, roles: Roles) -> str:
    """Say which columns are used for what."""
    used = [f"{roles.lhs.column} (left)", f"{roles.rhs.column} (right)"]
    for role, column in (
        ("relation", roles.rel),
        ("time", roles.time),
        ("weight", roles.weight),
        ("split", roles.split),
    ):
        if column is not None:
            used.append(f"{role} {column}")
    rows = f"{sample.rows:,} rows" if sample.complete else f"of the first {sample.rows:,} rows"
    unused = f"; not used: {', '.join(roles.unused)}" if roles.unused else ""
    return f"{rows}; {', '.join(used)}{unused}"


def _snapshots(con: duckdb.DuckDBPyConnection, sample: Sample, roles: Roles) -> tuple[Source, str | None]:
    """Return the source as its times suggest: a date in a file's name may not be that of a snapshot."""
    source = sample.source
    if not source.snapshots:
        return source, None
    dates = f"{source.snapshots[0]} to {source.snapshots[-1]}" if len(source.snapshots) > 1 else source.snapshots[0]
    with explained(source.newest):
        span = init_files.span(con, sample.table, roles.time, roles.time_unit or "s") if roles.time else None
    if span is not None and f"{span[1]}" > source.snapshots[-1] and len(source.snapshots) == 1:
        path = init_files.escaped(source.newest)
        return replace(source, path=path, snapshots=()), f"{dates} is no snapshot's date: rows go on until {span[1]}"
    if span is not None and len(source.snapshots) > 1 and f"{span[0]}" > source.snapshots[-2]:
        path = source.path.replace("{snapshot}", "*")
        return replace(source, path=path, snapshots=()), f"{dates}: each file has the rows of its days, so all are read"
    return source, f"{{snapshot}} is the date in the name: {dates}"


def _count(con: duckdb.DuckDBPyConnection, sample: Sample, roles: Roles) -> tuple[dict[str, int], str | None, float]:
    """Return rows by relation, the relation's name where it is no column's, and the share of rows that have no id."""
    ends = " AND ".join(f"{name(end.column)} IS NOT NULL" for end in (roles.lhs, roles.rhs))
    relation = None if roles.rel else sample.source.stem
    value = f"CAST({name(roles.rel)} AS VARCHAR)" if roles.rel else "'edge'"
    with explained(sample.source.newest):
        rows = con.execute(
            f"SELECT {value} AS rel, count(*) AS n FROM {sample.table} WHERE {ends} GROUP BY ALL ORDER BY n DESC, rel"
        ).fetchall()
    counts = {relation or str(text): int(n) for text, n in rows if n and text is not None and names_relation(str(text))}
    if not counts:
        raise UserError(
            f"{sample.source.newest}: no row has both {roles.lhs.column} and {roles.rhs.column}"
            f"{f' and {roles.rel}' if roles.rel else ''}; give a file with edges"
        )
    return counts, relation, 1 - sum(counts.values()) / sample.rows


def _named(counts: dict[str, int]) -> str:
    shown = [f"{text} {count:,}" for text, count in list(counts.items())[:8]]
    return ", ".join(shown) + (f" and {len(counts) - 8:,} more" if len(counts) > 8 else "")


def _name_relations(tables: list[_Table]) -> None:
    """Give relations that are named after their files names that no other file's have."""
    taken = {text for table in tables if table.relation is None for text in table.relations}
    for table in tables:
        if table.relation is None:
            continue
        unique, number = table.relation, 2
        while unique in taken:
            unique = f"{table.relation}_{number}"
            number += 1
        taken.add(unique)
        table.relations = {unique: sum(table.relations.values())}
        table.relation = unique


def _types(
    con: duckdb.DuckDBPyConnection, tables: list[_Table], choose: Choose
) -> tuple[dict[tuple[int, str, str], str], list[str]]:
    """Return the entity type of each (table, relation, side), and lines about types."""
    places: list[Place] = []
    of: dict[tuple[int, str, str], int] = {}
    for number, table in enumerate(tables):
        for side in ("lhs", "rhs"):
            end = getattr(table.roles, side)
            # Where the column's name says no type, each relation's ids may be of their own.
            apart = end.entity is None and table.roles.rel is not None and len(table.relations) <= MOST_LISTED
            # Numbers that count entities are in every relation, whatever their type.
            apart = apart and not init_types.count_entities(con, table.sample.table, end.column)
            for relation in table.relations if apart else [None]:
                for text in table.relations if relation is None else [relation]:
                    of[number, text, side] = len(places)
                places.append(
                    Place(
                        table=table.sample.table,
                        file=table.file,
                        side=side,
                        column=end.column,
                        rel=table.roles.rel,
                        relation=relation,
                        entity=end.entity,
                        people=end.people,
                        complete=table.sample.complete,
                    )
                )
    types, lines = init_types.guess(con, places, choose)
    return {key: types[place] for key, place in of.items()}, lines


def _relations(tables: list[_Table], types: dict[tuple[int, str, str], str]) -> dict[str, tuple[str, str]]:
    """Return the types of each relation's sides, in order. Raises UserError where two files differ."""
    pairs: dict[str, tuple[str, str]] = {}
    origin: dict[str, str] = {}
    for number, table in enumerate(tables):
        for relation in table.relations:
            pair = types[number, relation, "lhs"], types[number, relation, "rhs"]
            if pairs.setdefault(relation, pair) != pair:
                raise UserError(
                    f"relation {relation!r} joins {' and '.join(pairs[relation])} in {origin[relation]}, and "
                    f"{' and '.join(pair)} in {table.file}; rename it in one of them"
                )
            origin.setdefault(relation, table.file)
    if len(pairs) > MOST_LISTED and len(set(pairs.values())) == 1:
        return {"*": next(iter(pairs.values()))}
    return pairs


def _split(tables: list[_Table], lines: list[str]) -> dict[str, Any] | None:
    if all(table.roles.split is not None for table in tables):
        lines.append(f"split: as the column {tables[0].roles.split} says")
        return {"strategy": "given"}
    timed = [table for table in tables if table.roles.time is not None]
    if not timed:
        lines.append("split: at random, since no column says when an edge happened")
        return None
    split: dict[str, Any] = {"strategy": "temporal", "validation": VALIDATION, "test": TEST}
    relations = list(dict.fromkeys(text for table in timed for text in table.relations))
    if len(timed) < len(tables) and len(relations) <= MOST_LISTED:
        split["relations"] = relations
    columns = ", ".join(dict.fromkeys(str(table.roles.time) for table in timed))
    lines.append(f"split: by {columns}; the latest {TEST:.0%} are the test, the {VALIDATION:.0%} before validation")
    return split


def _source(table: _Table, out: str) -> dict[str, Any]:
    path = table.sample.source.path
    if "://" not in path and not os.path.isabs(path):
        path = os.path.relpath(path, os.path.dirname(os.path.abspath(out)))
    source: dict[str, Any] = {"path": path}
    if table.sample.delimiter is not None:
        source["delimiter"] = table.sample.delimiter
    if table.relation is not None:
        source["relation"] = table.relation
    roles = table.roles
    columns = {"lhs": roles.lhs.column, "rel": roles.rel, "rhs": roles.rhs.column}
    unit = None if roles.time_unit == "s" else roles.time_unit
    columns |= {"time": roles.time, "time_unit": unit, "weight": roles.weight, "split": roles.split}
    source["columns"] = {role: column for role, column in columns.items() if column is not None}
    if table.rejected > ACCEPTED:
        source["max_rejected_share"] = min(1.0, math.ceil(table.rejected * 110) / 100)
    return source


def _text(data: dict[str, Any], tables: list[_Table]) -> str:
    """Return the YAML, a line an item, with comments."""
    lines = [
        "# Written by `twhin init`. All other fields have defaults: `twhin config -c` this file prints them, and",
        "# docs/reference/configuration.md explains them. Relative paths are relative to this file's folder.",
    ]
    if "source" in data:
        lines += ["source:", *(f"  {item}" for item in _items(data["source"], tables[0].newest))]
    else:
        lines.append("sources:")
        for source, table in zip(data["sources"], tables, strict=True):
            items = _items(source, table.newest)
            lines += [f"  - {items[0]}", *(f"    {item}" for item in items[1:])]
    model = data["model"]
    lines += ["model:", "  embeddings:", "    tables:  # entity types; rename them as you like, here and below"]
    lines += [f"      - {_flow(entity)}" for entity in model["embeddings"]["tables"]]
    lines.append("  relations:")
    counts: dict[str, int] = {}
    for table in tables:
        for text, count in table.relations.items():
            counts[text] = counts.get(text, 0) + count
    for relation in model["relations"]:
        comment = (
            f"each of the {len(counts):,} relations" if relation["name"] == "*" else _rows(counts[relation["name"]])
        )
        lines.append(f"    - {_flow(relation)}  # {comment}")
    if "split" in data:
        lines.append(f"split: {_flow(data['split'])}")
    return "\n".join(lines) + "\n"


def _items(source: dict[str, Any], newest: date | None) -> list[str]:
    """Return the lines of a source; of an event log with what makes each of its days a snapshot, as a comment.

    A log that still grows begins with the last day that is over, since each day's snapshot has all the days before.
    One that ended long ago would have a snapshot of every day since.
    """
    items = [f"{key}: {_flow(value)}" for key, value in source.items()]
    if "time" in source["columns"] and "{snapshot}" not in source["path"]:
        today = datetime.now(UTC).date()
        last_day = min(newest or today, today) - timedelta(days=1)  # a time to come is a mistake
        days, why = f"from: {last_day}, every: 1d", "if it grows day by day: each day is a snapshot"
        if newest is not None and today - newest > timedelta(days=ENDED_DAYS):
            days = f"from: {newest - timedelta(days=2)}, every: 1d, to: {newest}"
            why = "each day is a snapshot; without `to`, also those since"
        items.append(f"# snapshots: {{{days}}}  # {why}")
    return items


def _rows(count: int) -> str:
    return f"{count:,} rows"


def _flow(value: Any) -> str:
    """Return YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
