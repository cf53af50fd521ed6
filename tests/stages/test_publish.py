"""Nothing is registered whose vectors or evaluation did not pass their checks; then the catalog shows every table."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa
import pytest
import small_store
from small_store import SNAPSHOT

from twhin_pipeline import tracking
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, Verdict
from twhin_pipeline.vectors.export import export


@pytest.fixture
def run(tmp_path) -> Run:
    """A run whose vectors are written, and whose evaluation has passed its checks."""
    small = small_store.make(tmp_path, config=small_store.config(training={"refit": False}))
    export(small.config, small.store, SNAPSHOT)
    with small.store.replace("evaluation", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table({"relation": ["all"], "metric": ["filtered_mrr"], "value": [0.5]}))
        draft.details = {"metrics": {"filtered_mrr": 0.5, "recall@10": None}}
    small.store.judge(small.store.manifest("evaluation", SNAPSHOT), Verdict("passed", "now"))
    return Run(small.config, "unused", [], small.store, SNAPSHOT)


@pytest.fixture
def registered(monkeypatch) -> list[dict[str, Any]]:
    """What was registered, in place of MLflow's registry."""
    found: list[dict[str, Any]] = []

    def register(store: Store, snapshot: str, metrics: dict[str, float]) -> str:
        found.append(metrics)
        return f"models:/twhin/{len(found)}"

    monkeypatch.setattr(tracking, "run_exists", lambda store, run_id: True)
    monkeypatch.setattr(tracking, "register_model", register)
    return found


def publish(run: Run) -> list[str]:
    said: list[str] = []
    run_stage(run, STAGES["publish"], said.append)
    return said


def test_vectors_that_passed_are_published_with_what_evaluation_measured(run, registered):
    (line,) = publish(run)
    assert registered == [{"filtered_mrr": 0.5}] and "registered models:/twhin/1" in line
    manifest = run.store.manifest("published", SNAPSHOT)
    assert manifest.details["model"] == "models:/twhin/1" and manifest.rows == 0
    assert {"evaluation", "embeddings/user", "embeddings/relations", "twhin_model"} <= set(manifest.parents)
    with duckdb.connect(manifest.details["catalog"], read_only=True) as catalog:
        assert catalog.execute("SELECT count(*) FROM embeddings_user").fetchall() == [(small_store.NUM["user"],)]


def test_vectors_that_fail_a_blocking_check_are_neither_registered_nor_recorded(run, registered):
    made = run.store.manifest("embeddings/user", SNAPSHOT)
    rows = run.store.read("embeddings/user", SNAPSHOT)
    with run.store.replace("embeddings/user", SNAPSHOT, config_hash="test", parents=made.parents) as draft:
        draft.write(rows.slice(1))
    relations = run.store.read("embeddings/relations", SNAPSHOT)
    known = run.store.manifest("embeddings/relations", SNAPSHOT)
    parents = known.parents | run.store.versions(SNAPSHOT, ["embeddings/user"])
    with run.store.replace("embeddings/relations", SNAPSHOT, config_hash="test", parents=parents) as draft:
        draft.write(relations)
        draft.details = known.details
    with pytest.raises(UserError, match="vectors_match_vocabulary of embeddings/user"):
        publish(run)
    assert registered == [] and not run.store.exists("published", SNAPSHOT)


def test_an_evaluation_that_failed_its_gates_is_checked_again_and_holds_the_model_back(run, registered):
    failed = [{"name": "floors_reached", "passed": False, "blocking": True, "finding": ""}]
    run.store.judge(run.store.manifest("evaluation", SNAPSHOT), Verdict("failed", "now", failed))
    with pytest.raises(UserError, match="of evaluation"):
        publish(run)
    assert registered == []


def test_without_its_run_in_mlflow_the_model_is_not_registered_and_a_note_says_so(run):
    assert any("the model is not registered" in line for line in publish(run))
    assert run.store.exists("published", SNAPSHOT) and run.store.fs.exists(run.store.path("catalog.duckdb"))


def test_what_was_published_is_stale_once_its_vectors_are_made_anew(run, registered):
    publish(run)
    assert run.store.stale("published", SNAPSHOT) == []
    export(run.config, run.store, SNAPSHOT)
    assert "embeddings/user" in run.store.stale("published", SNAPSHOT)
