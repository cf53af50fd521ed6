"""The command line: quick to start, one line and exit code 2 on a mistake, and the same chain as its stages."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from edge_files import make_config, write

from twhin_pipeline import cli, pipeline
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.results import SCHEMA
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parents[2]
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


def test_help_is_quick_and_loads_nothing_slow():
    code = (
        "import sys; from twhin_pipeline.cli import run_arguments; run_arguments(['--help']);"
        "slow = {'torch', 'duckdb', 'mlflow', 'pandas', 'pyarrow', 'dagster', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'loaded {slow}' if slow else 0)"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 3  # about 0.2 s; the rest is for a busy machine


def test_the_command_alone_shows_its_help_and_every_line_of_it_is_whole():
    done = subprocess.run([sys.executable, "-m", "twhin_pipeline.cli"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("Usage: twhin") and "  init        Write a configuration for your own files." in lines
    assert len(lines) > 20 and "..." not in done.stdout.split("Commands:")[1]


def test_the_version_is_that_of_the_package(capsys):
    assert run_arguments(["--version"]) == 0
    assert capsys.readouterr().out == f"twhin-pipeline {metadata.version('twhin-pipeline')}\n"


def test_every_command_is_there_and_explains_itself(capsys):
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    stages = {"ingest", "vocabulary", "sample", "train", "evaluate", "export"}
    assert (
        stages | {"init", "run", "metrics", "neighbors", "recommend", "sql", "plan", "generate", "doctor", "config"}
        <= commands
    )
    for command in sorted(commands):
        assert run_arguments([command, "--help"]) == 0
        assert "Usage: twhin" in capsys.readouterr().out


def test_stage_commands_are_the_stages_of_the_chain_in_order():
    assert {name: stage.summary for name, stage in pipeline.STAGES.items()} == cli.STAGE_HELP
    assert list(pipeline.STAGES) == list(cli.STAGE_HELP)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nosuch"], "No such command"),
        (["neighbors"], "Missing argument"),
        (["run", "--nosuch"], "No such option"),
        (["plan", "--world-size", "0"], "--world-size"),
        (["config", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["config", "-c", "debian", "--set", "training.num_epoch=3"], "did you mean 'num_epochs'"),
        (["config", "-c", "debian", "--set", "nothing"], "must look like training.num_epochs=3"),
        (["run", "-c", "debian", "--snapshot", "yesterday"], "must be a date, YYYY-MM-DD"),
        (
            ["ingest", "-c", "debian", "--set", "source.path=absent-{snapshot}.parquet"],
            "absent-{snapshot}.parquet; correct the path, or pass --snapshot",
        ),
        (["ingest", "-c", "debian", "--snapshot", "1999-01-01"], "no file for snapshot 1999-01-01"),
        (["metrics"], "there is no evaluation yet; make one with `twhin run`"),
        (["neighbors", "package", "vim"], "there is no embeddings/relations yet"),
        (["evaluate", "-c", "debian"], "make it with `twhin"),
        (["summary"], "there is no embeddings/relations yet"),
        (["plan", "-c", "debian"], "--rows package="),
        (["generate"], "give the path of the Parquet file"),
        (["generate", "graph.csv"], "must be a local path that ends in .parquet"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    assert run_arguments(arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.startswith("twhin: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_mistake_shows_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "twhin_pipeline.cli", "metrics", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.startswith("twhin: ")


def test_an_error_that_is_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("twhin_pipeline.operations.doctor.examine", lambda store: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_arguments(["doctor"])


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


def test_a_stage_says_what_it_made_and_runs_its_checks(tmp_path, capsys):
    """The blocking check on `raw_edges` ends the command when too many rows were rejected."""
    edges = tmp_path / "edges.csv"
    edges.write_text("lhs,rel,rhs\na,likes,x\nb,likes,y\nb,hates,y\n")
    data = {
        "source": {"path": str(edges)},
        "model": {
            "embeddings": {"tables": [{"name": "user", "embedding_dim": 4}, {"name": "item", "embedding_dim": 4}]},
            "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
        },
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(data))
    home = ["--config", str(config), "--home", str(tmp_path / "home"), "--snapshot", SNAPSHOT]
    assert run_arguments(["ingest", *home]) == 2
    assert "edges_rejected_share" in capsys.readouterr().err
    assert run_arguments(["ingest", *home, "--set", "source.max_rejected_share=0.5"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("ingest") and "raw_edges 2 rows, raw_edges_rejected 1 rows" in shown


def test_a_stage_refuses_tables_that_no_longer_fit_each_other(tmp_path, capsys):
    config = make_config(write(tmp_path / "e.parquet", [("a", "fav", "x"), ("b", "reply", "y"), ("a", "follows", "b")]))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    arguments = ["-c", str(tmp_path / "c.yaml"), "--home", str(tmp_path / "home"), "-s", SNAPSHOT]
    for stage in ("ingest", "vocabulary", "sample", "vocabulary"):
        assert run_arguments([stage, *arguments]) == 0
    assert run_arguments(["train", *arguments]) == 2
    told = capsys.readouterr().err
    assert "training_set/positives" in told and "is stale" in told and f"`twhin sample --snapshot {SNAPSHOT}`" in told


def test_an_empty_query_and_a_home_that_is_a_file_are_told_in_one_line(tmp_path, capsys):
    assert run_arguments(["sql", " ; ", "--home", str(tmp_path)]) == 2
    assert "the query is empty" in capsys.readouterr().err
    config = make_config(write(tmp_path / "e.parquet", [("a", "fav", "x")]))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    (tmp_path / "file").write_text("no folder")
    home = str(tmp_path / "file")
    assert run_arguments(["ingest", "-c", str(tmp_path / "c.yaml"), "--home", home, "-s", SNAPSHOT]) == 2
    told = capsys.readouterr().err
    assert home in told and "--home" in told and len(told.splitlines()) == 1


@pytest.fixture
def found(tmp_path) -> list[str]:
    """The flags of a small source all of whose relations are found, in an empty store."""
    write(tmp_path / "e.parquet", [("a", "/r/likes", "b"), ("b", "/r/knows", "a")])
    table = {"name": "user", "embedding_dim": 8}
    star = {"name": "*", "lhs": "user", "rhs": "user"}
    data = {
        "source": {"path": str(tmp_path / "e.parquet"), "snapshots": [SNAPSHOT]},
        "model": {"embeddings": {"tables": [table]}, "relations": [star]},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    return ["--config", str(tmp_path / "c.yaml"), "--home", str(tmp_path / "home")]


def test_relations_of_the_source_need_no_listing_at_the_command_line(found, capsys):
    for command in ("ingest", "vocabulary"):
        assert run_arguments([command, *found]) == 0
    assert run_arguments(["plan", *found, "--json"]) == 0
    assert '"rows": 2' in capsys.readouterr().out
    assert run_arguments(["ingest", *found, "--set", "model.relations.*.operator=rotation"]) == 0


def test_a_plan_needs_no_edges_for_relations_that_are_yet_to_be_found(found, capsys):
    assert run_arguments(["plan", *found, "--rows", "user=100", "--json"]) == 0
    assert run_arguments(["vocabulary", *found]) == 2
    assert "twhin ingest" in capsys.readouterr().err


def test_edges_cannot_be_generated_like_relations_that_are_yet_to_be_found(found, capsys):
    assert run_arguments(["generate", "--like", found[1]]) == 2
    assert "list its relations" in capsys.readouterr().err
