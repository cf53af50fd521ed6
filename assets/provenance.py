"""What an asset was made from: the code it ran, and whether the tables above it still fit each other.

What belongs here: refusing stale upstream tables, and code versions. What does not: recording parents (the stages of
`twhin_pipeline` do, in each table's manifest).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from importlib import resources

import dagster as dg

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import MAKERS, Store, code_version


def code(*modules: str) -> str:
    """Return a code version that changes when one of these modules of `twhin_pipeline` does."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update((resources.files("twhin_pipeline") / f"{module}.py").read_bytes())
    return f"{code_version()}-{digest.hexdigest()[:8]}"


def refuse_stale(store: Store, snapshot: str, tables: Iterable[str]) -> None:
    """Raise UserError where one of `tables`, or a table above one, was made from what has been replaced since."""
    seen: set[str] = set()
    waiting = list(tables)
    while waiting:
        table = waiting.pop(0)
        if table in seen or "@" in table:
            continue
        seen.add(table)
        manifest = store.manifest(table, snapshot)
        stale = store.stale(table, snapshot)
        if stale:
            stage = MAKERS[table.split("/")[0]]
            raise UserError(
                f"{table} of snapshot {snapshot} is stale: {', '.join(sorted(stale))} changed after it was made; "
                f"materialize {table} and what follows it again (in a terminal: `twhin {stage} --snapshot {snapshot}`)"
            )
        waiting += manifest.parents


def key(table: str) -> dg.AssetKey:
    """Return the asset key of a table of the store: `vocabulary/user` is ["vocabulary", "user"]."""
    return dg.AssetKey(table.split("/"))
