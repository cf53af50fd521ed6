"""The service is sent what its own OpenAPI allows and what it forbids: it never fails (schemathesis)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import days
import pytest
from service_process import served

from twhin_pipeline.store import Store

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def fuzz(store: Store, folder: Path, examples: int) -> None:
    """Send so many requests for each endpoint; responses must be of a status, type and form that OpenAPI names."""
    with served(store.root) as client:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{client.base_url}/openapi.json"]
        options = ["--checks", CHECKS, "--max-examples", str(examples), "--seed", "1", "--no-color"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
        counted = client.get("/metrics").text
        asked = sum(
            float(line.rsplit(" ", 1)[1]) for line in counted.splitlines() if line.startswith("twhin_requests_")
        )
        assert asked > examples and 'status="500"' not in counted


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "home"))
    days.make(store, 0)
    return store


def test_no_request_makes_the_service_fail(store: Store, tmp_path: Path) -> None:
    fuzz(store, tmp_path, 5)


@pytest.mark.long
def test_no_request_of_very_many_makes_the_service_fail(store: Store, tmp_path: Path) -> None:
    fuzz(store, tmp_path, 400)
