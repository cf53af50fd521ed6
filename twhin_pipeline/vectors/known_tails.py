"""The tails that are not recommended: those that a head has already, and those that a call excludes.

What a head has is read from the snapshot's edges, and kept; or it is mapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors import mapped_edges
from twhin_pipeline.vectors.chosen import Chosen
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.mapped_edges import RAW_EDGES, MappedEdges, edge_rows
from twhin_pipeline.vectors.row_pairs import RowLists, RowPairs
from twhin_pipeline.words import RELATIONS

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation
    from twhin_pipeline.store import Store

TailsOf = Callable[[np.ndarray], RowPairs]
"""From heads' rows int64 `[Q]`, -1 for none, to the tails that they have."""


class KnownTails:
    """A snapshot's edges, as far as they are asked for."""

    def __init__(
        self, store: Store | None, snapshot: str, relations: Sequence[Relation], tables: Mapping[str, EntityTable]
    ) -> None:
        """Take where the edges are, the model's relations and its entity types; nothing is read yet."""
        self.store, self.snapshot, self.relations, self.tables = store, snapshot, relations, tables
        self._numbers = {one.name: number for number, one in enumerate(relations)}
        self._lists: dict[tuple[str, ...], RowLists] = {}
        self._mapped: dict[tuple[str, str], MappedEdges] | None = None

    def map(self) -> None:
        """Map all edges from files that processes share; they are made where they are missing."""
        if self.store is not None:
            relations = self.store.manifest(RELATIONS, self.snapshot)
            self._mapped = mapped_edges.mapped(self.store, relations, self.relations, self.tables)

    def names(self, number: int, which: bool | Literal["any"]) -> list[str]:
        """Return the relations whose tails are known ones of a relation."""
        chosen = self.relations[number]
        if which != "any":
            return [chosen.name]
        return [one.name for one in self.relations if (one.lhs, one.rhs) == (chosen.lhs, chosen.rhs)]

    def left_out(
        self,
        number: int,
        chosen: Chosen,
        tails: EntityTable,
        exclude_known: bool | Literal["any"],
        each: Mapping[Any, Any] | None,
        barred: np.ndarray,
    ) -> Callable[[slice], RowPairs]:
        """Return the function that returns what is not recommended to a part of the heads.

        Args:
            number: The relation's number.
            chosen: The heads.
            tails: The type of its tails.
            exclude_known: As of `TwhinEmbeddings.recommend`.
            each: By head, ids of tails to leave out besides.
            barred: Rows of tails to leave out for every head, int64 `[n]`.

        Raises:
            UserError: `exclude_known` is something else.
        """
        if exclude_known not in (True, False, "any"):
            raise UserError(f"exclude_known must be True, False or 'any', got {exclude_known!r}")
        relation, names = self.relations[number], self.names(number, exclude_known)
        known = self.of(names, chosen, tails) if exclude_known else None
        excluded = {} if each is None else _by_row(each, chosen, tails)

        def left_out(part: slice) -> RowPairs:
            rows = chosen.rows[part]
            parts = [RowPairs(np.repeat(np.arange(len(rows)), len(barred)), np.tile(barred, len(rows)))]
            if known is not None:
                parts.append(known(rows))
            if exclude_known and relation.lhs == relation.rhs:
                parts.append(chosen.themselves(part))
            if exclude_known and chosen.new is not None:
                parts.append(chosen.new.heads_of([self._numbers[name] for name in names], part, len(rows)))
            for at, key in enumerate(chosen.keys(part)) if excluded else ():
                if key in excluded:
                    parts.append(RowPairs(np.full(len(excluded[key]), at), excluded[key]))
            return RowPairs.joined(parts)

        return left_out

    def of(self, names: list[str], chosen: Chosen, tails: EntityTable) -> TailsOf | None:
        """Return the function from heads' rows to their known tails; None, with a warning, where there are no edges."""
        if chosen.one and self.store is not None and self._mapped is None and tuple(names) not in self._lists:
            row = chosen.rows
            found = known_tails(self.store, self.snapshot, names, chosen.table.ids(row)[0]) if row[0] >= 0 else set()
            if found is not None:
                rows = tails.find(list(found))
                pairs = RowPairs(np.zeros(int((rows >= 0).sum()), np.int64), rows[rows >= 0])
                return lambda _: pairs
        elif (every := self.of_every(names, chosen.table, tails)) is not None:
            return every
        warnings.warn(f"there is no table raw_edges of {self.snapshot}, so known edges are not left out", stacklevel=4)
        return None

    def of_every(self, names: list[str], heads: EntityTable, tails: EntityTable) -> TailsOf | None:
        """Return the same function for every head: the edges are mapped, or read once; None where there are none."""
        if self._mapped is not None:
            edges = self._mapped[heads.name, tails.name]
            return partial(edges.pairs, relations=[self._numbers[name] for name in names])
        key = tuple(names)
        if key not in self._lists and self.store is not None:
            lists = all_known_tails(self.store, self.snapshot, names, heads, tails)
            if lists is not None:
                self._lists[key] = lists
        return self._lists[key].pairs if key in self._lists else None


def _by_row(each: Mapping[Any, Any], chosen: Chosen, tails: EntityTable) -> dict[Any, np.ndarray]:
    """Return the rows of the tails to leave out by the head's key (`Chosen.keys`)."""
    heads = list(each)
    result: dict[Any, np.ndarray] = {}
    for head, row in zip(heads, chosen.table.find(heads).tolist(), strict=True):
        result[row if row >= 0 else str(head)] = rows_of(each[head], tails)
    return result


def rows_of(ids: Any, table: EntityTable) -> np.ndarray:
    """Return the rows of an id or of several (a sequence or a set), int64 `[n]`; without those that have no vector."""
    if isinstance(ids, Set):
        ids = list(ids)
    rows = table.find([ids] if np.ndim(ids) == 0 else ids)
    return rows[rows >= 0]


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
    chosen = pc.field("rel").isin(list(relations)) & (pc.field("lhs") == value)
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
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([np.zeros(0, np.int32)], [np.zeros(0, np.int32)])
    for head, tail, _ in edge_rows(store, snapshot, relations, heads, tails):
        sides[0].append(head)
        sides[1].append(tail)
    return RowLists.of_pairs(np.concatenate(sides[0]), np.concatenate(sides[1]), len(heads))
