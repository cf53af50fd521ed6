"""The evaluation's page: the model's figures first, beside every baseline's, and the warnings."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from dagster_tables import SNAPSHOT

from twhin_pipeline._dagster.assets import evaluation


def test_the_evaluations_page_shows_retrieval_beside_ranks(store):
    row = {"relation": "all", "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.1, "edges": 9}
    recall = {**row, "side": "rhs", "metric": "recall@10", "value": 0.4, "baseline": 0.2}
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist([row, {**row, "side": "rhs", "value": 0.7}, recall]))
        metrics = {"filtered_mrr": 0.5, "recall@10": 0.4}
        draft.details = {"sides": "both", "edges": 9, "metrics": metrics, "baseline": {"recall@10": 0.2}}
    shown = evaluation.measured(store, store.manifest("evaluation", SNAPSHOT))
    assert (shown["filtered_mrr"], shown["recall@10"], shown["baseline_recall@10"]) == (0.5, 0.4, 0.2)
    assert "recall@10 of most popular" in shown["relations"].records[0].data
    assert list(shown)[:2] == ["filtered_mrr", "recall@10"], "the model's figures come first"


def test_the_evaluations_page_shows_every_baseline_as_numbers_and_in_the_table_and_the_warnings(store):
    row = {"relation": "likes", "side": "rhs", "metric": "recall@10", "value": 0.4, "baseline": 0.2, "edges": 9,
           "item_knn": 0.3, "als": 0.5, "compared": 0.41, "compared_edges": 6}  # fmt: skip
    overall = {name: {"recall@10": row[name]} for name in ("baseline", "item_knn", "als", "compared")}
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist([row, {**row, "relation": "all"}]))
        draft.details = {
            "sides": "both", "edges": 9, "compared_edges": 6, "metrics": {"recall@10": 0.4}, **overall,
            "warnings": ["likes: below ALS's 0.500", "Try: more."], "als_settings": {"a → b": {"alpha": 20}},
        }  # fmt: skip
    shown = evaluation.measured(store, store.manifest("evaluation", SNAPSHOT))
    names = ("baseline_recall@10", "item_knn_recall@10", "als_recall@10", "compared_recall@10")
    assert [shown[name] for name in names] == [0.2, 0.3, 0.5, 0.41] and all(type(shown[n]) is float for n in names)
    head = shown["relations"].records[0].data
    assert [f"recall@10 of {name}" in head for name in ("most popular", "item-kNN", "ALS")] == [True] * 3
    assert shown["warnings"].value == "- likes: below ALS's 0.500\n- Try: more."
    assert shown["als_settings"].value == {"a → b": {"alpha": 20}}
    assert "![Recall@10 of the model" in shown["model_beside_baselines"].value
    assert Path(shown["model_beside_baselines_large"].value).read_bytes().startswith(b"\x89PNG")


def test_the_evaluations_page_shows_all_relations_together_and_then_the_largest(store):
    rows = [
        {"relation": name, "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.1, "edges": edges}
        for name, edges in [*((f"/r/{i:03d}", i) for i in range(237)), ("all", 9_000)]
    ]
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist(rows))
        draft.details = {"sides": "both", "edges": 9_000, "metrics": {"filtered_mrr": 0.5}, "baseline": {}}
    shown = evaluation.measured(store, store.manifest("evaluation", SNAPSHOT))
    names = [record.data["relation"] for record in shown["relations"].records]
    assert names[:3] == ["all", "/r/236", "/r/235"]
    assert names[-1] == "… and 218 more" and len(names) == 21
