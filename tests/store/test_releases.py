"""Releases name versions that belong together; `current` moves as one file, and every move is recorded."""

from __future__ import annotations

import json
import threading

import pyarrow as pa
import pytest

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, releases

S = "2025-01-01"


def write(store: Store, asset: str, value: int, **parents: str) -> str:
    with store.replace(asset, S, config_hash="c", parents=parents) as draft:
        draft.write(pa.table({"a": [value]}))
    return store.manifest(asset, S).version


def made(store: Store, value: int) -> releases.Release:
    edges = write(store, "raw_edges", value)
    vocabulary = write(store, "vocabulary/user", value, raw_edges=edges, **{"vocabulary/user@2024-01-01": "x"})
    vectors = write(store, "embeddings/user", value, **{"vocabulary/user": vocabulary})
    return releases.make(store, S, {"embeddings/user": vectors}, {"recall@20": 0.5}, None)


def test_a_release_names_its_tables_and_all_that_they_were_made_from(store):
    release = made(store, 1)
    assert set(release.tables) == {"raw_edges", "vocabulary/user", "embeddings/user"}
    assert releases.read(store, release.name) == release and releases.names(store) == [release.name]


def test_a_reader_of_a_release_sees_its_versions_whatever_is_made_later(store):
    release = made(store, 1)
    made(store, 2)
    reader = releases.opened(store, release)
    assert [reader.read(asset, S)["a"].to_pylist() for asset in release.tables] == [[1]] * 3
    assert store.read("raw_edges", S)["a"].to_pylist() == [2]


def test_promotion_moves_current_and_rollback_moves_it_back_both_on_the_record(store):
    assert releases.current(store) is None and releases.history(store) == []
    first, second = made(store, 1), made(store, 2)
    for release, reason in ((first, "first"), (second, "better"), (first, "second was worse")):
        releases.promote(store, release.name, "me", reason)
        assert releases.current(store) == release
    assert [(one.release, one.by, one.reason) for one in releases.history(store)] == [
        (first.name, "me", "first"), (second.name, "me", "better"), (first.name, "me", "second was worse")
    ]  # fmt: skip


def test_releases_that_were_rolled_back_from_are_not_trusted_until_they_are_current_again(store):
    first, second, third = made(store, 1), made(store, 2), made(store, 3)
    assert releases.trusted(store) == set()
    moves = [
        (first, {first.name}),
        (second, {first.name, second.name}),
        (first, {first.name}),
        (third, {first.name, third.name}),
        (second, {first.name, second.name, third.name}),
    ]
    for release, trusted in moves:
        releases.promote(store, release.name, "me", "test")
        assert releases.trusted(store) == trusted


def test_an_unknown_release_and_one_whose_tables_are_gone_are_not_promoted(store):
    release = made(store, 1)
    with pytest.raises(UserError, match="unknown release"):
        releases.promote(store, release.name[:-1], "me", "typo")
    version = release.tables["raw_edges"]
    store.fs.rm(store.fs._strip_protocol(store.path("raw_edges", S, version)), recursive=True)
    with pytest.raises(UserError, match=f"no version {version} of table raw_edges"):
        releases.promote(store, release.name, "me", "gone")
    assert releases.current(store) is None


def test_a_reader_of_current_sees_one_whole_file_at_every_moment(tmp_path):
    store = Store(str(tmp_path))
    known = {one.name for one in (made(store, 1), made(store, 2))}
    releases.promote(store, min(known), "me", "start")
    ended, seen = threading.Event(), set()

    def read() -> None:
        while not ended.is_set():
            seen.add(json.loads((tmp_path / "releases" / "current.json").read_text())["release"])

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(50):
        releases.promote(store, sorted(known)[turn % 2], "me", "turn")
    ended.set()
    reader.join()
    assert seen <= known and len(releases.history(store)) == 51


def test_a_user_without_a_name_is_recorded_by_number(monkeypatch):
    """As in a container that runs under a number of its own."""
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("getpwuid(): uid not found: 1234")))
    monkeypatch.setattr("os.getuid", lambda: 1234)
    assert releases.user() == "uid 1234"


@pytest.mark.parametrize(
    "name", ["../secret", "current", "pinned/x", "a\0b", "", "2025-01-01-20250101T000000/../../secret"]
)
def test_a_name_that_is_none_of_a_release_reads_no_other_file(tmp_path, name):
    store = Store(str(tmp_path / "home"))
    store.write_text(["secret.json"], '{"name": "x", "snapshot": "x", "created": "x", "tables": {}}')
    with pytest.raises(UserError, match="unknown release"):
        releases.read(store, name)
