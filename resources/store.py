"""The store as a Dagster resource: where tables live, and what they may be made of.

What belongs here: the root of the tables and DuckDB over them. What does not: what is in a table (`twhin_pipeline`).
https://docs.dagster.io/guides/build/external-resources
"""

from __future__ import annotations

import dagster as dg
from pydantic import Field

from twhin_pipeline.store import DEFAULT_HOME, Store


class StoreResource(dg.ConfigurableResource):
    """Tables under one root."""

    root: str = Field(
        default="",
        description=f"A folder or fsspec URL. Empty: the environment variable TWHIN_HOME, else `{DEFAULT_HOME}`.",
    )

    def open(self) -> Store:
        """Return the store."""
        return Store(self.root or None)
