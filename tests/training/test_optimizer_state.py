"""A warm start takes over the optimizers' state by id, whatever the sharding; new entities start afresh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import SNAPSHOT, planted_config, write_config, write_planted

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.optimizer_state import OptimizerState
from twhin_pipeline.store import Store, catalog
from twhin_pipeline.training import launch as processes
from twhin_pipeline.training import train
from twhin_pipeline.training.progress import Progress
from twhin_pipeline.training.reporting import SilentReporter
from twhin_pipeline.training.trainer import Trainer
from twhin_pipeline.vectors.model_files import ModelTables

pytestmark = pytest.mark.usefixtures("one_tracking_store")

LATER = "2025-01-02"
SUPPORT = Path(__file__).parents[1] / "support"
ALGORITHMS: dict[str, dict[str, Any]] = {
    "rowwise_adagrad": {"rowwise_adagrad": {"lr": 0.1}},
    "adagrad": {"adagrad": {"lr": 0.1}},
    "adam": {"adam": {"lr": 0.01}},
    "rmsprop": {"rmsprop": {"lr": 0.01}},
    "sgd": {"sgd": {"lr": 0.1}},
}


def configured(algorithm: str, **training: Any) -> TwhinConfig:
    model = json.loads(planted_config().model.model_dump_json())
    for table in model["embeddings"]["tables"]:
        table["optimizer"] = ALGORITHMS[algorithm]
    model["translation_optimizer"] = {"adagrad": {"lr": 0.1}}
    launch = {"nproc_per_node": 1 if algorithm in ("adam", "rmsprop") else 2}
    training = {"num_epochs": 2, "carry_optimizer_state": True, **training}
    return planted_config(model=model, training=training, launch=launch)


def write_later(store: Store, config: TwhinConfig) -> None:
    """Write a second snapshot whose users are in the opposite order, with one that is new in place of user-0."""
    write_planted(store, config, LATER, seed=1)
    ids = [f"user-{i}" for i in range(59, 0, -1)] + ["newcomer"]
    table = store.read("vocabulary/user", LATER).set_column(0, "id", pa.array(ids))
    with store.replace("vocabulary/user", LATER, config_hash="test") as draft:
        draft.write(table)


def started(config: TwhinConfig, store: Store) -> tuple[Trainer, OptimizerState]:
    """Return a trainer of the later snapshot before its first step."""
    trainer = Trainer(config, store, LATER, Ranks(0, 1, torch.device("cpu")), SilentReporter())
    trainer._start()
    trainer.checkpoints.release()
    return trainer, OptimizerState(trainer.sharded, trainer.optimizer, config.model)


def stored(store: Store, table: str, state: str) -> np.ndarray:
    blocks = list(ModelTables.open(store, SNAPSHOT).state_blocks(table, state))
    np.testing.assert_array_equal(
        np.concatenate([rows for rows, _ in blocks]), np.arange(60 if table == "user" else 48)
    )
    return np.concatenate([values for _, values in blocks])


@pytest.mark.parametrize("algorithm", ["rowwise_adagrad", "adagrad", "adam", "rmsprop"])
def test_each_id_finds_the_state_that_it_had_and_a_new_one_has_none(tmp_path: Path, algorithm: str) -> None:
    config = configured(algorithm)
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    write_later(store, config)
    kept = store.manifest("twhin_model", SNAPSHOT).details["optimizer"]
    trainer, state = started(configured(algorithm, initial_checkpoint_dir=f"{store.root}@{SNAPSHOT}"), store)
    assert kept["tables"]["user"]["states"], "the optimizer has a state"
    for name in kept["tables"]["user"]["states"]:
        before, after = stored(store, "user", name), state.tables["user"][name].numpy()
        np.testing.assert_array_equal(after[:59], before[:0:-1])
        assert before[1:].any() and not after[59].any()
        np.testing.assert_array_equal(state.tables["item"][name].numpy(), stored(store, "item", name))
    for name, value in kept["tables"]["user"]["scalars"].items():
        assert float(state.scalars["user"][name]) == value > 0
    assert trainer.steps_before == kept["steps"] > 0
    accumulated = ModelTables.open(store, SNAPSHOT).operator_states()["sum"]
    for relation, row in state.operator_rows()["sum"].items():
        assert row.any() and torch.equal(row, accumulated[relation])


def test_the_stored_state_is_that_of_the_chosen_step(tmp_path: Path) -> None:
    """The model goes back to its best step, so its state has to go back too."""
    config = configured("rowwise_adagrad", num_epochs=1, eval_log_every_n=5, checkpoint_every_n=5)
    short, long = Store(str(tmp_path / "short")), Store(str(tmp_path / "long"))
    write_planted(short, config)
    write_planted(long, config)
    train.run(config.model_copy(update={"training": config.training.model_copy(update={"num_train_steps": 5})}),
              short, SNAPSHOT)  # fmt: skip
    best, original = 5, Progress.add_validation

    def first_is_best(self: Progress, *given: Any) -> bool:
        before = self.best_step, self.best_epoch, self.best_value
        original(self, *given)
        if self.step > best:
            self.best_step, self.best_epoch, self.best_value = before
        return self.step == best

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add_validation", first_is_best)
        details = train.run(config, long, SNAPSHOT)
    assert details["chosen_step"] == best < details["steps"]
    np.testing.assert_array_equal(stored(long, "user", "momentum1"), stored(short, "user", "momentum1"))
    assert details["optimizer"]["steps"] == best


@pytest.mark.parametrize(
    ("before", "after", "carry"),
    [("adagrad", "rowwise_adagrad", True), ("sgd", "adagrad", True), ("adagrad", "adagrad", False)],
)
def test_another_algorithm_or_the_switch_off_means_a_fresh_state(
    tmp_path: Path, before: str, after: str, carry: bool
) -> None:
    config = configured(before)
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    write_later(store, config)
    source = f"{store.root}@{SNAPSHOT}"
    _, state = started(configured(after, initial_checkpoint_dir=source, carry_optimizer_state=carry), store)
    assert all(not value.any() for value in state.tables["user"].values())


def test_with_the_switch_off_no_state_is_stored(tmp_path: Path) -> None:
    config = configured("adagrad", carry_optimizer_state=False)
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    assert "optimizer" not in train.run(config, store, SNAPSHOT)
    parts = store.part_files(store.manifest("twhin_model", SNAPSHOT))
    assert not any(part.startswith("optimizer") for part in parts)


def test_the_catalog_shows_the_state_of_a_table_as_one_view(tmp_path: Path) -> None:
    import duckdb

    config = configured("rowwise_adagrad")
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    with duckdb.connect(catalog.refresh(store), read_only=True) as con:
        assert con.execute("SELECT count(*) FROM twhin_model_optimizer_user").fetchall() == [(60,)]
        assert con.execute("SELECT count(*) FROM twhin_model_optimizer").fetchall() == [(2,)]


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Vectors of a warm start by one process, by two that share memory, by two that exchange vectors, and afresh."""
    folder = tmp_path_factory.mktemp("ranks")
    config = configured("rowwise_adagrad", num_epochs=4)
    earlier = Store(str(folder / "earlier"))
    write_planted(earlier, config)
    processes.run(config, write_config(config, folder), [], earlier, SNAPSHOT, output=lambda line: None)
    assert stored(earlier, "user", "momentum1").all(), "each of two ranks has written the rows that it holds"
    found = {}
    for name in ("one", "shared", "exchanged", "fresh"):
        warm = configured(
            "rowwise_adagrad",
            initial_checkpoint_dir=f"{earlier.root}@{SNAPSHOT}",
            carry_optimizer_state=name != "fresh",
        )
        if name in ("one", "fresh"):  # as many edges a step as two processes take
            data = warm.train_data.model_copy(update={"per_replica_batch_size": 128})
            warm = warm.model_copy(update={"train_data": data})
        store = Store(str(folder / name))
        write_planted(store, warm, seed=2)
        (folder / f"{name}.d").mkdir()
        path = write_config(warm, folder / f"{name}.d")
        if name == "shared":
            processes.run(warm, path, [], store, SNAPSHOT, output=lambda line: None)
        elif name == "exchanged":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            arguments = ["--config", path, "--snapshot", SNAPSHOT, "--home", store.root]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*torchrun, str(SUPPORT / "exchanging.py"), *arguments], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert "ranks exchange vectors: as asked" in done.stdout
        else:
            train.run(warm, store, SNAPSHOT)
        found[name] = ModelTables.open(store, SNAPSHOT).table("user")
    return found


@pytest.mark.parametrize("ranks", ["shared", "exchanged"])
def test_processes_take_over_the_state_as_one_alone_does(by_processes: dict[str, np.ndarray], ranks: str) -> None:
    np.testing.assert_allclose(by_processes[ranks], by_processes["one"], rtol=2e-3, atol=2e-4)
    difference = np.abs(by_processes["fresh"] - by_processes["one"]).max()
    assert difference > 0.01, "the state changes what is trained"
