"""What a person reads of an evaluation is what each relation is for: its replaced sides."""

import pyarrow as pa

from twhin_pipeline.figures import chief_rows, told_sides


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
        ("all", "filtered_mrr"): ("replaced", 0.33),
        ("all", "recall@20"): ("rhs", 0.7),
    }


def test_all_relations_together_are_the_overall_metrics_not_the_rows_of_both_sides():
    assert figures(DETAILS | {"sides": "rhs"})["all", "filtered_mrr"] == ("rhs", 0.33)
    assert figures(DETAILS | {"sides": "rhs"})["follows", "filtered_mrr"] == ("rhs", 0.2)
    assert figures(DETAILS)["follows", "filtered_mrr"] == ("both", 0.1 + 0.05), "evaluations of earlier versions"


def test_the_heading_says_which_sides():
    assert told_sides({"sides": "rhs"}) == "tails predicted"
    assert told_sides({}) == "both sides"
    assert told_sides({"sides": {"a": "lhs", "b": "both"}}) == "each relation's replaced sides"
