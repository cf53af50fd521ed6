"""The record of what retention has removed: one file for each run, written before the first removal and after the last.

    <root>/retention/<time>.json

A file has `at`, `by`, `policy`, `notes`, `status` (`began`, then `ended` or `broke off`), `bytes`, and `removed`: what
went, each with its table, snapshot, name and bytes. A run that was killed leaves `began` and what it was to remove.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twhin_pipeline.store.store import Store

FOLDER = "retention"


def write(store: Store, record: Mapping[str, Any], name: str | None = None) -> str:
    """Write a run's record, a new one or over the one of that `name`; return its name."""
    name = name or f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}.json"
    store.write_text([FOLDER, name], json.dumps(record, indent=1, default=str))
    return name


def records(store: Store) -> list[dict[str, Any]]:
    """Return the records, the newest first."""
    names = [one for one in store.children(FOLDER) if one.endswith(".json")]
    return [json.loads(store.read_text([FOLDER, name])) for name in reversed(names)]


def removed(store: Store, name: str) -> str | None:
    """Return when a version or release was removed; None where no record says so."""
    for record in records(store):
        if any(one["name"] == name for one in record["removed"]):
            return str(record["at"])
    return None
