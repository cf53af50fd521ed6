"""On a CUDA device training, resuming and evaluation do what they do on the CPU (`make test-gpu`)."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from stopped import stop_after
from torchrec.distributed.types import CacheParams

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.sharding import placement, torchrec_tables, unsharded_tables
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, train
from twhin_pipeline.training.launch import TrainingCancelled
from twhin_pipeline.vectors.model_files import ModelTables

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_tracking_store")]

GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module", autouse=True)
def _cuda() -> None:
    assert torch.cuda.is_available(), "these tests need a CUDA device"


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun gives the only rank of a node: it joins a process group (NCCL), in this process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        values = ("0", "0", "1", "1", "127.0.0.1", str(free.getsockname()[1]))
    for name, value in zip(GROUP, values, strict=True):
        monkeypatch.setenv(name, value)


def model_with(optimizer: dict[str, Any], operator: str = "translation", **model: Any) -> dict[str, Any]:
    section = json.loads(planted_config().model.model_dump_json())
    for table in section["embeddings"]["tables"]:
        table["optimizer"] = optimizer
    for relation in section["relations"]:
        relation["operator"] = operator
    return section | {"init_scale": 1.0} | model


def configured(device: str, **sections: Any) -> TwhinConfig:
    training = {"num_epochs": 4, "selection_metric": "filtered_mrr", "eval_every_n_epochs": 2}
    sections = {**sections, "training": training | sections.get("training", {})}
    return planted_config(**sections, launch={"device": device, "nproc_per_node": 1})


def trained(folder: Path, config: TwhinConfig, **options: Any) -> Store:
    store = Store(str(folder))
    write_planted(store, config)
    train.run(config, store, SNAPSHOT, **options)
    return store


def assert_close(a: Store, b: Store, tolerance: float) -> None:
    """The same model, and the same losses and validation metrics on the way."""
    left, right = ModelTables.open(a, SNAPSHOT), ModelTables.open(b, SNAPSHOT)
    pairs = [(left.table(name), right.table(name)) for name in ("user", "item")]
    rows = right.relation_rows()
    pairs += [(row.numpy(), rows[name].numpy()) for name, row in left.relation_rows().items()]
    for first, second in pairs:
        np.testing.assert_allclose(first.astype(np.float32), second.astype(np.float32), rtol=0, atol=tolerance)
    losses = [tables.read("losses").column("loss").to_numpy() for tables in (left, right)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=tolerance)
    values = [
        [row["value"] for row in tables.read("metrics").to_pylist() if row["metric"] != "rce"]
        for tables in (left, right)
    ]
    np.testing.assert_allclose(values[0], values[1], atol=10 * tolerance)


ROWWISE = {"rowwise_adagrad": {"lr": 0.1}}
EVERYTHING = {"global_negatives": "all", "in_batch_negatives": 0}
LEARNS: dict[str, dict[str, Any]] = {
    "rowwise_adagrad": {"model": model_with(ROWWISE)},
    "adagrad": {"model": model_with({"adagrad": {"lr": 0.1}})},
    "sgd": {"model": model_with({"sgd": {"lr": 0.5}})},
    "adam": {"model": model_with({"adam": {"lr": 0.02}})},
    "rmsprop": {"model": model_with({"rmsprop": {"lr": 0.02}})},
    "binary cross-entropy": {"model": model_with(ROWWISE), "loss": {"name": "bce"}},
    "complex and reciprocal": {"model": model_with(ROWWISE, "complex_diagonal", reciprocal=True)},
    "rotations at a distance": {
        "model": model_with(ROWWISE, "rotation", comparator="l2", operator_init="random", temperature=1.0)
    },
    "penalties": {"model": model_with(ROWWISE, regularization={"entities": 0.01, "operators": 0.01})},
    "all candidates": {"model": model_with(ROWWISE), "train_data": EVERYTHING},
    "a sample of the step": {"model": model_with(ROWWISE), "train_data": {**EVERYTHING, "sampled_per_step": 30}},
    "one side": {"model": model_with(ROWWISE), "negatives": {"sides": "rhs"}},
}


@pytest.mark.parametrize("name", LEARNS)
def test_a_gpu_trains_the_vectors_that_the_cpu_does(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = trained(tmp_path / "gpu", configured("cuda", **LEARNS[name]))
    assert gpu.manifest("twhin_model", SNAPSHOT).details["device"] == "cuda"
    for variable in GROUP:
        monkeypatch.delenv(variable)
    cpu = trained(tmp_path / "cpu", configured("cpu", **LEARNS[name]))
    assert_close(gpu, cpu, 2e-2 if name == "adam" else 5e-3)


def test_vectors_of_half_precision_train_on_a_gpu(tmp_path: Path) -> None:
    section = model_with(ROWWISE)
    for table in section["embeddings"]["tables"]:
        table["data_type"] = "fp16"
    config = configured("cuda", model=section, training={"num_epochs": 8})
    found = ModelTables.open(trained(tmp_path, config), SNAPSHOT)
    assert best(found, "filtered_mrr") > 0.3


def test_fbgemm_s_kernels_hold_the_tables_but_for_an_optimizer_that_they_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for kind in (torchrec_tables.TorchrecTables, unsharded_tables.UnshardedTables):
        original = kind.rows

        def rows(self: Any, ids: Any, kind: Any = kind, original: Any = original) -> Any:
            asked.append(kind.__name__)
            return original(self, ids)

        monkeypatch.setattr(kind, "rows", rows)
    for name, kind in (("adagrad", "TorchrecTables"), ("rmsprop", "UnshardedTables")):
        asked.clear()
        trained(tmp_path / name, configured("cuda", **LEARNS[name], training={"num_epochs": 1}))
        assert set(asked) == {kind}


def cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave tables in the host's memory, as a plan does that finds no room on the GPU."""
    planned = placement.plan_tables

    def plan_tables(*arguments: Any) -> Any:
        plan = planned(*arguments)
        for sharding in plan.get_plan_for_module("embeddings").values():
            sharding.compute_kernel = "fused_uvm_caching"
            sharding.cache_params = CacheParams(load_factor=0.3)
        return plan

    monkeypatch.setattr(placement, "plan_tables", plan_tables)


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam"])
def test_tables_in_the_hosts_memory_train_as_on_the_gpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, and the best step that is gone back to, see what is in the cache; and nothing old stays there."""
    config = configured("cuda", **LEARNS[name])
    on_gpu = trained(tmp_path / "gpu", config)
    cached(monkeypatch)
    store = trained(tmp_path / "cached", config)
    assert "fused_uvm_caching" in store.manifest("twhin_model", SNAPSHOT).details["plan"]
    assert_close(on_gpu, store, 1e-3)
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled, match="step 10;"):
        trained(tmp_path / "stopped", config, stop=stop_after(10, patch))
    resumed = Store(str(tmp_path / "stopped"))
    train.run(config, resumed, SNAPSHOT)
    assert_close(on_gpu, resumed, 1e-3)


@pytest.mark.parametrize("name", ["rowwise_adagrad", "adam", "rmsprop"])
def test_a_stopped_run_goes_on_from_its_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configured("cuda", **LEARNS[name])
    whole = trained(tmp_path / "whole", config)
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled, match="step 10;"):
        trained(tmp_path / "stopped", config, stop=stop_after(10, patch))
    capsys.readouterr()
    store = Store(str(tmp_path / "stopped"))
    train.run(config, store, SNAPSHOT)
    assert "resumed from step 10" in "".join(capsys.readouterr())
    assert_close(whole, store, 1e-3)


def test_a_checkpoint_of_the_cpu_goes_on_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", configured("cuda"))
    joined = {variable: os.environ[variable] for variable in GROUP}
    for variable in GROUP:
        monkeypatch.delenv(variable)
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled, match="step 10;"):
        trained(tmp_path / "stopped", configured("cpu"), stop=stop_after(10, patch))
    for variable, value in joined.items():
        monkeypatch.setenv(variable, value)
    store = Store(str(tmp_path / "stopped"))
    train.run(configured("cuda"), store, SNAPSHOT)
    assert_close(whole, store, 5e-3)


def test_evaluation_on_a_gpu_finds_the_figures_of_the_cpu(tmp_path: Path) -> None:
    store = trained(tmp_path, configured("cuda"))
    without_test_edges(store)
    found = {}
    for device in ("cuda", "cpu"):
        manifest = evaluate(configured(device), store, SNAPSHOT)
        assert manifest.details["device"] == device
        found[device] = manifest.details["metrics"]
    assert set(found["cuda"]) == set(found["cpu"]) and "filtered_mrr" in found["cuda"]
    for metric, value in found["cuda"].items():
        assert value == pytest.approx(found["cpu"][metric], rel=1e-3), metric


@pytest.mark.parametrize("runtime", [{"enable_amp": True}, {"enable_tensorfloat32": True}], ids=lambda r: next(iter(r)))
def test_shorter_numbers_learn_the_planted_graph_too(runtime: dict[str, bool], tmp_path: Path) -> None:
    store = trained(tmp_path, configured("cuda", runtime=runtime, training={"num_epochs": 8}))
    assert best(ModelTables.open(store, SNAPSHOT), "filtered_mrr") > 0.3


def test_torchrun_trains_on_a_gpu_where_the_device_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in GROUP:
        monkeypatch.delenv(variable)
    config = configured("auto")
    store = Store(str(tmp_path / "home"))
    write_planted(store, config)
    lines: list[str] = []
    launch.run(config, write_config(config, tmp_path), [], store, SNAPSHOT, output=lines.append)
    assert any("1 process(es) on cuda" in line for line in lines), lines
    assert best(ModelTables.open(store, SNAPSHOT), "filtered_mrr") > 0.3


def best(tables: ModelTables, metric: str) -> float:
    value = max(row["value"] for row in tables.read("metrics").to_pylist() if row["metric"] == metric)
    assert math.isfinite(value)
    return value


def without_test_edges(store: Store) -> None:
    """Write an empty test set, so that `evaluate` ranks the validation edges."""
    validation = store.read("held_out/validation", SNAPSHOT)
    with store.replace("held_out/test", SNAPSHOT, config_hash="test") as draft:
        draft.write(validation.slice(0, 0))
