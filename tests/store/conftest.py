"""Fixtures of the store."""

from __future__ import annotations

import uuid

import pytest
import s3_server

from twhin_pipeline.store import Store, locks


@pytest.fixture(params=["file", "memory", "s3"])
def store(request, tmp_path, monkeypatch) -> Store:
    """An empty store: in a folder, in fsspec's memory, and on a server of S3."""
    monkeypatch.setattr(locks, "WAIT_S", 0.3)
    if request.param == "s3":
        return Store(f"{s3_server.use(monkeypatch)}/home")
    return Store((tmp_path / "home").as_uri() if request.param == "file" else f"memory://{uuid.uuid4().hex}")


@pytest.fixture(params=["memory", "s3"])
def remote_store(request, monkeypatch) -> Store:
    """An empty store behind a URL."""
    return Store(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else f"{s3_server.use(monkeypatch)}/home")
