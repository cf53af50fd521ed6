"""A step refuses tables that do not fit each other, and its code version covers every module that it runs."""

from __future__ import annotations

import shutil

import pytest
from dagster_tables import SNAPSHOT, put

from twhin_pipeline._dagster.assets import provenance
from twhin_pipeline.errors import UserError


def test_fresh_tables_are_taken(store):
    store.refuse_stale(SNAPSHOT, ["training_set/positives"])


def test_a_table_made_from_a_replaced_one_is_refused_with_the_remedy(store):
    put(store, "vocabulary/user", "raw_edges")
    with pytest.raises(UserError, match=r"training_set/positives .* stale: vocabulary/user .*`twhin sample --snapshot"):
        store.refuse_stale(SNAPSHOT, ["training_set/positives"])


def test_staleness_further_up_is_found_too(store):
    put(store, "raw_edges")
    put(store, "training_set/positives", "raw_edges", "vocabulary/user")
    with pytest.raises(UserError, match=r"vocabulary/user .* stale: raw_edges .*twhin vocabulary"):
        store.refuse_stale(SNAPSHOT, ["training_set/positives"])


def test_a_code_version_changes_with_the_code_and_with_nothing_else():
    assert provenance.code("graph.raw_edges") == provenance.code("graph.raw_edges") != provenance.code("graph.source")


def test_a_code_version_covers_every_module_that_the_stage_imports(monkeypatch, tmp_path):
    shutil.copytree(provenance.ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ENGINE", tmp_path / "engine")
    before = {stage: provenance.code(stage) for stage in ("training.train", "graph.raw_edges")}
    for far in (
        "model/losses",
        "sharding/row_optimizers",
        "training/warm_start",
        "store/store",
    ):  # imported by modules that `train` imports
        path = tmp_path / "engine" / f"{far}.py"
        path.write_text(path.read_text() + "# changed\n")
        after = provenance.code("training.train")
        assert after != before["training.train"]
        before["training.train"] = after
        if far.startswith("model"):
            assert provenance.code("graph.raw_edges") == before["graph.raw_edges"]
