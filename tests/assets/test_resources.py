"""The launcher, and what training's processes report to Dagster."""

from __future__ import annotations

import json
import os
from typing import Any

import dagster as dg
import numpy as np
import pytest
from helpers import SNAPSHOT, planted_config

from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.pipes import as_metadata
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.tracking import outbox, start_run


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


def test_the_launcher_chooses_where_to_train_by_the_configurations_own_field():
    assert LauncherResource(kind="slurm", nnodes=2).overrides([]) == ["launch.kind=slurm", "launch.nnodes=2"]


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


@pytest.mark.parametrize(
    ("env", "field", "page"),
    [
        ({}, "", "http://127.0.0.1:5000/#/"),
        ({"TWHIN_MLFLOW_URL": "http://127.0.0.1:5001"}, "", "http://127.0.0.1:5001/#/"),
        ({"TWHIN_MLFLOW_URL": "http://127.0.0.1:5001"}, "http://elsewhere/", "http://elsewhere/#/"),
    ],
)
def test_links_to_mlflow_follow_the_port_that_it_is_served_on(env, field, page, tmp_path, monkeypatch):
    for name in ("TWHIN_MLFLOW_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    tracking, store = TrackingResource(mlflow_url=field), Store(str(tmp_path / "home"))
    assert (
        tracking.model_link(store, "models:/twhin/3").value
        == f"{page}models/twhin/versions/3?workflowType=machine_learning"
    )
    assert tracking.link(store, "abc").value.startswith(f"{page}experiments/")


@pytest.mark.parametrize(
    ("env", "field", "service"),
    [
        (None, "", "http://127.0.0.1:8000"),
        ("https://x.org/twhin/", "", "https://x.org/twhin"),
        ("y", "http://z", "http://z"),
    ],
)
def test_links_to_the_explorer_follow_where_the_service_is(env, field, service, monkeypatch):
    if env is None:
        monkeypatch.delenv("TWHIN_SERVICE_URL", raising=False)
    else:
        monkeypatch.setenv("TWHIN_SERVICE_URL", env)
    link = TrackingResource(service_url=field).explorer_link("2025-01-01-x")
    assert link.value == f"{service}/explore/?release=2025-01-01-x"


class Context:
    """What the resource asks of Dagster's context, in the second attempt of a step."""

    retry_number = 1
    selected_asset_keys = frozenset({dg.AssetKey("twhin_model")})

    class run:  # noqa: N801
        run_id = "0" * 32


@pytest.mark.filterwarnings("ignore:MLflow at")
def test_a_users_mistake_stays_one_where_mlflow_is_away_so_that_dagster_does_not_try_again(tmp_path, monkeypatch):
    """An error of MLflow in its place would be retried."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking, store = TrackingResource(), Store(str(tmp_path / "home"))

    def train() -> None:
        with tracking.run(Context(), store, SNAPSHOT, planted_config()):
            raise UserError("mend the batch size")

    with pytest.raises(UserError, match="mend the batch size"):
        train()
    (run_id,) = outbox.waiting(store)
    assert [event["kind"] for event in outbox.events(store, run_id)] == ["run", "end"]
    assert tracking.link(store, run_id).value == run_id


@pytest.mark.filterwarnings("ignore:MLflow at")
def test_the_training_processes_write_to_the_same_outbox_as_dagsters(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    store = Store(str(tmp_path / "home"))
    with TrackingResource().run(Context(), store, SNAPSHOT, planted_config()) as run:
        monkeypatch.setenv("MLFLOW_RUN_ID", run.run_id)
        of_rank = start_run(store, SNAPSHOT, planted_config())
        of_rank.log_metrics({"train/loss": 1.0}, 3)
        of_rank.finish()
        monkeypatch.delenv("MLFLOW_RUN_ID")
    assert outbox.waiting(store) == [run.run_id]
    assert [event["kind"] for event in outbox.events(store, run.run_id)] == ["run", "metrics", "end"]
