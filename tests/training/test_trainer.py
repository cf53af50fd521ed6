"""Training: it learns, it goes on where it was stopped with the same bits, and it says what is wrong."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers import SNAPSHOT, planted_config, write_config, write_planted
from mlflow import MlflowClient
from stopped import stop_after
from torchrec.optim.keyed import CombinedOptimizer

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import unwrapped
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, train
from twhin_pipeline.training.checkpoint import folder_of
from twhin_pipeline.training.launch import TrainingCancelled
from twhin_pipeline.training.progress import Interval
from twhin_pipeline.training.reporting import SilentReporter
from twhin_pipeline.training.trainer import Trainer
from twhin_pipeline.vectors.model_files import ModelTables

pytestmark = pytest.mark.usefixtures("one_tracking_store")

EPOCHS = 12


def make_store(path: Path, config: TwhinConfig) -> Store:
    store = Store(str(path))
    write_planted(store, config)
    return store


def train_here(config: TwhinConfig, store: Store, **kwargs: Any) -> dict[str, Any]:
    """Train in this process, without a process group."""
    return train.run(config, store, SNAPSHOT, **kwargs)


def assert_same_training(a: Store, b: Store, *, exact: bool) -> None:
    left, right = ModelTables.open(a, SNAPSHOT), ModelTables.open(b, SNAPSHOT)
    compare: Any = np.testing.assert_array_equal if exact else _close
    for table in ("user", "item"):
        compare(left.table(table), right.table(table))
    for relation, row in left.relation_rows().items():
        compare(row.numpy(), right.relation_rows()[relation].numpy())
    for name in ("losses", "metrics"):
        first, second = left.read(name), right.read(name)
        assert first.column_names == second.column_names
        for column in set(first.column_names) - {"edges_per_second"}:
            if pa.types.is_floating(first.column(column).type):
                compare(first.column(column).to_numpy(), second.column(column).to_numpy())
            else:
                assert first.column(column).to_pylist() == second.column(column).to_pylist(), column


def _close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def selecting(**sections: dict[str, Any]) -> TwhinConfig:
    """Training whose model is chosen by full ranking, with a rate that depends on the length of training."""
    model = json.loads(planted_config().model.model_dump_json())
    decay = {"linear_decay": {"learning_rate": 0.1, "final_learning_rate": 0.01}}
    model["embeddings"]["tables"][0]["optimizer"]["learning_rate"] = decay
    training = {"num_epochs": EPOCHS, "selection_metric": "filtered_mrr", "eval_every_n_epochs": 2}
    return planted_config(training=training, model=model, **sections)


@pytest.fixture(scope="module")
def config() -> TwhinConfig:
    return selecting()


@pytest.fixture(scope="module")
def two_ranks(config: TwhinConfig, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a model that two processes trained without interruption."""
    folder = tmp_path_factory.mktemp("two")
    store = make_store(folder / "home", config)
    launch.run(config, write_config(config, folder), [], store, SNAPSHOT, output=lambda line: None)
    return store


def test_two_processes_learn_a_planted_graph(two_ranks: Store) -> None:
    found = ModelTables.open(two_ranks, SNAPSHOT).read("metrics").to_pylist()
    mrr = [row["value"] for row in found if row["metric"] == "mrr"]
    # An edge among its 14 candidates has a reciprocal rank of 0.22 by chance.
    assert max(mrr) > 0.6
    details = two_ranks.manifest("twhin_model", SNAPSHOT).details
    assert details["world_size"] == 2 and details["final_loss"] < details["first_loss"] / 2
    assert details["edges"] == EPOCHS * two_ranks.manifest("training_set/positives", SNAPSHOT).rows


def test_each_rank_writes_its_rows_and_every_row_is_there_once(two_ranks: Store) -> None:
    tables = ModelTables.open(two_ranks, SNAPSHOT)
    for name, rows in (("user", 60), ("item", 48)):
        assert len(tables.parts(name)) == 2
        numbers = np.concatenate([numbers for numbers, _ in tables.blocks(name)])
        np.testing.assert_array_equal(numbers, np.arange(rows))


@pytest.fixture(scope="module")
def interrupted(config: TwhinConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A store whose training by two processes was stopped by a signal, and the configuration's path."""
    folder = tmp_path_factory.mktemp("interrupted")
    store = make_store(folder / "home", config)
    path = write_config(config, folder)

    def interrupt(line: str) -> None:
        if line.startswith("step 12 of"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingCancelled, match=r"stopped at step \d+"):
        launch.run(config, path, [], store, SNAPSHOT, output=interrupt)
    assert not store.exists("twhin_model", SNAPSHOT)
    return store, path


def test_a_run_stopped_by_a_signal_and_resumed_equals_an_uninterrupted_one_bit_for_bit(
    config: TwhinConfig, two_ranks: Store, interrupted: tuple[Store, str], tmp_path: Path
) -> None:
    store, path = interrupted
    copy = Store(str(tmp_path / "copy"))
    copy.fs.copy(store.root, copy.root, recursive=True)
    lines: list[str] = []
    launch.run(config, path, [], copy, SNAPSHOT, output=lines.append)
    assert any(line.startswith("resumed from step") for line in lines)
    assert_same_training(two_ranks, copy, exact=True)


def test_a_checkpoint_of_two_ranks_goes_on_at_one_and_reads_every_edge(
    config: TwhinConfig, interrupted: tuple[Store, str], tmp_path: Path
) -> None:
    store, _ = interrupted
    copy = Store(str(tmp_path / "copy"))
    copy.fs.copy(store.root, copy.root, recursive=True)
    details = train_here(config, copy)
    assert details["world_size"] == 1
    assert details["edges"] == EPOCHS * copy.manifest("training_set/positives", SNAPSHOT).rows
    tables = ModelTables.open(copy, SNAPSHOT)
    steps = tables.read("losses").column("step").to_pylist()
    assert steps == sorted(set(steps))
    assert max(row["value"] for row in tables.read("metrics").to_pylist() if row["metric"] == "mrr") > 0.6


def test_one_process_trains_the_same_vectors_as_two(config: TwhinConfig, two_ranks: Store, tmp_path: Path) -> None:
    alone = selecting(
        train_data={"per_replica_batch_size": 128},
        validation_data={"per_replica_batch_size": 128},
    )
    store = make_store(tmp_path, alone)
    train_here(alone, store)
    assert_same_training(two_ranks, store, exact=False)


def test_operators_start_from_the_seed_alone_whatever_the_tables_draw(tmp_path: Path) -> None:
    model = json.loads(planted_config().model.model_dump_json())
    config = planted_config(model=model | {"operator_init": "random"})
    trainer = Trainer(
        config, make_store(tmp_path, config), SNAPSHOT, Ranks(0, 1, torch.device("cpu")), SilentReporter()
    )
    trainer.checkpoints.release()
    torch.manual_seed(config.training.seed)
    expected = Scorer(config.model).state_rows()
    for relation, row in unwrapped(trainer.sharded).scorer.state_rows().items():
        assert row.any() and torch.equal(row, expected[relation])


RAMP = {"learning_rate": 0.2, "num_ramp_steps": 6}
RATES: dict[str, dict[str, Any]] = {
    "constant": {"constant": 0.1},
    "ramp": {"linear_ramp_to_constant": RAMP},
    "cosine": {"linear_ramp_to_cosine": {**RAMP, "final_learning_rate": 0.01, "final_num_steps": 30}},
    "decay": {"linear_decay": {"learning_rate": 0.2, "final_learning_rate": 0.01}},
    "piecewise": {"piecewise_constant": {"learning_rate_boundaries": [9], "learning_rate_values": [0.2, 0.05]}},
}


def scheduled_model(table: str, algorithm: str, data_type: str = "fp32") -> dict[str, Any]:
    """The model section with an optimizer and schedule on its tables, and Adam with a ramp on the operators."""
    model = json.loads(planted_config().model.model_dump_json())
    for entry in model["embeddings"]["tables"]:
        entry |= {"optimizer": {algorithm: {"lr": 9.0}, "learning_rate": RATES[table]}, "data_type": data_type}
    model["translation_optimizer"] = {"adam": {"lr": 9.0}, "learning_rate": RATES["ramp"]}
    return model


def rates(store: Store) -> list[float]:
    return ModelTables.open(store, SNAPSHOT).read("losses").column("learning_rate/item").to_pylist()


@pytest.mark.parametrize(
    ("steps", "model"),
    [
        (3, scheduled_model("cosine", "rowwise_adagrad")),
        (10, scheduled_model("piecewise", "adagrad", "fp16")),
        (14, scheduled_model("ramp", "adam")),
        (18, scheduled_model("decay", "rowwise_adagrad")),
        (6, scheduled_model("decay", "rmsprop")),
    ],
)
def test_a_run_stopped_at_any_step_resumes_to_the_same_bits(
    steps: int, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"num_epochs": 2, "selection_metric": "ndcg@5", "eval_every_n_epochs": 1}
    config = planted_config(training=training, model=model, launch={"nproc_per_node": 1})
    whole, stopped = make_store(tmp_path / "whole", config), make_store(tmp_path / "stopped", config)
    train_here(config, whole)
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled, match=f"step {steps};"):
        train_here(config, stopped, stop=stop_after(steps, patch))
    told: list[int] = []
    monkeypatch.setattr(CombinedOptimizer, "set_optimizer_step", lambda self, step: told.append(step))
    train_here(config, stopped)
    assert_same_training(whole, stopped, exact=True)
    assert rates(whole) == rates(stopped)
    assert told == [steps], "the kernels were not told the step (test_sharding.py: what they do with it)"


def test_mlflow_gets_curves_by_group_and_relation_the_plan_and_norms_by_shard(tmp_path: Path) -> None:
    model = json.loads(planted_config().model.model_dump_json())
    model["embeddings"]["tables_to_log"] = ["item"]
    config = planted_config(training={"num_epochs": 1}, model=model)
    store = make_store(tmp_path, config)
    details = train_here(config, store)
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(details["mlflow_run_id"])
    groups = {f"learning_rate/{group}" for group in ("user", "item", "translation")}
    assert {"train/loss", "train/edges_per_second", "loss/likes", "loss/follows", *groups} <= run.data.metrics.keys()
    assert {f"validation/{name}" for name in ("loss", "auc", "rce", "mrr")} <= run.data.metrics.keys()
    norms = {key for key in run.data.metrics if key.startswith("norms/")}
    assert norms == {f"norms/item/rows_from_0/norm_{kind}" for kind in ("min", "mean", "max")}
    curve = client.get_metric_history(run.info.run_id, "loss/likes")
    losses = ModelTables.open(store, SNAPSHOT).read("losses")
    assert [(point.step, point.value) for point in curve] == list(
        zip(losses["step"].to_pylist(), losses["loss/likes"].to_pylist(), strict=True)
    )
    assert {"config.yaml", "sharding_plan.txt"} <= {file.path for file in client.list_artifacts(run.info.run_id)}
    assert "user 60 x 16, item 48 x 16" in details["plan"]


def test_num_eval_steps_bounds_an_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for limit, edges in ((1, 64), (-1, 120)):
        config = planted_config(training={"num_train_steps": 1, "num_eval_steps": limit})
        train_here(config, make_store(tmp_path / str(limit), config))
        assert f"), {edges} edges in" in capsys.readouterr().out


def test_num_train_steps_ends_a_run_and_says_so(tmp_path: Path) -> None:
    config = planted_config(training={"num_train_steps": 5})
    details = train_here(config, make_store(tmp_path, config))
    assert details["steps"] == 5 and "comes before the end of num_epochs" in details["stop_reason"]


def test_a_finished_run_and_a_new_training_set_both_start_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = planted_config(training={"num_epochs": 2})
    store = make_store(tmp_path, config)
    train_here(config, store)
    assert train_here(config, store)["steps"] == 32
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled):
        train_here(config, store, stop=stop_after(9, patch))
    write_planted(store, config, seed=1)
    capsys.readouterr()
    train_here(config, store)
    assert "resumed" not in capsys.readouterr().out


def test_training_stops_early_and_keeps_the_best_model(tmp_path: Path) -> None:
    config = planted_config(
        training={"num_epochs": 40, "early_stopping_patience": 2, "eval_log_every_n": 8, "checkpoint_max_to_keep": 1}
    )
    store = make_store(tmp_path, config)
    details = train_here(config, store)
    assert details["stop_reason"].startswith("early stopping") and details["steps"] < 40 * 16
    found = ModelTables.open(store, SNAPSHOT).read("metrics").to_pylist()
    losses = {row["step"]: row["value"] for row in found if row["metric"] == "loss"}
    assert details["best_validation"] == min(losses.values()) == losses[details["best_step"]]
    folder = Path(folder_of(config, store, SNAPSHOT))
    kept = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))
    assert kept == [details["best_step"], details["steps"]]
    # The same training, ended at the best step.
    until = planted_config(
        training={"num_epochs": 40, "eval_log_every_n": 8, "num_train_steps": details["best_step"]},
    )
    expected = make_store(tmp_path / "until", until)
    train_here(until, expected)
    best, there = ModelTables.open(store, SNAPSHOT), ModelTables.open(expected, SNAPSHOT)
    for table in ("user", "item"):
        np.testing.assert_array_equal(best.table(table), there.table(table))
    for relation, row in best.relation_rows().items():
        assert torch.equal(row, there.relation_rows()[relation])


def without_test_edges(store: Store) -> None:
    """Write an empty test set, so that `evaluate` ranks the validation edges."""
    validation = store.read("held_out/validation", SNAPSHOT)
    with store.replace("held_out/test", SNAPSHOT, config_hash="test") as draft:
        draft.write(validation.slice(0, 0))


SHORT = {"comparator": "dot", "temperature": 1.0, "max_norm": 1.0}


@pytest.mark.parametrize(
    ("metric", "model", "data_type", "sides"),
    [
        ("filtered_mrr", {}, "fp32", None),
        ("filtered_hits@3", SHORT, "fp16", "rhs"),
        ("recall@5", SHORT, "fp32", "lhs"),
        ("ndcg@4", {"reciprocal": True}, "fp32", None),
    ],
)
def test_the_model_is_the_best_by_full_ranking_and_evaluation_finds_the_same_figure(
    metric: str, model: dict[str, Any], data_type: str, sides: str | None, tmp_path: Path
) -> None:
    section = json.loads(planted_config().model.model_dump_json()) | model
    section["relations"][0]["sides"] = sides
    for table in section["embeddings"]["tables"]:
        # Far too fast, so that later is not always better.
        table |= {"data_type": data_type, "optimizer": {"rowwise_adagrad": {"lr": 0.6}}}
    config = planted_config(
        model=section,
        training={"num_epochs": 6, "eval_every_n_epochs": 1, "selection_metric": metric},
        evaluation={"recall_at": [4, 5]},
    )
    store = make_store(tmp_path, config)
    without_test_edges(store)
    details = train_here(config, store)
    found = ModelTables.open(store, SNAPSHOT).read("metrics").to_pylist()
    values = {row["step"]: row["value"] for row in found if row["metric"] == metric}
    assert list(values) == [16 * epoch for epoch in range(1, 7)], "not the ends of the epochs"
    assert details["best_validation"] == max(values.values()) == values[details["chosen_step"]]
    assert details["chosen_step"] == 16 * details["chosen_epoch"]
    assert details["validation_metric"] == metric
    measured = evaluate(config, store, SNAPSHOT).details
    assert measured["metrics"][metric] == details["best_validation"]
    assert measured["chosen_step"] == details["chosen_step"] and measured["chosen_epoch"] == details["chosen_epoch"]
    assert measured["sides"] == ({"likes": sides, "follows": "both"} if sides else "both")
    logged = MlflowClient(os.environ["MLFLOW_TRACKING_URI"]).get_run(details["mlflow_run_id"]).data
    assert logged.metrics["chosen_epoch"] == details["chosen_epoch"]
    assert logged.metrics["best_validation"] == details["best_validation"]
    assert logged.params["training.selection_metric"] == metric
    if "max_norm" in model:
        lengths = np.linalg.norm(ModelTables.open(store, SNAPSHOT).table("user"), axis=1)
        assert lengths.max() == pytest.approx(1, abs=1e-3) and np.isclose(lengths, 1, atol=1e-3).sum() > 1


def test_the_chosen_step_is_told_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = planted_config(training={"num_epochs": 3, "eval_every_n_epochs": 2, "selection_metric": "filtered_hits@5"})
    details = train_here(config, make_store(tmp_path, config))
    told = f"the model is that of step {details['chosen_step']:,} (epoch {details['chosen_epoch']}): filtered_hits@5 "
    assert told + f"{details['best_validation']:.4f}, the best of 2 evaluation(s)" in capsys.readouterr().out


def test_training_stops_when_the_full_ranking_gets_no_better(tmp_path: Path) -> None:
    model = json.loads(planted_config().model.model_dump_json())
    for table in model["embeddings"]["tables"]:
        table["optimizer"] = {"rowwise_adagrad": {"lr": 0.0}}
    model["translation_optimizer"] = {"sgd": {"lr": 0.0}}
    config = planted_config(
        model=model,
        training={
            "num_epochs": 40,
            "eval_every_n_epochs": 3,
            "early_stopping_patience": 2,
            "selection_metric": "filtered_mrr",
            "num_eval_steps": 0,
        },
    )
    details = train_here(config, make_store(tmp_path, config))
    assert details["stop_reason"].startswith("early stopping: 2 evaluation(s) did not better filtered_mrr")
    assert (details["chosen_epoch"], details["epochs"]) == (3, 9)


@pytest.fixture
def _tf32_as_before() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_tf32_as_before")
def test_numerics_and_sides_are_those_configured(tmp_path: Path) -> None:
    for amp, tf32, sides in ((True, True, "lhs"), (False, False, "rhs")):
        config = planted_config(
            runtime={"enable_amp": amp, "enable_tensorfloat32": tf32},
            negatives={"sides": sides},
            training={"num_train_steps": 1},
        )
        store = make_store(tmp_path / sides, config)
        trainer = Trainer(config, store, SNAPSHOT, Ranks(0, 1, torch.device("cpu")), SilentReporter())
        trainer.checkpoints.release()
        _, outputs = trainer.model(next(iter(trainer.dataset)))
        assert trainer.model.amp is amp
        # Scores, or where they are not kept the losses, of that side alone.
        assert {s for s in ("lhs", "rhs") if {f"{s}_logits", f"{s}_loss"} & outputs.keys()} == {sides}
        assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is tf32


def test_an_evaluation_out_of_time_is_told_and_decides_on_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = planted_config(training={"num_epochs": 2, "eval_timeout_in_s": 1e-9, "early_stopping_patience": 1})
    store = make_store(tmp_path, config)
    details = train_here(config, store)
    assert "stopped after eval_timeout_in_s, 0 of" in capsys.readouterr().out
    assert details["best_step"] is None and details["stop_reason"].startswith("num_epochs")


@pytest.mark.parametrize("metric", ["loss", "filtered_mrr"])
def test_without_held_out_edges_the_last_step_is_the_model(tmp_path: Path, metric: str) -> None:
    config = planted_config(training={"num_epochs": 2, "selection_metric": metric})
    store = make_store(tmp_path, config)
    store.fs.rm(f"{store.root}/held_out", recursive=True)
    details = train_here(config, store)
    assert details["best_step"] is None and details["steps"] == details["chosen_step"] == 32
    assert details["chosen_epoch"] == 2
    assert ModelTables.open(store, SNAPSHOT).read("metrics").num_rows == 0


def test_a_second_run_on_the_same_checkpoints_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twhin_pipeline.training.checkpoint.LOCK_PATIENCE_S", 0.1)
    config = planted_config()
    store = make_store(tmp_path, config)
    refused: list[str] = []
    original = train.Trainer._start

    def start_another(self: Any) -> None:
        original(self)
        with pytest.raises(UserError) as error:
            train.Trainer(config, store, SNAPSHOT, Ranks(0, 1, torch.device("cpu")), self.reporter)
        refused.append(str(error.value))
        raise TrainingCancelled("enough")

    monkeypatch.setattr(train.Trainer, "_start", start_another)
    with pytest.raises(TrainingCancelled, match="enough"):
        train_here(config, store)
    assert "trains this snapshot with this configuration" in refused[0]


def test_a_loss_that_is_not_finite_names_step_and_relation() -> None:
    interval = Interval(["likes", "follows"], Ranks(0, 1, torch.device("cpu")))

    class Batch:
        global_edges = 4

    def outputs(*losses: float) -> dict[str, torch.Tensor]:
        return {"relation_loss": torch.tensor(losses), "relation_edges": torch.ones(2)}

    interval.add(7, torch.tensor(1.0), outputs(1.0, 1.0), Batch())  # type: ignore[arg-type]
    interval.check_finite()
    interval.add(8, torch.tensor(float("nan")), outputs(1.0, float("nan")), Batch())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"nan at step 8, in relation follows; lower the learning rates"):
        interval.check_finite()


def test_training_that_diverges_fails_with_that_error_and_leaves_no_model(tmp_path: Path) -> None:
    config = planted_config(training={"num_epochs": 2})
    store = make_store(tmp_path, config)
    table = store.read("training_set/positives", SNAPSHOT).to_pandas()
    table.loc[table.rel == 1, "weight"] = np.float32(np.inf)
    details = store.manifest("training_set/positives", SNAPSHOT).details
    with store.replace("training_set/positives", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.Table.from_pandas(table, preserve_index=False))
        draft.details = details
    with pytest.raises(UserError, match=r"inf at step [1-9], in relation follows"):
        train_here(config, store)
    assert not store.exists("twhin_model", SNAPSHOT)


def test_a_warm_start_finds_each_id_its_earlier_vector(tmp_path: Path) -> None:
    config = planted_config(training={"num_epochs": 2})
    earlier = make_store(tmp_path / "earlier", config)
    train_here(config, earlier)
    # The same ids in the opposite order, and one that is new.
    later = make_store(tmp_path / "later", config)
    ids = [f"user-{i}" for i in range(59, 0, -1)] + ["newcomer"]
    table = later.read("vocabulary/user", SNAPSHOT).set_column(0, "id", pa.array(ids))
    with later.replace("vocabulary/user", SNAPSHOT, config_hash="test") as draft:
        draft.write(table)
    still = json.loads(config.model.model_dump_json())
    for entry in still["embeddings"]["tables"]:
        entry["optimizer"] = {"rowwise_adagrad": {"lr": 0.0}}
    still["translation_optimizer"] = {"sgd": {"lr": 0.0}}
    frozen = {"num_train_steps": 1, "initial_checkpoint_dir": f"{earlier.root}@{SNAPSHOT}"}
    train_here(planted_config(model=still, training=frozen), later)
    before, after = ModelTables.open(earlier, SNAPSHOT), ModelTables.open(later, SNAPSHOT)
    np.testing.assert_array_equal(after.table("user")[:59], before.table("user")[:0:-1])
    np.testing.assert_array_equal(after.table("item"), before.table("item"))
    assert not np.isin(after.table("user")[59], before.table("user")).any()
    for relation, row in before.relation_rows().items():
        assert torch.equal(after.relation_rows()[relation], row)


def test_pretrained_vectors_are_matched_by_id(tmp_path: Path) -> None:
    vectors = np.arange(32, dtype=np.float32).reshape(2, 16)
    from twhin_pipeline.vectors.model_files import vectors_array

    pa.parquet.write_table(
        pa.table({"id": ["item-7", "item-3"], "embedding": vectors_array(vectors)}), tmp_path / "vectors.parquet"
    )
    model = json.loads(planted_config().model.model_dump_json())
    model["embeddings"]["tables"][1] |= {
        "pretrained": {"emb_name": "item", "embedding_snapshot_uri": str(tmp_path / "vectors.parquet")},
        "optimizer": {"sgd": {"lr": 0.0}},
    }
    config = planted_config(model=model, training={"num_train_steps": 1})
    store = make_store(tmp_path / "store", config)
    train_here(config, store)
    table = ModelTables.open(store, SNAPSHOT).table("item")
    np.testing.assert_array_equal(table[[7, 3]], vectors)
    assert abs(table[4]).max() < 1


@pytest.mark.parametrize(
    ("column", "told"),
    [
        (pa.array(["x", "y"]), "of type string; it must hold lists of numbers"),
        (pa.array([["x"], ["y"]]), "must hold lists of numbers"),
        (pa.array([[1.0] * 16, [2.0]]), "lists of different lengths"),
        (pa.array([[1.0] * 16, [float("nan")] * 16]), "the vector of 'item-3' is not finite"),
        (pa.array([[1.0] * 8] * 2), "8 elements, but embedding_dim of 'item' is 16"),
        (None, "cannot be read as Parquet"),
    ],
)
def test_pretrained_vectors_that_are_none_are_told_with_their_file(tmp_path: Path, column: Any, told: str) -> None:
    path = tmp_path / "vectors.parquet"
    if column is None:
        path.write_text("id,embedding")
    else:
        pa.parquet.write_table(pa.table({"id": ["item-7", "item-3"], "embedding": column}), path)
    with pytest.raises(UserError, match=rf"tables\[1\].pretrained.*{told}"):
        _train_from(path, tmp_path)


def test_pretrained_vectors_of_other_entities_are_an_error(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"id": ["x", "y"], "embedding": [[1.0] * 16] * 2}), tmp_path / "vectors.parquet")
    with pytest.raises(UserError, match=r"tables\[1\].pretrained: has none of the ids of 'item'; mend the path"):
        _train_from(tmp_path / "vectors.parquet", tmp_path)


def _train_from(path: Path, folder: Path) -> Store:
    model = json.loads(planted_config().model.model_dump_json())
    model["embeddings"]["tables"][1] |= {
        "pretrained": {"emb_name": "item", "embedding_snapshot_uri": str(path)},
        "optimizer": {"sgd": {"lr": 0.0}},
    }
    config = planted_config(model=model, training={"num_train_steps": 1})
    store = make_store(folder / "store", config)
    train_here(config, store)
    return store


def test_vectors_of_integer_ids_are_found_by_ids_that_have_become_texts(tmp_path: Path) -> None:
    config = planted_config()
    ids = pa.array(range(len(make_store(tmp_path / "plain", config).read("vocabulary/item", SNAPSHOT))))
    store = make_store(tmp_path / "store", config)
    table = store.read("vocabulary/item", SNAPSHOT)
    with store.replace("vocabulary/item", SNAPSHOT, config_hash="test") as draft:
        draft.write(table.set_column(0, "id", ids.cast(pa.string())))
    pa.parquet.write_table(pa.table({"id": [7], "embedding": [[3.0] * 16]}), tmp_path / "vectors.parquet")
    model = json.loads(config.model.model_dump_json())
    model["embeddings"]["tables"][1] |= {
        "pretrained": {"emb_name": "item", "embedding_snapshot_uri": str(tmp_path / "vectors.parquet")},
        "optimizer": {"sgd": {"lr": 0.0}},
    }
    train_here(planted_config(model=model, training={"num_train_steps": 1}), store)
    np.testing.assert_array_equal(ModelTables.open(store, SNAPSHOT).table("item")[7], [3.0] * 16)


def test_a_run_whose_newest_checkpoint_is_damaged_resumes_from_the_one_before_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = planted_config(training={"num_epochs": 2, "checkpoint_every_n": 4})
    whole, broken = make_store(tmp_path / "whole", config), make_store(tmp_path / "broken", config)
    train_here(config, whole)
    with monkeypatch.context() as patch, pytest.raises(TrainingCancelled, match="step 10;"):
        train_here(config, broken, stop=stop_after(10, patch))
    steps = sorted((tmp_path / "broken").rglob("step-*"))
    assert [int(path.name.removeprefix("step-")) for path in steps][-2:] == [8, 10]
    for path in steps[-1].glob("*.distcp"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    capfd.readouterr()
    train_here(config, broken)
    said = "".join(capfd.readouterr())
    assert f"{steps[-1].name} is damaged: " in said and "resumed from step 8 " in said
    assert_same_training(whole, broken, exact=True)
