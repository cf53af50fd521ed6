"""A consumer of vectors: what small models that were trained on earlier ones make of later ones."""

from __future__ import annotations

import numpy as np
import pytest
import small_store
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from small_store import SNAPSHOT

from tests.support.made_releases import rotation
from twhin_pipeline.lifecycle import consumer
from twhin_pipeline.store import database
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.compatibility import Shared
from twhin_pipeline.vectors.export import export

D = 6


def shared(after: np.ndarray | None = None, n: int = 600) -> tuple[Shared, np.ndarray]:
    rng = np.random.default_rng(0)
    before = rng.normal(size=(n, D))
    label = before @ rng.normal(size=D) + 0.3 * rng.normal(size=n) > 0
    after = before if after is None else before @ after
    return Shared(n, 0, 0, before, after, np.arange(n)), label[None]


def test_the_regression_is_scikit_learns() -> None:
    both, [label] = shared()
    ours = consumer.logistic(both.before, label, ridge=2.0)
    theirs = LogisticRegression(C=1 / 2.0, tol=1e-10, max_iter=1000).fit(both.before, label)
    np.testing.assert_allclose(ours[:-1], theirs.coef_[0], atol=1e-4)
    assert ours[-1] == pytest.approx(theirs.intercept_[0], abs=1e-4)


def test_labels_that_a_column_separates_have_finite_weights() -> None:
    both, _ = shared()
    weights = consumer.logistic(both.before, both.before[:, 0] > 0, ridge=0.1)
    assert np.isfinite(weights).all()


def test_losses_are_those_of_ids_that_the_model_was_not_fitted_to() -> None:
    both, labels = shared()
    found = consumer.measured(both, labels, "none")
    half = len(both.before) // 2
    scale = np.sqrt(np.square(both.before[:half]).mean())
    model = LogisticRegression(C=1 / consumer.RIDGE, tol=1e-10).fit(both.before[:half] / scale, labels[0][:half])
    chance = model.predict_proba(both.before[half:] / scale)[:, 1]
    assert found is not None and found.labels == 1
    assert found.loss == pytest.approx(log_loss(labels[0][half:], chance), abs=1e-4)
    assert found.auc == pytest.approx(roc_auc_score(labels[0][half:], chance), abs=1e-4)
    assert (found.loss_new, found.auc_new) == (found.loss, found.auc)
    assert found.loss_mapped is None and found.auc_mapped is None


@pytest.mark.parametrize("kind", ["linear", "orthogonal"])
def test_the_map_gives_a_consumer_back_what_turned_axes_took(kind: str) -> None:
    both, labels = shared(rotation(3))
    found = consumer.measured(both, labels, kind)
    assert found is not None and found.loss_new is not None and found.loss_mapped is not None
    assert found.loss_new > 2 * found.loss
    assert found.loss_mapped == pytest.approx(found.loss, rel=0.05)


def test_without_a_label_or_with_too_few_ids_nothing_is_measured() -> None:
    both, labels = shared()
    assert consumer.measured(both, labels[:0], "linear") is None
    few, label = shared(n=100)
    assert consumer.measured(few, label, "linear") is None


def test_labels_are_edges_to_popular_entities_and_many_edges_as_a_plain_loop_finds_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(consumer, "FEWEST", 5)
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    tables = small.store.versions(SNAPSHOT, ["training_set/positives", "embeddings/relations"])
    rows = np.random.default_rng(0).permutation(small_store.NUM["user"])[:25]
    with database.connect(store=small.store) as con:
        found = consumer.labels(con, small.store, Release("r", SNAPSHOT, "", tables), "user", rows)
    members: dict[tuple[int, int, int], set[int]] = {}
    degree = dict.fromkeys(rows.tolist(), 0)
    for lhs, rel, rhs in small.edges["train"].tolist():
        ends = [(0, lhs, rhs), *([(1, rhs, lhs)] if rel == 1 else [])]  # users follow users; else the tail is an item
        for side, own, other in ends:
            if own in degree:
                degree[own] += 1
                members.setdefault((rel, side, other), set()).add(own)
    popular = sorted(
        (key for key, ids in members.items() if 5 <= len(ids) <= 20),
        key=lambda key: (abs(len(members[key]) - 12), key),
    )[: consumer.LABELS]
    many = np.array([degree[row] for row in rows.tolist()]) > np.median(list(degree.values()))
    expected = [many, *(np.isin(rows, list(members[key])) for key in popular)]
    np.testing.assert_array_equal(found, np.array(expected))
