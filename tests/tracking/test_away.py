"""A tracking server that is away, slow or wrong: it is said before training, and no training is lost to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import SNAPSHOT, planted_config, write_planted
from mlflow import MlflowClient

from twhin_pipeline import tracking
from twhin_pipeline.cli.program import run_arguments
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import look_at_tracking
from twhin_pipeline.store import Store
from twhin_pipeline.tracking import outbox, runs, server
from twhin_pipeline.training import train
from twhin_pipeline.training.trainer import Trainer

CONFIG = planted_config(training={"num_epochs": 3})


@pytest.fixture(autouse=True)
def _no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI", "TWHIN_NO_TRACKING"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(str(tmp_path / "home"))
    write_planted(made, CONFIG)
    return made


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


class Mlflow:
    """A real `mlflow server`, which can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                   "--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, env={**os.environ, **quiet}, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while True:
            assert self.process.poll() is None, "mlflow server has ended"
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[Mlflow]:
    made = Mlflow(tmp_path)
    try:
        yield made
    finally:
        made.kill()


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:///{folder}/garbage.db", "cannot be used as a SQLite database"),
        ("sqlite:///{folder}/nowhere/mlflow.db", "there is no folder"),
        ("carrier-pigeon://coop", "is none of http"),
        ("{folder}/mlruns", "is none of http"),
    ],
)
def test_a_tracking_uri_that_can_never_work_is_refused_before_training(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, uri: str, told: str
) -> None:
    (tmp_path / "garbage.db").write_bytes(b"this is no database" * 1_000)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=tmp_path))
    with pytest.raises(UserError, match=rf"{told}.*--no-tracking"):
        look_at_tracking(store)


def test_a_database_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    path = tmp_path / "mlflow.db"
    sqlite3.connect(path).execute("CREATE TABLE t (x)").connection.close()
    original = sqlite3.connect
    # Whoever runs the tests as root can write everything, so the database is opened as others would open it.
    monkeypatch.setattr(sqlite3, "connect", lambda name, **more: original(name.replace("mode=rw", "mode=ro"), **more))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
    with pytest.raises(UserError, match=r"readonly database.*--no-tracking"):
        look_at_tracking(store)


def test_a_relative_path_of_a_database_is_the_same_file_in_every_folder(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs.db")
    assert tracking.uri(store) == f"sqlite:///{tmp_path}/runs.db" and tracking.check(store) is None


@pytest.mark.parametrize("kind", ["silent", "nobody"])
def test_a_server_that_does_not_answer_is_told_in_seconds_and_the_run_goes_on(
    store: Store, silent: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    uri = silent if kind == "silent" else f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(server, "SERVER_LIMIT_S", 2.0)
    calls: list[float] = []
    original = server.within
    monkeypatch.setattr(server, "within", lambda seconds, call: calls.append(seconds) or original(seconds, call))
    with pytest.warns(UserWarning, match=r"MLflow is away.*twhin track --send"):
        look_at_tracking(store)
    assert calls == [2.0], "one call, with a limit"


def test_a_training_whose_server_never_answers_ends_well_and_is_sent_later(
    tmp_path: Path, store: Store, silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    monkeypatch.setattr(server, "SERVER_LIMIT_S", 1.0)
    waits: list[float] = []
    original = server.within
    for module in ("server", "runs"):
        monkeypatch.setattr(
            f"twhin_pipeline.tracking.{module}.within", lambda s, call: waits.append(s) or original(s, call)
        )
    with pytest.warns(UserWarning, match="what it would be told is kept"):
        details = train.run(CONFIG, store, SNAPSHOT)
    assert sum(waits) <= 3, "the server is asked at the beginning and at the end, not for every line"
    run_id = details["mlflow_run_id"]
    assert run_id.startswith(outbox.PREFIX) and outbox.waiting(store) == [run_id]
    assert not tracking.run_exists(store, run_id)

    monkeypatch.setattr(server, "SERVER_LIMIT_S", 60.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/later.db")
    assert run_arguments(["track", "--home", store.root]) == 0 and run_id[:12] in capsys.readouterr().out
    assert run_arguments(["track", "--send", "--home", store.root]) == 0
    assert outbox.waiting(store) == [] and tracking.run_exists(store, run_id)
    became = tracking.resolved(store, run_id)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/later.db")
    found = client.get_run(became)
    assert found.info.status == "FINISHED" and found.data.params["training.num_epochs"] == "3"
    assert found.data.tags["twhin.snapshot"] == SNAPSHOT and found.inputs.dataset_inputs
    steps = [point.step for point in client.get_metric_history(became, "train/loss")]
    assert steps == [row["step"] for row in losses(store)]
    assert "config.yaml" in [file.path for file in client.list_artifacts(became)]


def losses(store: Store) -> list[dict[str, Any]]:
    return store.read_part(store.manifest("twhin_model", SNAPSHOT), "losses").to_pylist()


def test_a_server_killed_in_mid_training_costs_nothing_but_the_lines_which_are_sent_later(
    store: Store, mlflow_server: Mlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    original = Trainer._log
    waited: list[float] = []

    def log(self: Trainer) -> None:
        if self.progress.step == 8:
            mlflow_server.kill()
        began = time.monotonic()
        original(self)
        waited.append(time.monotonic() - began)

    monkeypatch.setattr(Trainer, "_log", log)
    assert tracking.check(store) is None
    with pytest.warns(UserWarning, match=r"is away .* training goes on"):
        details = train.run(CONFIG, store, SNAPSHOT)
    assert max(waited) < 20, "MLflow's own retries take minutes"
    run_id = details["mlflow_run_id"]
    kept = list(outbox.events(store, run_id))
    assert kept and kept[-1]["kind"] == "end" and not run_id.startswith(outbox.PREFIX)

    mlflow_server.start()
    assert run_arguments(["track", "--send", "--home", store.root]) == 0
    client = MlflowClient(tracking_uri=mlflow_server.uri)
    steps = sorted({point.step for point in client.get_metric_history(run_id, "train/loss")})
    assert steps == [row["step"] for row in losses(store)] and steps[0] < 8 < steps[-1]
    assert client.get_run(run_id).info.status == "FINISHED" and outbox.waiting(store) == []


def test_the_error_of_a_training_is_never_hidden_by_one_of_tracking(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is damaged while training runs, and then training fails of its own."""

    def fail(self: Trainer) -> None:
        for path in Path(store.root).glob("mlflow.db*"):
            path.write_bytes(b"no database" * 5_000)
        raise UserError("the loss is inf")

    monkeypatch.setattr(Trainer, "_log", fail)
    monkeypatch.setattr(server, "DATABASE_LIMIT_S", 60.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match="the loss is inf"):
            train.run(CONFIG, store, SNAPSHOT)
    (run_id,) = outbox.waiting(store)
    assert [event["status"] for event in outbox.events(store, run_id)] == ["FAILED"]


def test_without_tracking_no_run_is_made_and_nothing_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWHIN_NO_TRACKING", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "carrier-pigeon://coop")
    look_at_tracking(store)
    assert train.run(CONFIG, store, SNAPSHOT)["mlflow_run_id"] is None
    assert not Path(store.root, "mlflow.db").exists() and outbox.waiting(store) == []


def test_a_last_line_that_was_cut_off_is_left_out(store: Store) -> None:
    outbox.add(store, "r", {"kind": "tags", "values": {}})
    with (outbox.folder(store) / "r.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "end"})[:5])
    assert [event["kind"] for event in outbox.events(store, "r")] == ["tags"]


@pytest.mark.parametrize("name", ["a%20b", "q?x", "[v1]", "h#x", "sp ace"])
def test_runs_are_kept_in_a_store_whatever_its_path_is(tmp_path: Path, name: str) -> None:
    store = Store(str(tmp_path / name))
    assert server.sqlite_path(tracking.uri(store)) == tmp_path / name / "mlflow.db"
    run = tracking.open_run(store, SNAPSHOT, CONFIG)
    run.log_text("here", "here.txt")
    run.finish()
    assert (tmp_path / name / "mlflow.db").stat().st_size > 0
    assert [path.read_text() for path in (tmp_path / name / "mlartifacts").rglob("here.txt")] == ["here"]


def test_sending_that_broke_off_goes_on_in_the_same_run(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/later.db")
    run_id = outbox.new_id()
    outbox.add(store, run_id, {"kind": "run", "name": "one", "tags": {}, "time": 1})
    for step in (1, 2):
        outbox.add(store, run_id, {"kind": "metrics", "values": {"loss": 1.0 / step}, "step": step, "time": step})
    original = runs.apply

    def breaks_off(client: Any, became: str, event: dict[str, Any]) -> None:
        if event.get("step") == 2:
            raise ConnectionError("no route")
        original(client, became, event)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "apply", breaks_off)
        with pytest.raises(ConnectionError):
            tracking.send(store, run_id)
    assert outbox.waiting(store) == [run_id]
    became = tracking.send(store, run_id)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/later.db")
    [experiment] = [one for one in client.search_experiments() if one.name == tracking.EXPERIMENT]
    assert [run.info.run_id for run in client.search_runs([experiment.experiment_id])] == [became]
    assert [(point.step, point.value) for point in client.get_metric_history(became, "loss")] == [(1, 1.0), (2, 0.5)]
