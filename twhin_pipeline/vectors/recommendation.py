"""What a recommendation needs besides scores: which relation is meant, and which tails the head already has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.vectors.row_pairs import RowLists

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation
    from twhin_pipeline.store import Store
    from twhin_pipeline.vectors.entity_table import EntityTable
    from twhin_pipeline.vectors.reader import TwhinEmbeddings

RAW_EDGES = "raw_edges"


def known_tails(store: Store, snapshot: str, relations: Sequence[str], head: Any) -> set[Any] | None:
    """Return the tails that `head` has by any of the relations in a snapshot's `raw_edges`; None where it has no table.

    The table is sorted by relation and head, so only row groups whose statistics have both are read.
    """
    if not store.exists(RAW_EDGES, snapshot):
        return None
    table = store.dataset(RAW_EDGES, snapshot)
    kind = table.schema.field("lhs").type
    # Where one entity type has texts for ids, the ids of all types are texts there.
    value = pa.scalar(int(head) if pa.types.is_integer(kind) else str(head), kind)
    chosen = ds.field("rel").isin(list(relations)) & (ds.field("lhs") == value)
    return set(table.to_table(columns=["rhs"], filter=chosen)["rhs"].to_pylist())


def all_known_tails(
    store: Store, snapshot: str, relations: Sequence[str], heads: EntityTable, tails: EntityTable
) -> RowLists | None:
    """Return the tails of every head by any of the relations, from `raw_edges`; None where a snapshot has no table.

    The table is read once, as a stream. What is kept takes 4 bytes an edge and 8 a head, and twice that for a moment.
    Ids without a vector are passed over.
    """
    if not store.exists(RAW_EDGES, snapshot):
        return None
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    edges = store.dataset(RAW_EDGES, snapshot)
    for batch in edges.to_batches(columns=["lhs", "rhs"], filter=ds.field("rel").isin(list(relations))):
        rows = []
        for name, table in (("lhs", heads), ("rhs", tails)):
            codes = batch.column(name).dictionary_encode()
            found = table.find(codes.dictionary).astype(np.int32)
            rows.append(found[codes.indices.to_numpy()])
        here = (rows[0] >= 0) & (rows[1] >= 0)
        for side, of_side in zip(sides, rows, strict=True):
            side.append(of_side[here])
    head_rows, tail_rows = (np.concatenate([np.zeros(0, np.int32), *side]) for side in sides)
    return RowLists.of_pairs(head_rows, tail_rows, len(heads))


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
