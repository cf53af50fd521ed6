"""What finds the best rows of an entity type, as tails or as neighbors: a comparison with all of them, or an index."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.index_choice import LEAST_FOR_PQ

if TYPE_CHECKING:
    from twhin_pipeline.vectors.retrieval import ExactSearch, IndexSearch
    from twhin_pipeline.vectors.scoring import EdgeScores
    from twhin_pipeline.vectors.vector_index import VectorIndex

Search = Literal["auto", "exact", "index"]
Wanted = Literal["tails", "neighbors"]
"""Tails score highest by the model's comparator; neighbors are nearest by the cosine."""


class Searchers:
    """The searchers of a model's entity types, made when they are first asked for, and kept."""

    def __init__(
        self,
        snapshot: str,
        scores: Callable[[], EdgeScores],
        open_index: Callable[[EntityTable, Wanted], VectorIndex | None],
    ) -> None:
        """Take the model's snapshot, its scores, and what opens an index, None where there is none."""
        self.snapshot = snapshot
        self._scores, self._open_index = scores, open_index
        self._exact: dict[tuple[str, bool, Wanted], ExactSearch] = {}
        self._indexes: dict[tuple[str, Wanted], VectorIndex | None] = {}

    def get(
        self, table: EntityTable, untrained: bool, search: Search, wanted: Wanted = "tails"
    ) -> ExactSearch | IndexSearch:
        """Return what finds an entity type's best rows: the one place where it is chosen.

        `untrained`: it returns entities without training edges too. Scores of neighbors are cosines.
        """
        key = (table.name, untrained, wanted)
        if key not in self._exact:
            allowed = None if untrained or table.trained is None else np.asarray(table.trained)
            if wanted == "tails":
                self._exact[key] = self._scores().exact(table.vectors, allowed)
            else:
                from twhin_pipeline.model.comparators import Cosine
                from twhin_pipeline.vectors.retrieval import ExactSearch

                self._exact[key] = ExactSearch(Cosine(), table.vectors, allowed)
        index = self.index(table, untrained, search, wanted)
        if index is None:
            return self._exact[key]
        from twhin_pipeline.vectors.retrieval import IndexSearch

        return IndexSearch(index, self._exact[key], index.most)

    def index(
        self, table: EntityTable, untrained: bool, search: Search, wanted: Wanted = "tails"
    ) -> VectorIndex | None:
        """Return the index that a search of an entity type uses, None where it compares every row.

        Raises:
            UserError: One is asked for and cannot be used.
        """
        if search not in get_args(Search):
            raise UserError(f"search must be 'auto', 'exact' or 'index', got {search!r}")
        if search == "exact" or (search == "auto" and untrained):
            return None
        if untrained:
            raise UserError("an index has trained entities only; leave untrained or search='index' out")
        if search == "auto" and (extras.missing("faiss") or extras.missing("torch")):
            return None
        key = (table.name, wanted)
        if key not in self._indexes:
            self._indexes[key] = self._open_index(table, wanted)
        if search == "index" and self._indexes[key] is None:
            few = (
                f", which of fewer than {LEAST_FOR_PQ:,} entities are compared with all"
                if wanted == "neighbors"
                else ""
            )
            raise UserError(
                f"{self.snapshot} has no index of {table.name} for {wanted}{few}; leave search='index' out, or make "
                "one with `twhin index --set indexes.kind=hnsw`"
            )
        return self._indexes[key]
