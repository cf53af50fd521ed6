"""Decisions: what the table `promotion` says about releases, for whoever reads it. `promotion.py` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twhin_pipeline.store import Store
from twhin_pipeline.words import PROMOTION

PROMOTED, HELD = "promoted", "held"


def decisions(store: Store, snapshot: str | None = None) -> dict[str, dict[str, Any]]:
    """Return what was decided about releases, by their names: the details of the tables `promotion`.

    Args:
        store: Where they are.
        snapshot: Only this one's; None: all.
    """
    base = store.seen_as(None)
    made = [
        base.manifest(PROMOTION, of, version).details
        for of in ([snapshot] if snapshot is not None else base.snapshots_made(PROMOTION))
        for version in base.versions_of(PROMOTION, of)
    ]
    return {details["release"]: details for details in made}


def in_words(details: Mapping[str, Any]) -> str:
    """Return what was decided, on one line, from the details of a table `promotion`."""
    if details["decision"] == HELD:
        return f"held by a gate: {details['reason']}"
    return f"promoted: {details.get('headline') or details['reason']}"
