"""Execution: the pool that steps share, and what a user's mistake does to a step.

What belongs here: how steps run. What does not: what they run (`steps.py`, `checks.py`, `jobs.py`).
https://docs.dagster.io/guides/operate/managing-concurrency
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from twhin_pipeline.errors import UnavailableError, UserError

POOL = "twhin"
"""Its limit is in `resources/dagster.yaml`."""
HELD = "held"
"""Metadata of a failure that does not pass by itself."""


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
