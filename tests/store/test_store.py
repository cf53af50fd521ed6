"""A table exists when its manifest does; a crash leaves the old one as it was."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Draft, Store, Verdict

S = "2025-01-01"


def write(store: Store, values: list[int], asset: str = "raw_edges", snapshot: str = S, **parents: str) -> None:
    with store.replace(asset, snapshot, config_hash="c", parents=parents) as draft:
        draft.write(pa.table({"a": values}))
        draft.details["count"] = len(values)


def everything(store: Store) -> set[str]:
    """Return every file but the locks, which stay."""
    return {str(path) for path in store.fs.find(store.root) if not str(path).endswith("/.lock")}


def test_what_is_written_is_read_back_with_its_manifest(store):
    write(store, [1, 2, 3], asset="vocabulary/user")
    manifest = store.manifest("vocabulary/user", S)
    assert store.read("vocabulary/user", S)["a"].to_pylist() == [1, 2, 3]
    assert (manifest.rows, manifest.schema, manifest.details) == (3, {"a": "int64"}, {"count": 3})
    assert store.assets() == ["vocabulary/user"] and store.snapshots("vocabulary/user") == [S]


def test_a_failing_writer_leaves_the_old_table_and_nothing_else(store):
    write(store, [1, 2])
    before = everything(store)
    with pytest.raises(ZeroDivisionError), store.replace("raw_edges", S, config_hash="c") as draft:  # noqa: PT012
        draft.write(pa.table({"a": [9]}))
        _ = 1 / 0
    assert everything(store) == before
    assert store.read("raw_edges", S)["a"].to_pylist() == [1, 2]


def test_a_writer_that_is_killed_leaves_nothing_a_reader_would_take_for_finished(store):
    draft = store.begin("raw_edges", S)
    draft.write(pa.table({"a": [9]}))
    assert not store.exists("raw_edges", S) and store.assets() == []


def test_a_rerun_replaces_a_table_whole_and_leaves_other_folders(store):
    write(store, [1, 2, 3])
    keep = store.path("raw_edges", S, "checkpoints", "abc", "x")
    store.fs.makedirs(store.path("raw_edges", S, "checkpoints", "abc"), exist_ok=True)
    store.fs.pipe_file(keep, b"1")
    write(store, [4])
    assert store.read("raw_edges", S)["a"].to_pylist() == [4]
    assert store.fs.exists(keep)


def test_processes_can_fill_one_version_together(store):
    draft = store.begin("embeddings/user", S)
    other = Draft(store, "embeddings/user", S, draft.version)
    other.write(pa.table({"a": [3, 4]}), "part-00001.parquet")
    draft.write(pa.table({"a": [1, 2]}), "part-00000.parquet")
    draft.commit(config_hash="c", parents={})
    assert store.read("embeddings/user", S)["a"].to_pylist() == [1, 2, 3, 4]


@pytest.mark.parametrize("view", [None, "refit"])
def test_a_models_manifest_describes_its_vectors_and_lists_its_other_parts_apart(store, view):
    """Rows once were those of losses and vectors together, and the columns those of the losses."""
    store = store.seen_as(view)
    with store.replace("twhin_model", S, config_hash="c") as draft:
        draft.write(pa.table({"step": [1, 2, 3], "loss": [0.3, 0.2, 0.1]}), "losses.parquet")
        draft.write(pa.table({"row": [0, 1], "embedding": [[1.0], [2.0]]}), "tables/user/part-00000.parquet")
        draft.write(pa.table({"row": [0], "embedding": [[3.0]]}), "tables/item/part-00000.parquet")
    manifest = store.manifest("twhin_model", S)
    assert manifest.rows == 3 and list(manifest.schema) == ["row", "embedding"]
    assert manifest.parts == {"losses": {"rows": 3, "schema": {"step": "int64", "loss": "double"}}}
    assert store.read("twhin_model", S)["embedding"].to_pylist() == [[3.0], [1.0], [2.0]]
    assert [path.rpartition("/")[2] for path in store.part_files(manifest).values()] == ["losses.parquet"]


def test_a_stage_that_holds_no_table_excludes_nobody(store):
    """The stage that trains leaves the lock to its processes."""
    with store.writing(S, []):
        write(store, [1])
    assert store.read("raw_edges", S).num_rows == 1


def test_a_missing_table_names_the_command_that_makes_it(store):
    write(store, [1], snapshot="2024-01-01")
    with pytest.raises(UserError, match=rf"raw_edges for snapshot {S}.*2024-01-01.*`twhin ingest --snapshot {S}`"):
        store.read("raw_edges", S)


def test_a_child_is_stale_once_its_parent_is_made_anew(store):
    write(store, [1])
    write(store, [1], asset="vocabulary/user", snapshot="2024-01-01")
    parents = store.versions(S, ["raw_edges"])
    parents["vocabulary/user@2024-01-01"] = store.manifest("vocabulary/user", "2024-01-01").version
    write(store, [2], asset="vocabulary/user", **parents)
    assert store.stale("vocabulary/user", S) == []
    write(store, [5])
    assert store.stale("vocabulary/user", S) == ["raw_edges"]


def test_snapshots_are_ordered_and_the_one_before_is_found(store):
    for snapshot in ("2025-01-01", "2023-01-01", "2024-01-01"):
        write(store, [1], snapshot=snapshot)
    assert store.snapshots("raw_edges") == ["2023-01-01", "2024-01-01", "2025-01-01"]
    assert store.latest_before("raw_edges", "2025-01-01") is None, "none has passed its checks"
    for snapshot in ("2023-01-01", "2024-01-01"):
        store.judge(store.manifest("raw_edges", snapshot), Verdict("passed", "now"))
    assert store.latest_before("raw_edges", "2025-01-01").snapshot == "2024-01-01"
    assert store.latest_before("raw_edges", "2023-01-01") is None


def test_a_manifest_with_a_number_that_is_not_finite_is_refused(store):
    with pytest.raises(ValueError, match="JSON"), store.replace("raw_edges", S, config_hash="c") as draft:
        draft.details["loss"] = float("nan")
    assert not store.exists("raw_edges", S) and everything(store) == set()


def test_the_home_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path / "there"))
    write(Store(), [1])
    (path,) = (tmp_path / "there" / "raw_edges" / S).glob("*/_manifest.json")
    assert json.loads(path.read_text())["rows"] == 1


def test_a_table_is_refused_while_one_above_it_is_older_than_what_it_was_made_from(store):
    write(store, [1])
    write(store, [2], asset="vocabulary/user", **store.versions(S, ["raw_edges"]))
    write(store, [3], asset="training_set/positives", **store.versions(S, ["vocabulary/user"]))
    store.refuse_stale(S, ["training_set/positives", "held_out/test"])
    write(store, [4])
    with pytest.raises(UserError, match=f"vocabulary/user of snapshot {S} is stale: raw_edges.*`twhin vocabulary --sn"):
        store.refuse_stale(S, ["training_set/positives"])


def test_parquet_files_are_read_wherever_they_are_and_local_ones_without_python_in_between(store, monkeypatch):
    write(store, [1, 2, 3])
    (path,) = store.files("raw_edges", S)
    if store.is_local:
        # What Python reads for Arrow may outlive the interpreter in a thread of Arrow's, and abort it.
        monkeypatch.setattr(store.fs, "open", lambda *_args, **_options: pytest.fail("opened by Python"))
    with store.parquet(path) as file:
        assert file.metadata.num_rows == 3
        assert file.read()["a"].to_pylist() == [1, 2, 3]


@pytest.mark.parametrize("size", [1, 4, 100])
@pytest.mark.parametrize(("first", "count"), [(0, None), (0, 0), (2, 5), (7, 9), (9, 1), (11, 100), (40, 3)])
def test_any_range_of_rows_is_streamed_across_files_and_row_groups(store, size, first, count):
    with store.replace("raw_edges", S, config_hash="a") as draft:
        for name, start, rows in (("a", 0, 10), ("b", 10, 0), ("c", 10, 11)):
            table = pa.table({"n": pa.array(range(start, start + rows), pa.int64()), "m": ["x"] * rows})
            with draft.writer(f"part-{name}.parquet", table.schema) as writer:
                writer.write_table(table, row_group_size=4)
    files = store.files("raw_edges", S)
    batches = list(store.batches(files, ["n"], size, first, count))
    assert all(0 < len(batch) <= size and batch.schema.names == ["n"] for batch in batches)
    found = [n for batch in batches for n in batch["n"].to_pylist()]
    assert found == list(range(21))[first : None if count is None else first + count]
