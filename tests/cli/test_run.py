"""Commands that make tables: each says what it made and runs its checks."""

from __future__ import annotations

import json

import pytest
import yaml
from edge_files import make_config, write

from twhin_pipeline import pipeline
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.views import summary

SNAPSHOT = "2025-01-01"


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


def test_a_run_as_json_prints_nothing_else_on_standard_output(tmp_path, capsys, monkeypatch):
    def fake(config, config_path, overrides, store, snapshot, say, skip_unchanged):
        say("train  1.0 s")
        print("a line of a rank")
        return pipeline.Run(config, config_path, overrides, store, snapshot)

    monkeypatch.setattr(pipeline, "run", fake)
    monkeypatch.setattr(summary, "as_dict", lambda config, store, snapshot, config_path: {"snapshot": snapshot})
    config = make_config(write(tmp_path / "e.parquet", [("a", "fav", "x")]))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    arguments = ["-c", str(tmp_path / "c.yaml"), "--home", str(tmp_path / "home"), "-s", SNAPSHOT]
    assert run_arguments(["run", *arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"snapshot": SNAPSHOT}
    assert "train  1.0 s\na line of a rank\n" in captured.err and f"store {tmp_path}" in captured.err
