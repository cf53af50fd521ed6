"""What only a store on a server has: pages, retries, uploads in parts, and credentials that go nowhere."""

from __future__ import annotations

import os

import pyarrow as pa
import pytest
import s3_server

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Draft, Store

S = "2025-01-02"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    return Store(f"{s3_server.use(monkeypatch)}/home")


@pytest.fixture
def server() -> s3_server.Server:
    yield s3_server.shared()
    s3_server.shared().fault = None


def test_a_table_of_more_files_than_a_page_has_is_listed_and_read_whole(store):
    count = 2 * s3_server.PAGE + 3
    with store.replace("raw_edges", S, config_hash="c") as draft:
        for number in range(count):
            draft.write(pa.table({"a": [number]}), f"part-{number:05d}.parquet")
    assert len(store.files("raw_edges", S)) == count
    assert store.read("raw_edges", S)["a"].to_pylist() == list(range(count))
    assert len(store.children(f"raw_edges/{S}/{store.manifest('raw_edges', S).version}")) == count + 1


def test_a_server_that_is_busy_for_a_moment_is_asked_again(store, server):
    refused: dict[str, int] = {}

    def busy(environ: dict) -> tuple[str, str] | None:
        method = environ["REQUEST_METHOD"]
        refused[method] = refused.get(method, 0) + 1
        return ("503 Slow Down", "SlowDown") if refused[method] == 1 else None

    server.fault = busy
    with store.replace("raw_edges", S, config_hash="c") as draft:
        draft.write(pa.table({"a": [1]}))
    assert store.read("raw_edges", S)["a"].to_pylist() == [1]
    assert {"PUT", "GET", "HEAD"} <= set(refused)


def test_a_large_file_is_uploaded_in_parts_and_one_that_fails_leaves_none(store, server, tmp_path, monkeypatch):
    monkeypatch.setattr("s3fs.core.calculate_chunksize", lambda size, chunksize=None: 5 << 20)
    draft = Draft(store, "raw_edges", S, "20250102T000000-00000000")

    def upload() -> None:
        with draft.local_file("part-00000.parquet") as path, open(path, "wb") as file:
            file.write(os.urandom(12 << 20))

    server.requests.clear()
    upload()
    parts = [path for method, path in server.requests if method == "PUT" and "partNumber=" in path]
    assert len(parts) == 3 and store.sizes(draft.location) == {"part-00000.parquet": 12 << 20}

    store.remove(draft.location)
    server.fault = lambda environ: (
        ("403 Forbidden", "AccessDenied") if "partNumber=2" in environ["QUERY_STRING"] else None
    )
    with pytest.raises(PermissionError):
        upload()
    assert any(method == "DELETE" and "uploadId=" in path for method, path in server.requests), (
        "what was sent is removed"
    )
    assert store.sizes(draft.location) == {}


def test_what_another_process_writes_is_seen_at_once(store):
    """s3fs keeps listings unless it is told not to."""
    assert store.versions_of("raw_edges", S) == [] and not store.exists("raw_edges", S)
    other = Store(store.root)
    other.fs = type(store.fs)(skip_instance_cache=True)
    with other.replace("raw_edges", S, config_hash="c") as draft:
        draft.write(pa.table({"a": [1]}))
    assert len(store.versions_of("raw_edges", S)) == 1 and store.exists("raw_edges", S)


def test_a_password_in_the_stores_url_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="has a user's password in its URL") as caught:
        Store("s3://me:hunter2@bucket/home")
    assert "hunter2" not in str(caught.value)
