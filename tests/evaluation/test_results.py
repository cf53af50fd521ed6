"""What a person reads of an evaluation is what each relation is for: its corrupted sides."""

import pyarrow as pa

from twhin_pipeline.evaluation.results import SCHEMA, chief_metric, chief_rows, comparisons, sides_title


def table(rows: list[tuple]) -> pa.Table:
    names = ("relation", "side", "metric", "value", "baseline", "edges")
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])


ROWS = [
    (relation, side, "filtered_mrr", value, 0.01, 5)
    for relation, base in (("follows", 0.1), ("visits", 0.4), ("all", 0.9))
    for side, value in (("lhs", base), ("rhs", base + 0.1), ("both", base + 0.05))
] + [("visits", "rhs", "recall@20", 0.7, 0.2, 5), ("all", "rhs", "recall@20", 0.7, 0.2, 5)]
DETAILS = {"metrics": {"filtered_mrr": 0.33, "recall@20": 0.7}, "baseline": {"filtered_mrr": 0.02}, "edges": 10}


def figures(details: dict) -> dict:
    rows = chief_rows(table(ROWS), details).to_pylist()
    return {(row["relation"], row["metric"]): (row["side"], row["value"]) for row in rows}


def test_a_relation_shows_the_side_that_it_replaces_and_retrieval_its_tails():
    found = figures(DETAILS | {"sides": {"follows": "both", "visits": "rhs"}})
    assert found == {
        ("follows", "filtered_mrr"): ("both", 0.1 + 0.05),
        ("visits", "filtered_mrr"): ("rhs", 0.4 + 0.1),
        ("visits", "recall@20"): ("rhs", 0.7),
        ("all", "filtered_mrr"): ("corrupted", 0.33),
        ("all", "recall@20"): ("rhs", 0.7),
    }


def test_all_relations_together_are_the_overall_metrics_not_the_rows_of_both_sides():
    assert figures(DETAILS | {"sides": "rhs"})["all", "filtered_mrr"] == ("rhs", 0.33)
    assert figures(DETAILS | {"sides": "rhs"})["follows", "filtered_mrr"] == ("rhs", 0.2)
    assert figures(DETAILS)["follows", "filtered_mrr"] == ("both", 0.1 + 0.05), "evaluations of earlier versions"


def test_the_heading_says_which_sides():
    assert sides_title({"sides": "rhs"}) == "tails predicted"
    assert sides_title({}) == "both sides"
    assert sides_title({"sides": {"a": "lhs", "b": "both"}}) == "each relation's corrupted sides"


def test_a_table_of_an_earlier_version_has_the_later_columns_empty():
    found = chief_rows(table(ROWS), DETAILS)
    assert found.schema == SCHEMA
    assert found["item_knn"].null_count == found["als"].null_count == found["compared"].null_count == found.num_rows


def test_the_chief_metric_is_recall_of_the_longest_list_else_mrr():
    assert chief_metric(["auc", "recall@10", "recall@9", "repeat_recall@50"]) == "recall@10"
    assert chief_metric(["auc", "filtered_mrr", "repeat_recall@50"]) == "filtered_mrr"


def test_the_model_is_beside_the_baselines_that_were_measured_the_largest_relation_first_and_all_last():
    columns = (*SCHEMA.names[:6], "als", "compared", "compared_edges")
    rows = [
        ("buy", "rhs", "recall@20", 0.3, 0.1, 300, 0.5, 0.31, 200),
        ("view", "rhs", "recall@20", 0.4, 0.2, 900, 0.3, 0.41, 600),
        ("rare", "rhs", "recall@20", 0.4, None, 9, None, None, None),
        ("view", "both", "filtered_mrr", 0.1, 0.2, 900, None, None, None),
    ]
    given = pa.Table.from_pylist([dict(zip(columns, row, strict=True)) for row in rows])
    details = {
        "metrics": {"recall@20": 0.35, "filtered_mrr": 0.1}, "baseline": {"recall@20": 0.15},
        "als": {"recall@20": 0.36}, "compared": {"recall@20": 0.34}, "edges": 1_209, "compared_edges": 800,
    }  # fmt: skip
    view, buy, rare, every = comparisons(given, details)
    assert [one.relation for one in (view, buy, rare, every)] == ["view", "buy", "rare", "all"]
    assert buy.baselines == {"popularity": 0.1, "als": 0.5} and (buy.model("popularity"), buy.model("als")) == (
        0.3,
        0.31,
    )
    assert (view.best, buy.best, rare.best, every.best) == ("model", "als", "model", "als")
    assert list(buy.better) == ["als"] and not view.better and not rare.better
    assert buy.sampled and not rare.sampled
    assert (every.value, every.baselines, every.compared_edges) == (0.35, {"popularity": 0.15, "als": 0.36}, 800)
    assert [one.relation for one in comparisons(given, details, "filtered_mrr")] == ["view", "all"]
