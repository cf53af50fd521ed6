"""Popularity, item-kNN and ALS, and the metrics that need no model."""

from __future__ import annotations

import warnings

import duckdb
import numpy as np
import pytest
import scipy.sparse as sp
import small_store
import torch
from plain_evaluation import als_by_the_library, pairs_of, plain_similarity
from sklearn.metrics import ndcg_score

from twhin_pipeline.evaluation import baselines
from twhin_pipeline.evaluation.baselines import (
    ALS_SETTINGS,
    FactorScores,
    NeighborScores,
    fit_als,
    item_similarity,
    popular_ranks,
    read_degrees,
    read_interactions,
)
from twhin_pipeline.evaluation.rank_metrics import rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts, rank_edges
from twhin_pipeline.training_set.known_edges import KnownEdges, read_known


@pytest.fixture
def files(tmp_path):
    return small_store.make(tmp_path, config=small_store.config()).store.files(
        "training_set/positives", small_store.SNAPSHOT
    )


@pytest.mark.parametrize("side", ["lhs", "rhs"])
def test_degrees_count_training_edges_by_relation_and_side(files, side):
    rows = small_store.edges()["train"]
    with duckdb.connect() as con:
        degrees = read_degrees(con, files, side, [1, 2, 7])
    for relation in (1, 2, 7):
        chosen = rows[rows[:, 1] == relation][:, 0 if side == "lhs" else 2]
        expected = [int((chosen == entity).sum()) for entity in range(40)]
        assert degrees[relation].of_all(40).tolist() == expected


def test_known_edges_are_read_only_for_the_entities_asked_for(files):
    rows = small_store.edges()["train"]
    with duckdb.connect() as con:
        known = read_known(con, [*files, *files], "rhs", {2: np.array([3, 3, 5]), 0: np.array([1]), 7: np.array([2])})
    for relation, asked in ((2, (3, 5)), (0, (1,)), (7, ())):
        expected = sorted((int(rhs), int(lhs)) for lhs, rel, rhs in rows if rel == relation and rhs in asked)
        assert bool(expected) == bool(asked)
        assert pairs_of(known[relation]) == expected


@pytest.mark.parametrize("sample", [None, 12])
def test_popular_ranks_equal_a_plain_loop(sample):
    rng = np.random.default_rng(0)
    degrees = rng.integers(0, 5, 40)
    queries, targets = rng.integers(0, 20, 60), rng.integers(0, 40, 60)
    known = KnownEdges.from_pairs(rng.integers(0, 20, 200), rng.integers(0, 40, 200))
    true = set(pairs_of(known))
    chosen = CandidateSet.sample(40, sample, rng)
    rows = range(40) if chosen.rows is None else chosen.rows.tolist()
    raw, filtered = popular_ranks(degrees, queries, targets, chosen, [known])
    for i, (query, target) in enumerate(zip(queries.tolist(), targets.tolist(), strict=True)):
        for counts, left_out in ((raw, set()), (filtered, true)):
            rivals = [degrees[e] for e in rows if e != target and (query, e) not in left_out]
            assert counts.above[i] == sum(d > degrees[target] for d in rivals)
            assert counts.tied[i] == sum(d == degrees[target] for d in rivals)


def test_rank_metrics_of_known_ranks():
    found = rank_metrics("raw", np.array([1.0, 2.0, 1.5, 4.0]), [1, 3])
    assert found == pytest.approx(
        {"raw_mrr": (1 + 1 / 2 + 1 / 1.5 + 1 / 4) / 4, "raw_mean_rank": 2.125, "raw_hits@1": 0.25, "raw_hits@3": 0.75}
    )


@pytest.mark.parametrize("levels", [4, 10_000])
def test_ndcg_equals_scikit_learn_and_recall_a_plain_loop_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (25, 30)).astype(float)
    relevant = rng.random((25, 30)) < 0.15
    relevant[:, 0] = True
    query, item = np.nonzero(relevant)
    own = scores[query, item][:, None]
    counts = Counts((scores[query] > own).sum(1).astype(float), (scores[query] == own).sum(1).astype(float) - 1)
    found = retrieval_metrics(query, counts, [3, 10])
    for k in (3, 10):
        assert found[f"ndcg@{k}"] == pytest.approx(ndcg_score(relevant, scores, k=k))
        # The expected recall over random orders of ties, by drawing many.
        drawn = []
        for _ in range(300 if levels == 4 else 1):
            top = np.argsort(-(scores + 1e-3 * rng.random(scores.shape)), axis=1)[:, :k]
            drawn.append((np.take_along_axis(relevant, top, 1).sum(1) / relevant.sum(1)).mean())
        assert found[f"recall@{k}"] == pytest.approx(np.mean(drawn), abs=0.01 if levels == 4 else 1e-12)


def interactions(heads: int = 40, tails: int = 25, seed: int = 0) -> np.ndarray:
    """Return dense weights, 0 where there is no edge; the first head and the last tail have none."""
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random((heads, tails)) < 0.25, rng.integers(1, 6, (heads, tails)), 0).astype(float)
    weights[0] = weights[:, -1] = 0
    return weights


def test_interactions_are_the_weights_of_several_relations_added_up(tmp_path):
    rows = "(VALUES (0, 0, 1, 2.0), (0, 1, 1, 0.5), (0, 1, 1, 0.25), (2, 1, 0, 4.0), (2, 5, 1, 8.0))"
    with duckdb.connect() as con:
        con.sql(f"COPY (SELECT * FROM {rows} t(lhs, rel, rhs, weight)) TO '{tmp_path}/edges.parquet'")
        found = read_interactions(con, [f"{tmp_path}/edges.parquet"], [0, 1], (3, 2))
    assert found.toarray().tolist() == [[0, 2.75], [0, 0], [4, 0]]
    assert found.nnz == 2


def test_item_similarity_is_the_cosine_of_columns_without_the_diagonal():
    weights = interactions()
    found = item_similarity(sp.csr_matrix(weights), neighbors=1_000)
    np.testing.assert_allclose(found.toarray(), plain_similarity(weights), atol=1e-12)


def test_item_similarity_keeps_the_largest_of_each_row():
    weights = interactions(200, seed=1)
    found, expected = item_similarity(sp.csr_matrix(weights), neighbors=5).toarray(), plain_similarity(weights)
    assert (np.count_nonzero(found, axis=1) <= 5).all() and (np.count_nonzero(found, axis=1)[:-1] == 5).all()
    for row, full in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.sort(row)[-5:], np.sort(full)[-5:], atol=1e-12)


def plain_counts(scores: np.ndarray, side: str, queries, targets, rows, true) -> list[list[tuple[int, int]]]:
    """Count candidates above and tied, raw and filtered, one edge at a time; scores are `[heads, tails]`."""
    of_query = scores if side == "rhs" else scores.T
    found = []
    for left_out in (set(), true):
        counts = []
        for query, target in zip(queries.tolist(), targets.tolist(), strict=True):
            rivals = [of_query[query, e] for e in rows if e != target and (query, e) not in left_out]
            own = of_query[query, target]
            counts.append((sum(s > own for s in rivals), sum(s == own for s in rivals)))
        found.append(counts)
    return found


@pytest.mark.parametrize("side", ["lhs", "rhs"])
@pytest.mark.parametrize("sample", [None, 12])
@pytest.mark.parametrize("which", ["item_knn", "als"])
def test_neighbors_and_factors_rank_as_a_plain_loop_over_dense_scores(side, sample, which):
    weights = interactions()
    rng = np.random.default_rng(3)
    if which == "item_knn":
        scores = NeighborScores(sp.csr_matrix(weights), item_similarity(sp.csr_matrix(weights), 1_000))
        dense = ((weights > 0).astype(float) @ plain_similarity(weights)).astype(np.float32)
    else:
        # Small integers: products are exact, and some are tied.
        factors = [rng.integers(-1, 2, (n, 4)).astype(np.float32) for n in weights.shape]
        scores, dense = FactorScores(*factors), factors[0] @ factors[1].T
    sizes = {"lhs": weights.shape[0], "rhs": weights.shape[1]}
    other = "rhs" if side == "lhs" else "lhs"
    queries, targets = rng.integers(0, sizes[other], 70), rng.integers(0, sizes[side], 70)
    known = KnownEdges.from_pairs(rng.integers(0, sizes[other], 90), rng.integers(0, sizes[side], 90))
    true = set(pairs_of(known))
    chosen = CandidateSet.sample(sizes[side], sample, rng)
    rows = range(sizes[side]) if chosen.rows is None else chosen.rows.tolist()
    expected = plain_counts(dense, side, queries, targets, rows, true)
    for block_size in (1, 512):
        found = rank_edges(scores, side, queries, targets, chosen, [known], block_size)
        for counts, pairs in zip(found, expected, strict=True):
            assert list(zip(counts.above.astype(int), counts.tied.astype(int), strict=True)) == pairs


def test_a_head_without_edges_ties_all_tails_so_that_it_is_no_better_than_chance():
    weights = sp.csr_matrix(interactions())
    none = np.zeros(3, np.int64)
    for scores in (NeighborScores(weights, item_similarity(weights, 10)), fit_als(weights, 4, 0, None)[0]):
        [raw] = rank_edges(scores, "rhs", none, np.array([0, 7, 24]), CandidateSet(25), [], 512)
        assert raw.ranks.tolist() == [13, 13, 13]


def dense_scores(scores: FactorScores) -> np.ndarray:
    return (scores.tables["lhs"] @ scores.tables["rhs"].T).numpy()


@pytest.mark.parametrize("best", [0, 1])
def test_als_is_the_librarys_with_the_setting_that_validation_prefers(best):
    weights = interactions()
    trials = []

    def quality(scores: FactorScores) -> float:
        trials.append(dense_scores(scores))
        return float(len(trials) - 1 == best)

    scores, setting = fit_als(sp.csr_matrix(weights), 6, 5, quality)
    assert setting == ALS_SETTINGS[best] and len(trials) == len(ALS_SETTINGS)
    np.testing.assert_allclose(dense_scores(scores), als_by_the_library(weights, 6, 5, setting), atol=1e-5)
    # A judge sees scores that differ.
    assert np.abs(trials[0] - trials[1]).max() > 1e-3


def test_als_without_validation_takes_the_first_setting():
    weights = interactions()
    scores, setting = fit_als(sp.csr_matrix(weights), 6, 5, None)
    assert setting == ALS_SETTINGS[0]
    np.testing.assert_allclose(dense_scores(scores), als_by_the_library(weights, 6, 5, setting), atol=1e-5)


def test_als_does_not_depend_on_the_unit_of_weights_nor_on_threads_and_warns_of_nothing(monkeypatch):
    monkeypatch.setattr(baselines, "EDGES_FOR_THREADS", 0)
    weights = sp.csr_matrix(interactions(300, 200))
    before = torch.get_num_threads()
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            for threads, factor in ((1, 1.0), (2, 1.0), (2, 1_024.0)):
                torch.set_num_threads(threads)
                found.append(dense_scores(fit_als(weights * factor, 8, 0, None)[0]))
        finally:
            torch.set_num_threads(before)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    assert not np.allclose(found[0], dense_scores(fit_als(weights, 8, 1, None)[0]))
