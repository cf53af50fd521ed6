"""Checkpoints: whole or absent, the latest and the best kept, and apart from what training does next."""

from __future__ import annotations

import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SNAPSHOT, planted_config

from twhin_pipeline.config import stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.store import Store
from twhin_pipeline.training import checkpoint
from twhin_pipeline.training.checkpoint import CheckpointFolder, folder_of, load_tensors

ALONE = Ranks(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3, 4), value)}}


def test_what_is_loaded_is_what_was_there_when_save_was_called(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    state = tensors(1.0)
    folder.save(5, state, {"step": 5})
    state["model"]["weight"].fill_(2.0)  # the next training step, while the checkpoint is being written
    folder.flush()
    found = tensors(0.0)
    folder.load(5, found)
    assert torch.equal(found["model"]["weight"], torch.full((3, 4), 1.0))
    assert folder.read_state(5) == {"step": 5} and folder.steps() == [5]


def test_the_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE, keep=2)
    for step in range(1, 7):
        folder.save(step, tensors(step), {}, best=2)
    folder.flush()
    assert folder.steps() == [2, 5, 6]


def test_all_are_kept_where_no_number_is_given(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    for step in range(4):
        folder.save(step, tensors(step), {}, wait=True)
    assert folder.steps() == [0, 1, 2, 3]


def test_a_checkpoint_that_a_crash_cut_short_is_not_seen_and_is_written_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, tensors(1.0), {}, wait=True)
    folder.save(2, tensors(2.0), {}, wait=True)
    (tmp_path / "step-00000002" / "checksums.json").unlink()
    assert folder.steps() == [1]
    folder.save(2, tensors(3.0), {}, wait=True)
    found = tensors(0.0)
    folder.load(2, found)
    assert folder.steps() == [1, 2] and found["model"]["weight"][0, 0] == 3.0


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "checksums.json"])
@pytest.mark.parametrize("damage", ["a bit flipped", "cut short", "removed"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, tensors(1.0), {"step": 1}, wait=True)
    assert folder.problem(1) is None
    path = tmp_path / "step-00000001" / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "a bit flipped" else content[:-1])
    assert folder.problem(1) is not None
    if name != "checksums.json":
        assert name in folder.problem(1)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_never_runs_code_of_its_metadata(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, tensors(1.0), {}, wait=True)
    (tmp_path / "step-00000001" / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "was-run")))
    for path in (str(tmp_path / "step-00000001"), f"file://{tmp_path}/step-00000001"):
        with pytest.raises(UserError, match=r"describes more than tensors \(it names posix.system"):
            load_tensors(path, tensors(0.0), ALONE)
    assert not (tmp_path / "was-run").exists()


def test_a_checkpoint_never_runs_code_of_an_object_in_the_place_of_a_tensor(tmp_path: Path) -> None:
    torch.distributed.checkpoint.save(
        {"model": {"weight": Hostile(tmp_path / "was-run")}}, checkpoint_id=tmp_path / "c", no_dist=True
    )
    for wanted in (tensors(0.0), {"model": {"weight": "anything"}}):
        with pytest.raises(UserError):
            load_tensors(str(tmp_path / "c"), wanted, ALONE)
    assert not (tmp_path / "was-run").exists()


def large() -> dict[str, dict[str, torch.Tensor]]:
    model = {"table": torch.randn(1000, 16), "half": torch.randn(500, 16).half()}
    return {"model": model, "optimizer": {"rows": torch.randn(20_000), "step": torch.tensor(3.0)}}


def test_a_state_is_written_from_where_it_is_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the state, or of a table, is not made: it would need as much memory as there is."""
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 4096)
    state = large()
    written: list[torch.Tensor] = []
    plain = checkpoint.BlockPlanner.resolve_data

    def resolved(planner: Any, item: Any) -> Any:
        data = plain(planner, item)
        written.append(data)
        return data

    monkeypatch.setattr(checkpoint.BlockPlanner, "resolve_data", resolved)
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, state, {}, wait=True)
    flat = [tensor for part in state.values() for tensor in part.values()]
    spans = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in flat]
    for block in written:
        assert any(start <= block.data_ptr() and block.data_ptr() + block.nbytes <= end for start, end in spans)
        assert block.untyped_storage().nbytes() == block.nbytes <= 4096, "torch copies what is part of a larger storage"
    assert sum(block.nbytes for block in written) == sum(tensor.nbytes for tensor in flat)


def test_what_was_written_in_blocks_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 4096)
    state, found = large(), large()
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, state, {}, wait=True)
    sizes = []
    plain = torch.load

    def loaded(*args: Any, **kwargs: Any) -> Any:
        tensor = plain(*args, **kwargs)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch, "load", loaded)
    folder.load(1, found)
    for part in state:
        for name in state[part]:
            assert torch.equal(found[part][name], state[part][name])
    assert max(sizes) <= 4096


def test_a_checkpoint_of_an_earlier_version_with_tables_as_a_whole_is_read(tmp_path: Path) -> None:
    state, found = large(), large()
    torch.distributed.checkpoint.save(state, checkpoint_id=str(tmp_path / "step-00000001"), no_dist=True)
    CheckpointFolder(str(tmp_path), ALONE).load(1, found)
    assert torch.equal(found["model"]["table"], state["model"]["table"])


def test_an_error_in_the_background_is_raised_at_the_next_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path / "run"), ALONE)
    folder.acquire()
    folder._seal = lambda *args: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    folder.save(1, tensors(1.0), {})
    with pytest.raises(ZeroDivisionError):
        folder.save(2, tensors(1.0), {})


def test_a_folder_whose_process_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    first, second = CheckpointFolder(str(tmp_path), ALONE), CheckpointFolder(str(tmp_path), ALONE)
    first.acquire()
    ending = threading.Timer(0.3, first.release)
    ending.start()
    second.acquire()
    second.release()
    ending.join()


def test_only_one_run_at_a_time_has_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twhin_pipeline.training.checkpoint.LOCK_PATIENCE_S", 0.1)
    first, second = CheckpointFolder(str(tmp_path), ALONE), CheckpointFolder(str(tmp_path), ALONE)
    first.acquire()
    with pytest.raises(UserError, match=r"process \d+ on .* trains this snapshot"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, tensors(1.0), {}, wait=True)
    with pytest.raises(UserError, match="does not fit this model"):
        folder.load(1, {"model": {"weight": torch.zeros(5, 4)}})


def test_finishing_and_clearing(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path), ALONE)
    folder.save(1, tensors(1.0), {}, wait=True)
    assert not folder.finished()
    folder.finish({"steps": 1})
    assert folder.finished()
    folder.clear()
    assert not folder.finished() and folder.steps() == []


def test_the_folder_depends_on_what_is_trained_and_not_on_how_many_processes(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    config = planted_config()
    other = planted_config(launch={"nproc_per_node": 1})
    assert folder_of(config, store, SNAPSHOT) == folder_of(other, store, SNAPSHOT)
    assert folder_of(config, store, SNAPSHOT) != folder_of(planted_config(training={"seed": 1}), store, SNAPSHOT)
    assert (
        folder_of(config, store, SNAPSHOT, "/elsewhere")
        == f"/elsewhere/{SNAPSHOT}/{stage_settings.digest(config, 'train')}"
    )


def test_checkpoints_do_not_make_the_store_see_a_table(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    folder = CheckpointFolder(folder_of(planted_config(), store, SNAPSHOT), ALONE)
    folder.save(1, tensors(1.0), {}, wait=True)
    assert store.assets() == [] and not store.exists("twhin_model", SNAPSHOT)
    shutil.rmtree(folder.path)
