"""Which column of a file is which: guesses from names, types and contents, for `twhin init`.

A column plays one role of an edge's: `lhs`, `rhs`, `rel`, `time`, `weight` or `split`. Nothing here reads a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twhin_pipeline.config.data import TIME_UNITS
from twhin_pipeline.errors import UserError
from twhin_pipeline.words import PARTS

Choose = Callable[[str, Sequence[str], str], str]
"""Asks a question with answers to choose from, and a default; returns the answer."""

NONE = "(none)"


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ID_WORDS = frozenset(_words("id ids key uid uuid guid no nr code hash"))
NOUNS = {"sku": "product", "asin": "product", "isbn": "book", "uid": "user"}
"""Words of ids that mean an entity type of another name."""
ACTORS = _words(
    "user customer member account visitor client buyer shopper reader viewer listener player person reviewer author "
    "voter subscriber patient student employee session device cookie"
)
"""Entity types that act, the likeliest left side first."""
OBJECTS = _words(
    "item product article movie film book track song video post tweet page recipe game course job hotel restaurant "
    "business listing ad query artist album document paper store merchant channel group tag category brand"
)
"""Entity types that are acted on, the likeliest right side first."""
PEOPLE = frozenset(_words("follower followee followed following friend sender receiver recipient trustor trustee"))
"""Roles that people play."""
PAIRS = [
    _words(pair)
    for pair in (
        *("lhs rhs", "src dst", "src dest", "source target", "source destination", "origin destination", "from to"),
        *("head tail", "subject object", "subj obj", "s o", "h t", "u v", "a b", "x y", "i j", "left right", "1 2"),
        *("start end", "citing cited", "parent child", "follower followee", "follower followed", "follower following"),
        *("sender receiver", "sender recipient", "trustor trustee"),
    )
]
"""Names of an edge's two ends."""
ROLES = PEOPLE | {word for pair in PAIRS for word in pair} | {"entity", "node", "vertex"}
"""Words that say which end of an edge a column is, or nothing at all, and not of which type its entities are."""
RELATION_NAMES = frozenset(
    _words(
        "rel relation relationship predicate edge_type relation_type rel_type link_type event_type event event_name "
        "action action_type interaction interaction_type behavior behaviour behavior_type behaviour_type verb edge"
    )
)
WEAK_RELATION_NAMES = frozenset(_words("type kind label activity"))
MOST_RELATIONS, MOST_WEAK_RELATIONS = 100_000, 50
TIME_WORDS = frozenset(_words("time timestamp datetime date ts at when created updated occurred"))
TIME_NAMES = ("event_time", "timestamp", "event_timestamp", "time", "datetime", "created_at", "ts", "date")
"""The likeliest first."""
WEIGHT_NAMES = frozenset(_words("weight w count cnt strength times"))
POSSIBLE_WEIGHTS = frozenset(_words("rating score quantity qty stars value"))
SPLIT_NAMES = frozenset(_words("split set fold subset partition"))
SECONDS = (3e8, 4.2e9)
"""Numbers in this range may be seconds since 1970 (from 1979 to 2103)."""


@dataclass(frozen=True)
class Column:
    """A column of a file, and what a sample of its rows holds."""

    name: str
    kind: str
    """`text`, `integer`, `float`, `time` or `other`; what a text file's values are written as."""
    distinct: int
    """Different values, about."""
    low: float | None = None
    """The least and the largest number, where all values are numbers."""
    high: float | None = None
    values: tuple[str, ...] = ()
    """The different values, where there are few."""

    @property
    def words(self) -> list[str]:
        """Return the words of the name, in lower case: `from`, `user`, `id` of `fromUserId`."""
        parted = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", self.name)
        return re.findall(r"[a-z]+|[0-9]+", parted.lower())

    @property
    def plain(self) -> str:
        """Return the name in snake case."""
        return "_".join(self.words)

    @property
    def core(self) -> list[str]:
        """Return the words of the name but those that say that it is an id."""
        words = self.words
        return [NOUNS.get(word, word) for word in words if word not in ID_WORDS or word in NOUNS]

    @property
    def is_id(self) -> bool:
        """Tell whether the values may be ids."""
        return self.kind in ("text", "integer")

    @property
    def noun(self) -> str:
        """Return the last word of the name that may name an entity type; empty where none does."""
        return self.core[-1] if self.core else ""


@dataclass(frozen=True)
class End:
    """An edge's left or right column, and what its name says of its entities."""

    column: str
    entity: str | None
    """The entity type; None where the name does not say it."""
    people: bool = False
    """Whether the name says that the entities are people."""


@dataclass(frozen=True)
class Roles:
    """Which columns of a file are which."""

    lhs: End
    rhs: End
    rel: str | None = None
    time: str | None = None
    time_unit: str | None = None
    """Of times that are numbers."""
    weight: str | None = None
    split: str | None = None
    unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What someone who checks the guess should know, a line each."""


def guess(file: str, columns: Sequence[Column], choose: Choose) -> Roles:
    """Guess the roles of a file's columns.

    Args:
        file: Its name, for questions and messages.
        columns: The columns, in order.
        choose: Is asked where a guess is doubtful.

    Raises:
        UserError: No two columns hold ids.
    """
    notes: list[str] = []
    left = list(columns)
    relation = _take(left, _relation(file, left, choose))
    timed = _time(file, left, choose)
    time = _take(left, timed)
    split = _take(left, _split(left, notes))
    weight = _take(left, next((c for c in left if c.plain in WEIGHT_NAMES and _not_negative(c)), None))
    first, second = _ends(file, left, choose)
    unused = [c for c in left if c.name not in (first.column, second.column)]
    for column in unused:
        if column.plain in POSSIBLE_WEIGHTS and _not_negative(column) and weight is None:
            notes.append(f"{column.name} is not used; to weigh edges by it, add weight: {column.name} to columns")
    return Roles(
        first,
        second,
        relation,
        time,
        None if timed is None else _unit(timed),
        weight,
        split,
        tuple(column.name for column in unused),
        tuple(notes),
    )


def _take(left: list[Column], column: Column | None) -> str | None:
    if column is None:
        return None
    left.remove(column)
    return column.name


def _relation(file: str, columns: list[Column], choose: Choose) -> Column | None:
    strong = [c for c in columns if c.plain in RELATION_NAMES and c.is_id and c.distinct <= MOST_RELATIONS]
    weak = [
        c for c in columns if c.plain in WEAK_RELATION_NAMES and c.kind == "text" and c.distinct <= MOST_WEAK_RELATIONS
    ]
    likely = sorted(strong, key=lambda c: c.distinct == 1) + weak
    if not likely or (strong and len(likely) == 1):
        return likely[0] if likely else None
    answer = choose(f"Which column of {file} names the relation?", [*(c.name for c in likely), NONE], likely[0].name)
    return next((c for c in likely if c.name == answer), None)


def _unit(column: Column) -> str | None:
    """Return the unit in which a column's numbers are times since 1970; None where they are none."""
    if column.kind not in ("integer", "float") or column.low is None or column.high is None:
        return None
    low, high = column.low, column.high
    fitting = (unit for unit, parts in TIME_UNITS.items() if SECONDS[0] * parts <= low and high <= SECONDS[1] * parts)
    return next(fitting, None)


def _time(file: str, columns: list[Column], choose: Choose) -> Column | None:
    likely = []
    for column in columns:
        named = bool(TIME_WORDS & set(column.words))
        if column.kind == "time" or (named and _unit(column)):
            likely.append((column, named))

    def rank(item: tuple[Column, bool]) -> tuple[bool, int]:
        column, named = item
        return not named, TIME_NAMES.index(column.plain) if column.plain in TIME_NAMES else len(TIME_NAMES)

    likely.sort(key=rank)
    if len(likely) > 1 and rank(likely[0]) == rank(likely[1]):
        names = [column.name for column, _ in likely]
        answer = choose(f"Which column of {file} says when an edge happened?", [*names, NONE], names[0])
        return next((column for column, _ in likely if column.name == answer), None)
    return likely[0][0] if likely else None


def _split(columns: list[Column], notes: list[str]) -> Column | None:
    for column in columns:
        if column.plain not in SPLIT_NAMES or not column.values:
            continue
        values = {value.strip().lower() for value in column.values}
        if values <= set(PARTS) and "train" in values:
            return column
        if values <= {*PARTS, "valid", "val", "dev", "eval"}:
            notes.append(f"{column.name} is not used: its values must be {', '.join(PARTS)}, and are {column.values}")
    return None


def _not_negative(column: Column) -> bool:
    return column.kind in ("integer", "float") and column.low is not None and column.low >= 0


def _ends(file: str, columns: list[Column], choose: Choose) -> tuple[End, End]:
    ids = [column for column in columns if column.is_id]
    pair = _named_pair(ids)
    if pair is not None:
        return pair
    known = [c for c in ids if ID_WORDS & set(c.words) or c.noun in ACTORS or c.noun in OBJECTS or c.noun in ROLES]
    doubtful = len(known) > 2
    if len(known) < 2:
        # The columns with the most different values are the likeliest ids.
        others = sorted((c for c in ids if c not in known), key=lambda c: -c.distinct)
        known = [c for c in ids if c in known or c in others[: 2 - len(known)]]
        doubtful = len(ids) > 2
    if len(known) < 2:
        _refuse(file, columns)
    first = min(known, key=lambda c: _rank(c, ACTORS))
    second = min((c for c in known if c is not first), key=lambda c: _rank(c, OBJECTS))
    if doubtful and (first.noun not in ACTORS or second.noun not in OBJECTS):
        names = [column.name for column in ids]
        answer = choose(f"Which column of {file} is the left entity, the one that acts?", names, first.name)
        first = next(c for c in ids if c.name == answer)
        names.remove(first.name)
        default = second.name if second.name in names else names[0]
        answer = choose(f"Which column of {file} is the right entity?", names, default)
        second = next(c for c in ids if c.name == answer)
    return _end(first), _end(second)


def _rank(column: Column, words: Sequence[str]) -> int:
    return words.index(column.noun) if column.noun in words else len(words)


def _named_pair(ids: list[Column]) -> tuple[End, End] | None:
    """Return the columns whose names differ by the two words of a pair alone, such as `from_user` and `to_user`."""
    for one, other in PAIRS:
        for first in ids:
            for second in ids:
                if one not in first.core or other not in second.core or first is second:
                    continue
                common = [word for word in first.core if word != one]
                if common == [word for word in second.core if word != other]:
                    entity = "_".join(common) if set(common) - ROLES else None
                    people = one in PEOPLE
                    return End(first.name, entity, people), End(second.name, entity, people)
    return None


def _end(column: Column) -> End:
    core = column.core
    if not core or column.noun in ROLES:
        return End(column.name, None, column.noun in PEOPLE)
    word = column.noun if column.noun in NOUNS.values() else "_".join(core)
    return End(column.name, re.sub(r"^[^a-z]+", "", word) or None)


def _refuse(file: str, columns: list[Column]) -> None:
    floats = [c.name for c in columns if c.kind == "float" and ID_WORDS & set(c.words)]
    if floats:
        raise UserError(
            f"{file}: column {floats[0]!r} holds ids as floating-point numbers; cast it to integers or text"
        )
    names = ", ".join(c.name for c in columns) or "none"
    raise UserError(
        f"{file}: no two columns hold ids of entities (columns left for them: {names}); an edge needs a left and a "
        "right entity, so name two columns lhs and rhs"
    )
