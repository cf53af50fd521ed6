"""The whole chain through Dagster's front door: a fresh instance, one command, two ranks."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from pathlib import Path

import dagster as dg
import pytest
from dagster_home import SNAPSHOT, Home, end
from patience import wait_for

from twhin_pipeline.checks import checks
from twhin_pipeline.config import load_config
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Store, releases

DATA = "not key:twhin_model+"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Home:
    """The chain, materialized once."""
    home = Home(tmp_path_factory.mktemp("chain"))
    done = home.materialize()
    assert done.returncode == 0, (done.stdout + done.stderr)[-6_000:]
    (home.folder / "log.txt").write_text(done.stdout + done.stderr)
    return home


@pytest.fixture(scope="module")
def instance(made):
    with dg.DagsterInstance.from_config(made.env["DAGSTER_HOME"]) as opened:
        yield opened


def metadata(instance: dg.DagsterInstance, *key: str) -> dict:
    event = instance.get_latest_materialization_event(dg.AssetKey(list(key)))
    assert event is not None and event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    return {n: v if isinstance(v, dg.TableMetadataValue) else v.value for n, v in shown.items()}


def test_every_table_is_in_the_store_and_fits_the_others(made):
    store = Store(str(made.store))
    config = load_config(made.env["TWHIN_CONFIG"])
    vocabularies = [f"vocabulary/{name}" for name in config.model.table_names]
    for asset in (
        "raw_edges",
        *vocabularies,
        "training_set/negatives",
        "twhin_model",
        "evaluation",
        "calibration",
        "embeddings/relations",
    ):
        assert store.exists(asset, SNAPSHOT) and store.stale(asset, SNAPSHOT) == []
    for name in config.model.table_names:
        assert (
            store.manifest(f"embeddings/{name}", SNAPSHOT).rows == store.manifest(f"vocabulary/{name}", SNAPSHOT).rows
        )


def test_two_ranks_trained_a_model_that_beats_the_most_popular(made):
    store = Store(str(made.store))
    assert store.manifest("twhin_model", SNAPSHOT).details["world_size"] == 2
    found = {
        (row["relation"], row["side"], row["metric"]): row for row in store.read("evaluation", SNAPSHOT).to_pylist()
    }
    overall = found["all", "both", "filtered_mrr"]
    assert overall["value"] > 1.5 * overall["baseline"]


def test_every_check_ran_and_passed(made, instance):
    config = load_config(made.env["TWHIN_CONFIG"])
    missing, failed = [], []
    for check in checks.CHECKS.values():
        for table in check.tables_of(config):
            key = dg.AssetCheckKey(dg.AssetKey(table.split("/")), check.name)
            records = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
            if not records:
                missing.append(key)
            elif not records[0].event.dagster_event.event_specific_data.passed:
                failed.append(key)
    assert (missing, failed) == ([], [])


def test_assets_show_numbers_tables_and_pictures(instance):
    model = metadata(instance, "twhin_model")
    assert model["final_loss"] < model["first_loss"] and model["edges_per_second"] > 0
    assert next(iter(model)) == "final_loss", "the headline comes first"
    assert Path(model["loss_curve_large"]).read_bytes().startswith(b"\x89PNG") and "rank 1" in model["plan"]
    assert "data:image/svg+xml," in model["loss_curve"] and len(model["loss_curve"]) < 1_000, "drawn without a click"
    evaluation = metadata(instance, "evaluation")
    assert isinstance(evaluation["filtered_mrr"], float)
    assert {"likes", "all"} <= {record.data["relation"] for record in evaluation["relations"].records}
    assert Path(evaluation["reliability_large"]).read_bytes().startswith(b"\x89PNG")
    assert isinstance(evaluation["ece"], float) and isinstance(evaluation["calibrated_rce"], float)
    assert metadata(instance, "calibration")["base_rate"] == pytest.approx(1 / 11, abs=1e-4)
    user = metadata(instance, "embeddings", "user")
    assert Path(user["map_by_commonest_neighbour_type_large"]).read_bytes().startswith(b"\x89PNG")
    assert len(user["map_by_commonest_neighbour_type"]) < 1_000 and user["nearest_neighbours"].records
    assert all(column.description for column in user["dagster/column_schema"].columns)
    assert metadata(instance, "raw_edges")["dagster/row_count"] > 1_000


def run_in(link: str) -> str:
    """Return the run that a link to MLflow's pages leads to."""
    return link.rpartition("/")[2].partition("?")[0]


def test_mlflow_has_the_run_linked_both_ways_and_the_registered_model(made, instance):
    model = metadata(instance, "twhin_model")
    run_id = run_in(model["mlflow_run"])
    with sqlite3.connect(made.store / "mlflow.db") as database:
        [(status,)] = database.execute("SELECT status FROM runs WHERE run_uuid = ?", (run_id,)).fetchall()
        tags = dict(database.execute("SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)))
        logged = {key for (key,) in database.execute("SELECT DISTINCT key FROM metrics WHERE run_uuid = ?", (run_id,))}
        versions = database.execute("SELECT run_id FROM model_versions").fetchall()
    [run] = instance.get_runs()
    assert status == "FINISHED" and tags["dagster.run_id"] == run.run_id
    assert tags["dagster.asset"] == "twhin_model" and tags["dagster.partition"] == SNAPSHOT
    assert run.run_id in tags["dagster.url"]
    assert {"filtered_mrr", "loss"} & {name.rpartition("/")[2] for name in logged} == {"filtered_mrr", "loss"}
    # What is registered is what is exported: the model of all edges, which has a run of its own.
    refitted = run_in(metadata(instance, "refit", "twhin_model")["mlflow_run"])
    assert versions == [(refitted,)] and refitted != run_id


def test_the_chain_ends_with_the_catalog_and_the_model_that_is_registered_after_the_checks_of_its_vectors(
    made, instance
):
    """`make demo` once named a catalog that was never made, and the model was registered before the checks ran."""
    published = metadata(instance, "published")
    assert Path(published["catalog"]).exists() and published["mlflow_model"].startswith("models:/twhin/")
    event = instance.get_latest_materialization_event(dg.AssetKey("published"))
    config = load_config(made.env["TWHIN_CONFIG"])
    for check, table in checks.of_tables(config, STAGES["export"].tables(config)):
        key = dg.AssetCheckKey(dg.AssetKey(table.split("/")), check.name)
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
        assert record.event.timestamp < event.timestamp
    promotion = metadata(instance, "promotion")
    assert (promotion["decision"], promotion["current_before"]) == ("promoted", "nothing")
    current = releases.current(Store(str(made.store)))
    assert current is not None and promotion["release"] == current.name
    assert published["explorer"] == f"http://127.0.0.1:8000/explore/?release={current.name}"


def test_progress_of_training_is_in_the_runs_log(made):
    log = (made.folder / "log.txt").read_text()
    assert "edges/s" in log and "PreviewWarning" not in log and "expected_writer_count" not in log


def test_fields_can_be_set_for_one_run(made):
    """From the launchpad: one place, for every step and check of the run."""
    before = Store(str(made.store)).manifest("embeddings/user", SNAPSHOT).version
    floors = "evaluation.floors={filtered_mrr: 0.999}"
    done = made.materialize_quickly("key:evaluation+ or key:calibration", configuration={"set": [floors]})
    assert done.returncode != 0, "a floor that is not reached blocks"
    assert "floors_reached" in done.stdout + done.stderr
    assert Store(str(made.store)).manifest("embeddings/user", SNAPSHOT).version == before
    done = made.materialize_quickly(
        "key:evaluation or key:calibration", configuration={"set": [floors.replace("floors", "flors")]}
    )
    assert done.returncode != 0 and "did you mean 'floors'" in done.stdout + done.stderr


def test_stale_tables_are_refused_with_the_remedy(made):
    assert made.materialize_quickly("group:edges").returncode == 0
    done = made.materialize_quickly("key:evaluation or key:calibration")
    assert done.returncode != 0 and "is stale" in done.stdout + done.stderr and "twhin " in done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Home:
    """A training set, for runs of the training step alone: long ones, that are stopped."""
    training = {"num_epochs": 2_000, "num_train_steps": 100_000, "checkpoint_every_n": 10, "train_log_every_n": 5}
    home = Home(tmp_path_factory.mktemp("training"), training=training, negatives={"chunk_size": 100, "epochs": 2})
    done = home.materialize_quickly(DATA)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6_000:]
    return home


def checkpoints(home: Home) -> list[Path]:
    return sorted(home.store.glob(f"twhin_model/{SNAPSHOT}/checkpoints/*/step-*"))


def test_a_failing_rank_shows_its_own_traceback(data):
    """Rank 1 fails while rank 0 only loses its connection: the cause is shown, not the echo."""
    (data.folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import threading\n"
        "    def trip():\n"
        "        from twhin_pipeline.training import dataset\n"
        "        def broken(self): raise ValueError('out of eggs')\n"
        "        dataset.EdgesDataset.__iter__ = broken\n"
        "    class Finder:\n"
        "        def find_spec(self, name, *rest):\n"
        "            if name == 'twhin_pipeline.training.trainer':\n"
        "                sys.meta_path.remove(self); trip()\n"
        "    sys.meta_path.insert(0, Finder())\n"
    )
    done = data.materialize_quickly("key:twhin_model", launcher={"env": {"PYTHONPATH": str(data.folder)}})
    shown = done.stdout + done.stderr
    assert done.returncode != 0
    assert "rank 1 failed: ValueError: out of eggs" in shown and "in broken" in shown
    assert not data.ranks()


def test_cancelling_leaves_a_checkpoint_and_no_process_and_a_new_run_resumes(data):
    process = data.start("key:twhin_model")
    try:
        wait_for(lambda: checkpoints(data), 90, "a checkpoint of a running training")
        process.send_signal(signal.SIGINT)
        process.wait(600)
        wait_for(lambda: not data.ranks(), 10, "ranks ended")
    finally:
        end(process)
    assert process.returncode != 0
    step = max(int(path.name.partition("-")[2].split(".")[0]) for path in checkpoints(data))
    with sqlite3.connect(data.store / "mlflow.db") as database:
        last = "SELECT status FROM runs ORDER BY start_time DESC LIMIT 1"
        assert database.execute(last).fetchall() == [("KILLED",)]
    process = data.start("key:twhin_model")
    try:
        log = data.folder / "started.log"
        wait_for(lambda: later(log, step), 90, "a step after the checkpoint")
        # From the checkpoint on: it says so, and no step before it is taken a second time.
        assert f"resumed from step {step:,} (" in log.read_text()
        assert min(steps_shown(log)) > step
        killed = wait_for(lambda: steps_of(process.pid), 30, "the step's process")
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not data.ranks(), 10, "no orphan after kill -9 of the step")
    finally:
        end(process)


def steps_shown(log: Path) -> list[int]:
    """Return the training steps whose loss a log shows."""
    found = re.findall(r"\bstep ([\d,]+) of [\d,]+  epoch", log.read_text(errors="replace"))
    return [int(number.replace(",", "")) for number in found]


def later(log: Path, step: int) -> bool:
    """Tell whether a log shows a step after that one."""
    return any(one > step for one in steps_shown(log))


def steps_of(pid: int) -> list[int]:
    """Return the processes between Dagster's command and torchrun: those that a kernel out of memory would kill.

    A step is a child of the run's fork server, which is the command's child.
    """
    parents: dict[int, int] = {}
    launchers = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"torch.distributed.run" in (folder / "cmdline").read_bytes():
                launchers.append(int(folder.name))
        except OSError:
            continue
    return [step for one in launchers if (step := parents[one]) in parents and pid in ancestors(step, parents)]


def ancestors(pid: int, parents: dict[int, int]) -> list[int]:
    """Return a process's parent, that one's parent, and so on."""
    found = []
    while (pid := parents.get(pid, 0)) > 0:
        found.append(pid)
    return found
