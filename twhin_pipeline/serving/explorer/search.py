"""Finds entities by what someone types: the id, its beginning, a part of it, or one that is spelled alike."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np
import pyarrow.compute as pc

from twhin_pipeline.vectors.entity_table import SEARCHED_ROWS, EntityTable
from twhin_pipeline.vectors.reader import TwhinEmbeddings

LEAST_ALIKE = 0.5
"""Share of the characters that an id must have in common with the text, to be spelled alike."""


@dataclass(frozen=True)
class Hit:
    """An entity that was found, and how: `id`, `beginning`, `part` or `spelling`."""

    entity: str
    id: str
    how: str
    trained: bool


def search(model: TwhinEmbeddings, text: str, limit: int = 10, entity: str | None = None) -> list[Hit]:
    """Look an id up in every entity type, or in one.

    First come entities with that id, then those whose id begins with the text, then those that have it inside, the
    shortest ids first and upper and lower case alike. Where no type has one, those that are spelled alike. In types
    with more than `SEARCHED_ROWS` entities, only whole ids and beginnings of texts are looked for.

    Args:
        model: Whose entities.
        text: What was typed.
        limit: Hits of each entity type at most.
        entity: The entity type; None: all.
    """
    text = text.strip()
    if not text:
        return []
    ranked = [
        (rank, hit)
        for name, table in model.tables.items()
        if entity in (None, name)
        for rank, hit in enumerate(_of_type(name, table, text, limit))
    ]
    order = ("id", "beginning", "part")
    if all(hit.how == "spelling" for _, hit in ranked):
        alike = [(_likeness(text, hit.id), hit) for _, hit in ranked]
        return [hit for likeness, hit in sorted(alike, key=lambda one: -one[0]) if likeness >= LEAST_ALIKE]
    found = [one for one in ranked if one[1].how != "spelling"]
    return [hit for _, hit in sorted(found, key=lambda one: (order.index(one[1].how), one[0]))]


def _likeness(text: str, id: str) -> float:
    return SequenceMatcher(None, text.lower(), id.lower()).ratio()


def _of_type(name: str, table: EntityTable, text: str, limit: int) -> list[Hit]:
    found: dict[str, str] = {}
    if table.has(text):
        found[str(table.ids(table.rows([text]))[0])] = "id"
    if not table.index.integer:
        for how, function in (("beginning", pc.starts_with), ("part", pc.match_substring)):
            if len(found) < limit and (how == "beginning" or len(table) <= SEARCHED_ROWS):
                rows = np.flatnonzero(function(table.index.ids, text, ignore_case=True).to_numpy(zero_copy_only=False))
                for one in sorted(table.ids(rows), key=lambda one: (len(one), one))[:limit]:
                    found.setdefault(one, how)
    if not found and len(table):
        # Ids are compared letter by letter, and what was typed may be in capitals.
        values = {text, text.lower()} if not table.index.integer else {int(text)} if _is_integer(text) else set()
        found = {str(one): "spelling" for value in sorted(values) for one in table.nearest_ids(value)}
    shown = list(found.items())[:limit]
    if not shown:
        return []
    rows = table.rows([one for one, _ in shown])
    trained = np.ones(len(rows), bool) if table.trained is None else table.trained[rows]
    return [Hit(name, one, how, bool(ok)) for (one, how), ok in zip(shown, trained, strict=True)]


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isascii() and text.removeprefix("-").isdigit()
