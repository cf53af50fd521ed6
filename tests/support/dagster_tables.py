"""Small tables for tests of the Dagster side."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from twhin_pipeline.store import Store

SNAPSHOT = "2025-01-01"


def put(store: Store, asset: str, *parents: str, details: dict[str, Any] | None = None) -> None:
    versions = store.versions(SNAPSHOT, parents)
    with store.replace(asset, SNAPSHOT, config_hash="c", parents=versions) as draft:
        draft.write(pa.table({"row": [1, 2], "name": ["a", "b"]}))
        draft.details = details or {}
