"""Execution: where steps run, the pool that they share, and what a user's mistake does to a step.

What belongs here: how steps run. What does not: what they run (`steps.py`, `checks.py`, `jobs.py`).
https://docs.dagster.io/guides/operate/managing-concurrency
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from twhin_pipeline.errors import UnavailableError, UserError

POOL = "twhin"
"""Its limit is in `resources/dagster.yaml`."""
HELD = "held"
"""Metadata of a failure that does not pass by itself."""
DEFINITIONS = "twhin_pipeline.definitions"


def forked(config: Mapping[str, Any]) -> dict[str, Any]:
    """Let a step's process be a fork of one that has loaded the code, so that no step loads it anew.

    That one, a fork server of `multiprocessing`, has opened no instance and has no torch, duckdb or MLflow, whose
    threads a fork would lose. Elsewhere than on Linux a fork is not safe, and steps start as Dagster starts them.

    Args:
        config: What the run says of its executor, Dagster's defaults filled in.
    """
    of_processes = config.get("multiprocess")
    if of_processes is None or "start_method" in of_processes or not sys.platform.startswith("linux"):
        return dict(config)
    # Another module may have assembled the definitions, in whose place ours may not load.
    loaded = DEFINITIONS if DEFINITIONS in sys.modules else "dagster"
    return {"multiprocess": {**of_processes, "start_method": {"forkserver": {"preload_modules": [loaded]}}}}


executor = dg.multi_or_in_process_executor.configured(
    forked, config_schema=dg.multi_or_in_process_executor.config_schema.as_field(), name="multi_or_in_process_executor"
)
"""Dagster's own, which takes the same settings; by default its steps are forks."""


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn a user's mistake into a failure of the step that shows its one message and is not tried again."""
    try:
        yield
    except UserError as error:
        held = {} if isinstance(error, UnavailableError) else {HELD: True}
        raise dg.Failure(str(error), held, allow_retries=False) from error


def cause(event: dg.DagsterEvent) -> str:
    """Return on one line why a step failed: what it said itself, else the innermost error."""
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        text = data.user_failure_data.description
    elif (error := data.error) is not None:
        while error.cause is not None:
            error = error.cause
        text = error.message
    else:
        text = "failed"
    return " ".join(text.split())
