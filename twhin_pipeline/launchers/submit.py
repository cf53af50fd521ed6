"""`python -m twhin_pipeline.launchers.submit`: submits a training to a scheduler and follows it until it ends.

To the process that starts it, it is what torchrun is on one machine: it prints what the ranks print, SIGINT and SIGTERM
let the ranks write a checkpoint and end, its exit code says how it went, and the first failure is below `--log-dir`,
where `launch.first_failure` finds it. So the command line and Dagster treat a job like a local training, and neither
ranks nor nodes need a way to this machine but the scheduler's.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.launchers.job import FAILURE, Job, Training
from twhin_pipeline.launchers.kubernetes import KubernetesJob
from twhin_pipeline.launchers.node import RANK_0
from twhin_pipeline.launchers.slurm import SlurmJob
from twhin_pipeline.store import Store
from twhin_pipeline.training.launch import CANCELLED_EXIT, Failure, train_parser
from twhin_pipeline.training.reporting import (
    FINISHED,
    MILESTONE,
    RECORDS_ENV,
    REPORTER_ENV,
    Reporter,
    make_reporter,
    parse_record,
)
from twhin_pipeline.training.with_parent import PR_SET_PDEATHSIG

POLL_S = 0.2
RETRY_S = 5.0
STOP_S = 45.0
"""How long ranks may take to write a checkpoint and end: torchrun's own grace of 30 s, and time to notice."""


def make_job(config: TwhinConfig, training: Training, log_dir: str) -> Job:
    """Return the job of `launch.kind`, not submitted yet."""
    if config.launch.kind == "slurm":
        return SlurmJob(config, training, log_dir)
    return KubernetesJob(config, training)


class Relay:
    """Passes a job's lines on: records to Dagster's reporter or to `launch.run`, all others to standard output."""

    def __init__(self, reporter: Reporter | None, wanted: set[str]) -> None:
        """Take where records go.

        Args:
            reporter: Gets milestones and results; None: they are printed.
            wanted: Kinds of records to print as records, for `launch.run`.
        """
        self.reporter, self.wanted = reporter, wanted
        self.failures: list[Failure] = []
        self.last: list[str] = []
        """The last lines that are no record."""

    def take(self, line: str) -> None:
        """Pass one line on."""
        record = parse_record(line)
        if record is None:
            self.last = [*self.last[-29:], line.removeprefix(RANK_0)]
            emit(line)
            return
        kind, values = record
        if kind == FAILURE:
            self.failures.append(Failure(**values))
        elif kind in self.wanted:
            emit(line)
        elif kind == MILESTONE:
            if self.reporter is not None:
                self.reporter.milestone(values["text"])
            else:
                emit(RANK_0 + values["text"])
        elif kind == FINISHED and self.reporter is not None:
            self.reporter.finished(values["metadata"])

    def cause(self, fallback: Failure | None) -> Failure | None:
        """Return the failure that came first by the clocks of the nodes, else `fallback`."""
        return min(self.failures, key=lambda failure: failure.when, default=fallback)


def follow(job: Job, relay: Relay, stop: threading.Event, stop_s: float = STOP_S) -> Failure | None:
    """Submit a job and wait for its end, passing its lines on; None where it succeeded, else why it did not.

    Args:
        job: Not submitted yet.
        relay: Gets the lines.
        stop: Set it to end the job.
        stop_s: After so many seconds of being asked to end, it is ended.

    Raises:
        UserError: The scheduler does not take the job.
    """
    name = job.start()
    note(f"{name} submitted")
    shown, phase, asked, act_at = "", "waiting", False, 0.0
    while True:
        for line in job.lines():
            relay.take(line)
        if stop.is_set() and time.monotonic() > act_at:
            note(f"{name}: ended, because it did not end by itself" if asked else f"{name}: asked to end")
            try:
                job.kill() if asked else job.stop()
                asked, act_at = True, time.monotonic() + stop_s
            except UserError as error:  # the scheduler may be away for a moment
                note(f"{name}: {error}; trying again")
                act_at = time.monotonic() + RETRY_S
        state = job.state()
        if state.phase == "ended":
            break
        if (phase, state.phase) == ("running", "waiting"):  # queued anew: what failed before is no cause any more
            relay.failures.clear()
        phase = state.phase
        if state.text and state.text != shown:
            shown = state.text
            note(f"{name} {state.text}")
        time.sleep(POLL_S)
    for line in job.lines():
        relay.take(line)
    if state.succeeded:
        return None
    if stop.is_set():
        text = "training was stopped by a signal; the same command trains again"
        return relay.cause(Failure(-1, "TrainingCancelled", text, text))
    text = f"{name} {state.text}"
    if relay.last:
        text += "; its last lines:\n" + "\n".join(relay.last)
    return relay.cause(Failure(-1, "JobFailed", text, text))


def note(text: str) -> None:
    """Print a line of our own among the ranks'."""
    emit(RANK_0 + text)


def emit(line: str) -> None:
    """Print a line; where nobody reads any more, the job must still be ended."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until this process ends)


def leave(failure: Failure, log_dir: str) -> None:
    """Write a failure where and as `launch.first_failure` finds it."""
    rank = str(failure.rank) if failure.rank >= 0 else "job"
    path = Path(log_dir, f"job-{time.time_ns()}", rank, "error.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    message = {"message": f"{failure.kind}: {failure.message}", "extraInfo": {"py_callstack": failure.traceback}}
    path.write_text(json.dumps({"message": message}), encoding="utf-8")
    when = failure.when or time.time_ns()
    os.utime(path, ns=(when, when))


def end_with_parent() -> None:
    """Get SIGTERM, which cancels the job, when the parent ends, however it does (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a job may inherit: its ranks report to this process, not to Dagster."""
    ours = {REPORTER_ENV, RECORDS_ENV}
    return {
        name: value for name, value in variables.items() if name not in ours and not name.startswith("DAGSTER_PIPES")
    }


def main(arguments: list[str] | None = None) -> None:
    """Submit, follow, and exit as torchrun would: 0 where the training succeeded."""
    parser = train_parser("twhin_pipeline.launchers.submit", "Train by a scheduler.")
    parser.add_argument("--log-dir", required=True, help="gets the failure, where there is one")
    options = parser.parse_args(arguments)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    end_with_parent()
    reporter = make_reporter(0) if os.environ.get(REPORTER_ENV) else None
    relay = Relay(reporter, set(os.environ.get(RECORDS_ENV, "").split(",")))
    os.environ.update(kept := environment(os.environ))
    for name in os.environ.keys() - kept.keys():
        del os.environ[name]
    failure: Failure | None
    try:
        config = load_config(options.config, options.set)
        training = Training(options.config, Store(options.home, options.view), options.snapshot, tuple(options.set))
        failure = follow(make_job(config, training, options.log_dir), relay, stop)
    except (UserError, UnavailableError) as error:
        failure = Failure(-1, type(error).__name__, str(error), str(error))
    if failure is not None:
        leave(failure, options.log_dir)
        sys.exit(CANCELLED_EXIT if failure.kind == "TrainingCancelled" else 1)


if __name__ == "__main__":
    main()
