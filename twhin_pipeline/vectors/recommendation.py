"""What a recommendation needs besides scores: which relation is meant, and which tails the head already has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from twhin_pipeline.errors import UserError, unknown

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation
    from twhin_pipeline.vectors.reader import TwhinEmbeddings

RAW_EDGES = "raw_edges"


def choose_relation(
    model: TwhinEmbeddings, id: Any, relation: str | None, entity: str | None, edges: Mapping[str, int]
) -> tuple[str, str | None]:
    """Return the relation that `id` is to be recommended tails of, and a note where it was chosen among several.

    Args:
        model: The model.
        id: The head.
        relation: Its name, if it was given.
        entity: The entity type of the head, if it was given.
        edges: Edges by relation, as far as they are known. Of several relations between the same two types, the one
            with the most edges is taken.

    Raises:
        KeyError: The relation, the entity type or the id is unknown.
        UserError: The relation has other heads, or relations of different types are possible; the message lists them.
    """
    if entity is not None and entity not in model.entities:
        raise UserError(unknown("entity type", entity, model.entities))
    if relation is not None:
        if relation not in model.relations:
            raise UserError(unknown("relation", relation, model.relations))
        chosen = next(one for one in model.config.relations if one.name == relation)
        if entity not in (None, chosen.lhs):
            raise UserError(f"relation {relation} goes from {chosen.lhs} to {chosen.rhs}; leave out --entity {entity}")
        return relation, None
    heads = dict.fromkeys(one.lhs for one in model.config.relations if entity in (None, one.lhs))
    if not heads:
        raise UserError(f"no relation goes from {entity}; relations: {_listed(model.config.relations)}")
    known = [name for name in heads if model.has(name, id)]
    if not known:
        model.tables[next(iter(heads))].rows([id])  # raises, with the nearest ids
    possible = [one for one in model.config.relations if one.lhs in known]
    if len(possible) == 1:
        return possible[0].name, None
    if len({(one.lhs, one.rhs) for one in possible}) > 1:
        raise UserError(f"{id!r} may be the head of several relations: {_listed(possible)}; choose one with --relation")
    best = max(possible, key=lambda one: edges.get(one.name, 0))
    names = ", ".join(one.name for one in possible)
    return best.name, f"relation {best.name}, which has the most edges of {names}; --relation chooses another"


def _listed(relations: Iterable[Relation]) -> str:
    by_pair: dict[tuple[str, str], list[str]] = {}
    for one in relations:
        by_pair.setdefault((one.lhs, one.rhs), []).append(one.name)
    return "; ".join(f"{', '.join(names)} ({lhs} to {rhs})" for (lhs, rhs), names in by_pair.items())
