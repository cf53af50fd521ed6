"""Baselines: what simple methods make of the same training edges.

- **Most popular**: a candidate's score is its number of training edges in that relation and on that side.
- **Item-kNN** (Sarwar et al., 2001; Deshpande and Karypis, 2004): a head and a tail score the sum of the cosines
  between that tail and the tails that the head has.
- **ALS** (Hu, Koren and Volinsky, 2008), by the library `implicit`: the dot product of two factors.

The last two take the edges of all relations between the same two entity types as one matrix of heads and tails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import scipy.sparse as sp
import torch

from twhin_pipeline.evaluation.ranking import EDGES_A_THREAD, CandidateSet, Counts, Scores
from twhin_pipeline.kernels.vector_kernels import count_listed, in_parts
from twhin_pipeline.model.relation_scores import queries_at_once, to_tensor
from twhin_pipeline.training_set.known_edges import KnownEdges, read_by_relation
from twhin_pipeline.words import Side, other

MOST_EDGES, MOST_ENTITIES = 5_000_000, 2_000_000
"""Training edges and entities of a pair of types up to which item-kNN and ALS are fitted: about a minute on 2 cores."""
MOST_PAIRS = 300_000_000
"""Pairs of tails of one head, over all heads, that item-kNN compares at most."""
NEIGHBORS = 400
"""Of each tail, item-kNN keeps the most similar ones."""
EDGES_FOR_THREADS = 200_000
"""Fewer pairs with an edge are fitted by one thread: more would wait for each other longer than they work."""
TRIAL_ITERATIONS, ITERATIONS = 4, 8
"""Of ALS, for each setting that is tried and for the chosen one. More change its figures by less than their noise."""


@dataclass(frozen=True)
class AlsSetting:
    """An edge of mean weight counts `alpha` times as much as a pair without an edge; `regularization` is of factors."""

    alpha: float
    regularization: float


ALS_SETTINGS = (AlsSetting(20.0, 100.0), AlsSetting(40.0, 10.0))
"""Tried on validation edges; the first one where there are none. One suits dense graphs, the other sparse ones."""


@dataclass(frozen=True)
class Degrees:
    """Entities that have an edge of a relation on one side, and how many: int64 `[K]` each."""

    entity: np.ndarray
    count: np.ndarray

    def of_all(self, num_entities: int) -> np.ndarray:
        """Return every entity's number, int64 `[num_entities]`."""
        degrees = np.zeros(num_entities, np.int64)
        degrees[self.entity] = self.count
        return degrees


def read_degrees(
    con: duckdb.DuckDBPyConnection, files: list[str], side: str, relations: Iterable[int]
) -> dict[int, Degrees]:
    """Count entities' edges on `side` by relation, from Parquet (`lhs`, `rhs`, `rel`)."""
    relations = list(relations)
    query = (
        f"SELECT rel, {side} AS entity, count(*) AS count FROM read_parquet(?) "
        f"WHERE rel IN ({', '.join(map(str, relations))}) GROUP BY ALL ORDER BY rel"
    )
    return {n: Degrees(*columns) for n, columns in read_by_relation(con, query, files, relations).items()}


def popular_ranks(
    degrees: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    filters: Sequence[KnownEdges],
) -> list[Counts]:
    """Rank the same edges as `ranking.rank_edges` by the candidates' `degrees` `[num_entities]`; returns the same.

    The score does not depend on the query, so one sort answers for all edges.
    """
    values = degrees if candidates.rows is None else degrees[candidates.rows]
    ordered = np.sort(values)
    own = degrees[targets]
    below = np.searchsorted(ordered, own, "left")
    above = len(ordered) - np.searchsorted(ordered, own, "right")
    raw = Counts(above.astype(float), (candidates.others(targets) - above - below).astype(float))
    return [raw, *(raw.less(_known(values, own, queries, targets, candidates, edges)) for edges in filters)]


def _known(
    values: np.ndarray,
    own: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    edges: KnownEdges,
) -> Counts:
    """Count a filter's candidates above and tied, by degrees: `values` `[N]` of candidates, `own` `[E]` of targets."""
    each = np.arange(len(queries))
    # The same values for every edge, without a copy.
    scores = np.broadcast_to(values, (len(queries), len(values)))
    columns, column = candidates.columns[edges.neighbors], candidates.columns[targets]
    start, end = edges.spans(queries)
    above_and_tied = np.zeros((2, len(queries)), np.int64)

    def count(e: slice) -> None:
        count_listed(scores, columns, start, end, each[e], own[e], column[e], *above_and_tied[:, e])

    in_parts(count, len(queries), EDGES_A_THREAD)
    return Counts(*above_and_tied.astype(float))


def read_interactions(
    con: duckdb.DuckDBPyConnection, files: list[str], relations: Iterable[int], shape: tuple[int, int]
) -> sp.csr_matrix:
    """Add up the edges of relations between the same two entity types, from Parquet (`lhs`, `rhs`, `rel`, `weight`).

    Returns:
        Their weights, float64 `[heads, tails]`; a pair without an edge has no entry.
    """
    query = f"SELECT lhs, rhs, weight FROM read_parquet(?) WHERE rel IN ({', '.join(map(str, relations))}) ORDER BY ALL"
    edges = con.execute(query, [files]).fetchnumpy()
    lhs, rhs = (np.asarray(edges[side], np.int64) for side in ("lhs", "rhs"))
    matrix = sp.csr_matrix((np.asarray(edges["weight"], np.float64), (lhs, rhs)), shape)
    matrix.sum_duplicates()
    return matrix


def item_similarity(interactions: sp.csr_matrix, neighbors: int) -> sp.csr_matrix:
    """Return the cosines between columns of the binary `interactions` `[heads, tails]`, but of a column with itself.

    Returns:
        float64 `[tails, tails]`; each row has the `neighbors` largest that are above 0.
    """
    from implicit.nearest_neighbours import ItemItemRecommender

    count = np.bincount(interactions.indices, minlength=interactions.shape[1])
    unit = sp.csr_matrix(
        (1 / np.sqrt(count[interactions.indices]), interactions.indices, interactions.indptr), interactions.shape
    )
    # A column is among its own neighbors.
    model = ItemItemRecommender(neighbors + 1, num_threads=_threads(interactions))
    model.fit(unit, show_progress=False)
    similarity = model.similarity.tocoo()
    others = similarity.row != similarity.col
    cells = (similarity.row[others], similarity.col[others])
    return sp.csr_matrix((similarity.data[others], cells), similarity.shape)


class NeighborScores:
    """Item-kNN's scores: `interactions @ similarity`, of which a block of rows, or of columns, is made at a time."""

    def __init__(self, interactions: sp.csr_matrix, similarity: sp.csr_matrix) -> None:
        """Take the weights `[heads, tails]`, of which it counts only where they are, and `item_similarity`'s result."""
        ones = np.ones(interactions.nnz)
        known = sp.csr_matrix((ones, interactions.indices, interactions.indptr), interactions.shape)
        self._factors = {"rhs": (known, similarity), "lhs": (similarity.T.tocsr(), known.T.tocsr())}

    def encode_queries(self, side: Side, rows: np.ndarray) -> torch.Tensor:
        """Return the scores of queries with all entities of `side`, float32 `[Q, entities]`."""
        left, right = self._factors[side]
        # Summed in float64: equal sums of other terms are then equal in float32 too.
        return torch.from_numpy((left[rows] @ right).astype(np.float32).toarray())

    def encode_candidates(self, side: Side, rows: np.ndarray | None) -> torch.Tensor:
        """Return the candidates' columns, int64 `[N]`."""
        return torch.arange(self._factors[side][1].shape[1]) if rows is None else torch.from_numpy(rows)

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Pick the candidates' scores."""
        if torch.equal(candidates, torch.arange(queries.shape[1])):
            return queries
        return queries[:, candidates]

    def block(self, num_candidates: int, block_size: int) -> int:
        """Return how many queries to score at a time; their scores with all entities are made."""
        most = max(num_candidates, *(right.shape[1] for _, right in self._factors.values()))
        return queries_at_once(torch.device("cpu"), most, block_size)


class FactorScores:
    """The dot products of two tables of factors, float32 `[heads, F]` and `[tails, F]`."""

    def __init__(self, heads: np.ndarray, tails: np.ndarray, device: torch.device | str = "cpu") -> None:
        self.tables: dict[Side, torch.Tensor] = {"lhs": to_tensor(heads, device), "rhs": to_tensor(tails, device)}

    def encode_queries(self, side: Side, rows: np.ndarray) -> torch.Tensor:
        """Return the queries' factors, `[Q, F]`."""
        return self._rows(other(side), rows)

    def encode_candidates(self, side: Side, rows: np.ndarray | None) -> torch.Tensor:
        """Return the candidates' factors, `[N, F]`."""
        return self.tables[side] if rows is None else self._rows(side, rows)

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return queries @ candidates.T

    def block(self, num_candidates: int, block_size: int) -> int:
        """Return how many queries to score at a time."""
        return queries_at_once(self.tables["lhs"].device, num_candidates, block_size)

    def _rows(self, side: Side, rows: np.ndarray) -> torch.Tensor:
        table = self.tables[side]
        return table[torch.from_numpy(rows).to(table.device)]


def fit_als(
    interactions: sp.csr_matrix,
    factors: int,
    seed: int,
    quality: Callable[[Scores], float] | None,
    device: torch.device | str = "cpu",
) -> tuple[FactorScores, AlsSetting]:
    """Fit ALS to weights `[heads, tails]`, by that of `ALS_SETTINGS` whose scores have the greatest `quality`.

    Weights are divided by their mean, so that settings mean the same whatever unit they are in. The same seed gives the
    same factors, at any number of threads.

    Args:
        interactions: The weights, float64.
        factors: Numbers of a factor.
        seed: Of the initial factors.
        quality: Judges scores on validation edges; None: the first setting is taken.
        device: Where the scores are made.
    """
    from implicit.als import AlternatingLeastSquares
    from threadpoolctl import threadpool_limits

    weights = sp.csr_matrix(interactions / interactions.data.mean(), dtype=np.float32)
    settings = ALS_SETTINGS if quality is not None else ALS_SETTINGS[:1]
    best: tuple[float, Any, AlsSetting] | None = None
    # Its own threads each solve other rows; BLAS's would only be in their way.
    for setting in settings:
        with threadpool_limits(1, "blas"):
            model = AlternatingLeastSquares(
                factors,
                setting.regularization,
                setting.alpha,
                iterations=TRIAL_ITERATIONS,
                use_gpu=False,
                num_threads=_threads(interactions),
                random_state=seed,
            )
            model.fit(weights, show_progress=False)
        reached = quality(FactorScores(model.user_factors, model.item_factors, device)) if quality else 0.0
        if best is None or reached > best[0]:
            best = reached, model, setting
    assert best is not None
    _, model, setting = best
    with threadpool_limits(1, "blas"):
        # It goes on from the factors that it has.
        model.iterations = ITERATIONS - TRIAL_ITERATIONS
        model.fit(weights, show_progress=False)
    return FactorScores(model.user_factors, model.item_factors, device), setting


def _threads(interactions: sp.csr_matrix) -> int:
    return torch.get_num_threads() if interactions.nnz >= EDGES_FOR_THREADS else 1
