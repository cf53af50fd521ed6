"""The table `evaluation` says what a plain loop over the held-out edges says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import small_store
from plain_evaluation import loop, make, table
from small_store import NUM, RELATIONS, SNAPSHOT, Small

from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate


def popularity(small: Small, side: str) -> Callable[[int, int, int], float]:
    train = small.edges["train"]

    def score(lhs: int, relation: int, rhs: int) -> float:
        of_relation = train[train[:, 1] == relation]
        return float((of_relation[:, 0] == lhs).sum() if side == "lhs" else (of_relation[:, 2] == rhs).sum())

    return score


def summed(ranks: list[tuple[float, float]], kind: str) -> dict[str, float]:
    values = np.array([r[0 if kind == "filtered" else 1] for r in ranks])
    return {
        f"{kind}_mrr": (1 / values).mean(),
        f"{kind}_mean_rank": values.mean(),
        f"{kind}_hits@1": (values <= 1).mean(),
        f"{kind}_hits@5": (values <= 5).mean(),
    }


@pytest.mark.parametrize("model", [{}, {"comparator": "cosine", "temperature": 0.1}], ids=["dot", "cosine"])
def test_ranks_of_every_relation_side_and_overall_equal_a_plain_loop_beside_the_baseline(tmp_path, model):
    small = make(tmp_path, model=model)
    evaluate(small.config, small.store, SNAPSHOT)
    found = table(small)
    ours = loop(small, lambda *edge: small_store.score(small, edge[1], edge[0], edge[2]))
    theirs = {key: loop(small, popularity(small, key[1]))[key] for key in ours}
    for relation in (*RELATIONS, "all"):
        for side in ("lhs", "rhs", "both"):
            keys = [k for k in ours if relation in (k[0], "all") and side in (k[1], "both")]
            for kind in ("filtered", "raw"):
                expected = summed([r for k in keys for r in ours[k]], kind)
                baseline = summed([r for k in keys for r in theirs[k]], kind)
                for metric in expected:
                    row = found[relation, side, metric]
                    assert row["value"] == pytest.approx(expected[metric]), (relation, side, metric)
                    assert row["baseline"] == pytest.approx(baseline[metric]), (relation, side, metric)
                    assert (
                        row["edges"] == len(keys and ours[keys[0]]) if relation != "all" else len(small.edges["test"])
                    )


def test_recall_and_ndcg_equal_a_plain_loop_over_heads_without_their_training_and_validation_edges(tmp_path):
    small = make(tmp_path)
    evaluate(small.config, small.store, SNAPSHOT)
    found = table(small)
    seen = {tuple(e) for split in ("train", "validation") for e in small.edges[split].tolist()}
    test = {tuple(e) for e in small.edges["test"].tolist()}
    by_relation: dict[str, list[tuple[float, float]]] = {name: [] for name in RELATIONS}
    k = 10
    for lhs, relation in sorted({(e[0], e[1]) for e in test}):
        name = list(RELATIONS)[relation]
        items = [i for i in range(NUM[RELATIONS[name][1]]) if (lhs, relation, i) not in seen]
        items.sort(key=lambda i: -small_store.score(small, relation, lhs, i))
        hits = [(lhs, relation, i) in test for i in items[:k]]
        relevant = sum((lhs, relation, i) in test for i in items)
        ideal = sum(1 / np.log2(2 + p) for p in range(min(relevant, k)))
        by_relation[name].append((sum(hits) / relevant, sum(h / np.log2(2 + p) for p, h in enumerate(hits)) / ideal))
    by_relation["all"] = [pair for pairs in by_relation.values() for pair in pairs]
    for relation, measured in by_relation.items():
        recall, ndcg = np.mean(measured, axis=0)
        assert found[relation, "rhs", f"recall@{k}"]["value"] == pytest.approx(recall)
        assert found[relation, "rhs", f"ndcg@{k}"]["value"] == pytest.approx(ndcg)


def test_a_model_that_knows_the_edges_beats_the_baseline_and_a_random_one_does_not_tell_edges_apart(tmp_path):
    small = make(tmp_path)
    random = evaluate(small.config, small.store, SNAPSHOT).details["metrics"]
    assert 0.35 < random["auc"] < 0.65
    # Heads are their own tails: every follower follows itself alone.
    rows = np.array([[i, 1, i] for i in range(small_store.DIM)])
    planted = {"train": small.edges["train"][:50], "validation": rows[:0], "test": rows}
    folder = tmp_path / "planted"
    known = small_store.make(folder, config=small.config, splits=planted)
    vectors = {"user": np.zeros((NUM["user"], small_store.DIM), np.float32), "item": np.ones((45, 8), np.float32)}
    np.fill_diagonal(vectors["user"], 40)
    scorer = type(known.scorer)(known.config.model)
    small_store.write_model(known.store, known.config, vectors, scorer)
    details = evaluate(known.config, known.store, SNAPSHOT).details
    assert details["metrics"]["filtered_hits@1"] == 1
    assert details["metrics"]["recall@3"] == details["metrics"]["ndcg@3"] == 1
    assert details["metrics"]["auc"] == 1
    assert details["metrics"]["rce"] > random["rce"]
    assert details["metrics"]["filtered_mrr"] > details["baseline"]["filtered_mrr"]


def test_details_hold_overall_metrics_and_baselines_as_floats(tmp_path):
    small = make(tmp_path)
    details = evaluate(small.config, small.store, SNAPSHOT).details
    found = table(small)
    assert details["split"] == "test" and details["edges"] == len(small.edges["test"])
    assert details["metrics"]["filtered_mrr"] == found["all", "both", "filtered_mrr"]["value"]
    assert details["metrics"]["recall@3"] == found["all", "rhs", "recall@3"]["value"]
    assert details["baseline"]["filtered_mrr"] == found["all", "both", "filtered_mrr"]["baseline"]
    assert found["all", "both", "rce"]["baseline"] is None and "rce" not in details["baseline"]
    assert all(isinstance(value, float) for value in details["metrics"].values())


def test_without_test_edges_the_validation_edges_are_ranked_and_it_says_so(tmp_path):
    splits = small_store.edges()
    both = make(tmp_path / "a", {**splits, "test": splits["test"][:0]})
    manifest = evaluate(both.config, both.store, SNAPSHOT)
    assert manifest.details["split"] == "validation"
    assert "validation edges were ranked" in manifest.details["note"]
    assert manifest.details["edges"] == len(splits["validation"])


def test_without_held_out_edges_the_table_is_empty_and_valid_and_it_says_so(tmp_path):
    splits = small_store.edges()
    small = make(tmp_path, {**splits, "test": splits["test"][:0], "validation": splits["test"][:0]})
    manifest = evaluate(small.config, small.store, SNAPSHOT)
    assert manifest.rows == 0 and manifest.schema["value"] == "double"
    assert "nothing was measured" in manifest.details["note"]


def test_a_relation_without_held_out_edges_has_no_rows_and_is_named(tmp_path):
    splits = small_store.edges()
    small = make(tmp_path, {**splits, "test": splits["test"][splits["test"][:, 1] != 1]})
    assert "no held-out edge of follows" in evaluate(small.config, small.store, SNAPSHOT).details["note"]
    assert {key[0] for key in table(small)} == {"likes", "rates", "all"}


def test_recall_ranks_the_whole_catalogue_even_where_ranks_are_against_a_sample(tmp_path):
    whole, sampled = make(tmp_path / "a"), make(tmp_path / "b", candidates=5)
    evaluate(whole.config, whole.store, SNAPSHOT)
    evaluate(sampled.config, sampled.store, SNAPSHOT)
    a, b = table(whole), table(sampled)
    assert a["all", "rhs", "recall@3"] == b["all", "rhs", "recall@3"]
    assert b["all", "both", "raw_mean_rank"]["value"] <= 6 < a["all", "both", "raw_mean_rank"]["value"]


def test_max_edges_bounds_a_relations_edges_by_its_seed(tmp_path):
    small = make(tmp_path / "a", max_edges=7)
    again = make(tmp_path / "b", max_edges=7)
    other = make(tmp_path / "c", max_edges=7, seed=1)
    for each in (small, again, other):
        assert evaluate(each.config, each.store, SNAPSHOT).details["edges"] == 7 * len(RELATIONS)
    assert table(small) == table(again) != table(other)
    assert 1 <= table(small)["likes", "rhs", "recall@3"]["edges"] <= 7


def test_blocks_of_one_edge_give_the_same_table(tmp_path):
    one, many = make(tmp_path / "a", block_size=1), make(tmp_path / "b")
    evaluate(one.config, one.store, SNAPSHOT)
    evaluate(many.config, many.store, SNAPSHOT)
    ours, theirs = table(one), table(many)
    assert {k: r["value"] for k, r in ours.items()} == pytest.approx({k: r["value"] for k, r in theirs.items()})


def test_recall_can_be_left_out(tmp_path):
    small = make(tmp_path, recall_at=[])
    evaluate(small.config, small.store, SNAPSHOT)
    assert not any("recall" in metric for _, _, metric in table(small))


def test_a_model_of_an_earlier_vocabulary_is_refused(tmp_path):
    small = make(tmp_path)
    small_store.write_vocabulary(small.store, "user")
    with pytest.raises(UserError, match=r"before vocabulary/user was made anew.*twhin train"):
        evaluate(small.config, small.store, SNAPSHOT)


def test_a_missing_model_is_refused_with_its_remedy(tmp_path):
    small = make(tmp_path)
    with pytest.raises(UserError, match="twhin train"):
        evaluate(small.config, small.store, "2020-01-01")
