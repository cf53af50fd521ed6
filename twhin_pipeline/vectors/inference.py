"""Vectors of ids that the model does not have, from their edges to ids that it has (`model/placing.py`).

`edges` come as a mapping from an id to its pairs (relation, known id); or as a table (Arrow, pandas) with the columns
`lhs`, `rel`, `rhs`, an edge a row, of which one end is the new id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.words import SIDES, Side, other

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation
    from twhin_pipeline.vectors.entity_table import EntityTable
    from twhin_pipeline.vectors.scoring import EdgeScores

FORMS = "a mapping {id: [(relation, known id), …]}, or a table with the columns lhs, rel and rhs"
SHAPE = ["lhs", "rel", "rhs"]


@dataclass(frozen=True)
class NewEdges:
    """Edges of new ids of one type: the place of each among the new ids, its relation, its side, and the other end."""

    new: np.ndarray
    """int64 `[M]`."""
    relation: np.ndarray
    """Numbers, int64 `[M]`."""
    side: np.ndarray
    """0: the new id is the head; 1: the tail."""
    neighbor: np.ndarray
    """Rows of the other end's type, int64 `[M]`."""

    def estimate(
        self, count: int, relations: Sequence[Relation], tables: Mapping[str, EntityTable], scores: EdgeScores, of: str
    ) -> np.ndarray:
        """Return the vectors of `count` new ids of the entity type `of`, float32 `[count, D]`."""
        import torch

        from twhin_pipeline.model.placing import length_of, mean_wanted

        table = tables[of]
        total = torch.zeros(count, table.vectors.shape[1])
        for number, side in dict.fromkeys(zip(self.relation.tolist(), self.side.tolist(), strict=True)):
            here = (self.relation == number) & (self.side == side)
            name: Side = SIDES[side]
            known = tables[getattr(relations[number], other(name))].vectors[self.neighbor[here]]
            wanted = torch.from_numpy(scores.wanted(name, number, known))
            total.index_add_(0, torch.from_numpy(self.new[here]), wanted)
        weight = torch.from_numpy(np.bincount(self.new, minlength=count))
        trained = slice(None) if table.trained is None else np.asarray(table.trained)
        lengths = table.lengths()[trained]
        length = length_of(scores.scorer.comparator, float(lengths.mean()) if len(lengths) else 0.0)
        return mean_wanted(total, weight, length).numpy()


def new_edges(
    edges: Any, entity: str, ids: Sequence[Any], relations: Sequence[Relation], tables: Mapping[str, EntityTable]
) -> NewEdges:
    """Look up the edges of new `ids` of an entity type.

    Raises:
        KeyError: A relation is unknown.
        UserError: `edges` have another form, an id has no edge to a known id, or a relation does not have its type.
    """
    if edges is None:
        raise UserError(f"missing='infer' needs edges= of the {entity} without a vector, such as {ids[0]!r}: {FORMS}")
    names = [relation.name for relation in relations]
    places: dict[str, list[int]] = {}
    for i, one in enumerate(ids):  # an id may be asked for twice
        places.setdefault(str(one), []).append(i)
    parts: dict[tuple[int, int], tuple[list[int], list[Any]]] = {}
    for new, name, known, side in _rows(edges, places):
        if name not in names:
            raise UserError(f"edges of {entity} {ids[new]!r}: {unknown('relation', name, names)}")
        number = names.index(name)
        if getattr(relations[number], SIDES[side]) != entity:
            if not isinstance(edges, Mapping):
                continue  # an id of another type that is spelled alike
            side = 1
            if relations[number].rhs != entity:
                one = relations[number]
                raise UserError(
                    f"edges of {entity} {ids[new]!r}: relation {name} goes from {one.lhs} to {one.rhs}; give relations "
                    f"of {entity}"
                )
        of_part = parts.setdefault((number, side), ([], []))
        of_part[0].append(new)
        of_part[1].append(known)
    found: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(4)]
    for (number, side), (new_places, ends) in parts.items():
        rows = tables[getattr(relations[number], other(SIDES[side]))].find(ends)
        here = rows >= 0
        count = int(here.sum())
        columns = (np.array(new_places)[here], np.full(count, number), np.full(count, side), rows[here])
        for column, values in zip(found, columns, strict=True):
            column.append(values)
    result = NewEdges(*(np.concatenate(column) for column in found))
    without = np.flatnonzero(np.bincount(result.new, minlength=len(ids)) == 0)
    if len(without):
        raise UserError(
            f"edges= has no edge of {entity} {ids[int(without[0])]!r} to an id that the model has"
            f" ({len(without):,} such ids); give one for each, or missing='skip'"
        )
    return result


def _rows(edges: Any, places: Mapping[str, Sequence[int]]) -> Iterator[tuple[int, str, Any, int]]:
    """Yield, for each place of a new id, its edges: the place, the relation, the other end, and the side (0: head)."""
    if isinstance(edges, Mapping):
        for one, pairs in edges.items():
            if str(one) in places:
                for pair in pairs if isinstance(pairs, Iterable) else [pairs]:
                    if not isinstance(pair, Collection) or isinstance(pair, str | Set | Mapping) or len(pair) != 2:
                        raise UserError(
                            f"edges of {one!r}: {pair!r} is no pair (relation, known id); edges are {FORMS}"
                        )
                    name, known = pair
                    for place in places[str(one)]:
                        yield place, name, known, 0
        return
    try:
        table = edges if isinstance(edges, pa.Table) else pa.table(edges)
        columns = [table.column(name).to_pylist() for name in SHAPE]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"edges= must be {FORMS}, got {type(edges).__name__} ({error})") from error
    for lhs, name, rhs in zip(*columns, strict=True):
        for new, known, side in ((lhs, rhs, 0), (rhs, lhs, 1)):
            for place in places.get(str(new), ()):
                yield place, name, known, side
