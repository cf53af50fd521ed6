"""The read API: `load_model(path)` gives vectors, probabilities of relations, neighbours and recommendations.

>>> model = load_model("/data/twhin")
>>> model.get_user_embedding(12)
>>> model.predict_relation(12, 34, "fav")
>>> model.neighbors("tweet", 34, k=10)
>>> model.recommend("fav", 12, k=10)
>>> for batch in model.recommend("fav", k=10): ...  # all users, as Arrow record batches
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import pyarrow as pa

from twhin_pipeline import extras
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store import Store
from twhin_pipeline.vectors.answers import HEADS_AT_ONCE, answer, as_pairs
from twhin_pipeline.vectors.by_id import Missing, VectorsById, is_one
from twhin_pipeline.vectors.calibration import Calibrations, Threshold, sigmoid
from twhin_pipeline.vectors.entity_table import EntityTable, UnknownName
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.known_tails import KnownTails, rows_of
from twhin_pipeline.vectors.nearest import nearest
from twhin_pipeline.vectors.row_pairs import RowPairs
from twhin_pipeline.vectors.searchers import Search, Searchers, Wanted

if TYPE_CHECKING:
    from twhin_pipeline.vectors.mixture import Mixture
    from twhin_pipeline.vectors.scoring import EdgeScores
    from twhin_pipeline.vectors.vector_index import VectorIndex


class TwhinEmbeddings(VectorsById):
    """A trained model, to read: the vectors of each entity type, and the scorer that training used.

    Vectors, thresholds and neighbors of one id come without torch; scores, and answers for many ids, need it.
    Each entity type has its getter: `get_user_embedding(id)` is `get_embedding("user", id)`.
    """

    def __init__(
        self,
        model_config: TwhinModelConfig,
        tables: Mapping[str, EntityTable],
        open_scores: Callable[[], EdgeScores],
        snapshot: str,
        version: str,
        *,
        normalized: bool = False,
        store: Store | None = None,
        maps: Mapping[str, np.ndarray] | None = None,
        open_index: Callable[[EntityTable, Wanted], VectorIndex | None] = lambda table, wanted: None,
        open_calibrations: Callable[[], Calibrations] = Calibrations,
    ) -> None:
        """Put together what `load_model` found.

        Args:
            model_config: Entity types and relations.
            tables: Each entity type's vectors.
            open_scores: Returns what scores edges; called when the first score is asked for.
            snapshot: The snapshot that the model was trained on.
            version: That of the table `twhin_model` which the vectors were exported from.
            normalized: The vectors were exported with `export.normalize`.
            store: Where the snapshot's edges are, for `recommend`.
            maps: By entity type, a matrix `[D, D']` into another space, for `get_embedding`; None: the model's own.
            open_index: Returns the index that finds an entity type as tails or as neighbors, None where there is none;
                called when a search first could use it.
            open_calibrations: Returns the maps from scores to probabilities; called when the first is asked for.
        """
        super().__init__(model_config, tables, open_scores, normalized=normalized, maps=maps)
        self._open_calibrations = open_calibrations
        self.snapshot, self.version = snapshot, version
        self.store = store
        self._known = KnownTails(store, snapshot, model_config.relations, self.tables)
        self._searchers = Searchers(snapshot, self._open_scores, open_index)
        self._mixtures: dict[tuple[int, Interests], Mixture] = {}

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {len(table):,}" for name, table in self.tables.items())
        return f"TwhinEmbeddings({self.snapshot}: {sizes}; relations {', '.join(self.relations)})"

    @property
    def relations(self) -> list[str]:
        """Relations."""
        return self.config.relation_names

    def predict_relation(
        self, lhs: Any, rhs: Any, relation: str | None = None, *, prior: float | None = None
    ) -> float | np.ndarray:
        """Return the probability that `lhs` has `relation` to `rhs`.

        It is calibrated: fitted to validation edges, each beside `evaluation.auc_negatives` pairs of the same head with
        a random tail, so it is the probability at that base rate. It grows strictly with the score. Where nothing was
        fitted (no validation edges, or a store of an earlier version) it is sigmoid(score), and a warning says so.
        Another warns of ids that no training edge has.

        Args:
            lhs: An id, a sequence of n ids, or vectors of floats, `[D]` or `[n, D]`.
            rhs: Likewise; one entity is paired with all of the other side's n.
            relation: The relation's name; may be left out where the model has only one.
            prior: The share of edges among the pairs that you ask for, where it is another; log-odds are shifted by
                Bayes' rule (Elkan, 2001, theorem 2; Saerens et al., 2002).

        Returns:
            A float for one edge, or float64 `[n]`.

        Raises:
            KeyError: The relation or an id is unknown.
            UserError: The relation is left out where there are several, vectors or counts do not fit, or a prior is
                given that is not between 0 and 1, or for a relation that is not calibrated.
        """
        number, left, right = self._relation(relation)
        a, one_a = self._vectors(left, lhs)
        b, one_b = self._vectors(right, rhs)
        if not one_a and not one_b and len(a) != len(b):
            raise UserError(f"predict_relation pairs lhs and rhs one to one, got {len(a)} and {len(b)}")
        name = self.relations[number]
        log_odds = self._calibrations.log_odds(name, self._scores.of_pairs(a, number, b), prior)
        probability = sigmoid(log_odds)
        return float(probability[0]) if one_a and one_b else probability

    def probabilities(self, relation: str | None, scores: Any, *, prior: float | None = None) -> np.ndarray | None:
        """Return what `predict_relation` says of pairs with these scores, as `recommend` and `candidates` return them.

        Args:
            relation: The relation's name; may be None where the model has only one.
            scores: The model's scores, of any shape.
            prior: As of `predict_relation`.

        Returns:
            float64 of the same shape; None where the relation is not calibrated.

        Raises:
            KeyError: The relation is unknown.
            UserError: The relation is None where there are several, or a prior is not between 0 and 1.
        """
        name = self.relations[self._relation(relation)[0]]
        if not self._calibrations.are_of(name):
            return None
        return sigmoid(self._calibrations.log_odds(name, np.asarray(scores), prior))

    def queries(self, relation: str | None, heads: Any) -> np.ndarray:
        """Return heads (ids, or vectors `[n, D]`) as the relation's operator makes them, float32 `[n, D]`.

        The tails that a head most probably has the relation to are those nearest to it: by the dot product, the cosine
        or the distance, as the model's comparator is. For search engines that know only vectors. A warning names heads
        that no training edge has.

        Raises:
            KeyError: The relation or an id is unknown.
            UserError: The relation is None where there are several, or vectors do not fit.
        """
        number, left, _ = self._relation(relation)
        return self._scores.queries(number, self._vectors(left, heads)[0])

    def threshold(
        self,
        relation: str | None = None,
        *,
        precision: float | None = None,
        recall: float | None = None,
        prior: float | None = None,
    ) -> Threshold:
        """Return the probability from which on `predict_relation` reaches a precision, or a recall.

        What thresholds reach was measured on the evaluation's held-out edges, each beside `evaluation.auc_negatives`
        pairs of the same head with a random tail. Of the thresholds with the precision it is the lowest, of those with
        the recall the highest.

        Args:
            relation: The relation's name; may be left out where the model has only one.
            precision: The share of edges among the pairs at or above the threshold, above 0 and at most 1.
            recall: In its place, the share of edges that are at or above it.
            prior: As of `predict_relation`.

        Raises:
            KeyError: The relation is unknown.
            UserError: Not one of the two is given, no threshold reaches the precision (the message has the best), the
                relation had no held-out edge, or a prior does not fit.
        """
        name = self.relations[self._relation(relation)[0]]
        return self._calibrations.threshold(name, precision=precision, recall=recall, prior=prior)

    @cached_property
    def _calibrations(self) -> Calibrations:
        return self._open_calibrations()

    @overload
    def neighbors(
        self,
        entity: str,
        ids: str | int,
        k: int = 10,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        search: Search = "auto",
    ) -> list[tuple[Any, float]]: ...

    @overload
    def neighbors(
        self,
        entity: str,
        ids: Any = None,
        k: int = 10,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        search: Search = "auto",
    ) -> pa.RecordBatchReader: ...

    def neighbors(
        self,
        entity: str,
        ids: Any = None,
        k: int = 10,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        search: Search = "auto",
    ) -> list[tuple[Any, float]] | pa.RecordBatchReader:
        """Return the k entities of the same type whose vectors are nearest by cosine, best first, for one or many ids.

        Entities that no training edge has are left out, unless `untrained` is set: their vectors say nothing.

        Args:
            entity: The entity type.
            ids: An id, a sequence of ids, or None: all.
            k: How many; fewer come where there are no more.
            untrained: Entities without training edges too; among all `ids` as well.
            missing: As in `get_embedding`.
            edges: As in `get_embedding`.
            search: As in `recommend`.

        Returns:
            Of one id a list of (id, cosine). Else a stream of Arrow record batches, as of `recommend`, with the columns
            `id`, `neighbor`, `rank` (from 1) and `similarity`. That needs torch; a list does not.

        Raises:
            KeyError: The entity type or an id is unknown.
            UserError: As in `get_embedding`, or `search="index"` has no index to use.
        """
        chosen = self._choose(entity, ids, missing, edges)
        self._warn_untrained(chosen)
        table = chosen.table
        index = self._searchers.index(table, untrained, search, "neighbors")
        if chosen.one and chosen.new is None and index is None:
            return as_pairs(table, *nearest(table, int(chosen.rows[0]), max(k, 0), untrained))
        extras.need("torch", "neighbors of several ids", "reader")
        from twhin_pipeline.vectors.retrieval import best_rows

        if chosen.every and not untrained and table.trained is not None:
            chosen = replace(chosen, rows=np.flatnonzero(table.trained))
        searcher = self._searchers.get(table, untrained, search, "neighbors")
        k = min(k, len(table))

        def best(part: slice) -> tuple[np.ndarray, np.ndarray]:
            vectors = chosen.vectors(part)
            queries = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-8))
            return best_rows(searcher, queries, k, chosen.themselves(part))

        return answer(chosen, table, k, best, ("id", "neighbor", "similarity"))

    def candidates(
        self, relation: str | None, lhs: Any, k: int = 10, *, untrained: bool = False, search: Search = "auto"
    ) -> list[tuple[Any, float]]:
        """Return the k tails that `lhs` (an id or a vector `[D]`) most probably has `relation` to, as (id, score).

        The score is the model's. Tails that no training edge has are left out, unless `untrained` is set; a warning
        names a head that none has. `recommend` also leaves out what is known, and takes many heads; its `search` says
        how tails are found.

        Raises:
            KeyError: The relation or the id is unknown.
            UserError: More than one head was given, or `search="index"` has no index to use.
        """
        number, left, right = self._relation(relation)
        vectors, one = self._vectors(left, lhs)
        if not one:
            raise UserError(f"candidates takes one head, got {len(vectors)}; recommend takes many ids")
        if k < 1:
            return []
        queries = self._scores.queries(number, vectors)  # says what to install, where it is missing
        from twhin_pipeline.vectors.retrieval import best_rows

        tails = self._table(right)
        rows, scores = best_rows(self._searchers.get(tails, untrained, search), queries, min(k, len(tails)))
        return as_pairs(tails, rows[0], scores[0])

    @overload
    def recommend(
        self,
        relation: str | None,
        ids: str | int,
        k: int = 10,
        exclude_known: bool | Literal["any"] = True,
        exclude: Any = None,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        interests: Interests | None = None,
        search: Search = "auto",
    ) -> list[tuple[Any, float]]: ...

    @overload
    def recommend(
        self,
        relation: str | None,
        ids: Any = None,
        k: int = 10,
        exclude_known: bool | Literal["any"] = True,
        exclude: Any = None,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        interests: Interests | None = None,
        search: Search = "auto",
    ) -> pa.RecordBatchReader: ...

    def recommend(
        self,
        relation: str | None,
        ids: Any = None,
        k: int = 10,
        exclude_known: bool | Literal["any"] = True,
        exclude: Any = None,
        *,
        untrained: bool = False,
        missing: Missing = "error",
        edges: Any = None,
        interests: Interests | None = None,
        search: Search = "auto",
    ) -> list[tuple[Any, float]] | pa.RecordBatchReader:
        """Return the k best new tails for one head, for many, or for all, best first.

        Known edges are read from the snapshot's `raw_edges`: those of one head by its row groups; for several heads all
        of the relation once, and they are kept (4 bytes an edge, 8 a head). Besides that, memory does not grow with the
        heads or the tails. `torch.set_num_threads` says how many threads search.

        Args:
            relation: The relation's name; may be None where the model has only one.
            ids: A head, a sequence of heads (a list, or an array of NumPy, pandas or Arrow), or None: all heads.
            k: How many; fewer come where there are no more.
            exclude_known: True leaves out the tails that a head has by the relation in the snapshot's edges (those of
                training, validation and test), `"any"` those that it has by any relation between the same two entity
                types. Both leave out the head itself. False leaves out nothing.
            exclude: Tails to leave out besides: an id, a sequence or a set for all heads; or a mapping from a head to
                such. Ids that the model does not have are passed over.
            untrained: Do not leave out tails that no training edge has, nor, of all heads, such heads.
            missing: What happens to heads that have no vector, as in `get_embedding`.
            edges: For `missing="infer"`, as in `get_embedding`. They count as known.
            interests: Search by several vectors a head, one for each kind of tail that it engaged with, in place of its
                own ([many interests](../how-to/retrieve.md#many-interests)). What it engaged with are its known edges.
            search: "exact" compares all tails. "index" finds most of the best ones (`indexes.recall`), faster. "auto"
                takes the index where there is one ([indexes](../how-to/indexes.md)).

        Returns:
            Of one head a list of (id, score); the score is the model's, as of `candidates`, and `probabilities` says
            what it means. Else a stream of Arrow record batches with the columns `lhs`, `rhs`, `rank` (from 1), `score`
            and `probability` (null where the relation is not calibrated): a row for each recommendation, so that it can
            be written, joined and filtered as it comes. Iterate it once; or take `read_all()` for a table,
            or `read_pandas()` for a data frame. DuckDB and Polars read it too.

        Raises:
            KeyError: The relation or an id is unknown.
            UserError: The relation is None where there are several, vectors were exported with
                `export.normalize: true`, `search="index"` has no index to use, or as in `get_embedding`.
        """
        extras.need("torch", "scoring an edge", "reader")
        from twhin_pipeline.vectors.retrieval import ExactSearch, best_rows

        number, left, right = self._relation(relation)
        chosen, tails = self._choose(left, ids, missing, edges), self._table(right)
        k = min(k, len(tails))
        self._warn_untrained(chosen)
        if chosen.every and not untrained and chosen.table.trained is not None:
            chosen = replace(chosen, rows=np.flatnonzero(chosen.table.trained))
        each = exclude if isinstance(exclude, Mapping) else None
        searcher, barred = self._searchers.get(tails, untrained, search), np.zeros(0, np.int64)
        if exclude is not None and each is None:
            barred = rows_of(exclude, tails)
            if isinstance(searcher, ExactSearch):
                searcher, barred = searcher.without(barred), np.zeros(0, np.int64)
        left_out = self._known.left_out(number, chosen, tails, exclude_known, each, barred)

        def best(part: slice) -> tuple[np.ndarray, np.ndarray]:
            queries = self._scores.queries(number, chosen.vectors(part))
            return best_rows(searcher, queries, k, left_out(part))

        if interests is not None:
            mixture = self._mixture(number, interests)

            def best(part: slice) -> tuple[np.ndarray, np.ndarray]:
                rows = chosen.rows[part]
                engaged = [mixture.engaged(rows)]
                if chosen.new is not None:
                    engaged.append(chosen.new.heads_of([number], part, len(rows)))
                vectors = chosen.vectors(part)
                own = chosen.themselves(part)
                return mixture.search(searcher, vectors, own, RowPairs.joined(engaged), k, left_out(part))

        # What neighbors engaged with is in memory too, for all heads of a batch.
        heads = HEADS_AT_ONCE if interests is None else HEADS_AT_ONCE // 8
        probable = partial(self.probabilities, self.relations[number])
        return answer(chosen, tails, k, best, ("lhs", "rhs", "score"), heads, probable)

    def prepare_interests(self, relation: str | None, interests: Interests) -> None:
        """Make the clusters that `recommend` with `interests` searches by; the first such call does it otherwise."""
        self._mixture(self._relation(relation)[0], interests)

    def map_known_edges(self) -> None:
        """Map the snapshot's edges from files that processes share; they are made where they are missing.

        From then on `recommend` does not read `raw_edges`. A service does this when it opens a release.
        """
        self._known.map()

    def _mixture(self, number: int, interests: Interests) -> Mixture:
        """Return the clusters of a relation's tails; they are made at the first call, and kept."""
        key = (number, interests)
        if key not in self._mixtures:
            from twhin_pipeline.vectors.mixture import Mixture

            relation = self.config.relations[number]
            heads, tails = self._table(relation.lhs), self._table(relation.rhs)
            engaged = self._known.of_every([relation.name], heads, tails)
            if engaged is None:
                raise UserError(
                    f"interests need what heads engaged with, and there is no table raw_edges of {self.snapshot}; "
                    f"make it with `twhin ingest --snapshot {self.snapshot}`"
                )
            self._mixtures[key] = Mixture(interests, self._scores, number, heads, tails, engaged)
        return self._mixtures[key]

    def _relation(self, name: str | None) -> tuple[int, str, str]:
        """Return a relation's number and the entity types of its sides."""
        self._check_lengths()
        if name is None:
            if len(self.relations) > 1:
                raise UserError(f"the model has several relations; say which one: {', '.join(self.relations)}")
            name = self.relations[0]
        if name not in self.relations:
            raise UnknownName(unknown("relation", name, self.relations))
        number = self.relations.index(name)
        relation = self.config.relations[number]
        return number, relation.lhs, relation.rhs

    def _vectors(self, entity: str, given: Any) -> tuple[np.ndarray, bool]:
        """Return float32 `[n, D]` of ids or vectors, and whether it was one that was given."""
        if hasattr(given, "detach"):  # a tensor of torch
            given = given.detach().cpu().numpy()
        if not is_one(given):
            array = np.asarray(given)
            if np.issubdtype(array.dtype, np.floating) and array.shape != (0,):  # NumPy takes no ids for floats
                if array.ndim not in (1, 2) or array.shape[-1] != self.dim:
                    raise UserError(
                        f"vectors of {entity} must be [{self.dim}] or [n, {self.dim}], got {list(array.shape)}"
                    )
                return np.atleast_2d(array).astype(np.float32), array.ndim == 1
        chosen = self._choose(entity, given)
        self._warn_untrained(chosen, 4)
        return chosen.vectors(slice(None)), chosen.one
