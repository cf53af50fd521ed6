"""The tails that heads have already, which are not recommended: read from the snapshot's edges, kept, or mapped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from twhin_pipeline.vectors import mapped_edges
from twhin_pipeline.vectors.chosen import Chosen
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.mapped_edges import RAW_EDGES, MappedEdges
from twhin_pipeline.vectors.row_pairs import RowLists, RowPairs
from twhin_pipeline.words import RELATIONS

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation
    from twhin_pipeline.store import Store


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

    def of(self, names: list[str], chosen: Chosen, tails: EntityTable) -> Callable[[np.ndarray], RowPairs] | None:
        """Return the function from heads' rows to their known tails; None, with a warning, where there are no edges."""
        if self._mapped is not None:
            edges = self._mapped[chosen.table.name, tails.name]
            return partial(edges.pairs, relations=[self._numbers[name] for name in names])
        if self.store is not None and chosen.one and tuple(names) not in self._lists:
            row = chosen.rows
            found = known_tails(self.store, self.snapshot, names, chosen.table.ids(row)[0]) if row[0] >= 0 else set()
            if found is not None:
                rows = tails.find(list(found))
                pairs = RowPairs(np.zeros(int((rows >= 0).sum()), np.int64), rows[rows >= 0])
                return lambda _: pairs
        elif (lists := self.lists(names, chosen.table, tails)) is not None:
            return lists.pairs
        warnings.warn(f"there is no table raw_edges of {self.snapshot}, so known edges are not left out", stacklevel=4)
        return None

    def lists(self, names: list[str], heads: EntityTable, tails: EntityTable) -> RowLists | None:
        """Return every head's tails by some relations, read once; None where there are no edges."""
        key = tuple(names)
        if key not in self._lists and self.store is not None:
            lists = all_known_tails(self.store, self.snapshot, names, heads, tails)
            if lists is not None:
                self._lists[key] = lists
        return self._lists.get(key)


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
