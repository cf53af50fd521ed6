"""Fixtures of the Dagster side."""

from __future__ import annotations

import pytest
from dagster_tables import put

from twhin_pipeline.store import Store


@pytest.fixture
def store(tmp_path) -> Store:
    """Three tables, each made from the one before."""
    store = Store(str(tmp_path / "home"))
    put(store, "raw_edges")
    put(store, "vocabulary/user", "raw_edges")
    put(store, "training_set/positives", "raw_edges", "vocabulary/user")
    return store
