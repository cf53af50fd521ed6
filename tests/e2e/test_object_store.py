"""A store behind S3, through the front door: chain, resume, promotion, models, service, Dagster; and no secrets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import days
import pytest
import s3_server
from patience import wait_for
from service_process import served
from small_store import ids

from twhin_pipeline.cli.program import run_arguments
from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle import removal, retention
from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.vectors.opening import load_model

USER, ITEM = ids("user")[0], ids("item")[0]


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of an empty store; the working directory is an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TWHIN_NO_TRACKING", "1")
    url = f"{s3_server.use(monkeypatch)}/home"
    monkeypatch.setenv("TWHIN_HOME", url)
    return url


def test_releases_behind_a_url_are_opened_served_followed_rolled_back_and_removed(root: str) -> None:
    with pytest.raises(UserError, match="nothing has been published there"):
        load_model(f"{root}@current")
    store = Store(root)
    first = days.make(store, 0)
    with served(root, interval=0.05) as client:

        def vector() -> list[float]:
            return client.post("/embedding", json={"entity": "user", "ids": [USER]}).json()["embeddings"][0]

        assert vector() == pytest.approx(load_model(f"{root}@current").get_user_embedding(USER), abs=1e-6)
        second = days.make(store, 1)
        wait_for(lambda: client.get("/readyz").json()["release"] == second.name, 30, "the service follows")
        assert vector() == pytest.approx(load_model(f"{root}@{second.name}").get_user_embedding(USER), abs=1e-6)
        assert run_arguments(["rollback", "--reason", "worse"]) == 0
        wait_for(lambda: client.get("/readyz").json()["release"] == first.name, 30, "the service follows")
    model = load_model(f"{root}@current")
    assert model.snapshot == first.snapshot and len(model.neighbors("item", ITEM, k=3)) == 3
    assert [move.release for move in releases.history(store)] == [first.name, second.name, first.name]


def test_a_command_that_cannot_reach_the_object_store_says_so_in_one_line(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_arguments(["ingest", "-c", "debian", "--home", "s3://no-such-bucket/home"]) == 2
    assert "does not exist" in (told := capsys.readouterr().err) and "AWS_PROFILE" in told and "Traceback" not in told
    s3_server.shared().fault = lambda environ: ("403 Forbidden", "InvalidAccessKeyId")
    try:
        assert run_arguments(["releases"]) == 2
    finally:
        s3_server.shared().fault = None
    assert "the object store cannot be used" in (told := capsys.readouterr().err) and s3_server.SECRET not in told


SMALL = [
    "training.num_epochs=30", "training.checkpoint_every_n=10", "training.train_log_every_n=10",
    "train_data.per_replica_batch_size=1000", "negatives.chunk_size=250", "launch.nproc_per_node=2",
    "launch.device=cpu", "launch.threads_per_process=1", "launch.data_threads=1",
    *(f"model.embeddings.tables.{name}.embedding_dim=16" for name in ("user", "item")),
]  # fmt: skip
"""Fields that make a run small."""


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    output = Path("printed").open("a")  # noqa: SIM115 - the process writes it
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)


@pytest.mark.long
def test_the_chain_is_cancelled_and_resumed_behind_a_url_and_the_secret_is_nowhere(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TWHIN_NO_TRACKING")
    numbers = ["--users", "400", "--items", "200", "--edges", "12000", "--communities", "8"]
    assert started("generate", "graph.parquet", *numbers).wait() == 0
    chain = ["run", "-c", "graph.yaml", "--snapshot", "2025-01-01"]
    chain += [word for one in SMALL for word in ("--set", one)]
    run = started(*chain)
    wait_for(lambda: "step 40 of" in Path("printed").read_text(), 240, "the training is on its way")
    run.send_signal(signal.SIGINT)
    assert run.wait() == 130, Path("printed").read_text()
    assert started(*chain, "--skip-unchanged").wait() == 0, Path("printed").read_text()
    printed = Path("printed").read_text()
    assert "resumed from step" in printed and "is promoted" in printed

    store = Store(root)
    with database.connect(store=store) as con:
        (edges,) = con.execute(f"SELECT count(*) FROM {database.scan(store, 'raw_edges', '2025-01-01')}").fetchone()
    assert edges == store.manifest("raw_edges", "2025-01-01").rows
    assert load_model(f"{root}@current").get_user_embedding("user_0").shape == (16,)

    mine = [path.read_bytes() for path in Path().rglob("*") if path.is_file()]
    theirs = [store.fs.cat_file(path) for path in store.fs.find(store.root)]
    assert len(mine) > 10 and len(theirs) > 50
    assert not any(s3_server.SECRET.encode() in content for content in [*mine, *theirs])
    assert s3_server.SECRET in os.environ.values()


@pytest.mark.long
def test_dagster_makes_the_same_tables_behind_a_url(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("dagster").absolute()
    folder.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    monkeypatch.setenv("TWHIN_CONFIG", "debian")
    done = subprocess.run(
        [Path(sys.executable).with_name("dagster"), "asset", "materialize", "-m", "twhin_pipeline.definitions",
         "--select", "raw_edges,raw_edges_rejected", "--partition", "2021-08-14"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    store = Store(root)
    assert store.manifest("raw_edges", "2021-08-14").rows > 100_000
    verdict = store.verdict("raw_edges", "2021-08-14", store.manifest("raw_edges", "2021-08-14").version)
    assert verdict is not None and verdict.accepted


@pytest.mark.long
def test_retention_removes_what_no_release_needs_behind_a_url(root: str) -> None:
    store = Store(root)
    made = [days.make(store, day, edges=60) for day in range(3)]
    before = len(store.fs.find(store.root))
    policy = RetentionConfig(releases=1, snapshots=1, grace_hours=0)
    done = removal.carry_out(store, retention.plan(store, policy, now=days.NOW), "me")
    assert done.removed and not done.notes and len(store.fs.find(store.root)) < before
    assert releases.names(store) == [one.name for one in made[1:]]
    assert load_model(f"{root}@current").snapshot == made[2].snapshot
