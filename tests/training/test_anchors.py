"""Pull and freeze: known ids stay near their earlier vectors, or on them, and all else learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from helpers import SNAPSHOT, USERS, planted_config, write_config
from pydantic import ValidationError
from stopped import stop_after
from test_new_ids import LATER, write_later

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TableConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.anchors import Anchor, pull
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch as processes
from twhin_pipeline.training import train, warm_start
from twhin_pipeline.training.launch import TrainingCancelled
from twhin_pipeline.vectors.model_files import ModelTables

pytestmark = pytest.mark.usefixtures("one_tracking_store")

KNOWN = np.array([bool((USERS - 1 - row) % 3) for row in range(USERS)])
"""Rows of the later users that the earlier model has; its row of each is USERS - 1 - row."""


def held(
    optimizer: dict[str, Any] | None = None, carry: bool = False, max_norm: float | None = None, **user: Any
) -> TwhinConfig:
    """The planted configuration, its users held."""
    model = json.loads(planted_config().model.model_dump_json()) | {"max_norm": max_norm}
    model["embeddings"]["tables"][0] |= user
    for table in model["embeddings"]["tables"]:
        table["optimizer"] = optimizer or table["optimizer"]
    training = {"num_epochs": 2, "carry_optimizer_state": carry}
    launch = {"nproc_per_node": 1 if optimizer and {"adam", "rmsprop"} & set(optimizer) else 2}
    return planted_config(model=model, training=training, launch=launch)


def warm(config: TwhinConfig, earlier: Store) -> TwhinConfig:
    training = config.training.model_copy(update={"initial_checkpoint_dir": f"{earlier.root}@{SNAPSHOT}"})
    return config.model_copy(update={"training": training})


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return trained(tmp_path_factory.mktemp("earlier"), held())


def trained(folder: Path, config: TwhinConfig) -> Store:
    from helpers import write_planted

    store = Store(str(folder))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    return store


def trained_later(folder: Path, config: TwhinConfig) -> dict[str, np.ndarray]:
    store = Store(str(folder))
    write_later(store, config)
    train.run(config, store, LATER)
    tables = ModelTables.open(store, LATER)
    return {name: tables.table(name) for name in tables.names}


def moved(after: np.ndarray, earlier: Store) -> np.ndarray:
    """Return how far known users are from their earlier vectors."""
    before = ModelTables.open(earlier, SNAPSHOT).table("user")[::-1]
    return np.linalg.norm(after - before, axis=1)[KNOWN]


def test_the_pull_and_its_gradient_are_those_of_a_plain_loop() -> None:
    config = tiny.config()
    model = tiny.random_model(config)
    batch = tiny.batch(4, config.model)
    batch.weight[0, 0] = 0.0
    rng = np.random.default_rng(0)
    anchors = {
        "user": Anchor(rng.normal(size=(9, tiny.DIM)).astype(np.float32), rng.integers(-1, 9, 20), 0.3),
        "item": Anchor(rng.normal(size=(9, tiny.DIM)).astype(np.float32), rng.integers(-1, 9, 33), 0.7),
    }
    vectors = [v.detach().requires_grad_() for v in model.lookup(batch.ids)]
    pull(anchors, model.table_names, vectors, batch).backward()
    total, gradient = 0.0, [torch.zeros_like(v) for v in vectors]
    starts = np.cumsum([0, *map(len, vectors)])
    for g, edge in (batch.weight > 0).nonzero().tolist():
        for index in (batch.lhs_index, batch.rhs_index):
            place = int(index[g, edge])
            t = int(np.searchsorted(starts, place, side="right")) - 1
            name, row = model.table_names[t], place - int(starts[t])
            anchor, id = anchors[name], int(batch.ids[name][row])
            # The last users are rows of the table that are no id's.
            at = anchor.earlier_row[id] if id < len(anchor.earlier_row) else -1
            if at >= 0:
                difference = vectors[t].detach()[row] - torch.from_numpy(anchor.vectors[at])
                total += anchor.pull * float(difference.square().sum())
                gradient[t][row] += 2 * anchor.pull * difference
    assert total > 0
    assert float(pull(anchors, model.table_names, vectors, batch).detach()) == pytest.approx(total, rel=1e-5)
    for v, expected in zip(vectors, gradient, strict=True):
        torch.testing.assert_close(v.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_model_adds_the_pull_in_training_only() -> None:
    config = tiny.config()
    model = tiny.random_model(config)
    batch = tiny.batch(4, config.model)
    without = model(batch)["penalty"]
    rows = np.arange(tiny.ROWS["user"])
    model.anchors = {"user": Anchor(np.zeros((len(rows), tiny.DIM), np.float32), rows, 0.5)}
    assert float(model(batch)["penalty"].detach()) > float(without.detach())
    assert float(model.eval()(batch)["penalty"].detach()) == float(without.detach())


def test_the_stronger_the_pull_the_nearer_known_ids_stay(earlier: Store, tmp_path: Path) -> None:
    far = [
        moved(trained_later(tmp_path / str(weight), warm(held(pull=weight), earlier))["user"], earlier).mean()
        for weight in (0.0, 1.0, 100.0)
    ]
    assert far[1] < 0.8 * far[0] and far[2] < 0.3 * far[0], far


@pytest.mark.parametrize(
    ("optimizer", "carry", "max_norm"),
    [
        ({"rowwise_adagrad": {"lr": 0.1}}, True, None),
        ({"rowwise_adagrad": {"lr": 0.1}}, False, 0.4),
        ({"adagrad": {"lr": 0.1}}, False, None),
        ({"adam": {"lr": 0.01}}, True, None),
        ({"rmsprop": {"lr": 0.01}}, True, None),
        ({"sgd": {"lr": 0.5}}, False, None),
    ],
)
def test_frozen_ids_keep_every_bit_and_new_ones_learn(
    tmp_path: Path, optimizer: dict[str, Any], carry: bool, max_norm: float | None
) -> None:
    first = trained(tmp_path / "first", held(optimizer, carry, max_norm))
    config = warm(held(optimizer, carry, max_norm, freeze=True), first)
    after = trained_later(tmp_path / "after", config)
    assert (moved(after["user"], first) == 0).all()
    one_step = config.model_copy(update={"training": config.training.model_copy(update={"num_train_steps": 1})})
    begun = trained_later(tmp_path / "begun", one_step)
    assert (after["user"] != begun["user"]).any(axis=1)[~KNOWN].all()
    assert (after["item"] != ModelTables.open(first, SNAPSHOT).table("item")).any(axis=1).all()


def test_frozen_ids_do_not_move_within_training_either(earlier: Store, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(warm_start, "restore_frozen", lambda *given: None)
    after = trained_later(tmp_path, warm(held(freeze=True), earlier))
    assert (moved(after["user"], earlier) == 0).all()


def test_without_an_earlier_model_a_frozen_table_learns(tmp_path: Path) -> None:
    free, frozen = trained(tmp_path / "free", held()), trained(tmp_path / "frozen", held(freeze=True))
    tables = [ModelTables.open(store, SNAPSHOT).table("user") for store in (free, frozen)]
    np.testing.assert_array_equal(*tables)


@pytest.mark.parametrize("how", [{"pull": 3.0}, {"freeze": True}])
def test_a_run_that_was_killed_ends_with_the_same_bits(earlier: Store, tmp_path: Path, how: dict[str, Any]) -> None:
    config = warm(held(**how), earlier)
    whole = trained_later(tmp_path / "whole", config)
    store = Store(str(tmp_path / "stopped"))
    write_later(store, config)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingCancelled):
        train.run(config, store, LATER, stop=stop_after(11, patch))
    train.run(config, store, LATER)
    for name, table in whole.items():
        np.testing.assert_array_equal(ModelTables.open(store, LATER).table(name), table)


@pytest.mark.parametrize("how", [{"pull": 3.0}, {"freeze": True}])
def test_two_ranks_train_what_one_process_trains(earlier: Store, tmp_path: Path, how: dict[str, Any]) -> None:
    config = warm(held(**how), earlier)
    store = Store(str(tmp_path / "two"))
    write_later(store, config)
    processes.run(config, write_config(config, tmp_path), [], store, LATER, output=lambda line: None)
    data = config.train_data.model_copy(update={"per_replica_batch_size": 128})
    one = trained_later(tmp_path / "one", config.model_copy(update={"train_data": data}))
    for name, table in one.items():
        np.testing.assert_allclose(ModelTables.open(store, LATER).table(name), table, atol=1e-4)
    if "freeze" in how:
        assert (moved(ModelTables.open(store, LATER).table("user"), earlier) == 0).all()


def test_a_checkpoint_whose_ids_are_not_known_is_refused(earlier: Store, tmp_path: Path) -> None:
    folder = next(Path(earlier.root).glob("twhin_model/*/checkpoints/*"))
    config = held(pull=1.0)
    training = config.training.model_copy(update={"initial_checkpoint_dir": str(folder)})
    with pytest.raises(UserError, match="pull and freeze of user give the store of the trained model"):
        trained(tmp_path, config.model_copy(update={"training": training}))


def test_a_checkpoint_of_before_a_compaction_is_refused(earlier: Store, tmp_path: Path) -> None:
    folder = next(Path(earlier.root).glob("twhin_model/*/checkpoints/*"))
    config = held()
    training = config.training.model_copy(update={"initial_checkpoint_dir": str(folder)})
    config = config.model_copy(update={"training": training})
    store = Store(str(tmp_path))
    from helpers import write_planted

    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    table = store.read("vocabulary/user", SNAPSHOT)
    with store.replace("vocabulary/user", SNAPSHOT, config_hash="test") as draft:
        draft.write(table)
        draft.details = {"compacted": SNAPSHOT}
    with pytest.raises(UserError, match=r"since `twhin compact` \(user in snapshot 2025-01-01\); give the store"):
        train.run(config, store, SNAPSHOT)


def test_pull_and_freeze_of_one_table_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="leave one of them out"):
        TableConfig(name="user", pull=1.0, freeze=True)
