"""`python -m twhin_pipeline.launchers.node`: what a scheduler runs on each node of a job.

It starts torchrun as `twhin train` does on one machine, with the node's number and the first node's address, prints
what the ranks print, and ends with a record of what failed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.launchers.job import FAILURE
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, with_parent
from twhin_pipeline.training.launch import CANCELLED_EXIT, Failure, TrainingCancelled, TrainingFailed
from twhin_pipeline.training.reporting import record_line

NODE_RANK = {"slurm": "SLURM_NODEID", "kubernetes": "JOB_COMPLETION_INDEX"}
"""The variable in which a scheduler gives a node its number."""
USER_ERROR_EXIT = 2
RANK_0 = "[default0]:"
"""What torchrun puts before a line of rank 0: `launch.run` reads a job's lines as it reads torchrun's."""


def main(arguments: list[str] | None = None) -> None:
    """Train as one node of a job. Exit code 2: a mistake of the user's; 75: stopped by a signal; 1: another failure."""
    parser = launch.train_parser("twhin_pipeline.launchers.node", "Train as one node of a job.")
    parser.add_argument("--endpoint", required=True, help="host:port at which the first node waits for the others")
    parser.add_argument("--log-dir", required=True, help="gets a folder for each node")
    options = parser.parse_args(arguments)
    if options.home is None:
        parser.error("--home is required: a node knows no other place of the store")
    # `launch.run` passes SIGTERM on to torchrun.
    signal.signal(with_parent.STOP_SIGNAL, lambda *_: signal.raise_signal(signal.SIGTERM))
    failed: list[Failure] = []
    number, nodes = 0, 1
    try:
        asked = load_config(options.config, options.set).launch
        number, nodes = int(os.environ[NODE_RANK[asked.kind]]), asked.nnodes
        overrides = [*options.set, *local(number, nodes, options.endpoint)]
        config: TwhinConfig = load_config(options.config, overrides)
        store, log_dir = Store(options.home, options.view), os.path.join(options.log_dir, f"node-{number}")
        launch.run(
            config, options.config, overrides, store, options.snapshot,
            log_dir=log_dir, output=partial(show, number), on_record=show_record, on_failure=failed.append,
        )  # fmt: skip
    except (UserError, TrainingCancelled, TrainingFailed) as error:
        as_whole = Failure(-1, type(error).__name__, str(error), str(error), time.time_ns())
        print(
            RANK_0 + record_line(FAILURE, asdict(named(failed[0] if failed else as_whole, number, nodes))), flush=True
        )
        codes = {UserError: USER_ERROR_EXIT, TrainingCancelled: CANCELLED_EXIT}
        sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1))


def local(number: int, nodes: int, endpoint: str) -> list[str]:
    """Return the overrides by which a node of a job trains like a machine that someone started by hand."""
    result = ["launch.kind=local", "launch.slurm=null", "launch.kubernetes=null", f"launch.node_rank={number}"]
    return [*result, f"launch.rdzv_endpoint={endpoint}"] if nodes > 1 else result


def named(failure: Failure, number: int, nodes: int) -> Failure:
    """Return a failure that names its node, where there are several: a rank's number is that on its node."""
    if nodes == 1 or failure.rank < 0:
        return failure
    where = f"rank {failure.rank} of node {number} ({socket.gethostname()}) failed:\n"
    return replace(failure, rank=-1, traceback=where + failure.traceback)


def show(number: int, line: str) -> None:
    """Print a line of a rank."""
    print(f"{RANK_0}{line}" if number == 0 else f"{RANK_0}[node {number}] {line}", flush=True)


def show_record(kind: str, values: dict[str, Any]) -> None:
    """Print a record of rank 0."""
    print(RANK_0 + record_line(kind, values), flush=True)


if __name__ == "__main__":
    main()
