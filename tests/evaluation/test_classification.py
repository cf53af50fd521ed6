"""AUC and RCE against scikit-learn, and the negatives that they are measured on."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from twhin_pipeline.evaluation.classification import auc, classification_metrics, rce, sample_negatives
from twhin_pipeline.training_set.known_edges import KnownEdges


@pytest.mark.parametrize("levels", [5, 10_000])
def test_auc_equals_scikit_learn(levels):
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, levels, 50) + 1.0, rng.integers(0, levels, 200) + 0.0
    expected = roc_auc_score([1] * 50 + [0] * 200, np.concatenate([positive, negative]))
    assert auc(positive, negative) == pytest.approx(expected)
    assert auc(positive, np.array([])) is None


def test_rce_is_the_gain_over_the_base_rate_by_scikit_learns_log_loss():
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(1, 1, 50), rng.normal(-3, 1, 200)
    labels = [1] * 50 + [0] * 200
    probability = 1 / (1 + np.exp(-np.concatenate([positive, negative])))
    expected = 100 * (1 - log_loss(labels, probability) / log_loss(labels, [0.2] * 250))
    assert rce(positive, negative) == pytest.approx(expected)
    assert rce(np.full(10, np.log(0.25)), np.full(40, np.log(0.25))) == pytest.approx(0, abs=1e-9)
    assert rce(np.array([]), negative) is None


def test_scores_far_from_0_are_told_apart_where_probabilities_in_float32_are_all_0_or_1():
    positive, negative = np.array([90.0, 60.0], np.float32), np.array([80.0, 40.0, 20.0], np.float32)
    found = classification_metrics(positive, negative)
    assert found["auc"] == pytest.approx(5 / 6)
    base_rate = -(0.4 * np.log(0.4) + 0.6 * np.log(0.6))
    assert found["rce"] == pytest.approx(100 * (1 - (80 + 40 + 20) / 5 / base_rate))


def test_rce_of_certain_scores_is_100():
    assert rce(np.array([50.0]), np.full(4, -50.0)) == pytest.approx(100)


def test_sampled_negatives_are_never_true_edges_and_reach_all_others():
    known = KnownEdges.from_pairs(np.array([0, 0, 1, 1, 1, 1]), np.array([1, 2, 0, 1, 2, 3]))
    drawn, valid = sample_negatives(4, np.array([0, 1, 2]), known, 500, np.random.default_rng(0))
    assert set(drawn[0].tolist()) == {0, 3} and valid[0].all()
    assert not valid[1].any()  # it is connected to all there are
    assert set(drawn[2].tolist()) == {0, 1, 2, 3} and valid[2].all()
