"""Item-kNN and ALS rank the same test edges as the model, by the same protocol, and are fitted without them."""

from __future__ import annotations

import numpy as np
import pytest
import small_store
from plain_evaluation import als_by_the_library, loop, make, plain_similarity, table
from small_store import NUM, RELATIONS, SNAPSHOT, Small

from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import comparison
from twhin_pipeline.evaluation.baselines import ALS_SETTINGS, AlsSetting, FactorScores
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.evaluation.held_out import HeldOut, read_edges
from twhin_pipeline.evaluation.ranking import CandidateSet
from twhin_pipeline.store import database

COLUMNS = ("item_knn", "als", "compared")


def of_pair(small: Small, relation: int) -> np.ndarray:
    """Add up the training edges of all relations between the entity types of `relation`, dense."""
    types = list(RELATIONS.values())
    found = np.zeros([NUM[name] for name in types[relation]])
    for lhs, rel, rhs in small.edges["train"].tolist():
        if types[rel] == types[relation]:
            found[lhs, rhs] += 1
    return found


def dense(small: Small, which: str, details: dict) -> list[np.ndarray]:
    """Return each relation's scores `[heads, tails]` by plain NumPy, or by the library used directly."""
    found = []
    for number, (lhs, rhs) in enumerate(RELATIONS.values()):
        weights = of_pair(small, number)
        if which == "item_knn":
            found.append(((weights > 0).astype(float) @ plain_similarity(weights)).astype(np.float32))
        else:
            told = details["als_settings"][f"{lhs} → {rhs}"]
            setting = AlsSetting(told["alpha"], told["regularization"])
            found.append(als_by_the_library(weights, told["factors"], small.config.evaluation.seed, setting))
    return found


@pytest.mark.parametrize("which", ["item_knn", "als"])
def test_ranks_of_every_relation_side_and_overall_equal_a_plain_loop(tmp_path, which):
    small = make(tmp_path)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    found, scores = table(small), dense(small, which, details)
    theirs = loop(small, lambda lhs, relation, rhs: scores[relation][lhs, rhs])
    for relation in (*RELATIONS, "all"):
        for side in ("lhs", "rhs", "both"):
            keys = [k for k in theirs if relation in (k[0], "all") and side in (k[1], "both")]
            ranks = np.array([filtered for k in keys for filtered, _ in theirs[k]])
            row = found[relation, side, "filtered_mrr"]
            assert row[which] == pytest.approx((1 / ranks).mean(), rel=1e-3), (relation, side)
            assert found[relation, side, "filtered_hits@5"][which] == pytest.approx((ranks <= 5).mean(), abs=0.02)
            assert row["compared"] == pytest.approx(row["value"]) and row["compared_edges"] == row["edges"]
            for metric in ("raw_mrr", "auc", "rce", "filtered_mean_rank"):
                assert [found[relation, side, metric][column] for column in COLUMNS] == [None] * 3


@pytest.mark.parametrize("which", ["item_knn", "als"])
def test_recall_equals_a_plain_loop_over_heads_without_their_training_and_validation_edges(tmp_path, which):
    small = make(tmp_path)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    found, scores = table(small), dense(small, which, details)
    seen = {tuple(e) for split in ("train", "validation") for e in small.edges[split].tolist()}
    test = {tuple(e) for e in small.edges["test"].tolist()}
    recalls: dict[str, list[float]] = {name: [] for name in RELATIONS}
    k = 10
    for lhs, relation in sorted({(e[0], e[1]) for e in test}):
        name = list(RELATIONS)[relation]
        tails = [i for i in range(NUM[RELATIONS[name][1]]) if (lhs, relation, i) not in seen]
        # Of tied tails, the expected share among the first k.
        of = scores[relation][lhs]
        hits = 0.0
        for tail in (i for i in tails if (lhs, relation, i) in test):
            above, tied = sum(of[i] > of[tail] for i in tails), sum(of[i] == of[tail] for i in tails)
            hits += np.clip((k - above) / tied, 0, 1)
        recalls[name].append(hits / sum((lhs, relation, i) in test for i in tails))
    recalls["all"] = [value for values in recalls.values() for value in values]
    for relation, values in recalls.items():
        row = found[relation, "rhs", f"recall@{k}"]
        assert row[which] == pytest.approx(np.mean(values), abs=0.01), relation
        assert row["compared"] == pytest.approx(row["value"]) and row["compared_edges"] == row["edges"]
    assert details[which][f"recall@{k}"] == found["all", "rhs", f"recall@{k}"][which]


@pytest.mark.parametrize("options", [{}, {"candidates": 9}, {"max_edges": 20}], ids=["all", "candidates", "max_edges"])
def test_a_sample_has_whole_heads_and_the_models_figures_are_of_the_same_edges(tmp_path, options):
    whole, small = make(tmp_path / "a", **options), make(tmp_path / "b", baseline_edges=45, **options)
    every = evaluate(whole.config, whole.store, SNAPSHOT).details
    details = evaluate(small.config, small.store, SNAPSHOT).details
    assert 20 < details["compared_edges"] <= 45 < every["compared_edges"] == every["edges"]
    assert "item_knn and als rank" in details["note"] and "baseline_edges" not in every["note"]
    a, b = table(whole), table(small)
    assert {k: (r["value"], r["baseline"]) for k, r in a.items()} == {
        k: (r["value"], r["baseline"]) for k, r in b.items()
    }
    # The sampled figures of the model, from a loop over its heads' edges.
    with database.connect() as con:
        edges = read_edges(con, HeldOut.open(small.store, SNAPSHOT).test, len(RELATIONS))
    drawn = comparison._drawn(dict(enumerate(edges)), 45, small.config.evaluation.seed)
    for number, one in enumerate(edges):
        heads = one["lhs"][drawn[number]]
        assert len(heads) == np.isin(one["lhs"], heads).sum()
    if not options:
        ranks = loop(small, lambda *edge: small_store.score(small, edge[1], edge[0], edge[2]))
        for number, name in enumerate(RELATIONS):
            sampled = set(edges[number]["lhs"][drawn[number]].tolist())
            order = [lhs in sampled for lhs, relation, _ in small.edges["test"].tolist() if relation == number]
            mine = [1 / pair[0] for pair, kept in zip(ranks[name, "rhs"], order, strict=True) if kept]
            row = b[name, "rhs", "filtered_mrr"]
            assert row["compared"] == pytest.approx(np.mean(mine)) and row["compared_edges"] == len(mine)
    again = make(tmp_path / "c", baseline_edges=45, **options)
    evaluate(again.config, again.store, SNAPSHOT)
    assert table(again) == b


def test_more_edges_than_the_bound_leave_the_columns_empty_and_say_so(tmp_path, monkeypatch):
    small = make(tmp_path)
    monkeypatch.setattr(comparison, "MOST_EDGES", 300)  # likes and rates together have more, follows fewer
    details = evaluate(small.config, small.store, SNAPSHOT).details
    found = table(small)
    assert "item_knn and als not computed for user → item: " in details["note"] and "more than 300" in details["note"]
    assert "user → user" not in details["note"]
    for column in COLUMNS:
        assert found["likes", "rhs", "recall@3"][column] is None
        assert found["follows", "rhs", "recall@3"][column] is not None
        # A part of the relations is not all of them.
        assert found["all", "rhs", "recall@3"][column] is None and column not in details


def test_too_many_pairs_of_tails_leave_out_item_knn_alone(tmp_path, monkeypatch):
    small = make(tmp_path)
    monkeypatch.setattr(comparison, "MOST_PAIRS", 10)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    row = table(small)["all", "rhs", "recall@3"]
    assert row["item_knn"] is None and row["als"] is not None and row["compared"] == row["value"]
    assert "item_knn not computed for user → user" in details["note"] and "pairs of tails" in details["note"]


@pytest.mark.parametrize("baselines_", [[], ["popularity"]])
def test_popularity_alone_is_measured_where_no_other_baseline_is_asked_for(tmp_path, baselines_):
    small = make(tmp_path, baselines=baselines_)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    row = table(small)["all", "both", "filtered_mrr"]
    assert row["baseline"] is not None and [row[column] for column in COLUMNS] == [None] * 3
    assert details["compared_edges"] == 0 and not details["als_settings"] and "item_knn" not in details


def test_one_baseline_can_be_asked_for(tmp_path):
    small = make(tmp_path, baselines=["als"])
    evaluate(small.config, small.store, SNAPSHOT)
    row = table(small)["all", "both", "filtered_mrr"]
    assert row["item_knn"] is None and row["als"] is not None


def test_a_gate_that_nothing_measures_is_refused():
    with pytest.raises(UserError, match=r"must_beat: als is not measured; add it to evaluation\.baselines"):
        small_store.config(evaluation={"baselines": ["item_knn"], "must_beat": ["als"]})


def test_als_is_chosen_by_validation_edges_and_never_sees_a_test_edge(tmp_path):
    small = make(tmp_path)
    held_out = HeldOut.open(small.store, SNAPSHOT)
    blind = HeldOut("test", ["nowhere.parquet"], held_out.train, held_out.validation)
    rng = np.random.default_rng(0)
    heads, tails = (rng.normal(size=(NUM[name], 4)).astype(np.float32) for name in ("user", "item"))
    known = {tuple(edge) for edge in small.edges["train"].tolist()}
    recalls = []
    for lhs, relation in sorted({(e[0], e[1]) for e in small.edges["validation"].tolist() if e[1] in (0, 2)}):
        items = [i for i in range(NUM["item"]) if (lhs, relation, i) not in known]
        items.sort(key=lambda i: -float(heads[lhs] @ tails[i]))
        relevant = [e[2] for e in small.edges["validation"].tolist() if e[:2] == [lhs, relation]]
        recalls.append(len(set(relevant) & set(items[:10])) / len(relevant))
    with database.connect() as con:
        edges = read_edges(con, blind.validation, len(RELATIONS))
        judge = comparison._quality(con, small.config, {n: edges[n] for n in (0, 2)}, CandidateSet(NUM["item"]), blind)
    assert judge is not None
    assert judge(FactorScores(heads, tails)) == pytest.approx(np.mean(recalls))


def test_without_validation_edges_als_takes_its_first_setting(tmp_path):
    splits = small_store.edges()
    small = make(tmp_path, {**splits, "validation": splits["validation"][:0]})
    settings = evaluate(small.config, small.store, SNAPSHOT).details["als_settings"]
    for told in settings.values():
        assert told["chosen_by"] == "default: no validation edge"
        assert (told["alpha"], told["regularization"]) == (ALS_SETTINGS[0].alpha, ALS_SETTINGS[0].regularization)
    assert set(settings) == {"user → item", "user → user"}


def test_factors_are_as_many_as_the_models_numbers_but_not_more_than_the_most(tmp_path, monkeypatch):
    small = make(tmp_path)
    monkeypatch.setattr(comparison, "MOST_FACTORS", 5)
    assert {s["factors"] for s in evaluate(small.config, small.store, SNAPSHOT).details["als_settings"].values()} == {5}
    monkeypatch.setattr(comparison, "MOST_FACTORS", 64)
    settings = evaluate(small.config, small.store, SNAPSHOT).details["als_settings"]
    assert {s["factors"] for s in settings.values()} == {small_store.DIM}


def test_warnings_are_stored_where_the_model_is_below_a_baseline(tmp_path, monkeypatch):
    from twhin_pipeline.evaluation import results

    small = make(tmp_path)
    assert evaluate(small.config, small.store, SNAPSHOT).details["warnings"] == [], "of so few edges nothing is said"
    monkeypatch.setattr(results, "LEAST_EDGES", 30)
    warnings = evaluate(small.config, small.store, SNAPSHOT).details["warnings"]
    # The small store's vectors are random, so popularity is better.
    assert any(line.startswith("rates: the model's Recall@10 of ") and "popularity's" in line for line in warnings)
    assert warnings[-1].startswith("Try: ")
