"""Telling people how training goes. Only rank 0 tells."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any, Protocol

from twhin_pipeline.errors import UserError

REPORTER_ENV = "TWHIN_REPORTER"
# Under torchrun a rank's output is a pipe: where this variable is set, progress goes through it as marked lines.
PROGRESS_ENV, PROGRESS_MARK = "TWHIN_PROGRESS_LINES", "\x1etwhin-progress "


class Reporter(Protocol):
    """Where progress goes: a console, or Dagster."""

    def milestone(self, text: str) -> None:
        """Tell an event worth keeping: a checkpoint, an evaluation, a log line."""

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Tell where training stands; `rate` is edges per second. Called at each step: it must be cheap."""

    def finished(self, metadata: dict[str, Any]) -> None:
        """Tell what came out; JSON values."""


class ProgressBar:
    """A rich progress bar on a terminal."""

    def __init__(self) -> None:
        from rich import progress

        self.bar = progress.Progress(
            progress.TextColumn("training"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} edges/s"),
            progress.TimeRemainingColumn(),
        )
        self.task: Any = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def update(self, step: int, total: int, loss: float, rate: float) -> None:
        """Move the bar; it appears at the first call."""
        if self.task is None:
            self.bar.start()
            self.task = self.bar.add_task("training", total=total, loss=loss, rate=rate)
        self.bar.update(self.task, completed=step, total=total, loss=loss, rate=rate)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)


class ConsoleReporter:
    """A progress bar on a terminal, or under `launch.run` the lines it draws one from; otherwise milestones only."""

    def __init__(self) -> None:
        self.bar = ProgressBar() if sys.stdout.isatty() else None
        self.lines = PROGRESS_ENV in os.environ

    def milestone(self, text: str) -> None:
        """Print it."""
        if self.bar is not None:
            self.bar.print(text)
        else:
            print(text, flush=True)

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Move the bar, if there is one."""
        if self.bar is not None:
            self.bar.update(step, total, loss, rate)
        elif self.lines:
            values = {"step": step, "total": total, "loss": loss, "rate": rate}
            print(PROGRESS_MARK + json.dumps(values), flush=True)

    def finished(self, metadata: dict[str, Any]) -> None:
        """Close the bar; the milestones have told the rest."""
        if self.bar is not None:
            self.bar.bar.stop()


class SilentReporter:
    """For ranks other than 0."""

    def milestone(self, text: str) -> None:
        """Say nothing."""

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Say nothing."""

    def finished(self, metadata: dict[str, Any]) -> None:
        """Say nothing."""


def make_reporter(rank: int) -> Reporter:
    """Return rank 0's reporter, named by TWHIN_REPORTER as `module:Class` (default: the console); others are silent.

    Raises:
        UserError: TWHIN_REPORTER names nothing that can be imported.
    """
    if rank != 0:
        return SilentReporter()
    name = os.environ.get(REPORTER_ENV)
    if not name:
        return ConsoleReporter()
    module, _, attribute = name.partition(":")
    try:
        made: Reporter = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{REPORTER_ENV}={name!r} cannot be imported ({error}); give module:Class") from error
    return made
