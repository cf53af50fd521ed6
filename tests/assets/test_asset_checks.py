"""Checks in Dagster: prepared once a table, on the relations that were found."""

from __future__ import annotations

import json
from typing import Any

import dagster as dg
import pyarrow as pa
from dagster_tables import SNAPSHOT

from twhin_pipeline._dagster.assets import checks
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.checks import check_views
from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.store import Store

STAR = {
    "source": {"path": "edges.parquet"},
    "model": {
        "embeddings": {"tables": [{"name": "user"}]},
        "relations": [{"name": "*", "lhs": "user", "rhs": "user"}],
    },
}


def test_checks_get_the_relations_that_were_found_and_share_one_preparation_a_table(tmp_path, monkeypatch):
    """Each check once opened a database with all views of its own."""
    store = Store(str(tmp_path / "home"))
    prepared = []
    prepare = check_views.prepare

    def watched(config: TwhinConfig, *where: Any) -> Any:
        prepared.append(config.model.relation_names)
        return prepare(config, *where)

    monkeypatch.setattr(check_views, "prepare", watched)
    with store.replace("raw_edges", SNAPSHOT, config_hash="c") as draft:
        columns = {"lhs": ["u", "v"], "rel": ["a", "b"], "rhs": ["v", "u"], "weight": [1.0, 1.0]}
        draft.write(pa.table(columns))
        draft.details = {"relations": ["b", "a"]}
    (tmp_path / "c.yaml").write_text(json.dumps(STAR))
    (definition,) = checks.make("ingest_checks", parse_config(STAR), ["raw_edges", "raw_edges_rejected"])
    resources: dict[str, Any] = {
        "configuration": ConfigurationResource(path=str(tmp_path / "c.yaml")),
        "store": StoreResource(root=store.root),
    }
    definitions = dg.Definitions(asset_checks=[definition], resources=resources)
    with dg.DagsterInstance.ephemeral() as instance:
        done = definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance)
    assert done.success and prepared == [["a", "b"]]
    evaluated = done.get_asset_check_evaluations()
    assert len(evaluated) == len(list(definition.check_specs)) and all(one.passed for one in evaluated)
    verdict = store.verdict("raw_edges", SNAPSHOT, store.manifest("raw_edges", SNAPSHOT).version)
    assert verdict is not None and verdict.status == "passed"


def test_tables_without_checks_have_no_step_of_checks():
    assert checks.make("publish_checks", parse_config(STAR), ["published"]) == []
