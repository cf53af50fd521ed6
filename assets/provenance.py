"""What an asset was made from: its key in Dagster, and the version of the code that it ran.

What does not belong here: recording parents and refusing stale ones (`twhin_pipeline/store.py` does both).
"""

from __future__ import annotations

import hashlib
from importlib import resources

import dagster as dg

from twhin_pipeline.store import code_version


def code(*modules: str) -> str:
    """Return a code version that changes when one of these modules of `twhin_pipeline` does."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update((resources.files("twhin_pipeline") / f"{module}.py").read_bytes())
    return f"{code_version()}-{digest.hexdigest()[:8]}"


def key(table: str) -> dg.AssetKey:
    """Return the asset key of a table of the store: `vocabulary/user` is ["vocabulary", "user"]."""
    return dg.AssetKey(table.split("/"))
