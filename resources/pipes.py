"""Rank 0's line to Dagster, while training runs in processes of its own.

What belongs here: the reporter that training is told to use by TWHIN_REPORTER. Only rank 0 makes one: two that open the
session would both report.
https://docs.dagster.io/guides/build/external-pipelines
"""

from __future__ import annotations

import atexit
import math
from typing import Any

from dagster_pipes import PipesContext, open_dagster_pipes


class PipesReporter:
    """Sends milestones to the run's log at once, and the results as the asset's metadata."""

    def __init__(self) -> None:
        self.context: PipesContext = open_dagster_pipes()
        atexit.register(self.context.close)

    def milestone(self, text: str) -> None:
        """Log one line in Dagster."""
        print(text, flush=True)
        self.context.log.info(text)

    def progress(self, step: int, total: int, loss: float, rate: float) -> None:
        """Say nothing: an event for each step would make the run's page slow."""

    def validation(self, record: object) -> None:
        """Say nothing: the milestone has the values."""

    def finished(self, metadata: dict[str, Any]) -> None:
        """Report the materialization."""
        self.context.report_asset_materialization(metadata={key: as_metadata(value) for key, value in metadata.items()})


def as_metadata(value: Any) -> Any:
    """Return `value` as Pipes takes it: numpy's numbers raise, and NaN would break the page's charts."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if value is None:
        return {"raw_value": "none", "type": "text"}
    if isinstance(value, float) and not math.isfinite(value):
        return {"raw_value": str(value), "type": "text"}
    if isinstance(value, str):
        kind = "md" if "\n" in value else "text"
        return {"raw_value": f"```\n{value}\n```" if kind == "md" else value, "type": kind}
    if isinstance(value, (dict, list, tuple)):
        return {"raw_value": _plain(value), "type": "json"}
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
