"""Versions, verdicts and locks: nothing is lost, confused, or published unchecked."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Draft, Store, Verdict, locks

S, BEFORE = "2025-01-02", "2025-01-01"


def write(store: Store, values: list[int], asset: str = "raw_edges", snapshot: str = S):
    with store.replace(asset, snapshot, config_hash="c") as draft:
        draft.write(pa.table({"a": values}))
    return store.newest(asset, snapshot)


def judge(store: Store, manifest, status: str, **more) -> None:
    checks = [{"name": "edges_present", "passed": status == "passed", "blocking": True, "finding": ""}]
    store.judge(manifest, Verdict(status, "2025-01-02T00:00:00+00:00", checks, **more))


def values(store: Store, snapshot: str = S) -> list[int]:
    return store.read("raw_edges", snapshot)["a"].to_pylist()


def test_a_commit_leaves_every_other_version_as_it_was(store):
    first, second = write(store, [1]), write(store, [2])
    assert store.versions_of("raw_edges", S) == [first.version, second.version]
    assert values(store) == [2]
    assert store.files_of(store.manifest("raw_edges", S, first.version))
    store.verify(first)


def test_versions_are_in_the_order_of_their_commits_also_where_the_clock_is_set_back(store, monkeypatch):
    from datetime import UTC, datetime

    from twhin_pipeline.store import store as module

    first = write(store, [1])

    class Past(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2001, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(module, "datetime", Past)
    second = write(store, [2])
    assert second.version > first.version and values(store) == [2]


def test_readers_get_the_newest_version_that_no_check_has_refused(store):
    good, bad = write(store, [1]), write(store, [2])
    judge(store, good, "passed")
    assert values(store) == [2], "not yet checked"
    judge(store, bad, "failed")
    assert values(store) == [1]
    judge(store, bad, "overruled", by="someone", reason="known")
    assert values(store) == [2]


def test_a_table_of_which_every_version_was_refused_names_the_check_and_how_to_accept_it(store):
    judge(store, write(store, [1]), "failed")
    assert not store.exists("raw_edges", S) and store.snapshots("raw_edges") == []
    with pytest.raises(UserError, match=r"raw_edges of snapshot 2025-01-02 is held back.*edges_present.*twhin accept"):
        store.read("raw_edges", S)


def test_only_what_passed_or_was_overruled_is_the_snapshot_before(store):
    manifest = write(store, [1], snapshot=BEFORE)
    assert store.latest_before("raw_edges", S) is None, "never checked"
    judge(store, manifest, "failed")
    assert store.latest_before("raw_edges", S) is None
    judge(store, manifest, "passed")
    assert store.latest_before("raw_edges", S) == manifest
    worse = write(store, [2], snapshot=BEFORE)
    judge(store, worse, "failed")
    assert store.latest_before("raw_edges", S) == manifest
    judge(store, worse, "overruled", by="someone", reason="known")
    assert store.latest_before("raw_edges", S) == worse


def test_the_last_accepted_version_is_older_than_the_one_that_is_checked(store):
    judge(store, first := write(store, [1]), "passed")
    judge(store, second := write(store, [2]), "passed")
    assert store.last_accepted("raw_edges", S) == second
    assert store.last_accepted("raw_edges", S, second.version) == first
    assert store.last_accepted("raw_edges", S, first.version) is None


def test_a_reader_reads_the_versions_that_it_opened_to_the_end(store):
    write(store, [1])
    reader = store.pinned()
    assert values(reader) == [1]
    write(store, [2])
    assert values(reader) == [1] and values(store) == [2]
    write(reader, [3])
    assert values(reader) == [3], "what it wrote itself"


def test_a_view_keeps_the_verdicts_of_its_own_tables(store):
    view = store.seen_as("refit")
    with view.replace("twhin_model", S, config_hash="c") as draft:
        draft.write(pa.table({"a": [1]}))
    manifest = view.manifest("twhin_model", S)
    judge(view, manifest, "failed")
    assert not view.exists("twhin_model", S) and not store.exists("refit/twhin_model", S)


def hold(root: str, started, ended) -> None:
    draft = Store(root).begin("raw_edges", S)
    started.set()
    ended.wait(60)
    draft.discard()


def test_a_second_writer_is_refused_with_the_name_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_S", 0.3)
    context = multiprocessing.get_context("spawn")
    started, ended = context.Event(), context.Event()
    writer = context.Process(target=hold, args=(str(tmp_path), started, ended))
    writer.start()
    try:
        assert started.wait(60)
        with pytest.raises(UserError, match=rf"raw_edges of snapshot {S}: is being written by process {writer.pid} on"):
            Store(str(tmp_path)).begin("raw_edges", S)
        write(Store(str(tmp_path)), [1], snapshot=BEFORE)  # another snapshot is not excluded
    finally:
        ended.set()
        writer.join()
    write(Store(str(tmp_path)), [2])
    assert values(Store(str(tmp_path))) == [2]


def test_a_second_writer_waits_for_one_that_is_soon_done(tmp_path):
    code = (
        "import sys, time, pyarrow as pa; from twhin_pipeline.store import Store\n"
        f"with Store(sys.argv[1]).replace('raw_edges', '{S}', config_hash='c') as draft:\n"
        "    print('begun', flush=True); time.sleep(1); draft.write(pa.table({'a': [1]}))"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "begun\n"
        second = write(Store(str(tmp_path)), [2])
        assert first.wait() == 0
    store = Store(str(tmp_path))
    assert values(store) == [2] and len(store.versions_of("raw_edges", S)) == 2
    assert second.version == store.versions_of("raw_edges", S)[-1]


def test_the_lock_of_a_killed_writer_is_taken_over_and_what_it_left_is_removed(tmp_path):
    code = (
        "import os, sys, signal, pyarrow as pa; from twhin_pipeline.store import Store\n"
        f"draft = Store(sys.argv[1]).begin('raw_edges', '{S}')\n"
        "draft.write(pa.table({'a': [9]})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    store = Store(str(tmp_path))
    left = list(Path(tmp_path).rglob("*.parquet"))
    assert left and not store.exists("raw_edges", S)
    write(store, [1])
    assert values(store) == [1] and not any(path.exists() for path in left)


def test_a_stage_that_leaves_the_lock_to_its_own_process_takes_none(store):
    with store.writing(S, []):
        pass


def test_a_stage_that_holds_its_tables_may_begin_them(store):
    with store.writing(S, ["raw_edges", "raw_edges_rejected"]):
        write(store, [1])
        assert locks.holds(store.path("raw_edges", S))
    assert not locks.holds(store.path("raw_edges", S))
    assert values(store) == [1]


def test_of_two_drafts_of_one_process_neither_removes_the_other(store):
    one, other = store.begin("raw_edges", S), store.begin("raw_edges", S)
    for draft, value in ((one, 1), (other, 2)):
        draft.write(pa.table({"a": [value]}))
        draft.commit(config_hash="c", parents={})
    assert len(store.versions_of("raw_edges", S)) == 2 and values(store) == [2]


def test_processes_that_fill_a_version_of_another_hold_no_lock(store):
    draft = store.begin("embeddings/user", S)
    Draft(store, "embeddings/user", S, draft.version).write(pa.table({"a": [1]}))
    assert draft.commit(config_hash="c", parents={}).rows == 1


def test_a_file_that_was_cut_short_is_refused_when_it_is_opened(tmp_path):
    store = Store(str(tmp_path))
    write(store, [1, 2, 3])
    (path,) = store.files("raw_edges", S)
    os.truncate(path, os.path.getsize(path) - 1)
    with pytest.raises(UserError, match=r"raw_edges of snapshot 2025-01-02 is damaged: part-00000.parquet of version"):
        store.read("raw_edges", S)


def test_a_flipped_bit_is_found_by_verify(tmp_path):
    store = Store(str(tmp_path))
    manifest = write(store, list(range(1000)))
    (path,) = store.files("raw_edges", S)
    assert store.verify(manifest) == manifest.bytes
    content = bytearray(Path(path).read_bytes())
    content[len(content) // 2] ^= 1
    Path(path).write_bytes(content)
    store.files("raw_edges", S)  # of the same size
    with pytest.raises(UserError, match="has other contents than when it was written"):
        store.verify(manifest)


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    store = Store(str(tmp_path))
    manifest = write(store, [1])
    path = Path(store.path("raw_edges", S, manifest.version, "_manifest.json"))
    path.write_text(path.read_text().replace('"rows": 1', '"rows": 2'))
    with pytest.raises(UserError, match=r"_manifest.json: was changed after it was written"):
        store.manifest("raw_edges", S)


def test_a_newer_format_is_refused_and_an_older_one_is_read(tmp_path):
    store = Store(str(tmp_path))
    manifest = write(store, [1, 2])
    path = Path(store.path("raw_edges", S, manifest.version, "_manifest.json"))
    written = json.loads(path.read_text())
    # Format 1 kept one manifest for the snapshot, and neither checksums nor its own format.
    old = {key: value for key, value in written.items() if key not in ("format", "digest")}
    old["files"] = [{key: value for key, value in file.items() if key != "sha256"} for file in old["files"]]
    path.unlink()
    (path.parent.parent / "manifest.json").write_text(json.dumps(old))
    assert values(store) == [1, 2] and store.manifest("raw_edges", S).format == 1
    assert store.snapshots("raw_edges") == [S] and store.assets() == ["raw_edges"]
    # It kept no verdicts: the next snapshot grows from it all the same.
    assert store.latest_before("raw_edges", "2025-02-01").version == manifest.version
    newer = write(store, [3])
    assert values(store) == [3] and store.versions_of("raw_edges", S) == [manifest.version, newer.version]
    path = Path(store.path("raw_edges", S, newer.version, "_manifest.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="is of format 99"):
        store.manifest("raw_edges", S)


@pytest.mark.parametrize("name", ["a%20b", "what?", "[v1]", "with space", "ünïcode", "a#b"])
def test_the_stores_path_may_hold_any_character(tmp_path, name):
    store = Store(str(tmp_path / name))
    write(store, [1])
    write(store, [2], asset="vocabulary/user")
    assert values(store) == [1] and store.snapshots("raw_edges") == [S]
    assert store.assets() == ["raw_edges", "vocabulary/user"]


def test_tables_of_any_depth_are_listed(store):
    for asset in ("raw_edges", "vocabulary/user", "refit/training_set/positives"):
        write(store, [1], asset=asset)
    store.fs.makedirs(store.fs._strip_protocol(store.path("logs", "x")), exist_ok=True)
    assert store.assets() == ["raw_edges", "refit/training_set/positives", "vocabulary/user"]


def test_a_versions_folder_is_read_as_plain_parquet_by_anything(tmp_path):
    store = Store(str(tmp_path))
    manifest = write(store, [1, 2])
    judge(store, manifest, "passed")
    assert pq.read_table(store.path("raw_edges", S, manifest.version))["a"].to_pylist() == [1, 2]


def test_a_version_is_removed_with_its_manifest_first_and_the_others_stay(store, monkeypatch):
    first, second = write(store, [1]), write(store, [2])
    removed = []
    original = store.remove
    monkeypatch.setattr(store, "remove", lambda place: (removed.append(place), original(place)))
    store.remove_version("raw_edges", S, second.version)
    assert removed[0].endswith(f"{second.version}/_manifest.json") and removed[1].endswith(second.version)
    assert store.versions_of("raw_edges", S) == [first.version] and values(store) == [1]
    store.remove_version("raw_edges", S, second.version)  # of a run that broke off
    assert values(store) == [1] and list(store.tables()) == [("raw_edges", S)]


def test_a_version_of_the_former_format_is_removed_and_a_later_one_stays(tmp_path):
    store = Store(str(tmp_path))
    former = write(store, [1])
    path = Path(store.path("raw_edges", S, former.version, "_manifest.json"))
    old = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("format", "digest")}
    path.unlink()
    (path.parent.parent / "manifest.json").write_text(json.dumps(old))
    newer = write(store, [2])
    store.remove_version("raw_edges", S, former.version)
    assert store.versions_of("raw_edges", S) == [newer.version] and values(store) == [2]


def test_what_grew_from_an_earlier_snapshot_is_stale_when_that_is_made_anew_and_not_when_it_is_removed(store):
    earlier = write(store, [1], asset="vocabulary/user")
    parents = {f"vocabulary/user@{S}": earlier.version}
    with store.replace("vocabulary/user", "2025-02-01", config_hash="c", parents=parents) as draft:
        draft.write(pa.table({"a": [1]}))
    assert store.stale("vocabulary/user", "2025-02-01") == []
    store.remove_version("vocabulary/user", S, earlier.version)
    assert store.stale("vocabulary/user", "2025-02-01") == []
    write(store, [2], asset="vocabulary/user")
    assert store.stale("vocabulary/user", "2025-02-01") == [f"vocabulary/user@{S}"]
