"""The most-popular baseline, and the metrics that need no model."""

from __future__ import annotations

import duckdb
import numpy as np
import pytest
import small_store
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from twhin_pipeline.baselines import popular_ranks, read_degrees
from twhin_pipeline.classification import auc, rce, sample_negatives
from twhin_pipeline.known_edges import KnownEdges, read_known
from twhin_pipeline.rank_metrics import rank_metrics, retrieval_metrics
from twhin_pipeline.ranking import CandidateSet, Counts


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
        assert list(zip(known[relation].query.tolist(), known[relation].answer.tolist(), strict=True)) == expected


@pytest.mark.parametrize("sample", [None, 12])
def test_popular_ranks_equal_a_plain_loop(sample):
    rng = np.random.default_rng(0)
    degrees = rng.integers(0, 5, 40)
    queries, targets = rng.integers(0, 20, 60), rng.integers(0, 40, 60)
    known = KnownEdges.from_pairs(rng.integers(0, 20, 200), rng.integers(0, 40, 200))
    true = set(zip(known.query.tolist(), known.answer.tolist(), strict=True))
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


@pytest.mark.parametrize("levels", [5, 10_000])
def test_auc_equals_scikit_learn(levels):
    rng = np.random.default_rng(0)
    true, false = rng.integers(0, levels, 50) + 1.0, rng.integers(0, levels, 200) + 0.0
    expected = roc_auc_score([1] * 50 + [0] * 200, np.concatenate([true, false]))
    assert auc(true, false) == pytest.approx(expected)
    assert auc(true, np.array([])) is None


def test_rce_is_the_gain_over_the_base_rate_by_scikit_learns_log_loss():
    rng = np.random.default_rng(0)
    true, false = rng.normal(1, 1, 50), rng.normal(-3, 1, 200)
    labels = [1] * 50 + [0] * 200
    probability = 1 / (1 + np.exp(-np.concatenate([true, false])))
    expected = 100 * (1 - log_loss(labels, probability) / log_loss(labels, [0.2] * 250))
    assert rce(true, false) == pytest.approx(expected)
    assert rce(np.full(10, np.log(0.25)), np.full(40, np.log(0.25))) == pytest.approx(0, abs=1e-9)
    assert rce(np.array([]), false) is None


def test_sampled_negatives_are_never_true_edges_and_reach_all_others():
    known = KnownEdges.from_pairs(np.array([0, 0, 1, 1, 1, 1]), np.array([1, 2, 0, 1, 2, 3]))
    drawn, valid = sample_negatives(4, np.array([0, 1, 2]), known, 500, np.random.default_rng(0))
    assert set(drawn[0].tolist()) == {0, 3} and valid[0].all()
    assert not valid[1].any()  # it is connected to all there are
    assert set(drawn[2].tolist()) == {0, 1, 2, 3} and valid[2].all()
