"""What a job prints, on its way from rank 0 through the node and the submitter to Dagster or the terminal."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers import SNAPSHOT, planted_config, write_config

from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.launchers import node, submit
from twhin_pipeline.launchers.job import FAILURE, State
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch
from twhin_pipeline.training.launch import Failure
from twhin_pipeline.training.reporting import (
    FINISHED,
    KINDS,
    MILESTONE,
    PROGRESS,
    RECORDS_ENV,
    ConsoleReporter,
    parse_record,
    record_line,
)


class Dagster:
    """A reporter that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def milestone(self, text: str) -> None:
        self.got.append(text)

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        raise AssertionError("each step would make the run's page slow")

    def validation(self, record: object) -> None:
        raise AssertionError("the milestone has the values")

    def finished(self, metadata: dict[str, Any]) -> None:
        self.got.append(metadata)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that were printed; `splitlines` would end a line at a record's mark."""
    return capsys.readouterr().out.rstrip("\n").split("\n")


def lines_of_rank_0(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return what rank 0 of a job prints, as torchrun passes it on."""
    monkeypatch.setenv(RECORDS_ENV, ",".join(KINDS))
    capsys.readouterr()
    reporter = ConsoleReporter()
    reporter.milestone("step 4 of 8")
    reporter.progress(4, 8, 0.5, 100.0)
    reporter.finished({"final_loss": 0.25, "nan": float("nan")})
    return [node.RANK_0 + line for line in printed(capsys)]


def test_dagster_gets_milestones_and_results_and_nothing_for_each_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dagster = Dagster()
    relay = submit.Relay(dagster, set())
    for line in [*lines_of_rank_0(monkeypatch, capsys), node.RANK_0 + "a library's warning"]:
        relay.take(line)
    assert dagster.got[0] == "step 4 of 8" and dagster.got[1]["final_loss"] == 0.25 and len(dagster.got) == 2
    assert printed(capsys) == [node.RANK_0 + "a library's warning"]


def test_the_command_line_gets_milestones_as_lines_and_only_records_that_it_wants(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relay = submit.Relay(None, {PROGRESS})
    for line in lines_of_rank_0(monkeypatch, capsys):
        relay.take(line)
    shown = printed(capsys)
    assert shown[0] == node.RANK_0 + "step 4 of 8" and len(shown) == 2
    record = parse_record(shown[1])
    assert record is not None and record[0] == PROGRESS and record[1]["step"] == 4


def test_without_a_launcher_rank_0_prints_milestones_and_no_record(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    reporter.milestone("step 4 of 8")
    reporter.finished({"final_loss": 0.25})
    assert capsys.readouterr().out == "step 4 of 8\n"
    assert {MILESTONE, FINISHED} <= set(KINDS)


def test_the_first_failure_by_the_nodes_clocks_is_left_where_the_launcher_finds_it(tmp_path: Path) -> None:
    relay = submit.Relay(None, set())
    for when, kind in ((20, "RuntimeError"), (10, "ValueError"), (30, "OSError")):
        failure = Failure(1, kind, f"of {kind}", "its traceback", when)
        relay.take(node.RANK_0 + record_line(FAILURE, vars(failure)))
    cause = relay.cause(None)
    assert cause is not None
    submit.leave(cause, str(tmp_path))
    assert launch.first_failure(str(tmp_path)) == Failure(1, "ValueError", "of ValueError", "its traceback", 10)


@pytest.mark.parametrize(
    ("number", "nodes", "rank", "words"),
    [(0, 1, 3, "rank 3 failed:\nthe cause"), (2, 4, 0, "rank 0 of node 2 ("), (2, 4, -1, "the cause")],
)
def test_a_rank_is_named_with_its_node_where_there_are_several(number: int, nodes: int, rank: int, words: str) -> None:
    assert node.named(Failure(rank, "ValueError", "the cause", "the cause"), number, nodes).words.startswith(words)


def test_a_node_trains_as_a_machine_that_was_started_by_hand(tmp_path: Path) -> None:
    from twhin_pipeline.config import load_config

    section = {"partition": "gpu"}
    path = write_config(planted_config(launch={"kind": "slurm", "nnodes": 3, "slurm": section}), tmp_path)
    found = load_config(path, node.local(2, 3, "first:29500")).launch
    assert (found.kind, found.node_rank, found.rdzv_endpoint, found.slurm) == ("local", 2, "first:29500", None)
    alone = write_config(planted_config(launch={"kind": "slurm"}), tmp_path)
    assert load_config(alone, node.local(0, 1, "first:29500")).launch.rdzv_endpoint is None


def test_a_mistake_of_the_user_on_a_node_is_a_record_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    read_only = {"save_dir": "nosuch://bucket"}
    path = write_config(planted_config(launch={"kind": "slurm"}, training=read_only), tmp_path)
    where = ["--home", str(tmp_path), "--endpoint", "first:1", "--log-dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        node.main(["--config", path, "--snapshot", SNAPSHOT, *where])
    assert ended.value.code == 2
    record = parse_record(printed(capsys)[-1])
    assert record is not None and record[0] == FAILURE
    assert record[1]["kind"] == "UserError" and "training.save_dir" in record[1]["message"]


def test_a_job_inherits_no_line_to_dagster_and_all_else() -> None:
    variables = {"TWHIN_REPORTER": "r", "TWHIN_RECORDS": "p", "DAGSTER_PIPES_CONTEXT": "c", "AWS_PROFILE": "a"}
    assert submit.environment(variables) == {"AWS_PROFILE": "a"}


class Job:
    """A job that ends after some looks, whatever is printed."""

    def __init__(self, looks: int) -> None:
        self.looks, self.stopped = looks, 0

    def start(self) -> str:
        return "job 1"

    def lines(self) -> list[str]:
        return ["a line"]

    def state(self) -> State:
        self.looks -= 1
        return State("ended", "ended") if self.looks < 0 or self.stopped else State("running")

    def stop(self) -> None:
        self.stopped += 1

    def kill(self) -> None:
        raise AssertionError("it ends by itself")


def test_a_job_is_cancelled_also_where_nobody_reads_its_lines_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that read them was killed: the pipe breaks before the signal comes."""

    class Broken:
        def write(self, _: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Broken())
    job, stop = Job(10), threading.Event()
    stop.set()
    found = submit.follow(job, submit.Relay(None, set()), stop)
    assert job.stopped == 1 and found is not None and found.kind == "TrainingCancelled"


def test_a_scheduler_that_is_away_when_a_job_is_to_be_stopped_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "RETRY_S", 0.0)

    class Away(Job):
        def stop(self) -> None:
            self.stopped += 1
            if self.stopped == 1:
                raise UnavailableError("unable to contact slurm controller")

        def state(self) -> State:
            return State("ended", "ended") if self.stopped == 2 else State("running")

    job, stop = Away(0), threading.Event()
    stop.set()
    found = submit.follow(job, submit.Relay(None, set()), stop)
    assert job.stopped == 2 and found is not None and found.kind == "TrainingCancelled"


def test_what_failed_before_a_job_was_queued_anew_is_not_its_cause() -> None:
    states = iter([State("running"), State("waiting", "waits"), State("running"), State("ended", "ended as FAILED")])
    relay = submit.Relay(None, set())

    class Requeued(Job):
        def state(self) -> State:
            state = next(states)
            if state.phase == "waiting":
                relay.failures.append(Failure(0, "ValueError", "of a machine that died", "", 1))
            return state

    found = submit.follow(Requeued(0), relay, threading.Event())
    assert (
        found is not None
        and found.kind == "JobFailed"
        and found.message.endswith("its last lines:\n" + "a line\n" * 4 + "a line")
    )


def test_the_launcher_says_the_users_mistake_that_the_submitter_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch
    config = planted_config(launch={"kind": "slurm"})
    lines: list[str] = []
    with pytest.raises(UserError, match="needs sbatch"):
        launch.run(
            config, write_config(config, tmp_path), [], Store(str(tmp_path / "h")), SNAPSHOT, output=lines.append
        )
    assert not any("starting" in line for line in lines)


def test_records_are_json_also_with_numpys_numbers() -> None:
    import numpy as np

    _, _, values = record_line(FINISHED, {"metadata": {"loss": np.float32(0.5)}}).partition(f"{FINISHED} ")
    assert json.loads(values) == {"metadata": {"loss": 0.5}}
