"""Adapters between the pipeline and Dagster: staleness, mistakes, metadata, the launcher, schedules and sensors."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest

from twhin_pipeline._dagster.assets import automation, checks, evaluation, provenance, stage
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.pipes import as_metadata
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.checks.checks import CheckResult
from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

SNAPSHOT = "2025-01-01"


def put(store: Store, asset: str, *parents: str, details: dict[str, Any] | None = None) -> None:
    versions = store.versions(SNAPSHOT, parents)
    with store.replace(asset, SNAPSHOT, config_hash="c", parents=versions) as draft:
        draft.write(pa.table({"row": [1, 2], "name": ["a", "b"]}))
        draft.details = details or {}


@pytest.fixture
def store(tmp_path) -> Store:
    """Three tables, each made from the one before."""
    store = Store(str(tmp_path / "home"))
    put(store, "raw_edges")
    put(store, "vocabulary/user", "raw_edges")
    put(store, "training_set/positives", "raw_edges", "vocabulary/user")
    return store


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


def test_the_evaluations_page_shows_retrieval_beside_ranks(store):
    row = {"relation": "all", "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.1, "edges": 9}
    recall = {**row, "side": "rhs", "metric": "recall@10", "value": 0.4, "baseline": 0.2}
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist([row, {**row, "side": "rhs", "value": 0.7}, recall]))
        metrics = {"filtered_mrr": 0.5, "recall@10": 0.4}
        draft.details = {"sides": "both", "edges": 9, "metrics": metrics, "baseline": {"recall@10": 0.2}}
    shown = evaluation._metadata(store, store.manifest("evaluation", SNAPSHOT))
    assert (shown["filtered_mrr"], shown["recall@10"], shown["baseline_recall@10"]) == (0.5, 0.4, 0.2)
    assert "recall@10 of most popular" in shown["relations"].value


def test_the_evaluations_page_shows_every_baseline_as_numbers_and_in_the_table_and_the_warnings(store):
    row = {"relation": "likes", "side": "rhs", "metric": "recall@10", "value": 0.4, "baseline": 0.2, "edges": 9,
           "item_knn": 0.3, "als": 0.5, "compared": 0.41, "compared_edges": 6}  # fmt: skip
    overall = {name: {"recall@10": row[name]} for name in ("baseline", "item_knn", "als", "compared")}
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist([row, {**row, "relation": "all"}]))
        draft.details = {
            "sides": "both", "edges": 9, "compared_edges": 6, "metrics": {"recall@10": 0.4}, **overall,
            "warnings": ["likes: below ALS's 0.500", "Try: more."], "als_settings": {"a → b": {"alpha": 20}},
        }  # fmt: skip
    shown = evaluation._metadata(store, store.manifest("evaluation", SNAPSHOT))
    names = ("baseline_recall@10", "item_knn_recall@10", "als_recall@10", "compared_recall@10")
    assert [shown[name] for name in names] == [0.2, 0.3, 0.5, 0.41] and all(type(shown[n]) is float for n in names)
    head = shown["relations"].value.splitlines()[0]
    assert [f"recall@10 of {name}" in head for name in ("most popular", "item-kNN", "ALS")] == [True] * 3
    assert shown["warnings"].value == "- likes: below ALS's 0.500\n- Try: more."
    assert shown["als_settings"].value == {"a → b": {"alpha": 20}}
    assert "![Recall@10 of the model" in shown["model_beside_baselines"].value


def test_a_users_mistake_fails_the_step_once_with_its_one_message():
    with pytest.raises(dg.Failure, match=r"^mend it$") as raised, stage.mistakes():
        raise UserError("mend it")
    assert raised.value.allow_retries is False


def test_every_table_shows_rows_columns_size_place_and_preview(store):
    shown = stage.table_metadata(store, store.manifest("vocabulary/user", SNAPSHOT))
    assert shown["dagster/row_count"] == 2
    assert [column.name for column in shown["dagster/column_schema"].columns] == ["row", "name"]
    assert "| 1 | a |" in shown["preview"].value
    assert shown["size_mib"] > 0 and shown["path"].path.startswith(store.root)


def test_what_a_stage_counted_becomes_numbers_and_tables():
    shown = stage.counts(
        {"edges": 3, "by_relation": {"fav": 2}, "plan": "a\nb", "none": None, "hidden": 1}, leave_out=["hidden"]
    )
    assert (
        shown["edges"] == 3 and "| fav | 2 |" in shown["by_relation"].value and "```\na\nb\n```" in shown["plan"].value
    )
    assert not {"none", "hidden"} & set(shown)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (float("nan"), {"raw_value": "nan", "type": "text"}),
        ("a\nb", {"raw_value": "```\na\nb\n```", "type": "md"}),
        ({"a": np.float64("inf"), "b": [np.int32(1)]}, {"raw_value": {"a": None, "b": [1]}, "type": "json"}),
        (None, {"raw_value": "none", "type": "text"}),
    ],
)
def test_whatever_training_reports_can_be_sent(value, shown):
    """numpy's numbers raise in Pipes after training has finished, and NaN breaks the page's charts."""
    sent = as_metadata(value)
    assert sent == shown and type(sent) is type(shown)
    json.dumps(sent, allow_nan=False)


def test_what_the_launcher_sets_rules_over_the_configuration():
    launcher = LauncherResource(nproc_per_node=4, rdzv_endpoint="first:29500")
    assert launcher.overrides(["launch.nproc_per_node=2"]) == [
        "launch.nproc_per_node=2", "launch.nproc_per_node=4", "launch.rdzv_endpoint=first:29500",
    ]  # fmt: skip


def write_error(folder: Any, rank: int, message: str, when: int) -> None:
    path = folder / "run" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    extra = {"py_callstack": f"Traceback of rank {rank}\n{message}", "timestamp": str(when)}
    path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    os.utime(path, (when, when))


def test_a_failed_launch_shows_the_rank_that_failed_first_not_its_echo(tmp_path):
    write_error(tmp_path, 0, "RuntimeError: Connection closed by peer", 12)
    write_error(tmp_path, 1, "ValueError: out of eggs", 10)
    failure = LauncherResource.failure(str(tmp_path), "code 1")
    assert isinstance(failure, dg.Failure)
    assert "rank 1" in str(failure.description) and "out of eggs" in str(failure.description)
    assert failure.metadata["failing_rank"].value == 1


def test_a_users_mistake_in_a_rank_stays_one(tmp_path):
    write_error(tmp_path, 1, "UserError: mend the batch size", 10)
    failure = LauncherResource.failure(str(tmp_path), "code 1")
    assert isinstance(failure, UserError) and str(failure) == "mend the batch size"


def test_a_launch_that_says_nothing_points_at_its_logs(tmp_path):
    failure = LauncherResource.failure(str(tmp_path), "code -9")
    assert isinstance(failure, dg.Failure) and failure.metadata["logs"].value == str(tmp_path)


def chain_of(*snapshots: str) -> dg.Definitions:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(list(snapshots)))
    def one() -> None: ...

    return dg.Definitions([one], jobs=[automation.chain], schedules=[automation.retraining(lambda: list(snapshots))])


def test_the_schedule_takes_the_newest_snapshot_once():
    schedule = chain_of("2024-01-01", "2025-01-01").resolve_schedule_def("retraining")
    with dg.DagsterInstance.ephemeral() as instance:
        ticked = schedule.evaluate_tick(dg.build_schedule_context(instance))
    assert ticked.run_requests is not None
    [request] = ticked.run_requests
    assert request.tags["dagster/partition"] == "2025-01-01" and request.run_key == "2025-01-01"


def test_the_schedule_says_so_where_there_is_nothing():
    schedule = chain_of().resolve_schedule_def("retraining")
    with dg.DagsterInstance.ephemeral() as instance:
        ticked = schedule.evaluate_tick(dg.build_schedule_context(instance))
    assert not ticked.run_requests and "no snapshot" in str(ticked.skip_message)


@pytest.fixture
def webhook(monkeypatch):
    """A server that keeps what is posted to it."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv(automation.WEBHOOK_ENV, f"http://127.0.0.1:{server.server_port}/")
    yield got
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_failed_run_is_told_with_its_cause(webhook):
    @dg.op
    def breaks() -> None:
        raise dg.Failure("out of eggs")

    @dg.job
    def fails() -> None:
        breaks()

    with dg.DagsterInstance.ephemeral() as instance:
        result = fails.execute_in_process(instance=instance, raise_on_error=False, tags={"dagster/partition": SNAPSHOT})
        context = dg.build_run_status_sensor_context(
            "tell_failure", result.get_run_failure_event(), instance, result.dagster_run
        ).for_run_failure()
        automation.tell_failure(context)
    [message] = webhook
    assert message["run_id"] == result.run_id and message["snapshot"] == SNAPSHOT
    assert "out of eggs" in message["text"] and "breaks" in message["text"]


STAR = {
    "source": {"path": "edges.parquet"},
    "model": {
        "embeddings": {"tables": [{"name": "user"}]},
        "relations": [{"name": "*", "lhs": "user", "rhs": "user"}],
    },
}


class Loaded:
    """A configuration resource that has its configuration already."""

    file = "c.yaml"

    def load(self) -> TwhinConfig:
        return parse_config(STAR)


def opened_by(store: Store, upstream: list[str]) -> list[str]:
    context: Any = SimpleNamespace(partition_key=SNAPSHOT, log=logging.getLogger("test"))
    resource: Any = SimpleNamespace(open=lambda: store)
    configuration: Any = Loaded()
    with stage.opened(context, configuration, resource, upstream) as (config, _, _):
        return config.model.relation_names


def test_a_step_gets_the_relations_that_ingest_found_and_ingest_does_not(tmp_path):
    store = Store(str(tmp_path / "home"))
    put(store, "raw_edges", details={"relations": ["b", "a"]})
    assert opened_by(store, []) == ["*"]
    assert opened_by(store, ["raw_edges"]) == ["a", "b"]


def test_a_step_without_edges_to_find_relations_in_says_what_makes_them(tmp_path):
    with pytest.raises(dg.Failure, match="twhin ingest"):
        opened_by(Store(str(tmp_path / "home")), ["raw_edges"])


def test_checks_are_given_the_relations_that_were_found(tmp_path, monkeypatch):
    store = Store(str(tmp_path / "home"))
    put(store, "raw_edges", details={"relations": ["b", "a"]})
    given = []

    def run(name: str, config: TwhinConfig, *_: Any) -> CheckResult:
        given.append(config.model.relation_names)
        return CheckResult(True)

    monkeypatch.setattr("twhin_pipeline.checks.checks.run", run)
    (tmp_path / "c.yaml").write_text(json.dumps(STAR))
    definition = checks.make("edges_checks", parse_config(STAR), ["raw_edges"])
    resources: dict[str, Any] = {
        "configuration": ConfigurationResource(path=str(tmp_path / "c.yaml")),
        "store": StoreResource(root=store.root),
    }
    definitions = dg.Definitions(asset_checks=[definition], resources=resources)
    with dg.DagsterInstance.ephemeral() as instance:
        assert definitions.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance).success
    assert given and all(names == ["a", "b"] for names in given)


def test_counts_of_many_relations_show_the_largest_and_say_how_many_more():
    by_relation = {f"r{i:03d}": i for i in range(237)}
    shown = stage.counts({"edges_per_relation": by_relation})["edges_per_relation"].value
    lines = shown.splitlines()
    assert lines[2] == "| r236 | 236 |" and lines[2 + stage.TABLE_ROWS - 1] == "| r187 | 187 |"
    assert lines[-1] == "… and 187 more"


def test_the_evaluations_page_shows_all_relations_together_and_then_the_largest(store):
    rows = [
        {"relation": name, "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.1, "edges": edges}
        for name, edges in [*((f"/r/{i:03d}", i) for i in range(237)), ("all", 9_000)]
    ]
    with store.replace("evaluation", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist(rows))
        draft.details = {"sides": "both", "edges": 9_000, "metrics": {"filtered_mrr": 0.5}, "baseline": {}}
    shown = evaluation._metadata(store, store.manifest("evaluation", SNAPSHOT))
    names = [line.split(" | ")[0] for line in shown["relations"].value.splitlines()[2:5]]
    assert names == ["| all", "| /r/236", "| /r/235"]
    assert shown["relations"].value.endswith("… and 188 more") and len(shown["relations"].value) < 5_000
