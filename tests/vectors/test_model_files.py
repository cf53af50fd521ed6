"""Model files: what ranks write is what readers see, memory-mapped, by version."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import SNAPSHOT
from written_model import write_model

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, releases
from twhin_pipeline.vectors.model_files import (
    ModelTables,
    locate,
    parameters_array,
    parameters_of,
    vectors_array,
    vectors_of,
)


def test_tables_are_read_whole_and_in_order_whatever_rank_wrote_them(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    written = write_model(store)
    tables = ModelTables.open(store, SNAPSHOT)
    for name, vectors in written.items():
        found = tables.table(name)
        assert isinstance(found, np.memmap) and not found.flags.writeable and found.dtype == np.float32
        np.testing.assert_array_equal(found, vectors.float().numpy())
        assert tables.rows(name) == len(vectors)


def test_a_new_version_is_read_after_an_old_one(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_model(store, seed=0)
    before = np.array(ModelTables.open(store, SNAPSHOT).table("user"))
    written = write_model(store, seed=1)
    after = ModelTables.open(store, SNAPSHOT).table("user")
    assert not np.array_equal(before, after)
    np.testing.assert_array_equal(after, written["user"].numpy())


def test_the_scorer_has_the_trained_operators(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_model(store)
    rows = ModelTables.open(store, SNAPSHOT).scorer().state_rows()
    assert torch.equal(rows["likes"], torch.arange(16.0)) and torch.equal(rows["follows"], torch.zeros(16))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [16, 4, 2], [4]], ids=["equal", "unequal", "one"])
def test_operator_parameters_of_any_lengths_survive_the_way_through_arrow(lengths: list[int]) -> None:
    rows = {f"r{i}": torch.randn(length) for i, length in enumerate(lengths)}
    table = pa.table({"relation": list(rows), "embedding": parameters_array(list(rows.values()))})
    found = parameters_of(table)
    assert list(found) == list(rows) and all(torch.equal(found[name], row) for name, row in rows.items())
    assert pa.types.is_fixed_size_list(table["embedding"].type) == (len(set(lengths)) == 1)


def test_extra_figures_of_a_record_become_columns(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_model(store)
    assert ModelTables.open(store, SNAPSHOT).read("losses").to_pylist() == [
        {"step": 1, "epoch": 0, "loss": 2.5, "edges_per_second": None, "loss/likes": 2.0}
    ]


def test_an_unknown_table_names_the_nearest(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_model(store)
    with pytest.raises(UserError, match="unknown table 'users'; did you mean 'user'"):
        ModelTables.open(store, SNAPSHOT).table("users")


def test_a_model_is_found_by_store_snapshot_and_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_model(store, snapshot="2025-01-01")
    write_model(store, snapshot="2025-02-01")
    for path, snapshot in (
        (f"{tmp_path}", "2025-02-01"),
        (f"{tmp_path}@2025-01-01", "2025-01-01"),
        (f"{tmp_path}/twhin_model/2025-01-01/", "2025-01-01"),
    ):
        found, at = locate(path)
        assert (found.root, at) == (store.root, snapshot)
    with pytest.raises(UserError, match=r"no twhin_model there \(it has 2025-01-01, 2025-02-01\)"):
        locate(f"{tmp_path}@2024-01-01")


def test_a_registered_model_stays_readable_when_a_later_one_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm start from `models:/twhin/3` begins at the vectors that were registered."""
    store = Store(str(tmp_path))
    write_model(store, snapshot="2025-01-01")
    version = store.manifest("twhin_model", "2025-01-01").version
    registered = {"store": store.root, "snapshot": "2025-01-01", "version": version}
    monkeypatch.setattr("twhin_pipeline.tracking.pointer", lambda uri: registered)
    assert locate("models:/twhin/3")[1] == "2025-01-01"
    write_model(store, seed=1, snapshot="2025-01-01")
    found, at = locate("models:/twhin/3")
    assert ModelTables.open(found, at).manifest.version == version != store.manifest("twhin_model", at).version
    with pytest.raises(UserError, match=rf"version {version} of snapshot 2025-01-01, of which .* no embeddings/relati"):
        locate("models:/twhin/3", "embeddings/relations")


def test_a_model_before_a_snapshot_is_that_of_the_newest_older_release_that_consumers_got(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    first = {}
    for snapshot in ("2025-01-01", "2025-02-01", "2025-03-01"):
        write_model(store, snapshot=snapshot)
        first[snapshot] = store.manifest("twhin_model", snapshot).version
    assert locate(str(tmp_path), before="2025-03-01")[1] == "2025-02-01"
    release = releases.make(store, "2025-01-01", {"twhin_model": first["2025-01-01"]}, {}, None)
    releases.promote(store, release.name, "me", "test")
    write_model(store, seed=1, snapshot="2025-01-01")  # not released
    for _ in range(2):
        found, at = locate(str(tmp_path), before="2025-03-01")
        assert (at, found.manifest("twhin_model", at).version) == ("2025-01-01", first["2025-01-01"])
    held = releases.make(store, "2025-02-01", {"twhin_model": first["2025-02-01"]}, {}, None)
    assert locate(str(tmp_path), before="2025-03-01")[1] == "2025-01-01", "what was never current is no start"
    releases.promote(store, held.name, "me", "test")
    assert locate(str(tmp_path), before="2025-03-01")[1] == "2025-02-01"
    releases.promote(store, release.name, "me", "rollback")
    assert locate(str(tmp_path), before="2025-03-01")[1] == "2025-01-01"
    assert locate(str(tmp_path))[1] == "2025-01-01", "the current release, though later snapshots have a model"
    with pytest.raises(UserError, match=r"no twhin_model there \(it has none of any snapshot before 2025-01-01\)"):
        locate(str(tmp_path), before="2025-01-01")


def test_vectors_survive_the_way_through_arrow() -> None:
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_array_equal(vectors_of(vectors_array(vectors)), vectors)
    np.testing.assert_array_equal(vectors_of(vectors_array(vectors).slice(2, 2)), vectors[2:4])
    np.testing.assert_array_equal(vectors_of(pa.array(vectors.tolist())), vectors)


@pytest.mark.parametrize(
    ("column", "told"),
    [(pa.array([[1.0, 2.0], [1.0]]), "different lengths"), (pa.array([[1.0], None]), "nulls")],
)
def test_vectors_that_are_not_alike_are_refused(column: pa.Array, told: str) -> None:
    with pytest.raises(UserError, match=told):
        vectors_of(column)


def test_a_copy_for_which_the_disk_has_no_room_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    """Writing to a mapped page without room on the disk would end the process by a signal."""
    store = Store(str(tmp_path))
    write_model(store)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ModelTables.open(store, SNAPSHOT).table("user")
    assert not list(tmp_path.rglob("*.npy"))
    monkeypatch.undo()
    assert len(ModelTables.open(store, SNAPSHOT).table("user")) == 60
