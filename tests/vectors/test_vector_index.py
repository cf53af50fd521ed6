"""An index finds what the scorer would, for every comparator, and its scores are the scorer's."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch

from twhin_pipeline.model.comparators import COMPARATORS, Comparator
from twhin_pipeline.vectors import vector_index
from twhin_pipeline.vectors.index_choice import Kind
from twhin_pipeline.vectors.vector_index import Effort, VectorIndex

ROWS, DIM, QUERIES, K = 10_000, 8, 40, 10
NAMES = ("dot", "cosine", "l2", "squared_l2")
KINDS: tuple[Kind, ...] = ("flat", "hnsw", "ivf_pq")


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Clusters, of vectors that are not equally long."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(60, DIM))
    drawn = centers[rng.integers(60, size=ROWS)] + 0.5 * rng.normal(size=(ROWS, DIM))
    return (drawn * rng.uniform(0.5, 2, size=(ROWS, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def queries(vectors: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (vectors[rng.integers(ROWS, size=QUERIES)] + 0.3 * rng.normal(size=(QUERIES, DIM))).astype(np.float32)


def prepared(comparator: Comparator, vectors: np.ndarray) -> np.ndarray:
    return comparator.prepare(torch.from_numpy(vectors)).numpy()


def build(kind: Kind, comparator: Comparator, vectors: np.ndarray, threads: int = 1) -> faiss.Index:
    ready = prepared(comparator, vectors)
    blocks = (ready[start : start + 1_000] for start in range(0, len(ready), 1_000))
    return vector_index.build(kind, blocks, ready, len(ready), comparator=comparator, threads=threads)


def plainly(comparator: Comparator, queries: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score every row one by one: rows and scores, best first."""
    scores = np.array(
        [comparator.pairs(torch.from_numpy(query), torch.from_numpy(vectors)).numpy() for query in queries]
    )
    order = np.argsort(-scores, axis=1, kind="stable")
    return order, np.take_along_axis(scores, order, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_tuned_index_finds_the_best_rows_with_the_scorers_scores(
    vectors: np.ndarray, queries: np.ndarray, kind: Kind, name: str
) -> None:
    comparator = COMPARATORS[name](0.5)
    index = VectorIndex(build(kind, comparator, vectors), kind, comparator, vectors, {})
    ready = prepared(comparator, queries)
    order, best = plainly(comparator, ready, prepared(comparator, vectors))
    index.efforts = vector_index.tuned(index, ready, best[:, :K], np.arange(QUERIES) % 2, [1, K], 0.97)
    rows, scores = index.search(ready, K)
    shares = [len(set(found) & set(true)) / K for found, true in zip(rows.tolist(), order[:, :K].tolist(), strict=True)]
    assert np.mean(shares[::2]) >= 0.97 and np.mean(shares[1::2]) >= 0.97
    assert vector_index.recall(scores, best[:, :K], K) == pytest.approx(np.mean(shares))
    for query, found, given in zip(ready, rows, scores, strict=True):
        own = comparator.pairs(torch.from_numpy(query), torch.from_numpy(prepared(comparator, vectors[found])))
        np.testing.assert_allclose(given, own.numpy(), rtol=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()


def test_rows_are_those_of_the_table_where_the_index_has_some_of_them(vectors: np.ndarray, queries: np.ndarray) -> None:
    comparator = COMPARATORS["dot"](1.0)
    chosen = np.flatnonzero(np.arange(ROWS) % 3 == 1)
    index = VectorIndex(build("flat", comparator, vectors[chosen]), "flat", comparator, vectors, {K: Effort()}, chosen)
    rows, scores = index.search(queries, K)
    order, best = plainly(comparator, queries, vectors[chosen])
    np.testing.assert_array_equal(rows, chosen[order[:, :K]])
    np.testing.assert_allclose(scores, best[:, :K], rtol=1e-5)


def test_where_there_are_fewer_rows_than_wanted_the_rest_is_none(vectors: np.ndarray, queries: np.ndarray) -> None:
    comparator = COMPARATORS["dot"](1.0)
    for count in (0, 4):
        made = build("flat", comparator, vectors[:count])
        index = VectorIndex(made, "flat", comparator, vectors[:count], {K: Effort()})
        rows, scores = index.search(queries, K)
        assert rows.shape == scores.shape == (QUERIES, K)
        assert (np.sort(rows[:, :count], axis=1) == np.arange(count)).all() and (rows[:, count:] == -1).all()
        assert np.isfinite(scores[:, :count]).all() and (scores[:, count:] == -np.inf).all()
    assert index.search(queries[:0], K)[0].shape == (0, K)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_was_saved_is_opened_as_it_was(
    vectors: np.ndarray, queries: np.ndarray, kind: Kind, tmp_path: Path
) -> None:
    comparator = COMPARATORS["cosine"](1.0)
    efforts = {5: Effort(16, 4), K: Effort(64, 4)}
    index = VectorIndex(build(kind, comparator, vectors), kind, comparator, vectors, efforts)
    index.save(str(tmp_path / "a.faiss"))
    again = VectorIndex.open(tmp_path / "a.faiss", kind, comparator, vectors, efforts)
    for k in (5, K, 3 * K):
        for one, other in zip(index.search(queries, k), again.search(queries, k), strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(again) == ROWS


def test_with_one_thread_the_same_vectors_give_the_same_index(vectors: np.ndarray) -> None:
    comparator = COMPARATORS["l2"](1.0)
    for kind in KINDS:
        one, other = (faiss.serialize_index(build(kind, comparator, vectors)) for _ in range(2))
        np.testing.assert_array_equal(one, other)


def test_effort_is_that_of_the_next_larger_k_and_grows_beyond_the_largest() -> None:
    comparator = COMPARATORS["dot"](1.0)
    efforts = {10: Effort(16, 4), 100: Effort(64, 4)}
    index = VectorIndex(None, "hnsw", comparator, np.zeros((0, 4)), efforts)  # type: ignore[arg-type]
    found = [index.effort(k) for k in (1, 10, 11, 100, 250)]
    assert found == [Effort(16, 4), Effort(16, 4), Effort(64, 4), Effort(64, 4), Effort(160, 4)]


def test_recall_counts_rows_by_their_scores_so_that_any_of_equal_ones_will_do() -> None:
    best = np.array([[5.0, 3.0, 3.0], [2.0, 1.0, 0.5]], np.float32)
    found = np.array([[5.0, 3.0, -np.inf], [2.0, 0.4, 0.3]], np.float32)
    assert vector_index.recall(found, best, 3) == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert vector_index.recall(found, best, 2) == pytest.approx((1 + 1 / 2) / 2)
    assert vector_index.recall(found, best, 9) == pytest.approx((2 / 3 + 1 / 3) / 2)  # there are no more


def test_the_least_effort_is_taken_that_reaches_the_recall_in_every_group(
    vectors: np.ndarray, queries: np.ndarray
) -> None:
    comparator = COMPARATORS["l2"](1.0)
    index = VectorIndex(build("hnsw", comparator, vectors), "hnsw", comparator, vectors, {})
    best = plainly(comparator, queries, vectors)[1][:, :K]
    groups = np.repeat([0, 1], QUERIES // 2)
    for wanted in (0.5, 0.9, 0.999):
        effort = vector_index.tuned(index, queries, best, groups, [K], wanted)[K]
        tried = [one for one in vector_index.BREADTHS if K <= one <= effort.breadth]
        reached = [
            [vector_index.recall(index.search(queries[own], K, Effort(breadth))[1], best[own], K) for own in
             (groups == 0, groups == 1)]
            for breadth in tried
        ]  # fmt: skip
        assert min(reached[-1]) >= wanted and all(min(one) < wanted for one in reached[:-1])
