"""Reports of how training goes, for people and for programs. Only rank 0 reports."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from twhin_pipeline.errors import UserError

REPORTER_ENV = "TWHIN_REPORTER"
# Under torchrun a rank's output is a pipe. This variable lists the kinds of records (`KINDS`) that the launcher wants
# through it: each is a line of the mark, the kind and a JSON object.
RECORDS_ENV, RECORD_MARK = "TWHIN_RECORDS", "\x1etwhin "
KINDS = MILESTONE, PROGRESS, VALIDATION, FINISHED = "milestone", "progress", "validation", "finished"


@dataclass(frozen=True)
class ValidationRecord:
    """One evaluation on the validation edges during training."""

    step: int
    metrics: dict[str, float]
    complete: bool
    """False where `training.eval_timeout_in_s` ended it early, so that it cannot be compared with others."""


class Reporter(Protocol):
    """Where progress goes: a console, or Dagster."""

    def milestone(self, text: str) -> None:
        """Report an event worth keeping, for people: a checkpoint, an evaluation, a log line."""

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Report how far training is; `rate` is edges per second. Called at each step: it must be cheap."""

    def validation(self, record: ValidationRecord) -> None:
        """Report an evaluation's values, for programs."""

    def finished(self, metadata: dict[str, Any]) -> None:
        """Report the results; JSON values."""


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
    """Milestones, a progress bar on a terminal, and under `launch.run` the records that it asks for."""

    def __init__(self) -> None:
        self.bar = ProgressBar() if sys.stdout.isatty() else None
        self.records = os.environ.get(RECORDS_ENV, "").split(",")

    def milestone(self, text: str) -> None:
        """Print it."""
        if MILESTONE in self.records:
            self._record(MILESTONE, {"text": text})
        elif self.bar is not None:
            self.bar.print(text)
        else:
            print(text, flush=True)

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Move the bar, if there is one."""
        if self.bar is not None:
            self.bar.update(step, total, loss, rate)
        self._record(PROGRESS, {"step": step, "total": total, "loss": loss, "rate": rate})

    def validation(self, record: ValidationRecord) -> None:
        """Print it as a record, if the launcher asks for it; people read the milestone."""
        self._record(VALIDATION, asdict(record))

    def finished(self, metadata: dict[str, Any]) -> None:
        """Close the bar; the milestones have the results."""
        if self.bar is not None:
            self.bar.bar.stop()
        self._record(FINISHED, {"metadata": metadata})

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        if kind in self.records:
            print(record_line(kind, values), flush=True)


def record_line(kind: str, values: Mapping[str, Any]) -> str:
    """Return the line that `parse_record` reads; numpy's numbers become Python's."""
    return f"{RECORD_MARK}{kind} {json.dumps(values, default=lambda number: number.item())}"


def parse_record(line: str) -> tuple[str, dict[str, Any]] | None:
    """Return the kind and the values of a line that is a record, else None."""
    _, mark, record = line.partition(RECORD_MARK)
    kind, _, values = record.partition(" ")
    return (kind, json.loads(values)) if mark else None


class SilentReporter:
    """For ranks other than 0."""

    def milestone(self, text: str) -> None:
        """Say nothing."""

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Say nothing."""

    def validation(self, record: ValidationRecord) -> None:
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
