"""Commands that show what is in a store: a table for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pyarrow as pa
import pytest
import yaml

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.results import SCHEMA
from twhin_pipeline.store import Store

SNAPSHOT = "2025-01-01"


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with one small table of each of two snapshots."""
    store = Store(str(tmp_path / "home"))
    for snapshot, rows in (("2024-01-01", 2), (SNAPSHOT, 3)):
        with store.replace("raw_edges", snapshot, config_hash="0") as draft:
            ids = [f"u{i}" for i in range(rows)]
            draft.write(pa.table({"lhs": ids, "rel": ["likes"] * rows, "rhs": ids}))
    with store.replace("evaluation", SNAPSHOT, config_hash="0") as draft:
        rows_of = [
            ("likes", "both", "filtered_mrr", 0.5, 0.25, 10),
            ("likes", "both", "filtered_hits@10", 0.75, 0.5, 10),
            ("all", "both", "filtered_mrr", 0.5, 0.25, 10),
            ("all", "both", "rce", float("nan"), None, 10),
        ]
        names = ["relation", "side", "metric", "value", "baseline", "edges"]
        draft.write(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows_of]))
    return store


def test_config_prints_a_file_that_loads_to_the_same(capsys, tmp_path):
    assert run_arguments(["config", "-c", "debian", "--set", "training.num_epochs=3"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["training"]["num_epochs"] == 3
    (tmp_path / "again.yaml").write_text(text)
    assert run_arguments(["config", "--config", str(tmp_path / "again.yaml")]) == 0
    assert capsys.readouterr().out == text


def test_config_schema_names_every_section(capsys):
    assert run_arguments(["config", "--schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == set(TwhinConfig.model_fields)


def test_metrics_are_json_for_programs_and_a_table_for_people(store, capsys):
    assert run_arguments(["metrics", "--home", store.root, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["snapshot"] == SNAPSHOT
    assert found["metrics"][0] == {
        "relation": "likes", "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.25, "edges": 10,
    }  # fmt: skip
    assert found["metrics"][3]["value"] is None
    assert run_arguments(["metrics", "--home", store.root]) == 0
    shown = capsys.readouterr().out
    # The table is one of an earlier version, which had no other baseline.
    assert ["likes", "10", "*0.500", "0.250", "0.750", "0.500"] in [line.split() for line in shown.splitlines()]
    assert f"Snapshot {SNAPSHOT}, store {store.root}" in shown and "item-kNN" not in shown.splitlines()[3]


def test_metrics_show_every_baseline_the_best_one_marked_and_the_warnings(store, capsys):
    warnings = ["buys: the model's Recall@20 of 0.100 is below ALS's 0.300", "Try: more epochs."]
    rows = [
        {"relation": name, "side": "rhs", "metric": "recall@20", "value": value, "baseline": 0.2, "edges": edges,
         "item_knn": 0.25, "als": 0.3, "compared": value, "compared_edges": edges}
        for name, value, edges in (("views", 0.4, 900), ("buys", 0.1, 300), ("all", 0.35, 1_200))
    ]  # fmt: skip
    of_all = {name: {"recall@20": rows[2][name]} for name in ("item_knn", "als", "compared", "baseline")}
    details = {"metrics": {"recall@20": 0.35}, **of_all, "edges": 1_200, "compared_edges": 1_200, "warnings": warnings}
    with store.replace("evaluation", SNAPSHOT, config_hash="0") as draft:
        draft.write(pa.Table.from_pylist(rows, schema=SCHEMA))
        draft.details = details
    assert run_arguments(["metrics", "--home", store.root]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["relation", "edges", "recall@20", "popular", "item-kNN", "ALS"] in lines
    assert ["views", "900", "*0.400", "0.200", "0.250", "0.300"] in lines
    assert ["buys", "300", "0.100", "0.200", "0.250", "*0.300"] in lines
    assert ["recall@20", "rhs", "0.350", "0.200", "0.250", "0.300"] in lines, "all relations"
    assert all(f"warning: {line}" in shown for line in warnings)
    assert run_arguments(["metrics", "--home", store.root, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["warnings"] == warnings and found["metrics"][1]["als"] == 0.3


def test_metrics_of_a_sample_have_the_models_figure_of_the_same_edges_beside(store, capsys):
    row = {"relation": "buys", "side": "rhs", "metric": "recall@20", "value": 0.4, "baseline": 0.2, "edges": 900,
           "item_knn": 0.3, "als": 0.41, "compared": 0.42, "compared_edges": 300}  # fmt: skip
    with store.replace("evaluation", SNAPSHOT, config_hash="0") as draft:
        draft.write(pa.Table.from_pylist([row], schema=SCHEMA))
        draft.details = {"edges": 900, "compared_edges": 300}
    assert run_arguments(["metrics", "--home", store.root]) == 0
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    assert ["relation", "edges", "recall@20", "popular", "sample", "item-kNN", "ALS"] in lines
    assert ["buys", "900", "*0.400", "0.200", "0.420", "0.300", "0.410"] in lines
    assert "item-kNN and ALS rank 300 of the edges; sample = the model on these" in shown


def test_sql_sees_the_tables_of_all_snapshots_or_of_one(store, capsys):
    query = "select snapshot, count(*) as n from raw_edges group by all order by 1"
    assert run_arguments(["sql", query, "--home", store.root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"snapshot": "2024-01-01", "n": 2}, {"snapshot": SNAPSHOT, "n": 3}]
    arguments = ["sql", "select count(*) as n from raw_edges", "--home", store.root, "--snapshot", SNAPSHOT]
    assert run_arguments([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"n": 3}]
    assert run_arguments(["sql", "select lhs from raw_edges order by 1", "--home", store.root, "-s", SNAPSHOT]) == 0
    assert "u2" in capsys.readouterr().out


def test_sql_prints_csv(store):
    query = "select lhs, rel from raw_edges order by lhs"
    command = [sys.executable, "-m", "twhin_pipeline.cli", "sql", query, "--home", store.root, "-s", SNAPSHOT, "--csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.replace('"', "").splitlines() == ["lhs,rel", "u0,likes", "u1,likes", "u2,likes"]


def test_sql_prints_lists_as_csv_too(store):
    query = "select [1, 2] as a, {'x': 'y,z'} as s, 3 as \"b \"\"c\""
    command = [sys.executable, "-m", "twhin_pipeline.cli", "sql", query, "--home", store.root, "--csv"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = list(csv.reader(done.stdout.splitlines()))
    assert rows == [["a", "s", 'b "c'], ["[1, 2]", "{'x': 'y,z'}", "3"]] and done.stderr == ""


def test_an_unknown_table_in_sql_is_told_with_those_there(store, capsys):
    assert run_arguments(["sql", "select * from nosuch", "--home", store.root]) == 2
    told = capsys.readouterr().err
    assert "nosuch" in told and "raw_edges" in told and store.root in told and len(told.splitlines()) == 1


def test_a_mistake_in_sql_is_one_line(store, capsys):
    assert run_arguments(["sql", "select nosuch\nfrom raw_edges", "--home", store.root]) == 2
    error = capsys.readouterr().err
    assert error.startswith("twhin: SQL: Binder Error") and error.count("\n") == 1
