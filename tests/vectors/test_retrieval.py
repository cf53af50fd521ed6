"""The best rows for many queries: what a plain loop over all scores finds, ties and rows that are left out included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twhin_pipeline.model.comparators import COMPARATORS, Comparator
from twhin_pipeline.vectors import retrieval
from twhin_pipeline.vectors.retrieval import ExactSearch, IndexSearch, best_rows
from twhin_pipeline.vectors.row_pairs import RowLists, RowPairs

D = 4


class Plain:
    """A searcher that can leave nothing out, as an index: all scores, sorted."""

    def __init__(self, comparator: Comparator, vectors: np.ndarray) -> None:
        self.comparator, self.vectors = comparator, torch.from_numpy(vectors)
        self.asked: list[tuple[int, int]] = []

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((len(queries), k))
        scores = self.comparator.compare(torch.from_numpy(queries), self.comparator.prepare(self.vectors)).numpy()
        rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        values = np.take_along_axis(scores, rows, 1)
        missing = k - rows.shape[1]
        pad = ((0, 0), (0, max(missing, 0)))
        return np.pad(rows, pad, constant_values=-1), np.pad(values, pad, constant_values=-np.inf)


def plain_loop(scores: np.ndarray, k: int, allowed: np.ndarray, left_out: set[tuple[int, int]]) -> list[list[int]]:
    """The k best rows of each query, one comparison of two numbers at a time; equal ones in the order of rows."""
    found = []
    for query, values in enumerate(scores.tolist()):
        there = [row for row in range(len(values)) if allowed[row] and (query, row) not in left_out]
        found.append(sorted(there, key=lambda row: (-values[row], row))[:k])
    return found


@st.composite
def problems(draw):
    """Vectors of few different whole numbers, so that many scores are equal, and equal exactly."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    size, count = draw(st.integers(0, 300)), draw(st.integers(0, 12))
    spread = draw(st.sampled_from([1, 3, 1000]))
    vectors = rng.integers(-spread, spread + 1, (size, D)).astype(np.float32)
    queries = rng.integers(-2, 3, (count, D)).astype(np.float32)
    allowed = rng.random(size) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    pairs = np.argwhere(rng.random((count, size)) < draw(st.sampled_from([0.0, 0.3, 0.97])))
    return vectors, queries, draw(st.integers(1, 40)), allowed, RowPairs(pairs[:, 0], pairs[:, 1])


@pytest.mark.parametrize("comparator", ["dot", "squared_l2", "l2"])
@settings(max_examples=60, deadline=None)
@given(problem=problems(), tile=st.sampled_from([32, 64, 4096]), threads=st.sampled_from([1, 3]))
def test_exact_search_finds_what_a_plain_loop_finds(comparator, problem, tile, threads):
    vectors, queries, k, allowed, left_out = problem
    made = COMPARATORS[comparator](2.0)
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("TILE_ROWS", tile), ("KEPT_ROWS", 2 * tile), ("QUERIES", 5), ("GROUP", 4)):
            patch.setattr(retrieval, name, value)
        torch.set_num_threads(threads)
        try:
            rows, scores = ExactSearch(made, vectors, allowed).search(queries, k, left_out)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
    every = made.compare(torch.from_numpy(queries), made.prepare(torch.from_numpy(vectors))).numpy()
    pairs = set(zip(left_out.queries.tolist(), left_out.rows.tolist(), strict=True))
    assert rows.shape == scores.shape == (len(queries), k)
    for query, expected in enumerate(plain_loop(every, k, allowed, pairs)):
        assert rows[query].tolist() == expected + [-1] * (k - len(expected))
        assert scores[query, : len(expected)].tolist() == every[query, expected].tolist()
        assert (scores[query, len(expected) :] == -np.inf).all()


def test_of_a_large_table_the_best_are_those_of_a_full_sort_also_where_all_are_equal():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(70_001, D)).astype(np.float32)
    vectors[5_000:40_000] = 7.0  # more equal rows, and better ones, than are asked for
    queries = np.concatenate([rng.normal(size=(140, D)), np.ones((1, D)), np.zeros((1, D))]).astype(np.float32)
    rows, scores = ExactSearch(COMPARATORS["cosine"](0.5), vectors).search(queries, 20)
    expected = Plain(COMPARATORS["cosine"](0.5), vectors).search(queries, 20)
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5, atol=1e-6)
    every = torch.nn.functional.normalize(torch.from_numpy(vectors)).numpy() @ queries.T / 0.5
    np.testing.assert_allclose(np.take_along_axis(every.T, rows, 1), scores, rtol=1e-5, atol=1e-6)
    assert rows[-2].tolist() == list(range(5_000, 5_020))
    assert rows[-1].tolist() == list(range(20))


def test_a_searcher_that_cannot_leave_rows_out_is_asked_for_as_many_more():
    rng = np.random.default_rng(1)
    vectors, queries = (rng.normal(size=(n, D)).astype(np.float32) for n in (60, 9))
    pairs = np.argwhere(rng.random((9, 60)) < np.linspace(0, 1, 9)[:, None])
    left_out = RowPairs(pairs[:, 0], pairs[:, 1])
    searcher = Plain(COMPARATORS["dot"](), vectors)
    rows, scores = best_rows(
        IndexSearch(searcher, ExactSearch(searcher.comparator, vectors), 100), queries, 7, left_out
    )
    expected = best_rows(ExactSearch(COMPARATORS["dot"](), vectors), queries, 7, left_out)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_allclose(scores, expected[1], rtol=1e-5)
    assert searcher.asked[0] == (1, 7) and sum(count for count, _ in searcher.asked) == 9
    assert (rows[-1] == -1).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40), st.lists(st.integers(-1, 5), max_size=8))
def test_lists_of_rows_return_an_entitys_pairs_whatever_order_they_came_in(pairs, asked):
    entities, rows = np.array(pairs, np.int32).reshape(-1, 2).T
    found = RowLists.of_pairs(entities, rows, 6).pairs(np.array(asked, np.int64))
    expected = [(query, row) for query, entity in enumerate(asked) for of, row in pairs if of == entity]
    assert list(zip(found.queries.tolist(), found.rows.tolist(), strict=True)) == expected
