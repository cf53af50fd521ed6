"""Which entity types the ends of edges have: guesses from names of columns and from ids that they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import duckdb

from twhin_pipeline.config.model import NAME
from twhin_pipeline.operations.init_columns import ACTORS, Choose, Column
from twhin_pipeline.store.database import name

SURELY, LIKELY, LIKELY_OF_SAMPLE, HARDLY = 0.5, 0.3, 0.1, 0.05
"""Shares of the smaller side's ids that the other side has. Two sides with the first are of one type, two with less
than the last are not; between them it is asked, and the default is by the middle ones (of a part of a file the second,
since a part of its edges has not all that two sides share)."""
DENSE = 20
"""Integers are taken for numbers that count entities where their range is less than so many times their number."""
PREFIX_SHARE, SHORTEST_PREFIX = 0.95, 3
OWN = "a type of its own"


@dataclass(frozen=True)
class Place:
    """One side of a relation (None: of all relations of a file): where its ids are, and what its column's name says."""

    table: str
    file: str
    side: str
    column: str
    rel: str | None
    """The column of the relation's name."""
    relation: str | None
    entity: str | None
    people: bool
    complete: bool
    """Whether all rows of the file are looked at."""

    def __str__(self) -> str:
        return f"{self.column} of {self.file}" if self.relation is None else f"{self.column} of {self.relation}"


@dataclass
class _Group:
    """Places of one entity type."""

    places: list[int]
    entity: str | None = None
    reasons: list[str] = field(default_factory=list)


def guess(con: duckdb.DuckDBPyConnection, places: Sequence[Place], choose: Choose) -> tuple[list[str], list[str]]:
    """Return the entity type of each place, and a line for each type about how it was found."""
    ids = _Ids(con, places)
    known: dict[str, _Group] = {}
    unknown: list[int] = []
    for number, place in enumerate(places):
        prefix = None if place.entity else ids.prefix(number)
        entity = place.entity or prefix
        if entity is None:
            unknown.append(number)
            continue
        group = known.setdefault(entity, _Group([], entity))
        group.places.append(number)
        if prefix is not None:
            group.reasons.append(f"ids begin with {prefix}")
    groups = list(known.values())
    named = bool(groups)
    for group in _components(places, ids, unknown, choose):
        target = _known_type(places, ids, group, list(known.values()), choose)
        if target is not None:
            share = _share(ids, group.places, target.places)
            target.reasons.append(f"{share:.0%} of the ids are shared")
            target.places += group.places
        else:
            groups.append(group)
    for group in groups:
        if group.entity is None:
            taken = {other.entity for other in groups}
            group.entity = _unique(_fresh(places, group, alone=not named and len(groups) == 1), taken)
    types = [""] * len(places)
    lines = []
    for group in sorted(groups, key=lambda group: min(group.places)):
        assert group.entity is not None
        for number in group.places:
            types[number] = group.entity
        why = f" ({'; '.join(dict.fromkeys(group.reasons))})" if group.reasons else ""
        lines.append(f"{group.entity}: {_columns(places, group.places)}{why}")
    return types, lines


def count_entities(con: duckdb.DuckDBPyConnection, table: str, column: str) -> bool:
    """Tell whether a column's ids are integers that count entities, so that two types may have the same by chance."""
    text = f"CAST({name(column)} AS VARCHAR)"
    ids = f"(SELECT DISTINCT {text} AS id FROM {table} WHERE {name(column)} IS NOT NULL)"
    return bool(con.execute(f"SELECT {_dense('id')} FROM {ids}").fetchall()[0][0])


def _dense(column: str) -> str:
    number = f"TRY_CAST({column} AS DOUBLE)"
    all_integers = f"bool_and(regexp_full_match({column}, '-?[0-9]+'))"
    return f"{all_integers} AND max({number}) - min({number}) < {DENSE} * count(*)"


class _Ids:
    """The ids of places: how many they share, whether they are numbers, and how they begin."""

    def __init__(self, con: duckdb.DuckDBPyConnection, places: Sequence[Place]) -> None:
        con.execute("CREATE OR REPLACE TABLE place_ids (place INTEGER, id VARCHAR)")
        for number, place in enumerate(places):
            where = f"{name(place.column)} IS NOT NULL"
            values = []
            if place.relation is not None and place.rel is not None:
                where += f" AND CAST({name(place.rel)} AS VARCHAR) = ?"
                values = [place.relation]
            con.execute(
                f"INSERT INTO place_ids SELECT DISTINCT {number}, CAST({name(place.column)} AS VARCHAR) "
                f"FROM {place.table} WHERE {where}",
                values,
            )
        rows = con.execute(f"SELECT place, count(*), {_dense('id')} FROM place_ids GROUP BY place").fetchall()
        self._count = {int(place): int(count) for place, count, _ in rows}
        self._numbers = {int(place) for place, _, numbers in rows if numbers}
        rows = con.execute(
            "SELECT place, p, n FROM (SELECT place, lower(regexp_extract(id, '^([A-Za-z]+)[_:/#-]', 1)) AS p, "
            "count(*) AS n FROM place_ids GROUP BY ALL) "
            "QUALIFY row_number() OVER (PARTITION BY place ORDER BY n DESC, p) = 1"
        ).fetchall()
        self._prefix = {int(place): str(prefix) for place, prefix, n in rows if n >= PREFIX_SHARE * self._count[place]}
        rows = con.execute(
            "SELECT a.place, b.place, count(*) FROM place_ids a JOIN place_ids b USING (id) WHERE a.place < b.place "
            "GROUP BY ALL"
        ).fetchall()
        self._common = {(int(a), int(b)): int(count) for a, b, count in rows}

    def shared(self, a: int, b: int) -> float:
        """Return the share of the smaller place's ids that the other one has."""
        smaller = min(self._count.get(a, 0), self._count.get(b, 0))
        return self._common.get((min(a, b), max(a, b)), 0) / smaller if smaller else 0.0

    def numbers(self, places: Sequence[int]) -> bool:
        """Tell whether all ids are numbers that count entities."""
        return all(place in self._numbers for place in places)

    def prefix(self, place: int) -> str | None:
        """Return the word that ids begin with, as in `user_17`; None where they do not."""
        text = self._prefix.get(place, "")
        return text if len(text) >= SHORTEST_PREFIX and text not in ("http", "https", "urn") else None


def _components(places: Sequence[Place], ids: _Ids, unknown: list[int], choose: Choose) -> list[_Group]:
    """Group places whose names say no type by the ids that they share."""
    groups = {number: _Group([number]) for number in unknown}
    apart: list[tuple[int, int]] = []
    same_columns: dict[frozenset[tuple[str, str]], bool] = {}
    pairs = [(a, b) for at, a in enumerate(unknown) for b in unknown[at + 1 :]]
    for a, b in sorted(pairs, key=lambda pair: -ids.shared(*pair)):
        both = {id(groups[a]), id(groups[b])}
        if len(both) == 1 or any({id(groups[c]), id(groups[d])} == both for c, d in apart):
            continue
        likely, doubtful = _alike(places, ids, a, b)
        if doubtful:
            # Of numbers, the answer goes for the columns; of texts, for the groups.
            columns = frozenset((places[number].table, places[number].column) for number in (a, b))
            share = f"{ids.shared(a, b):.0%}"
            question = f"{places[a]} and {places[b]} have {share} of their ids in common. Are they one entity type?"
            if not ids.numbers([a, b]) or columns not in same_columns:
                same_columns[columns] = choose(question, ["yes", "no"], "yes" if likely else "no") == "yes"
            likely = same_columns[columns]
            if not likely:
                apart.append((a, b))
        if likely:
            groups[a].places += groups[b].places
            groups[a].reasons = ["they share ids"]
            for number in groups[b].places:
                groups[number] = groups[a]
    return list({id(group): group for group in groups.values()}.values())


def _alike(places: Sequence[Place], ids: _Ids, a: int, b: int) -> tuple[bool, bool]:
    """Tell whether two places seem to be of one type, and whether that is doubtful."""
    share, one, other = ids.shared(a, b), places[a], places[b]
    if share < HARDLY:
        return False, False
    likely = share >= (LIKELY if one.complete and other.complete else LIKELY_OF_SAMPLE)
    if not ids.numbers([a, b]):
        return likely, share < SURELY
    if one.table != other.table:
        return False, False  # numbers of two files may be the same by chance
    return likely, one.column != other.column and not (one.people and other.people)


def _known_type(
    places: Sequence[Place], ids: _Ids, group: _Group, known: list[_Group], choose: Choose
) -> _Group | None:
    """Return the type, named by other columns, that has the group's ids."""
    numbers = ids.numbers(group.places)
    people = any(places[number].people for number in group.places)
    likely = []
    for other in known:
        share = _share(ids, group.places, other.places)
        if share >= (SURELY if numbers else LIKELY_OF_SAMPLE):
            # Numbers of two types may be the same by chance, but people are likelier users than products.
            likely.append(((numbers and people and other.entity in ACTORS, share), other))
    if not likely:
        return None
    ranked = [other for _, other in sorted(likely, key=lambda item: item[0], reverse=True)]
    if not numbers and len(ranked) == 1:
        return ranked[0]
    names = [str(other.entity) for other in ranked]
    question = f"Which entity type are the ids in {_columns(places, group.places)}?"
    answer = choose(question, [*names, OWN], names[0])
    return next((other for other in ranked if other.entity == answer), None)


def _share(ids: _Ids, these: Sequence[int], those: Sequence[int]) -> float:
    return max((ids.shared(a, b) for a in these for b in those if a != b), default=0.0)


def _columns(places: Sequence[Place], numbers: Sequence[int]) -> str:
    """Name the columns of places: `follower and followee of follows.csv`."""
    columns: dict[str, dict[str, None]] = {}
    for number in sorted(numbers):
        place = places[number]
        where = place.file if place.relation is None else place.relation
        columns.setdefault(where, {})[place.column] = None
    wheres: dict[str, list[str]] = {}
    for where, names in columns.items():
        wheres.setdefault(" and ".join(names), []).append(where)
    return ", ".join(f"{names} of {_some(where)}" for names, where in wheres.items())


def _some(names: list[str]) -> str:
    return " and ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} and {len(names) - 2} more"


def _fresh(places: Sequence[Place], group: _Group, *, alone: bool) -> str:
    """Name a type that no column's name and no id tells."""
    members = [places[number] for number in group.places]
    if any(place.people for place in members):
        return "user"
    if alone:
        return "entity"
    column = members[0].column
    if all((place.table, place.column) == (members[0].table, column) for place in members) and (
        sum((place.table, place.column) == (members[0].table, column) for place in places) == len(members)
    ):
        return "_".join(Column(column, "text", 0).core)
    if any(place.side == "lhs" for place in members):
        return "entity"
    return f"{members[0].relation or 'edge'}_{members[0].side}"


def _unique(text: str, taken: set[str | None]) -> str:
    plain = re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_")
    plain = plain if NAME.fullmatch(plain) else f"type_{plain}".rstrip("_")
    plain = "entities" if plain in ("translation", "relations") else plain
    number = 2
    unique = plain
    while unique in taken:
        unique = f"{plain}_{number}"
        number += 1
    return unique
