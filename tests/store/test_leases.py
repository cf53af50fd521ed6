"""Writers behind a URL: one at a time, whatever dies, stalls or is lost on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import s3_server
from patience import wait_for

from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.lifecycle import leftovers
from twhin_pipeline.store import Store, conditional, locks, releases
from twhin_pipeline.training.checkpoint import CheckpointFolder

S = "2025-01-02"
FAR = {"host": "far", "process": 7, "since": "then", "token": "x", "machine": "another", "started": 1.0}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(locks, "WAIT_S", 0.3)
    return Store(f"{s3_server.use(monkeypatch)}/home")


@pytest.fixture
def server() -> s3_server.Server:
    """The server of the fixture `s3`; without faults again at the end."""
    yield s3_server.shared()
    s3_server.shared().fault = s3_server.shared().lost_answer = None
    s3_server.shared().ignores_conditions = False


def write(store: Store, value: int) -> None:
    with store.replace("raw_edges", S, config_hash="c") as draft:
        draft.write(pa.table({"a": [value]}))


def values(store: Store) -> list[int]:
    return store.read("raw_edges", S)["a"].to_pylist()


def lease(store: Store) -> str:
    return store.path("raw_edges", S, locks.WRITER)


def put_lease(store: Store, **fields: object) -> None:
    store.fs.pipe_file(lease(store), json.dumps({**FAR, "renewed": time.time(), **fields}).encode())


def test_a_lease_that_is_no_longer_renewed_is_taken_over(remote_store, monkeypatch):
    monkeypatch.setattr(locks, "WAIT_S", 0.2)
    put_lease(remote_store)
    assert remote_store.is_written("raw_edges", S)
    with pytest.raises(UserError, match="process 7 on far, since then; wait"):
        remote_store.begin("raw_edges", S)
    put_lease(remote_store, renewed=time.time() - 2 * locks.LEASE_S)
    assert not remote_store.is_written("raw_edges", S)
    write(remote_store, 1)
    assert values(remote_store) == [1] and not remote_store.fs.exists(lease(remote_store))


def test_of_many_that_wait_for_a_dead_writer_one_takes_its_place(remote_store):
    """Two that looked at the same time once removed the same lease, and each then made one of its own."""
    put_lease(remote_store, renewed=0)
    folder = remote_store.path("raw_edges", S)
    together = threading.Barrier(8)

    def attempt(_: int) -> bool:
        one = locks._Lease(remote_store.fs, folder, "raw_edges")
        together.wait()
        try:
            one.acquire(0)
        except UnavailableError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(8))) == 1


def test_without_conditional_writes_a_dead_writers_place_is_not_taken(remote_store, monkeypatch):
    monkeypatch.setattr(conditional, "excludes", lambda fs: False)
    put_lease(remote_store, renewed=0)
    with pytest.raises(
        UnavailableError, match=rf"process 7 on far.* no conditional writes.* remove {lease(remote_store)}"
    ):
        remote_store.begin("raw_edges", S)
    remote_store.fs.rm_file(lease(remote_store))
    write(remote_store, 1)


def test_a_writer_that_lost_its_place_makes_nothing_visible(remote_store):
    """It was cut off, or stopped, for longer than a lease lasts."""
    draft = remote_store.begin("raw_edges", S)
    draft.write(pa.table({"a": [1]}))
    put_lease(remote_store)
    with pytest.raises(UnavailableError, match="cut off from the store for so long"):
        draft.commit(config_hash="c", parents={})
    draft.discard()
    assert not remote_store.exists("raw_edges", S)
    assert json.loads(remote_store.fs.cat_file(lease(remote_store)))["token"] == "x", "the other's lease stays"


def test_a_lease_is_renewed_while_its_writer_lives(remote_store, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_S", 0.05)
    draft = remote_store.begin("raw_edges", S)
    first = json.loads(remote_store.fs.cat_file(lease(remote_store)))["renewed"]
    wait_for(lambda: json.loads(remote_store.fs.cat_file(lease(remote_store)))["renewed"] != first, 30, "it is renewed")
    draft.discard()
    assert not remote_store.fs.exists(lease(remote_store))


def test_the_place_of_a_killed_process_of_this_machine_is_taken_at_once(s3):
    code = (
        "import os, sys, signal; from twhin_pipeline.store import Store\n"
        f"draft = Store(sys.argv[1]).begin('raw_edges', '{S}'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, s3.root], check=False).returncode == -9
    assert s3.fs.exists(lease(s3)) and not s3.is_written("raw_edges", S)
    write(s3, 1)


def test_a_lease_of_a_living_process_of_this_machine_is_respected(remote_store):
    mine = {"machine": locks._machine(), "process": os.getpid(), "started": locks._started(os.getpid())}
    put_lease(remote_store, **mine)
    assert remote_store.is_written("raw_edges", S)
    put_lease(remote_store, **mine | {"started": 1.0})  # another process had its number
    assert not remote_store.is_written("raw_edges", S)


def test_a_write_whose_answer_is_lost_holds_the_lock_and_is_not_refused_by_itself(s3, server):
    lost: list[str] = []

    def once(environ: dict) -> bool:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "PUT" or not path.endswith(locks.WRITER) or len(lost) == 2:
            return False
        lost.append(path)
        return True

    server.lost_answer = once
    write(s3, 1)  # the first is the lease's creation, the second its renewal before the commit
    assert len(lost) == 2 and values(s3) == [1]


def test_a_server_that_ignores_conditions_is_refused(server, monkeypatch):
    store = Store(f"{s3_server.use(monkeypatch)}/home")
    server.ignores_conditions = True
    with pytest.raises(UserError, match="ignores conditional writes"):
        store.begin("raw_edges", S)
    assert not store.fs.exists(lease(store))


def test_a_promotion_that_was_overtaken_unnoticed_is_refused_and_the_other_stays(remote_store, monkeypatch):
    write(remote_store, 1)
    version = remote_store.manifest("raw_edges", S).version
    one, other = (releases.make(remote_store, S, {"raw_edges": version}, {}, None) for _ in range(2))
    releases.promote(remote_store, one.name, "a", "the first")
    move = Store.move_pointer

    def overtaken(store: Store, *arguments: object) -> None:
        monkeypatch.setattr(Store, "move_pointer", move)
        text = json.loads(store.read_text(["releases", "current.json"]))
        text["history"].append(text["history"][0] | {"release": other.name, "by": "b"})
        store.write_text(["releases", "current.json"], json.dumps(text))
        move(store, *arguments)

    monkeypatch.setattr(Store, "move_pointer", overtaken)
    with pytest.raises(UnavailableError, match="changed by another process meanwhile"):
        releases.promote(remote_store, one.name, "a", "again")
    assert [move.by for move in releases.history(remote_store)] == ["a", "b"]


def test_who_holds_the_lock_of_the_releases_is_no_release(remote_store):
    with remote_store.writing(releases.CURRENT, [releases.FOLDER]):
        assert releases.names(remote_store) == []


def test_a_training_holds_its_checkpoints_and_retention_leaves_them(remote_store, monkeypatch):
    from twhin_pipeline.sharding.distributed import Ranks

    path = remote_store.path("twhin_model", S, "checkpoints", "0123456789ab")
    folder = CheckpointFolder(path, Ranks(0, 1, None))
    folder.acquire()
    put = remote_store.path("twhin_model", S, "checkpoints", "0123456789ab", "state")
    remote_store.fs.pipe_file(put, b"1")
    found = leftovers.checkpoints(remote_store)
    assert [one.running for one in found] == [False], "one's own process is no other"
    monkeypatch.setattr(locks, "_held", {})
    (found,) = leftovers.checkpoints(remote_store)
    assert found.running and not leftovers.remove_checkpoints(found) and remote_store.fs.exists(put)
    monkeypatch.undo()
    folder.release()
    assert leftovers.remove_checkpoints(found) and not remote_store.fs.exists(put)


def test_checkpoints_are_listed_while_an_old_one_is_removed(remote_store, monkeypatch):
    """A rank once failed on S3 where rank 0 removed a checkpoint between two requests of its listing."""
    from twhin_pipeline.sharding.distributed import Ranks

    folder = CheckpointFolder(remote_store.path("twhin_model", S, "checkpoints", "0123456789ab"), Ranks(0, 1, None))
    assert folder.steps() == []
    for step in (10, 20):
        remote_store.fs.pipe_file(f"{folder.step_path(step)}/checksums.json", b"{}")
    remote_store.fs.pipe_file(f"{folder.step_path(30)}/state.json", b"{}")  # not finished
    listed = folder.fs.ls

    def then_removed(*arguments: object, **options: object) -> list[str]:
        result = listed(*arguments, **options)
        folder.remove(10)
        return result

    monkeypatch.setattr(folder.fs, "ls", then_removed)
    assert folder.steps() == [20]
