"""The entities that a call of the read API asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.inference import NewEdges
from twhin_pipeline.vectors.row_pairs import RowPairs


@dataclass(frozen=True)
class New:
    """Entities without a row, whose vectors were made from their edges."""

    places: np.ndarray
    """Where they are among those asked for, int64 `[m]`, ascending."""
    ids: list[str]
    vectors: np.ndarray
    """float32 `[m, D]`."""
    edges: NewEdges

    def heads_of(self, relations: Sequence[int], part: slice, count: int) -> RowPairs:
        """Return the tails that they have by one of the relations, for a part of `count` of the entities asked for."""
        edges = self.edges
        here = np.isin(edges.relation, relations) & (edges.side == 0)
        query = self.places[edges.new[here]] - (part.start or 0)
        inside = (query >= 0) & (query < count)
        return RowPairs.joined([RowPairs(query[inside], edges.neighbor[here][inside])])


@dataclass(frozen=True)
class Chosen:
    """n entities of one type, in the order in which they were asked for."""

    table: EntityTable
    rows: np.ndarray
    """Their rows, int64 `[n]`; -1 for a new one."""
    new: New | None = None
    one: bool = False
    """A single id was given, not a sequence."""
    every: bool = False
    """None was named, so it is all of the type."""
    found: np.ndarray | None = None
    """Which of the ids that were given are among them, bool; None: all."""

    def vectors(self, part: slice) -> np.ndarray:
        """Return the vectors of a part, float32 `[p, D]`."""
        rows = self.rows[part]
        result = np.array(self.table.vectors[rows])
        if self.new is not None:
            place = self.new.places - (part.start or 0)
            inside = (place >= 0) & (place < len(rows))
            result[place[inside]] = self.new.vectors[inside]
        return result

    def ids(self, part: slice) -> pa.Array:
        """Return the ids of a part, of the type that the table's have.

        Raises:
            UserError: A new id is not of that type.
        """
        rows, known = self.rows[part], self.table.index.ids
        if not (rows < 0).any():
            return known.take(pa.array(rows))
        values = known.take(pa.array(rows, mask=rows < 0)).to_pylist()
        for at, key in enumerate(self.keys(part)):
            if rows[at] < 0:
                try:
                    values[at] = self.table.as_stored(key)
                except ValueError:
                    raise UserError(
                        f"ids of {self.table.name} are integers, so answers for several have no place for {key!r}; ask "
                        "for it alone"
                    ) from None
        return pa.array(values, known.type)

    def keys(self, part: slice) -> list[Any]:
        """Return what stands for each entity of a part: its row, or the id of a new one as a text."""
        keys: list[Any] = self.rows[part].tolist()
        start = part.start or 0
        if self.new is not None:
            for place, name in zip(self.new.places.tolist(), self.new.ids, strict=True):
                if 0 <= place - start < len(keys):
                    keys[place - start] = name
        return keys

    def themselves(self, part: slice) -> RowPairs:
        """Return each entity of a part with its own row."""
        rows = self.rows[part]
        return RowPairs(np.flatnonzero(rows >= 0), rows[rows >= 0])
