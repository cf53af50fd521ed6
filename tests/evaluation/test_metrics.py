"""Metrics against scikit-learn and plain formulas; sums over ranks are tested in test_sharding.py."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from twhin_pipeline.evaluation.metrics import create_metrics


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 3000)
    logits = rng.normal(0, 2, 3000) + labels
    return 1 / (1 + np.exp(-logits)), labels, rng.uniform(0, 3, 3000)


def measured(*batches) -> dict[str, float]:
    metrics = create_metrics("cpu")
    for batch in batches:
        metrics.update(*(torch.as_tensor(part) for part in batch))
    return {name: value.item() for name, value in metrics.compute().items()}


def test_auc_equals_scikit_learns(examples):
    p, y, w = examples
    assert measured((p, y, w))["auc"] == pytest.approx(roc_auc_score(y, p, sample_weight=w), abs=2e-4)
    assert measured((p, y))["auc"] == pytest.approx(roc_auc_score(y, p), abs=2e-4)


def test_auc_counts_ties_half():
    assert measured(([0.5, 0.5, 0.9], [0, 1, 1]))["auc"] == pytest.approx(0.75)


def test_auc_tells_apart_probabilities_close_to_0_and_1():
    p = torch.tensor([1e-6, 2e-6, 1 - 2e-6, 1 - 1e-6], dtype=torch.float64)
    assert measured((p, torch.tensor([0, 1, 0, 1])))["auc"] == pytest.approx(0.75)


def test_log_loss_equals_scikit_learns(examples):
    p, y, w = examples
    assert measured((p, y, w))["log_loss"] == pytest.approx(log_loss(y, p, sample_weight=w), rel=1e-9)


def test_rce_is_the_gain_over_the_base_rate_in_percent(examples):
    p, y, w = examples
    rate = np.average(y, weights=w)
    baseline = log_loss(y, np.full(len(y), rate), sample_weight=w)
    expected = 100 * (1 - log_loss(y, p, sample_weight=w) / baseline)
    assert measured((p, y, w))["rce"] == pytest.approx(expected, rel=1e-9)


def test_rce_is_0_for_the_base_rate_and_nearly_100_for_certainty():
    labels = [1, 0, 0, 0]
    assert measured(([0.25] * 4, labels))["rce"] == pytest.approx(0, abs=1e-5)
    assert measured(([1.0, 0.0, 0.0, 0.0], labels))["rce"] == pytest.approx(100, abs=1e-3)


def test_batches_add_up_and_reset_starts_anew(examples):
    p, y, w = examples
    whole = measured((p, y, w))
    assert measured(*((p[i::3], y[i::3], w[i::3]) for i in range(3))) == pytest.approx(whole, rel=1e-9)
    metrics = create_metrics("cpu")
    metrics.update(torch.tensor([0.1]), torch.tensor([1]))
    metrics.reset()
    metrics.update(*(torch.as_tensor(part) for part in (p, y, w)))
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(whole, rel=1e-9)


def test_one_class_alone_gives_nan_for_auc_and_rce():
    values = measured(([0.3, 0.6], [1, 1]))
    assert math.isnan(values["auc"])
    assert math.isnan(values["rce"])
    assert math.isfinite(values["log_loss"])


def test_any_shape_and_single_precision_are_taken():
    p = torch.tensor([[0.2, 0.9], [0.6, 0.1]])
    y = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert measured((p, y))["auc"] == 1.0
