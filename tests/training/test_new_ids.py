"""New ids of a warm start begin where their neighbors want them, by a plain loop over edges and at any world size."""

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
from helpers import ITEMS, SNAPSHOT, USERS, planted_config, write_config, write_planted

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import COMPARATOR_NAMES, OPERATOR_NAMES
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import init_tables, table_weights
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch as processes
from twhin_pipeline.training import new_ids, train
from twhin_pipeline.training.new_ids import Known, start_from_neighbors
from twhin_pipeline.vectors.model_files import ModelTables

pytestmark = pytest.mark.usefixtures("one_tracking_store")

LATER = "2025-01-02"
SUPPORT = Path(__file__).parents[1] / "support"
ALONE = Ranks(0, 1, torch.device("cpu"))


def model_of(config: TwhinConfig) -> TwhinModel:
    torch.manual_seed(3)
    model = TwhinModel(config.model, UnshardedTables(config.model, {"user": USERS, "item": ITEMS}))
    init_tables(model, seed=1)
    for parameter in model.scorer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def wanted(model: TwhinModel, side: str, vector: torch.Tensor, relation: int) -> torch.Tensor:
    """What an edge wants at a side, written out for each operator."""
    scorer, config = model.scorer, planted_config()
    name = config.model.relation_names[relation]
    row = scorer.state_rows()[name]
    (kind,) = scorer.operators
    dim = len(vector)
    if scorer.reciprocal:
        row = row.chunk(2)[0 if side == "rhs" else 1]
        side = "rhs"
    forward = side == "rhs"
    half = dim // 2
    match kind:
        case "identity":
            return vector
        case "translation":
            return vector + row if forward else vector - row
        case "diagonal":
            return vector * row
        case "linear":
            matrix = row.view(dim, dim)
            return matrix @ vector if forward else matrix.T @ vector
        case "affine":
            matrix, offset = row[:-dim].view(dim, dim), row[-dim:]
            return matrix @ vector + offset if forward else matrix.T @ (vector - offset)
    z = torch.complex(vector[:half], vector[half:])
    turn = torch.polar(torch.ones(half), row) if kind == "rotation" else torch.complex(row[:half], row[half:])
    result = z * (turn if forward else turn.conj())
    return torch.cat([result.real, result.imag])


def plain(model: TwhinModel, store: Store, known: dict[str, Known]) -> dict[str, torch.Tensor]:
    """The tables after the start, by a loop over edges."""
    tables = {name: weight.detach().clone() for name, weight in table_weights(model).items()}
    types = {side: model.types[side] for side in ("lhs", "rhs")}
    sums = {name: torch.zeros_like(table) for name, table in tables.items()}
    weights = {name: torch.zeros(len(table)) for name, table in tables.items()}
    for edge in store.read("training_set/positives", SNAPSHOT).to_pylist():
        for side, kept in (("lhs", "rhs"), ("rhs", "lhs")):
            mine, theirs = types[side][edge["rel"]], types[kept][edge["rel"]]
            if edge["weight"] > 0 and not known[mine].rows[edge[side]] and known[theirs].rows[edge[kept]]:
                vector = wanted(model, side, tables[theirs][edge[kept]], edge["rel"])
                sums[mine][edge[side]] += edge["weight"] * vector
                weights[mine][edge[side]] += edge["weight"]
    for name, table in tables.items():
        for row in np.flatnonzero(~known[name].rows).tolist():
            if weights[name][row] > 0:
                estimate = sums[name][row] / weights[name][row]
                if "l2" not in type(model.scorer.comparator).__name__.lower() and known[name].length:
                    estimate = estimate / estimate.norm() * known[name].length
                table[row] += estimate
            elif known[name].mean is not None:
                table[row] += torch.from_numpy(known[name].mean)
    return tables


def some_known(rows: int, seed: int) -> Known:
    rng = np.random.default_rng(seed)
    return Known(rng.random(rows) < 0.6, rng.normal(size=16).astype(np.float32), 0.7)


def config_of(operator: str, **model: Any) -> TwhinConfig:
    section = json.loads(planted_config().model.model_dump_json()) | model
    for relation in section["relations"]:
        relation["operator"] = operator
    return planted_config(model=section)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("operator", OPERATOR_NAMES)
def test_new_ids_start_where_a_plain_loop_over_edges_puts_them(
    tmp_path: Path, operator: str, reciprocal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(operator, reciprocal=reciprocal)
    store = Store(str(tmp_path))
    write_planted(store, config)
    model = model_of(config)
    known = {"user": some_known(USERS, 0), "item": some_known(ITEMS, 1)}
    known["user"].rows[:] = np.arange(USERS) % 2 == 0
    expected = plain(model, store, known)
    before = {name: weight.detach().clone() for name, weight in table_weights(model).items()}
    monkeypatch.setattr(new_ids, "BLOCK", 100)  # several blocks
    counts = start_from_neighbors(model, store, SNAPSHOT, config.model.relations, known, ALONE)
    for name, weight in table_weights(model).items():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-5, atol=1e-6)
        rows = torch.from_numpy(known[name].rows)
        assert torch.equal(weight.detach()[rows], before[name][rows]), "known ids keep their vectors"
        assert not torch.equal(weight.detach()[~rows], before[name][~rows])
        new, placed = counts[name]
        assert new == int((~known[name].rows).sum()) and 0 < placed <= new


@pytest.mark.parametrize("comparator", COMPARATOR_NAMES)
def test_lengths_are_those_of_known_vectors_unless_the_comparator_is_a_distance(
    tmp_path: Path, comparator: str
) -> None:
    config = config_of("identity", comparator=comparator, init_scale=1e-6)
    store = Store(str(tmp_path))
    write_planted(store, config)
    model = model_of(config)
    with torch.no_grad():
        for weight in table_weights(model).values():
            weight.detach()[:30] = torch.randn(30, 16, generator=torch.Generator().manual_seed(0))
    known = {name: Known(np.arange(rows) < 30, None, 5.0) for name, rows in (("user", USERS), ("item", ITEMS))}
    start_from_neighbors(model, store, SNAPSHOT, config.model.relations, known, ALONE)
    lengths = table_weights(model)["user"].detach()[30:].norm(dim=1)
    scaled = comparator in ("dot", "cosine")
    assert bool(((lengths - 5).abs() < 1e-3).all()) == scaled
    assert scaled or float(lengths.max()) < 4.5


def test_an_id_without_a_known_neighbor_starts_near_the_mean_of_its_type_but_not_on_it(tmp_path: Path) -> None:
    config = config_of("translation")
    store = Store(str(tmp_path))
    write_planted(store, config)
    model = model_of(config)
    before = {name: weight.detach().clone() for name, weight in table_weights(model).items()}
    mean = np.full(16, 2.0, np.float32)
    known = {"user": Known(np.zeros(USERS, bool), mean), "item": Known(np.zeros(ITEMS, bool), None)}
    counts = start_from_neighbors(model, store, SNAPSHOT, config.model.relations, known, ALONE)
    assert counts == {"user": (USERS, 0), "item": (ITEMS, 0)}
    after = table_weights(model)
    torch.testing.assert_close(after["user"].detach(), before["user"] + 2.0)
    assert len(torch.unique(after["user"].detach(), dim=0)) == USERS
    assert torch.equal(after["item"].detach(), before["item"])


def still(**training: Any) -> TwhinConfig:
    """A training that moves nothing."""
    model = json.loads(planted_config().model.model_dump_json())
    for table in model["embeddings"]["tables"]:
        table["optimizer"] = {"rowwise_adagrad": {"lr": 0.0}}
    model["translation_optimizer"] = {"sgd": {"lr": 0.0}}
    return planted_config(model=model, training={"num_train_steps": 1, **training})


def write_later(store: Store, config: TwhinConfig, **columns: list[Any]) -> None:
    """Write a snapshot in which every third user is new, in another order."""
    write_planted(store, config, LATER, seed=1)
    ids = [f"user-{i}" if i % 3 else f"new-{i}" for i in reversed(range(USERS))]
    table = store.read("vocabulary/user", LATER).set_column(0, "id", pa.array(ids))
    with store.replace("vocabulary/user", LATER, config_hash="test") as draft:
        draft.write(table)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Store:
    config = planted_config(training={"num_epochs": 2})
    store = Store(str(tmp_path_factory.mktemp("earlier")))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT)
    return store


def test_one_process_and_two_ranks_start_with_the_same_bits(earlier: Store, tmp_path: Path) -> None:
    warm = still(initial_checkpoint_dir=f"{earlier.root}@{SNAPSHOT}")
    found = {}
    for name in ("one", "shared", "exchanged"):
        store = Store(str(tmp_path / name))
        write_later(store, warm)
        path = write_config(warm, tmp_path)
        if name == "one":
            train.run(warm, store, LATER)
        elif name == "shared":
            processes.run(warm, path, [], store, LATER, output=lambda line: None)
        else:
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            arguments = ["--config", path, "--snapshot", LATER, "--home", store.root]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            command = [*torchrun, str(SUPPORT / "exchanging.py"), *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        found[name] = ModelTables.open(store, LATER).table("user")
    for name in ("shared", "exchanged"):
        np.testing.assert_array_equal(found[name], found["one"])
    before = ModelTables.open(earlier, SNAPSHOT).table("user")
    old = [row for row in range(USERS) if (USERS - 1 - row) % 3]
    np.testing.assert_array_equal(found["one"][old], before[[USERS - 1 - row for row in old]])
    random = still(initial_checkpoint_dir=f"{earlier.root}@{SNAPSHOT}", new_ids="random")
    store = Store(str(tmp_path / "random"))
    write_later(store, random)
    train.run(random, store, LATER)
    table = ModelTables.open(store, LATER).table("user")
    np.testing.assert_array_equal(table[old], found["one"][old])
    new = np.setdiff1d(np.arange(USERS), old)
    assert np.linalg.norm(table[new], axis=1).max() < np.linalg.norm(found["one"][new], axis=1).min()


@pytest.mark.parametrize("column", ["evicted", "last_snapshot"])
def test_an_id_that_was_evicted_or_never_had_an_edge_starts_like_a_new_one(
    earlier: Store, tmp_path: Path, column: str
) -> None:
    gone = np.arange(USERS) == 7
    store = Store(str(tmp_path / "earlier"))
    config = planted_config(training={"num_epochs": 2})
    write_planted(store, config)
    table = store.read("vocabulary/user", SNAPSHOT)
    last = [None if one and column == "last_snapshot" else SNAPSHOT for one in gone]
    table = table.append_column("last_snapshot", pa.array(last, pa.string()))
    table = table.append_column("evicted", pa.array(gone & (column == "evicted")))
    with store.replace("vocabulary/user", SNAPSHOT, config_hash="test") as draft:
        draft.write(table)
    train.run(config, store, SNAPSHOT)
    warm = still(initial_checkpoint_dir=f"{store.root}@{SNAPSHOT}", new_ids="random")
    later = Store(str(tmp_path / "later"))
    write_planted(later, warm, LATER)
    train.run(warm, later, LATER)
    before, after = (ModelTables.open(*one).table("user") for one in ((store, SNAPSHOT), (later, LATER)))
    same = (before == after).all(axis=1)
    assert same.tolist() == (~gone).tolist()


@pytest.mark.parametrize("how", ["held", "cold"])
def test_an_id_without_an_edge_in_any_snapshot_that_was_trained_on_starts_like_a_new_one(
    earlier: Store, tmp_path: Path, how: str
) -> None:
    """User 7 had edges in a snapshot between, which was held (or trained on before a start at random), then none."""
    departed = np.arange(USERS) == 7
    second, third = LATER, "2025-01-03"
    stores = [Store(str(tmp_path / name)) for name in ("second", "third")]
    before = {} if how == "cold" else {"initial_checkpoint_dir": f"{earlier.root}@{SNAPSHOT}", "new_ids": "random"}
    config = planted_config(training={"num_epochs": 1, **before})
    write_planted(stores[0], config, second)
    table = stores[0].read("vocabulary/user", second)
    ids = [f"between-{i}" if gone else f"user-{i}" for i, gone in enumerate(departed)]
    last = [SNAPSHOT if gone else second for gone in departed]
    table = table.set_column(0, "id", pa.array(ids))
    table = table.set_column(2, "degree", pa.array((~departed).astype(np.int64)))
    table = table.append_column("last_snapshot", pa.array(last)).append_column("evicted", pa.array([False] * USERS))
    with stores[0].replace("vocabulary/user", second, config_hash="test") as draft:
        draft.write(table)
    train.run(config, stores[0], second)
    model = ModelTables.open(stores[0], second)
    assert model.untrained("user").tolist() == [7] and not len(model.untrained("item"))
    warm = still(initial_checkpoint_dir=f"{stores[0].root}@{second}", new_ids="random")
    write_planted(stores[1], warm, third)
    with stores[1].replace("vocabulary/user", third, config_hash="test") as draft:
        draft.write(table.set_column(2, "degree", pa.array(np.ones(USERS, np.int64))))
    train.run(warm, stores[1], third)
    same = (model.table("user") == ModelTables.open(stores[1], third).table("user")).all(axis=1)
    assert same.tolist() == (~departed).tolist()


def test_a_departed_id_that_an_earlier_model_was_trained_on_keeps_its_vector(earlier: Store, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "second"))
    config = still(initial_checkpoint_dir=f"{earlier.root}@{SNAPSHOT}", new_ids="random")
    write_planted(store, config, LATER)
    table = store.read("vocabulary/user", LATER)
    with store.replace("vocabulary/user", LATER, config_hash="test") as draft:
        draft.write(table.set_column(2, "degree", pa.array((np.arange(USERS) != 7).astype(np.int64))))
    train.run(config, store, LATER)
    model = ModelTables.open(store, LATER)
    assert not len(model.untrained("user"))
    np.testing.assert_array_equal(model.table("user")[7], ModelTables.open(earlier, SNAPSHOT).table("user")[7])
