"""Nothing is registered whose vectors or evaluation did not pass their checks; then the catalog shows every table."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import small_store
from small_store import SNAPSHOT

from twhin_pipeline import load_model, tracking
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, Verdict, releases
from twhin_pipeline.vectors import compatibility
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
    monkeypatch.setattr(tracking, "set_champion", lambda store, uri: None)
    return found


def publish(run: Run) -> list[str]:
    """Compare, publish and decide, as the chain does; return what was said of the publication."""
    said: dict[str, list[str]] = {}
    for name in ("compare", "publish", "decide"):
        run_stage(run, STAGES[name], said.setdefault(name, []).append)
    return said["publish"]


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


def test_the_registrys_champion_is_what_was_published_last(run, registered, monkeypatch):
    champions = []
    monkeypatch.setattr(tracking, "set_champion", lambda store, uri: champions.append(uri))
    publish(run)
    publish(run)
    assert champions == ["models:/twhin/1", "models:/twhin/2"]


def test_a_champion_that_cannot_be_moved_is_a_note_and_the_release_is_current(run, registered, monkeypatch):
    def away(store: Store, uri: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tracking, "set_champion", away)
    publish(run)
    [note] = run.store.manifest("promotion", SNAPSHOT).details["notes"]
    assert re.match(r"the alias champion was not moved to models:/twhin/1: .*no route", note)
    assert releases.current(run.store).model_uri == "models:/twhin/1"


def test_a_release_maps_its_vectors_into_the_space_of_the_one_before(run, registered):
    publish(run)
    first = releases.current(run.store)
    publish(run)
    details = run.store.manifest("published", SNAPSHOT).details
    assert (details["compatible_with"], details["compatibility"]) == (first.name, "linear")
    rows = {row["entity"]: row for row in run.store.read("published", SNAPSHOT).to_pylist()}
    assert set(rows) == {"user", "item"} and rows["item"]["distance"] < 0.1
    own, mapped = load_model(run.store.root), load_model(run.store.root, compatible_with=first.name)
    ids = small_store.ids("item")[:5]
    found = mapped.get_embedding("item", ids)
    np.testing.assert_allclose(found, own.get_embedding("item", ids), atol=0.05)  # the same vectors, but for the ridge
    assert found.dtype == np.float32 and not np.array_equal(found, own.get_embedding("item", ids))
    assert mapped.neighbors("item", ids[0], 3) == own.neighbors("item", ids[0], 3)


def test_the_release_that_a_consumer_was_trained_on_needs_no_map(run, registered):
    publish(run)
    publish(run)
    current = releases.current(run.store)
    ids = small_store.ids("item")[:5]
    own, same = load_model(run.store.root), load_model(run.store.root, compatible_with=current.name)
    np.testing.assert_array_equal(same.get_embedding("item", ids), own.get_embedding("item", ids))
    with pytest.raises(UserError, match="unknown release 'neverwas'"):
        load_model(run.store.root, compatible_with="neverwas")


def test_a_later_release_has_no_map_and_the_message_says_where_maps_lead(run, registered):
    publish(run)
    publish(run)
    first, second = (releases.read(run.store, name) for name in releases.names(run.store))
    with pytest.raises(UserError, match=f"no map leads from release {first.name} to {second.name}"):
        compatibility.maps_into(run.store, first, second.name)
    run.store.remove(run.store.path("releases", f"{first.name}.json"))
    publish(run)
    last = releases.names(run.store)[-1]
    with pytest.raises(UserError, match=f"before {second.name} were removed; there are maps into {second.name}"):
        compatibility.maps_into(run.store, replace(releases.read(run.store, last), name="other"), last)


def test_without_maps_a_release_says_so_to_who_asks_for_one(run, registered):
    publish(run)
    first = releases.current(run.store)
    export_section = run.config.export.model_copy(update={"compatibility": "none"})
    publish(replace(run, config=run.config.model_copy(update={"export": export_section})))
    assert run.store.manifest("published", SNAPSHOT).rows == 0
    with pytest.raises(UserError, match=f"no map leads .* to {first.name}"):
        load_model(run.store.root, compatible_with=first.name)


def test_an_earlier_release_that_cannot_be_read_does_not_hold_the_new_one_back(run, registered):
    publish(run)
    first = releases.current(run.store)
    gone = run.store.path("embeddings/user", SNAPSHOT, first.tables["embeddings/user"])
    export(run.config, run.store, SNAPSHOT)
    shutil.rmtree(gone)
    with pytest.warns(UserWarning, match=f"no maps into the space of {first.name}"):
        publish(run)
    assert releases.current(run.store).name != first.name
