"""Execution: the pool that steps share, and what a user's mistake does to a step.

What belongs here: how steps run. What does not: what they run (`steps.py`, `checks.py`, `jobs.py`).
https://docs.dagster.io/guides/operate/managing-concurrency
"""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from twhin_pipeline.errors import UserError

POOL = "twhin"
"""Its limit is in `resources/dagster.yaml`."""


@contextmanager
def mistakes() -> Iterator[None]:
    """Turn a user's mistake into a failure of the step that shows its one message and is not tried again."""
    try:
        yield
    except UserError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
