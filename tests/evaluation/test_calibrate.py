"""Probabilities hold, keep the order of scores, and thresholds reach what they say."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import small_store
import torch
from sklearn.calibration import calibration_curve
from sklearn.linear_model import LogisticRegression
from small_store import NUM, SNAPSHOT
from torchmetrics.functional.classification import binary_calibration_error

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import calibrate
from twhin_pipeline.evaluation.classification import rce
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.store import releases
from twhin_pipeline.vectors.calibration import Calibration, sigmoid
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

RNG = np.random.default_rng


def drawn(count: int, log_odds, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return normal scores of edges and of others, where a score's true log-odds are a function of it."""
    rng = RNG(seed)
    scores = rng.normal(size=count) * 3
    edge = rng.random(count) < sigmoid(log_odds(scores))
    return scores[edge], scores[~edge]


def bent(scores: np.ndarray) -> np.ndarray:
    """True log-odds that no line fits: flat below 0, then steep."""
    return np.where(scores < 0, 0.1 * scores - 4, 2 * scores - 4)


def test_scores_whose_log_odds_are_a_line_get_that_line_as_by_logistic_regression() -> None:
    positive, negative = drawn(20_000, lambda s: 0.7 * s - 2)
    found = calibrate.fit(positive, negative, 10)
    scores = np.concatenate([positive, negative])
    theirs = LogisticRegression(C=1e9).fit(scores[:, None], np.arange(len(scores)) < len(positive))
    at = np.array([-8.0, -3.0, 0.0, 2.5, 9.0])
    line = calibrate._curve(positive, negative, 1)
    expected = theirs.decision_function(at[:, None])
    assert Calibration("platt", 10, *line).log_odds(at) == pytest.approx(expected, abs=0.02)
    assert found.log_odds(at) == pytest.approx(0.7 * at - 2, abs=0.25)


def test_a_bent_map_is_taken_where_a_line_does_not_fit_and_holds_on_new_pairs() -> None:
    found = calibrate.fit(*drawn(30_000, bent), 10)
    new = drawn(30_000, bent, seed=1)
    line = Calibration("platt", 10, *calibrate._curve(*drawn(30_000, bent), 1))
    error, of_line = (calibrate.metrics([(one, new)])["ece"] for one in (found, line))
    assert found.method == "piecewise" and error is not None and of_line is not None
    assert error < 0.01 < of_line
    assert found.log_odds(np.array([-2.0, 1.0, 3.0])) == pytest.approx(bent(np.array([-2.0, 1.0, 3.0])), abs=0.5)


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (RNG(0).normal(size=300), RNG(1).normal(size=3000)),  # scores say nothing
        (RNG(0).normal(size=300) - 5, RNG(1).normal(size=3000)),  # the wrong way round
        (RNG(0).normal(size=300) + 50, RNG(1).normal(size=3000)),  # no overlap
        (np.full(300, 2.0), np.full(3000, 2.0)),  # all alike
        (1e-2 * RNG(0).normal(size=2000), 1e2 * RNG(1).normal(size=20_000)),
        (np.array([1.0]), np.array([-1.0])),
    ],
    ids=["noise", "reversed", "separated", "constant", "scales", "one each"],
)
def test_a_map_is_finite_and_strictly_increasing_whatever_the_scores(positive, negative) -> None:
    found = calibrate.fit(positive, negative, 10)
    at = np.unique(np.concatenate([positive, negative]))
    at = np.concatenate([[at[0] - 1], at, [at[-1] + 1]])
    log_odds = found.log_odds(at)
    assert np.isfinite(log_odds).all() and (np.diff(log_odds) > 0).all()
    assert (np.diff(found.scores) > 0).all() and (np.diff(found.values) > 0).all()


def test_scores_that_say_nothing_get_the_share_of_edges() -> None:
    found = calibrate.fit(RNG(0).normal(size=4_000), RNG(1).normal(size=40_000), 10)
    assert sigmoid(found.log_odds(np.array([-2.0, 0.0, 2.0]))) == pytest.approx(1 / 11, abs=0.01)


def test_without_edges_or_without_others_there_is_no_map() -> None:
    some, none = np.ones(3), np.ones(0)
    assert not calibrate.fit(none, some, 10).is_fitted and not calibrate.fit(some, none, 10).is_fitted
    assert calibrate.metrics([(calibrate.uncalibrated(10), (some, some))]) == {}


def test_the_calibration_error_equals_that_of_other_libraries() -> None:
    rng = RNG(3)
    probability = rng.random(1500) ** 3
    edge = rng.random(1500) < probability**0.7
    share, mean = calibration_curve(edge, probability, n_bins=15, strategy="quantile")
    assert calibrate.ece(probability[edge], probability[~edge]) == pytest.approx(np.abs(share - mean).mean())
    # Bins of equal width are those of equal mass where probabilities are evenly spread.
    even = (rng.permutation(1500) + 0.5) / 1500
    theirs = binary_calibration_error(torch.from_numpy(even), torch.from_numpy(edge).int(), n_bins=15, norm="l1")
    assert calibrate.ece(even[edge], even[~edge]) == pytest.approx(float(theirs), rel=1e-5)


def test_thresholds_reach_what_a_plain_count_says_with_one_more_sampled_pair() -> None:
    rng = RNG(4)
    positive, negative = rng.random(37).round(2), (rng.random(370) * 0.8).round(2)
    found = calibrate.thresholds(positive, negative, 10)
    assert found["recall"][-1] == 1 and (np.diff(found["probability"]) < 0).all()
    for probability, precision, recall, edges in zip(*found.values(), strict=True):
        above, false = (positive >= probability).sum(), (negative >= probability).sum()
        assert edges == above and recall == pytest.approx(above / 37)
        rate = (false + 1) / 371
        assert precision == pytest.approx(recall / (recall + 10 * rate))
    assert len(calibrate.thresholds(rng.random(5000), rng.random(9000), 10)["recall"]) == calibrate.MOST_THRESHOLDS


def made(tmp_path, *, planted: bool = True, model: dict | None = None, **splits: np.ndarray) -> small_store.Small:
    """Return a store whose relation `likes` has enough validation edges of its own, and vectors that know edges."""
    rng = RNG(7)
    every = np.array([(u, 0, i) for u in range(NUM["user"]) for i in range(NUM["item"]) if (u + i) % 4 == 0])
    every = rng.permutation(every)
    small = small_store.edges()
    others = {split: rows[rows[:, 1] > 0] for split, rows in small.items()}
    cuts = dict(zip(("train", "validation", "test"), np.split(every, [40, 170]), strict=True))
    edges = {split: np.concatenate([cuts[split], others[split]]) for split in cuts} | splits
    result = small_store.make(tmp_path, config=small_store.config(model=model or {}), splits=edges)
    if planted:
        vectors = {
            "user": 3 * np.eye(8)[[(-u) % 4 for u in range(NUM["user"])]] + rng.normal(size=(NUM["user"], 8)),
            "item": 3 * np.eye(8)[[i % 4 for i in range(45)]] + rng.normal(size=(45, 8)),
        }
        small_store.write_model(
            result.store, result.config, {k: v.astype(np.float32) for k, v in vectors.items()}, result.scorer
        )
    return result


def opened(small: small_store.Small) -> TwhinEmbeddings:
    export(small.config, small.store, SNAPSHOT)
    return load_model(small.store.root)


def pairs_of(rows: np.ndarray, relation: int = 0) -> tuple[list, list]:
    rows = rows[rows[:, 1] == relation]
    users, items = small_store.ids("user"), small_store.ids("item")
    return [users[u] for u in rows[:, 0]], [items[i] for i in rows[:, 2]]


def test_a_relation_with_few_validation_edges_has_the_map_of_all_and_the_others_their_own(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    rows = {row["relation"]: row for row in small.store.read("calibration", SNAPSHOT).to_pylist()}
    assert rows["likes"]["method"] in ("platt", "piecewise") and rows["likes"]["edges"] == 130
    assert rows["follows"]["method"] == rows["rates"]["method"] == "pooled"
    assert rows["follows"]["log_odds"] == rows["rates"]["log_odds"] != rows["likes"]["log_odds"]
    assert {row["negatives"] for row in rows.values()} == {10}


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one operator", "reciprocal"])
def test_what_is_served_is_what_was_measured_on_test_edges(tmp_path, reciprocal) -> None:
    small = made(tmp_path, model={"reciprocal": reciprocal})
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    probability = model.predict_relation(*pairs_of(small.edges["test"]), "likes")
    for recall in (0.1, 0.5, 0.9, 1.0):
        found = model.threshold("likes", recall=recall)
        # The scores of one and of many pairs may differ in their last bit.
        assert (probability >= found.probability - 1e-6).mean() == pytest.approx(
            found.recall
        ) and found.recall >= recall
        assert (probability >= found.probability - 1e-6).sum() == found.edges


def test_calibrated_figures_beat_the_base_rate_where_sigmoid_does_not_and_are_of_tails(tmp_path) -> None:
    small = made(tmp_path)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    rows = small.store.read("evaluation", SNAPSHOT).to_pylist()
    found = {(row["relation"], row["metric"]): row for row in rows if row["metric"] in ("ece", "calibrated_rce")}
    raw = {row["relation"]: row["value"] for row in rows if row["metric"] == "rce" and row["side"] == "rhs"}
    assert {row["side"] for row in found.values()} == {"rhs"}
    assert found["likes", "calibrated_rce"]["value"] > max(0, raw["likes"])
    assert found["likes", "ece"]["value"] < 0.05
    assert details["metrics"]["ece"] == found["all", "ece"]["value"]
    assert found["all", "ece"]["edges"] == len(small.edges["test"])


def test_ranking_by_probability_is_ranking_by_score(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    items, user = small_store.ids("item"), small_store.ids("user")[3]
    best = [name for name, _ in model.candidates("likes", user, len(items), untrained=True)]
    probability = model.predict_relation(user, best, "likes")
    assert (np.diff(probability) < 0).all() and ((probability > 0) & (probability < 1)).all()


def test_scores_of_recommendations_become_the_probabilities_of_their_pairs(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    users = small_store.ids("user")[:5]
    with pytest.warns(UserWarning, match="known edges are not left out"):
        found = model.recommend("likes", users, 6).read_all()
    pairs = found["lhs"].to_pylist(), found["rhs"].to_pylist()
    said = model.predict_relation(*pairs, "likes")
    assert found["probability"].to_pylist() == pytest.approx(said, rel=1e-4) and len(said) == 30
    scores = [score for _, score in model.candidates("likes", users[0], 6)]
    assert model.probabilities("likes", scores) == pytest.approx(said[:6], rel=1e-4)
    rare = model.predict_relation(*pairs, "likes", prior=0.01)
    assert model.probabilities("likes", found["score"], prior=0.01) == pytest.approx(rare, rel=1e-4)


def test_without_a_calibration_recommendations_have_no_probability(tmp_path) -> None:
    model = opened(small_store.make(tmp_path, config=small_store.config()))
    with pytest.warns(UserWarning, match="known edges are not left out"):
        found = model.recommend("likes", small_store.ids("user")[:2], 3).read_all()
    assert found["probability"].null_count == found.num_rows == 6
    assert model.probabilities("likes", [1.0]) is None


def test_a_prior_shifts_the_odds_of_probabilities_and_of_precision(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    pairs = pairs_of(small.edges["test"])
    here = model.predict_relation(*pairs, "likes")
    assert model.predict_relation(*pairs, "likes", prior=1 / 11) == pytest.approx(here)
    rare = model.predict_relation(*pairs, "likes", prior=0.001)
    assert rare / (1 - rare) == pytest.approx(here / (1 - here) * (0.001 / 0.999) * 10)
    common, scarce = model.threshold("likes", recall=0.5), model.threshold("likes", recall=0.5, prior=0.001)
    assert (common.recall, common.edges) == (scarce.recall, scarce.edges) and scarce.precision < common.precision
    assert (rare >= scarce.probability - 1e-9).sum() == (here >= common.probability - 1e-9).sum()
    for prior in (0, 1, -0.1, 7):
        with pytest.raises(UserError, match="prior must be between 0 and 1"):
            model.predict_relation(*pairs, "likes", prior=prior)


def test_thresholds_vectors_and_neighbors_of_one_id_are_read_without_torch(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    user = small_store.ids("user")[3]
    code = (
        "import sys\n"
        "sys.modules['torch'] = None  # as if it were not installed\n"
        "from twhin_pipeline import load_model\n"
        f"model = load_model({small.store.root!r})\n"
        f"print(model.threshold('likes', recall=0.5).edges, model.get_embedding('user', {user!r}).shape[0],\n"
        f"      *(name for name, _ in model.neighbors('user', {user!r}, 2)))\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    near = [name for name, _ in model.neighbors("user", user, 2)]
    assert shown == [str(model.threshold("likes", recall=0.5).edges), "8", *near]


def test_a_precision_that_no_threshold_reaches_is_refused_with_the_best_there_is(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    model = opened(small)
    low = model.threshold("likes", precision=0.4)
    assert low.precision >= 0.4 and low.prior == pytest.approx(1 / 11)
    assert model.threshold("likes", precision=0.2).recall >= low.recall
    with pytest.raises(
        UserError, match=r"no threshold of likes reaches a precision of 1 at .*; the best is 0\.\d+, at"
    ):
        model.threshold("likes", precision=1.0)
    for wrong in ({}, {"precision": 0.5, "recall": 0.5}):
        with pytest.raises(UserError, match="give either a precision or a recall"):
            model.threshold("likes", **wrong)
    for wrong in ({"precision": 0.0}, {"recall": 1.1}, {"recall": float("nan")}):
        with pytest.raises(UserError, match="must be above 0 and at most 1"):
            model.threshold("likes", **wrong)


def test_without_test_edges_nothing_is_reported_on_the_edges_that_were_fitted(tmp_path) -> None:
    small = made(tmp_path, test=np.zeros((0, 3), np.int64))
    metrics = evaluate(small.config, small.store, SNAPSHOT).details["metrics"]
    assert "auc" in metrics and not {"ece", "calibrated_rce"} & set(metrics)
    manifest = small.store.manifest("calibration", SNAPSHOT)
    assert manifest.details["measured_on"] == "validation" and manifest.parts["reliability"]["rows"] == 0
    assert opened(small).threshold("likes", recall=0.5).recall >= 0.5


def test_without_validation_edges_probabilities_are_sigmoids_and_one_note_says_so(tmp_path) -> None:
    small = made(tmp_path, validation=np.zeros((0, 3), np.int64))
    metrics = evaluate(small.config, small.store, SNAPSHOT).details["metrics"]
    assert not {"ece", "calibrated_rce"} & set(metrics)
    assert "no validation edge" in small.store.manifest("calibration", SNAPSHOT).details["notes"][0]
    model = opened(small)
    lhs, rhs = pairs_of(small.edges["test"])
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        found = [model.predict_relation(lhs[0], rhs[0], "likes") for _ in range(2)]
    assert ["not calibrated" in str(one.message) for one in noted] == [True]
    score = model.candidates("likes", lhs[0], NUM["item"], untrained=True)
    assert found[0] == pytest.approx(1 / (1 + np.exp(-dict(score)[rhs[0]])), rel=1e-5)
    with pytest.raises(UserError, match=r"not calibrated .*no prior"):
        model.predict_relation(lhs[0], rhs[0], "likes", prior=0.1)
    assert model.threshold("likes", recall=0.5).recall >= 0.5


def test_a_model_that_was_trained_anew_is_not_served_with_the_maps_of_the_one_before(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    small_store.write_model(small.store, small.config, {**small.vectors}, small.scorer)
    model = opened(small)
    with pytest.warns(UserWarning, match="no table `calibration`"):
        model.predict_relation(*pairs_of(small.edges["test"]), "likes")
    with pytest.raises(UserError, match="no table `calibration`"):
        model.threshold("likes", recall=0.5)


def test_no_sampled_pair_is_a_training_or_validation_edge(tmp_path, monkeypatch) -> None:
    """Else the edges that a model knows best would count as false."""
    small = made(tmp_path)
    pairs = []

    def spied(scores, edges, drawn, valid, options):
        heads = np.broadcast_to(edges["lhs"][:, None], drawn.shape)
        pairs.append(set(zip(heads[valid].tolist(), drawn[valid].tolist(), strict=True)))
        return original(scores, edges, drawn, valid, options)

    original = calibrate._scored
    monkeypatch.setattr(calibrate, "_scored", spied)
    evaluate(small.config, small.store, SNAPSHOT)
    assert len(pairs) == 3 and all(pairs)
    for rel, sampled in enumerate(pairs):
        known = np.concatenate([small.edges["train"], small.edges["validation"]])
        assert not sampled & {(lhs, rhs) for lhs, relation, rhs in known.tolist() if relation == rel}


def test_a_release_keeps_its_maps_when_its_model_is_evaluated_again(tmp_path) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    first = opened(small)
    pairs = pairs_of(small.edges["test"])
    before = first.predict_relation(*pairs, "likes")
    tables = small.store.versions(SNAPSHOT, ["calibration", "embeddings/relations"])
    release = releases.make(small.store, SNAPSHOT, tables, {}, None)
    releases.promote(small.store, release.name, "me", "test")
    evaluation = small.config.evaluation.model_copy(update={"auc_negatives": 100})
    evaluate(small.config.model_copy(update={"evaluation": evaluation}), small.store, SNAPSHOT)
    assert np.array_equal(load_model(small.store.root).predict_relation(*pairs, "likes"), before)
    newest = load_model(f"{small.store.root}@{SNAPSHOT}")
    assert newest.threshold("likes", recall=0.5).prior == pytest.approx(1 / 101)
    assert newest.predict_relation(*pairs, "likes").mean() < before.mean()


def test_the_command_line_prints_a_threshold_and_what_it_reaches(tmp_path, capsys) -> None:
    small = made(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    found = opened(small).threshold("likes", recall=0.5)
    home = ["--home", small.store.root]
    assert run_arguments(["threshold", "likes", "--recall", "0.5", "--json", *home]) == 0
    assert json.loads(capsys.readouterr().out) == {"snapshot": SNAPSHOT, **asdict(found)}
    assert run_arguments(["threshold", "likes", "--recall", "0.5", "--prior", "0.01", *home]) == 0
    shown = capsys.readouterr().out
    assert f"{found.recall:.4f}" in shown and "each edge comes with 99 pairs of the same head" in shown
    assert run_arguments(["threshold", "likes", "--precision", "1", *home]) == 2
    assert "the best is 0." in capsys.readouterr().err
    assert run_arguments(["threshold", "like", "--recall", "0.5", *home]) == 2
    assert "did you mean 'likes'" in capsys.readouterr().err


def test_the_table_s_bins_give_the_reported_error(tmp_path) -> None:
    small = made(tmp_path)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    bins = small.store.read_part(small.store.manifest("calibration", SNAPSHOT), "reliability").to_pylist()
    overall = [one for one in bins if one["relation"] == "all"]
    error = sum(one["pairs"] * abs(one["predicted"] - one["observed"]) for one in overall)
    assert error / sum(one["pairs"] for one in overall) == pytest.approx(details["metrics"]["ece"])
    assert len(overall) == calibrate.BINS


def test_the_relative_cross_entropy_of_calibrated_log_odds_is_that_of_scores_that_need_no_map() -> None:
    positive, negative = drawn(5_000, lambda s: s)
    identity = Calibration("platt", 1, np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    assert calibrate.metrics([(identity, (positive, negative))])["calibrated_rce"] == pytest.approx(
        rce(positive, negative)
    )
