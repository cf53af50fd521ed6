"""A worker follows the current release, and keeps the one that it has where the next cannot be opened or files go."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import days
import httpx
import pytest
import small_store
from days import NOW
from service_process import served

from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.lifecycle import promotion, removal, retention
from twhin_pipeline.serving import current_release
from twhin_pipeline.serving.current_release import CurrentRelease
from twhin_pipeline.serving.metrics import Metrics
from twhin_pipeline.store import Store, releases

USERS, ITEMS = small_store.ids("user"), small_store.ids("item")
ASKED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/recommend", {"ids": USERS[:5], "relation": "likes", "k": 5}),
    ("/recommend", {"ids": USERS[:5], "relation": "follows", "k": 5, "exclude_known": "any"}),
    ("/recommend", {"ids": USERS[:5], "relation": "rates", "k": 5, "exclude_known": False}),
    ("/neighbors", {"entity": "item", "ids": ITEMS[:5], "k": 5}),
    ("/score", {"lhs": USERS[:5], "rhs": ITEMS[:5], "relation": "likes"}),
    ("/embedding", {"entity": "user", "ids": USERS}),
)
"""A question of each kind."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "home"))


def answers(client: httpx.Client) -> list[Any]:
    found = [client.post(path, json=asked) for path, asked in ASKED]
    assert [one.status_code for one in found] == [200] * len(ASKED), [one.text for one in found]
    return [one.json() for one in found]


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_promoted_release_and_a_rollback_are_followed_and_counted(store: Store) -> None:
    first = days.make(store, 0)
    with served(store.root, interval=0.05) as client:
        before = answers(client)
        second = days.make(store, 1)
        wait_for(lambda: client.get("/readyz").json()["release"] == second.name)
        after = answers(client)
        assert {one["release"] for one in after} == {second.name} and {one["snapshot"] for one in after} == {
            days.name(1)
        }
        assert after[-1]["embeddings"] != before[-1]["embeddings"]
        promotion.rollback(store, None, "me", "worse")
        wait_for(lambda: client.get("/readyz").json()["release"] == first.name)
        assert answers(client) == before
        counted = client.get("/metrics").text
    assert "twhin_swaps_total 2.0" in counted and "twhin_swap_failures_total 0.0" in counted
    for release, workers in ((first, "1.0"), (second, "0.0")):
        label = f'release="{release.name}",snapshot="{release.snapshot}"'
        assert f"twhin_release_workers{{{label}}} {workers}" in counted


def test_a_release_that_cannot_be_opened_is_reported_and_the_former_one_answers_until_it_can(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(current_release, "RETRY_S", 0.1)
    first = days.make(store, 0)
    with served(store.root, interval=0.05) as client:
        before = answers(client)
        second = days.make(store, 1, publish=False)
        folder = Path(store.path("embeddings/user", second.snapshot, second.tables["embeddings/user"]))
        shutil.move(folder / "_index", folder / "_away")
        (part,) = folder.glob("*.parquet")
        content = part.read_bytes()
        part.write_bytes(content[:-1])
        releases.promote(store, second.name, "me", "test")
        wait_for(lambda: client.get("/readyz").json()["failed"] is not None)
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["release"] == first.name
        assert ready.json()["failed"]["release"] == second.name
        assert "is damaged" in ready.json()["failed"]["reason"] and store.root not in ready.text
        assert answers(client) == before
        counted = client.get("/metrics").text
        assert "twhin_release_failing 1.0" in counted and "twhin_swaps_total 0.0" in counted
        failures = [one for one in caplog.records if one.name == "twhin.serving" and second.name in one.getMessage()]
        assert f"still answering from {first.name}" in failures[0].getMessage()
        part.write_bytes(content)
        wait_for(lambda: client.get("/readyz").json()["release"] == second.name)
        assert client.get("/readyz").json()["failed"] is None
        assert "twhin_release_failing 0.0" in client.get("/metrics").text
        assert len(failures) < 10  # the same reason is logged once


def test_a_damaged_pointer_keeps_the_release(store: Store) -> None:
    release = days.make(store, 0)
    current = CurrentRelease(store.root, Metrics())
    current.look()
    assert current.opened is not None and current.failure is None
    store.write_text(["releases", "current.json"], "{")
    current.look()
    assert current.opened is not None and current.opened.name == release.name
    assert current.failure is not None and current.failure.release is None


def test_an_unchanged_pointer_costs_one_small_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    days.make(store, 0)
    current = CurrentRelease(store.root, Metrics())
    current.look()
    reads: list[Any] = []
    plain = Store.read_text
    monkeypatch.setattr(Store, "read_text", lambda self, parts: reads.append(parts) or plain(self, parts))
    monkeypatch.setattr(Store, "manifest", lambda *_: pytest.fail("a look read a manifest"))
    opened = current.opened
    current.look()
    assert reads == [["releases", "current.json"]] and current.opened is opened


def test_a_request_that_began_before_a_change_ends_on_the_release_it_began_with(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is replaced while a request computes: the answer is the former release's in every part."""
    first = days.make(store, 0)
    current = CurrentRelease(store.root, Metrics())
    current.look()
    kept = current.opened
    assert kept is not None
    expected = kept.model.recommend("likes", USERS[0], 5)
    second = days.make(store, 1)
    current.look()
    assert current.opened is not None and current.opened.name == second.name and kept.name == first.name
    assert kept.model.recommend("likes", USERS[0], 5) == expected


def test_a_worker_answers_on_when_retention_removes_the_release_that_it_has_open(store: Store) -> None:
    """A worker that follows no longer, as one that sleeps: three releases are published, and its own is removed.

    It relies on its mapped files, which the system keeps until they are unmapped; nothing is opened by name any more.
    """
    first = days.make(store, 0)
    with served(store.root, interval=3_600) as client:
        for day in range(1, 4):
            days.make(store, day)
        folder = Path(store.path("embeddings/user", first.snapshot, first.tables["embeddings/user"]))
        assert folder.exists()
        expected = answers(client)
        policy = RetentionConfig(releases=1, snapshots=1)
        removal.carry_out(store, retention.plan(store, policy, now=NOW), "me")
        assert not folder.exists() and first.name not in releases.names(store)
        assert answers(client) == expected
        assert {one["release"] for one in expected} == {first.name}
        # What was not asked before the removal:
        fresh = client.post("/recommend", json={"ids": USERS[10:], "relation": "follows", "k": 7})
        assert fresh.status_code == 200
