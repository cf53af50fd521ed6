"""A stage as a step of Dagster: it runs on what earlier stages found, and a user's mistake fails it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster_tables import SNAPSHOT, put

from twhin_pipeline._dagster.assets import execution, steps
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import Stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store

STAR: dict[str, Any] = {
    "source": {"path": "edges.parquet"},
    "model": {
        "embeddings": {"tables": [{"name": "user"}]},
        "relations": [{"name": "*", "lhs": "user", "rhs": "user"}],
    },
}


def materialize(stage: Stage, folder: Path) -> dg.ExecuteInProcessResult:
    """Run a stage as a step, on a store in `folder`; its page shows how many rows a table has."""
    (folder / "c.yaml").write_text(json.dumps(STAR))
    config = parse_config(STAR)
    specs = [
        steps.spec(table, stage, config, group="g", description="A table.", code="words", deps=[])
        for table in stage.tables(config)
    ]
    partitions = dg.StaticPartitionsDefinition([SNAPSHOT])
    made = steps.make(stage, config, partitions, specs=specs, page=lambda step, manifest: {"headline": manifest.rows})
    resources: dict[str, Any] = {
        "configuration": ConfigurationResource(path=str(folder / "c.yaml")),
        "store": StoreResource(root=str(folder / "home")),
        "tracking": TrackingResource(),
        "launcher": LauncherResource(),
    }
    return dg.materialize(made, partition_key=SNAPSHOT, resources=resources, raise_on_error=False)


def count_relations(run: Run) -> None:
    with run.store.replace("published", run.snapshot, config_hash="c") as draft:
        draft.write(pa.table({"relation": run.config.model.relation_names}))


READER = Stage("reads", "", count_relations, ("published",), ("raw_edges",))


def test_a_step_gets_the_relations_that_ingest_found_and_shows_its_headline_first(tmp_path):
    put(Store(str(tmp_path / "home")), "raw_edges", details={"relations": ["b", "a"]})
    done = materialize(READER, tmp_path)
    assert done.success
    (event,) = done.get_asset_materialization_events()
    shown = event.materialization.metadata
    assert list(shown)[:2] == ["headline", "dagster/row_count"] and shown["headline"].value == 2


def test_a_step_without_edges_to_find_relations_in_says_what_makes_them(tmp_path):
    done = materialize(READER, tmp_path)
    (failure,) = [event.step_failure_data for event in done.all_events if event.is_step_failure]
    assert not done.success and "twhin ingest" in str(failure.error)


def test_a_stage_that_has_nothing_to_do_shows_why(tmp_path):
    put(Store(str(tmp_path / "home")), "raw_edges", details={"relations": ["a"]})
    stage = Stage("idle", "", count_relations, ("published",), ("raw_edges",), (), lambda run: "it is Sunday")
    (event,) = materialize(stage, tmp_path).get_asset_materialization_events()
    assert event.materialization.metadata["left_out"].value == "it is Sunday"


def test_a_users_mistake_fails_the_step_once_with_its_one_message():
    with pytest.raises(dg.Failure, match=r"^mend it$") as raised, execution.mistakes():
        raise UserError("mend it")
    assert raised.value.allow_retries is False
