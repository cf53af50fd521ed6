"""Many interests: a head is searched for by several vectors, one for each kind of tail that it engaged with.

The tails are put into clusters by k-means. A head is the distribution over clusters of the tails it engaged with, and
in each cluster the mean of their vectors. Its strongest clusters get places in the answer in proportion to their
weights, and each fills its places with the tails nearest to its mean. So a minor interest is not outvoted by a major
one. This is the mixture of TwHIN (El-Kishky et al., 2022, "TwHIN: Embedding the Twitter Heterogeneous Information
Network for Personalized Recommendation"). Means over a head's own tails, and the smoothing over the heads whose vectors
are nearest, are those of kNN-Embed (El-Kishky et al., 2022, "kNN-Embed: Locally Smoothed Embedding Mixtures For
Multi-interest Candidate Retrieval"). Mixing the head's own vector into each mean is ours: it found more on each graph
that was tried (`benchmarks/interests.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from twhin_pipeline import extras
from twhin_pipeline.model.comparators import Cosine, Dot
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.retrieval import ExactSearch, IndexSearch, best_rows
from twhin_pipeline.vectors.row_pairs import RowLists, RowPairs
from twhin_pipeline.vectors.scoring import EdgeScores

BLOCK = 65_536


class Mixture:
    """The clusters of one entity type's tails, and what heads of one type engaged with.

    It keeps 4 bytes a tail, and of a search of Q heads about 4 D times their edges and those of their neighbors.
    """

    def __init__(
        self,
        interests: Interests,
        scores: EdgeScores,
        relation: int,
        heads: EntityTable,
        tails: EntityTable,
        engaged: Callable[[np.ndarray], RowPairs],
    ) -> None:
        """Cluster the tails that have training edges.

        Args:
            interests: How.
            scores: The model's.
            relation: The relation's number.
            heads: The type of its heads.
            tails: The type of its tails.
            engaged: From heads' rows int64 `[Q]`, -1 for none, to the tails that they engaged with.
        """
        self.interests, self.scores, self.relation = interests, scores, relation
        self.heads, self.tails, self.engaged = heads, tails, engaged
        self.cluster = self._clusters()
        trained = None if heads.trained is None else np.asarray(heads.trained)
        self._alike = ExactSearch(Cosine(), heads.vectors, trained)

    def _clusters(self) -> np.ndarray:
        """Return each tail's cluster, int32 `[N]`: by angle where the comparator is a product, else by distance."""
        extras.need("faiss", "many interests", "index")
        import faiss

        vectors, trained = self.tails.vectors, self.tails.trained
        rows = np.arange(len(vectors)) if trained is None else np.flatnonzero(trained)
        if not len(rows):
            return np.zeros(len(vectors), np.int32)
        count = min(self.interests.clusters or round(len(rows) ** 0.5), len(rows))
        by_angle = isinstance(self.scores.scorer.comparator, Dot)
        # FAISS takes no more than 256 a cluster; which, does not depend on the order of rows.
        drawn = np.sort(np.random.default_rng(0).permutation(rows)[: 256 * count])
        means = faiss.Kmeans(vectors.shape[1], count, niter=20, seed=0, spherical=by_angle, min_points_per_centroid=1)
        means.train(_scaled(np.array(vectors[drawn]), by_angle))
        cluster = np.empty(len(vectors), np.int32)
        for start in range(0, len(vectors), BLOCK):
            part = _scaled(np.array(vectors[start : start + BLOCK]), by_angle)
            cluster[start : start + BLOCK] = means.index.search(part, 1)[1][:, 0]
        return cluster

    def search(
        self,
        searcher: ExactSearch | IndexSearch,
        vectors: np.ndarray,
        themselves: RowPairs,
        engaged: RowPairs,
        k: int,
        left_out: RowPairs,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return k tails for each of Q heads, as `best_rows` does; best by the model's score first.

        Args:
            searcher: Finds tails.
            vectors: The heads, `[Q, D]`.
            themselves: Their own rows, where they have one.
            engaged: The tails that they engaged with.
            k: How many, above 0.
            left_out: Tails that are not returned for a head.
        """
        head, weight, means = self._components(vectors, themselves, engaged)
        lone = np.setdiff1d(np.arange(len(vectors)), head)  # engaged with nothing: searched by its own vector
        means = self.scores.scorer.comparator.prepare(torch.from_numpy(means)).numpy()
        plain = self.scores.queries(self.relation, vectors)
        queries = np.concatenate([self._mixed(means, plain[head]), plain[lone]])
        head, weight = np.concatenate([head, lone]), np.concatenate([weight, np.ones(len(lone))])
        spans = RowLists.of_pairs(left_out.queries, left_out.rows, len(vectors))
        found, _ = best_rows(searcher, queries, k, spans.pairs(head))
        rows = _shared_out(head, weight, found, k, len(vectors))
        return self._ranked(vectors, rows)

    def _mixed(self, means: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Return what clusters are searched by: means, mixed with the heads' own queries, `[M, D]` each.

        Where the comparator is a product, both count by their direction.
        """
        share = np.float32(self.interests.own)
        if isinstance(self.scores.scorer.comparator, Dot):
            means, own = _scaled(means, True), _scaled(own, True)
        return means * (1 - share) + own * share

    def _components(
        self, vectors: np.ndarray, themselves: RowPairs, engaged: RowPairs
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the strongest clusters of each head, M in all: its place, the weight and the mean vector."""
        given = self.interests
        queries, rows, weights = engaged.queries, engaged.rows, _shares(engaged.queries, len(vectors))
        if given.smoothing:
            near, _ = self._alike.search(_scaled(vectors, True), given.neighbors, themselves)
            places, column = np.nonzero(near >= 0)
            others = self.engaged(near[places, column])
            theirs = (
                _shares(others.queries, len(places))
                / np.bincount(places, minlength=len(vectors))[places[others.queries]]
            )
            queries = np.concatenate([queries, places[others.queries]])
            rows = np.concatenate([rows, others.rows])
            weights = np.concatenate([weights * (1 - given.smoothing), theirs * given.smoothing])
        count = int(self.cluster.max(initial=0)) + 1
        keys, place = np.unique(queries * count + self.cluster[rows], return_inverse=True)
        weight = np.bincount(place, weights, len(keys))
        head = keys // count
        order = np.lexsort((keys, -weight, head))
        rank = np.arange(len(order)) - np.searchsorted(head[order], head[order])
        kept = order[rank < given.top]
        means = torch.zeros(len(keys), vectors.shape[1])
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            of_part = torch.from_numpy(self.tails.vectors[rows[part]] * weights[part, None].astype(np.float32))
            means.index_add_(0, torch.from_numpy(place[part]), of_part)
        return head[kept], weight[kept], means.numpy()[kept] / weight[kept, None].astype(np.float32)

    def _ranked(self, vectors: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Score rows `[Q, k]` for their heads by the model, and put the best first."""
        heads = self.scores.queries(self.relation, vectors)
        scores = np.full(rows.shape, -np.inf, np.float32)
        query, column = np.nonzero(rows >= 0)
        comparator = self.scores.scorer.comparator
        for start in range(0, len(query), BLOCK):
            q, c = query[start : start + BLOCK], column[start : start + BLOCK]
            tails = comparator.prepare(torch.from_numpy(np.array(self.tails.vectors[rows[q, c]])))
            scores[q, c] = comparator.pairs(torch.from_numpy(heads[q]), tails).numpy()
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)


def _shares(queries: np.ndarray, count: int) -> np.ndarray:
    """Return weights of pairs, alike within a query and 1 together: float64 `[M]`."""
    return 1 / np.bincount(queries, minlength=count)[queries]


def _scaled(vectors: np.ndarray, by_angle: bool) -> np.ndarray:
    """Return vectors of length 1, or as they are."""
    if not by_angle:
        return vectors
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-8))


def _places(head: np.ndarray, weight: np.ndarray, k: int, count: int) -> np.ndarray:
    """Divide k places among each head's components in proportion to their weights, by largest remainders.

    Args:
        head: Each component's head, int64 `[M]`.
        weight: Its weight, `[M]`.
        k: The places of a head.
        count: How many heads there are.
    """
    exact = k * weight / np.bincount(head, weight, count)[head]
    places = np.floor(exact).astype(np.int64)
    short = k - np.bincount(head, places, count).astype(np.int64)
    order = np.lexsort((-weight, -(exact - places), head))
    rank = np.arange(len(order)) - np.searchsorted(head[order], head[order])
    places[order] += rank < short[head[order]]
    return places


def _shared_out(head: np.ndarray, weight: np.ndarray, found: np.ndarray, k: int, count: int) -> np.ndarray:
    """Return k rows for each head: of each component, the strongest first, its best rows that no earlier one took.

    What a component cannot fill, as there are too few rows, the others do.

    Args:
        head: Each component's head, int64 `[M]`.
        weight: Its weight, `[M]`.
        found: Its rows, best first, int64 `[M, k]`, -1 where there are fewer.
        k: The rows of a head.
        count: How many heads there are.

    Returns:
        int64 `[count, k]`, -1 where there are fewer.
    """
    places = _places(head, weight, k, count)
    order = np.lexsort((-weight, head))
    turn = np.empty(len(order), np.int64)
    turn[order] = np.arange(len(order)) - np.searchsorted(head[order], head[order])
    result, filled = np.full((count, k), -1, np.int64), np.zeros(count, np.int64)
    taken = np.zeros(0, np.int64)
    size = int(found.max(initial=0)) + 1
    for again in (False, True):
        for step in range(int(turn.max(initial=-1)) + 1):
            chosen = np.flatnonzero(turn == step)
            heads, rows = head[chosen], found[chosen]
            new = (rows >= 0) & ~np.isin(heads[:, None] * size + rows, taken)
            room = k - filled[heads]
            limit = room if again else np.minimum(places[chosen], room)
            nth = np.cumsum(new, 1)
            new &= nth <= limit[:, None]
            component, column = np.nonzero(new)
            of_head = heads[component]
            result[of_head, filled[of_head] + nth[component, column] - 1] = rows[component, column]
            filled[heads] += new.sum(1)
            taken = np.concatenate([taken, of_head * size + rows[component, column]])
    return result
