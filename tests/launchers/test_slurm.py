"""A training as a job of a real Slurm, and what its submitter makes of every way in which a job ends."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest
import slurm_cluster
from dagster_home import BIN, ROOT, Home, end
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from patience import wait_for

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.launchers import slurm as slurm_jobs
from twhin_pipeline.launchers import submit
from twhin_pipeline.launchers.job import Training
from twhin_pipeline.launchers.slurm import SlurmJob, script
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, train
from twhin_pipeline.training.launch import Failure

needs_slurm = pytest.mark.skipif(bool(slurm_cluster.why_not()), reason=slurm_cluster.why_not())


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cluster of two nodes, which sbatch in this process and its children reaches."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as env, pytest.MonkeyPatch.context() as patch:
        # Nothing is asked of a controller of a thousand jobs here.
        patch.setattr(slurm_jobs, "ASK_S", 0.3)
        patch.setattr(slurm_jobs, "OUTPUT_S", 0.5)
        for name, value in env.items():
            patch.setenv(name, value)
        yield


def slurm_config(setup: list[str] | None = None, **sections: dict) -> TwhinConfig:
    """Two nodes of one rank each, which fit a machine of two cores."""
    asked = {"kind": "slurm", "nnodes": 2, "nproc_per_node": 1, "slurm": {"partition": "main", "setup": setup or []}}
    return planted_config(**{"launch": asked, **sections})


def training(config: TwhinConfig, tmp_path: Path) -> Training:
    return Training(write_config(config, tmp_path), Store(str(tmp_path / "home")), SNAPSHOT)


def outcome(config: TwhinConfig, tmp_path: Path, stop: threading.Event | None = None) -> Failure | None:
    """Submit a job and follow it, as the submitter does."""
    job = SlurmJob(config, training(config, tmp_path), str(tmp_path / "logs"))
    return submit.follow(job, submit.Relay(None, set()), stop or threading.Event())


def jobs() -> list[str]:
    """Return the numbers of the jobs that are not over."""
    return subprocess.run(["squeue", "--noheader", "--format=%i"], capture_output=True, text=True).stdout.split()


@needs_slurm
def test_a_job_on_two_nodes_shows_its_lines_live_stops_after_a_checkpoint_and_resumes(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = slurm_config(training={"num_epochs": 2_000, "num_eval_steps": 0})
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    path = write_config(config, tmp_path)
    code = (
        "from twhin_pipeline.training import launch; from twhin_pipeline.config import load_config\n"
        "from twhin_pipeline.store import Store\n"
        f"launch.run(load_config({path!r}), {path!r}, [], Store({store.root!r}), {SNAPSHOT!r})"
    )
    env = {**os.environ, "TWHIN_NO_TRACKING": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as parent:  # fmt: skip
        assert parent.stdout is not None and parent.stderr is not None
        lines = []
        for line in parent.stdout:
            lines.append(line)
            if "step 20 of" in line:
                break
        assert parent.poll() is None, "the line came while the job ran"
        assert any("submitted" in line for line in lines) and any("2 process(es)" in line for line in lines), lines
        parent.send_signal(signal.SIGINT)
        _, error = parent.communicate(timeout=120)
    assert "TrainingCancelled" in error and "checkpoint" in error
    wait_for(lambda: not jobs(), 30, "the job is gone")
    # The same training in this process: told to stop at once, and early enough only if it goes on from a checkpoint.
    stop = threading.Event()
    stop.set()
    alone = planted_config(training={"num_epochs": 2_000, "num_eval_steps": 0})
    capsys.readouterr()
    with pytest.raises(launch.TrainingCancelled):
        train.run(alone, store, SNAPSHOT, stop=stop)
    resumed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed from step"))
    assert int(resumed.split()[3].replace(",", "")) >= 20


@needs_slurm
def test_a_job_that_fails_before_torchrun_is_a_failure_with_its_last_lines(slurm: None, tmp_path: Path) -> None:
    found = outcome(slurm_config(["echo no such module: cuda", "exit 7"]), tmp_path)
    assert found is not None and found.rank == -1
    assert "ended as FAILED" in found.traceback and found.traceback.endswith("no such module: cuda")


@needs_slurm
def test_a_job_that_someone_cancels_says_how_to_go_on(slurm: None, tmp_path: Path) -> None:
    canceller = threading.Thread(target=lambda: [wait_for(jobs, 30, "it is there"), os.system(f"scancel {jobs()[0]}")])
    canceller.start()
    found = outcome(slurm_config(["sleep 60"]), tmp_path)
    canceller.join()
    assert found is not None and "CANCELLED; the same command trains again" in found.message


@needs_slurm
def test_a_second_try_waits_for_the_first_and_a_signal_takes_it_out_of_the_queue(
    slurm: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The submitter of the first may have been killed: two jobs of one training would write the same checkpoints."""
    config = slurm_config(["sleep 60"])
    first = SlurmJob(config, training(config, tmp_path), str(tmp_path / "logs"))
    first.start()
    wait_for(lambda: first.state().phase == "running", 30, "the first job runs")
    stop = threading.Event()
    shown: list[str] = []

    class Stopping(SlurmJob):
        def state(self):  # type: ignore[no-untyped-def]
            state = super().state()
            if state.phase == "waiting" and state.text:
                shown.append(state.text)
                stop.set()
            return state

    second = Stopping(config, training(config, tmp_path), str(tmp_path / "logs"))
    found = submit.follow(second, submit.Relay(None, set()), stop)
    assert shown[0] == "waits (Dependency)" and found is not None and found.kind == "TrainingCancelled"
    first.kill()
    wait_for(lambda: not jobs(), 30, "both are gone")


@needs_slurm
def test_a_setting_that_slurm_refuses_is_the_users_mistake_with_slurms_words(slurm: None, tmp_path: Path) -> None:
    config = planted_config(launch={"kind": "slurm", "slurm": {"partition": "nope"}})
    with pytest.raises(UserError, match=r"Slurm refuses the job: .*invalid partition.*nope.*correct launch.slurm"):
        launch.run(config, write_config(config, tmp_path), [], Store(str(tmp_path / "home")), SNAPSHOT)


@pytest.mark.long
@pytest.mark.timeout(1_800)
@needs_slurm
def test_in_dagster_a_job_is_cancelled_resumed_ended_with_its_step_and_shows_what_rank_0_reported(
    slurm: None, tmp_path: Path
) -> None:
    fields = {"num_epochs": 2_000, "num_train_steps": 100_000, "checkpoint_every_n": 10, "train_log_every_n": 5}
    asked = {"kind": "slurm", "nnodes": 2, "nproc_per_node": 1}
    home = Home(tmp_path, training=fields, negatives={"chunk_size": 100, "epochs": 2}, launch=asked)
    done = home.materialize_quickly("not key:twhin_model+")
    assert done.returncode == 0, (done.stdout + done.stderr)[-6_000:]

    def start() -> subprocess.Popen[bytes]:
        process = home.start("key:twhin_model")
        wait_for(lambda: checkpoint(home) > before, 120, "a new checkpoint of a running job")
        return process

    before = 0
    process = start()
    try:
        process.send_signal(signal.SIGINT)
        process.wait(120)
        wait_for(lambda: not jobs() and not home.ranks(), 20, "the job is gone")
    finally:
        end(process)
    with sqlite3.connect(home.store / "mlflow.db") as database:
        assert database.execute("SELECT status FROM runs").fetchall() == [("KILLED",)]
    before = checkpoint(home)
    process = start()
    try:
        assert f"resumed from step {before:,} (" in (home.folder / "started.log").read_text()
        for pid in {
            psutil.Process(one).ppid() for one in home.ranks() if "submit" in " ".join(psutil.Process(one).cmdline())
        }:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not jobs() and not home.ranks(), 60, "no job outlives a step that was killed")
    finally:
        end(process)
    done = home.materialize_quickly("key:twhin_model", configuration={"set": ["training.num_epochs=3"]})
    assert done.returncode == 0, (done.stdout + done.stderr)[-6_000:]
    with dg.DagsterInstance.from_config(home.env["DAGSTER_HOME"]) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("twhin_model"))
    assert event is not None and event.asset_materialization is not None
    shown = event.asset_materialization.metadata
    assert shown["world_size"].value == 2 and shown["final_loss"].value < shown["first_loss"].value


def checkpoint(home: Home) -> int:
    """Return the step of the newest checkpoint."""
    paths = home.store.glob(f"twhin_model/{SNAPSHOT}/checkpoints/*/step-*")
    return max((int(path.name.partition("-")[2].partition(".")[0]) for path in paths), default=0)


def test_a_machine_without_slurm_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    config = slurm_config()
    with pytest.raises(UserError, match="needs sbatch, which is not here"):
        SlurmJob(config, training(config, tmp_path), str(tmp_path / "logs")).start()
    assert not (tmp_path / "logs").exists()


def test_the_script_asks_for_what_the_section_says_and_holds_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
    section = {
        "partition": "gpu", "account": "lab", "time": "12:00:00", "gpus_per_node": 8, "cpus_per_node": 64,
        "sbatch": ["--constraint=a100", "--exclusive"], "setup": ["module load cuda"],
    }  # fmt: skip
    config = planted_config(launch={"kind": "slurm", "nnodes": 3, "slurm": section})
    made = training(config, tmp_path)
    found = script(config, made, "/shared/c.yaml", "/shared/a folder/job-%j.out", "/shared/logs").splitlines()
    assert found[0] == "#!/bin/bash"
    asked = {line.removeprefix("#SBATCH ") for line in found if line.startswith("#SBATCH ")}
    assert asked >= {
        "--nodes=3", "--ntasks-per-node=1", "--partition=gpu", "--account=lab", "--time=12:00:00", "--gpus-per-node=8",
        "--cpus-per-task=64", "--constraint=a100", "--exclusive", "--signal=USR1@120", "--dependency=singleton",
        '--output="/shared/a folder/job-%j.out"', f"--job-name={made.name}",
    }  # fmt: skip
    last = next(i for i, line in enumerate(found) if line.startswith("srun "))
    assert "--cpus-per-task=64" in found[last] and "--config /shared/c.yaml" in found[last]
    assert found.index("module load cuda") < last
    assert "a-secret-key" not in "\n".join(found)


def test_the_printed_script_is_valid_for_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_config(slurm_config(["module load cuda"]), tmp_path)
    options = ["--config", path, "--home", str(tmp_path / "home"), "--snapshot", SNAPSHOT]
    assert run_arguments(["job", *options, "--set", "training.num_epochs=3"]) == 0
    text = capsys.readouterr().out
    done = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert done.returncode == 0 and done.stderr == "" and "--set training.num_epochs=3" in text
    assert run_arguments(["job", *options, "--set", "launch.kind=local", "--set", "launch.slurm=null",
                          "--set", "launch.nnodes=1"]) == 2  # fmt: skip
    assert "launch.kind is local" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(1_800)
@needs_slurm
def test_the_command_of_the_page_runs_the_whole_chain_with_both_trainings_as_jobs(slurm: None, tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/several-machines.md").read_text()
    (command,) = re.findall(r"^twhin (run .*launch\.kind=slurm.*)$", page, re.MULTILINE)
    home = Home(tmp_path, training={"num_epochs": 4})
    mine = {
        "my.yaml": home.env["TWHIN_CONFIG"],
        "STORE": str(home.store),
        "launch.nproc_per_node=8": "launch.nproc_per_node=1",
    }
    arguments = [mine.get(word, word) for word in command.split()]
    done = subprocess.run([str(BIN / "twhin"), *arguments], env=home.env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6_000:]
    assert done.stdout.count("submitted") == 2
    store = Store(str(home.store))
    for seen in (store, store.seen_as("refit")):
        assert seen.manifest("twhin_model", SNAPSHOT).details["world_size"] == 2
