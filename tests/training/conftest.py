"""Fixtures of trainings in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def one_tracking_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Making MLflow's SQLite file takes seconds: once for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        patch.delenv("MLFLOW_RUN_ID", raising=False)
        yield
