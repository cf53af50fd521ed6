"""Two snapshots of generated data by the defaults: the second starts from the store's model of the first."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.evaluation import evaluate as evaluation
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, releases
from twhin_pipeline.training import train
from twhin_pipeline.training.reporting import SilentReporter
from twhin_pipeline.vectors.opening import load_model

FIRST, SECOND = "2025-01-01", "2025-01-02"
Edge = tuple[str, str, str]


def train_in_this_process(run: Run) -> None:
    train.run(run.config, run.store, run.snapshot)


def run_of(config_path: str, store: Store, snapshot: str, *overrides: str) -> Run:
    return Run(load_config(config_path, overrides), config_path, overrides, store, snapshot, train_in_this_process)


def edges_of(config: TwhinConfig, store: Store, asset: str, snapshot: str) -> set[Edge]:
    """Return a table's edges by their ids."""
    ids = {n: store.read(f"vocabulary/{n}", snapshot, ["id"])["id"].to_pylist() for n in config.model.table_names}
    table = store.read(asset, snapshot, ["rel", "lhs", "rhs"])
    relations = config.model.relations
    return {
        (ids[relations[rel].lhs][lhs], relations[rel].name, ids[relations[rel].rhs][rhs])
        for rel, lhs, rhs in zip(*(table[name].to_pylist() for name in ("rel", "lhs", "rhs")), strict=True)
    }


@dataclass(frozen=True)
class Made:
    """Two snapshots' tables; `asked` is what evaluation of the second asked for."""

    config: TwhinConfig
    config_path: str
    overrides: tuple[str, ...]
    store: Store
    asked: list[Any]


@pytest.fixture(scope="module")
def two_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Run both snapshots."""
    folder = tmp_path_factory.mktemp("two")
    config_path = generate(str(folder / "graph.parquet"), users=900, items=400, edges=5_000, communities=6)
    table = pq.read_table(folder / "graph.parquet")
    rng = np.random.default_rng(0)
    earlier = table.filter(pa.array(rng.random(len(table)) < 0.7))  # the second snapshot has more edges
    pq.write_table(earlier, folder / f"{FIRST}.parquet")
    pq.write_table(table, folder / f"{SECOND}.parquet")
    overrides = (
        f"source.path={folder}/{{snapshot}}.parquet", f"source.snapshots=[{FIRST}, {SECOND}]", "training.num_epochs=3",
        "launch.nproc_per_node=1", "launch.device=cpu", f"training.initial_checkpoint_dir={folder}/home",
    )  # fmt: skip
    store = Store(str(folder / "home"))
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setattr("twhin_pipeline.training.train.make_reporter", lambda rank: SilentReporter())
        original = evaluation.read_edges

        def read(con: Any, files: list[str], count: int) -> Any:
            edges = original(con, files, count)
            asked.append(edges)
            return edges

        for snapshot in (FIRST, SECOND):
            # The first one has no model to start from.
            run = run_of(config_path, store, snapshot, *overrides[: -1 if snapshot == FIRST else None])
            for stage in STAGES.values():
                if snapshot == SECOND and stage.name == "evaluate":
                    patch.setattr(evaluation, "read_edges", read)
                run_stage(run, stage, lambda line: None)
    return Made(run.config, config_path, overrides, store, asked)


def test_no_ranked_edge_was_a_training_edge_of_the_model_that_this_one_started_from(
    two_snapshots: Made,
) -> None:
    config, store, asked = two_snapshots.config, two_snapshots.store, two_snapshots.asked
    details = store.manifest("twhin_model", SECOND).details
    started_from = details["started_from"]
    assert [one["snapshot"] for one in started_from] == [FIRST]
    trained = edges_of(config, store, "training_set/positives", FIRST)
    test = edges_of(config, store, "held_out/test", SECOND)
    both = trained & test
    assert both, "by the defaults (keep_connected) some edges change from training to test"
    ids = {n: store.read(f"vocabulary/{n}", SECOND, ["id"])["id"].to_pylist() for n in config.model.table_names}
    ranked = {
        (ids[relation.lhs][lhs], relation.name, ids[relation.rhs][rhs])
        for relation, edges in zip(config.model.relations, asked[0], strict=True)
        for lhs, rhs in zip(edges["lhs"].tolist(), edges["rhs"].tolist(), strict=True)
    }
    assert ranked == test - both
    evaluated = store.manifest("evaluation", SECOND)
    assert evaluated.details["edges_left_out"] == len(both) and evaluated.details["edges"] == len(test) - len(both)
    names = {one["name"]: one["passed"] for one in store.verdict("evaluation", SECOND, evaluated.version).checks}
    assert names["ancestors_left_out"]
    assert store.manifest("twhin_model", SECOND).parents[f"twhin_model@{FIRST}"] == started_from[0]["version"]
    assert load_model(store.root).snapshot == SECOND


def test_probabilities_are_fitted_to_validation_edges_that_no_earlier_model_knows_and_serve_the_refitted_one(
    two_snapshots: Made,
) -> None:
    config, store = two_snapshots.config, two_snapshots.store
    trained = edges_of(config, store, "training_set/positives", FIRST)
    validation = edges_of(config, store, "held_out/validation", SECOND)
    assert trained & validation
    rows = store.read("calibration", SECOND).to_pylist()
    assert sum(row["edges"] for row in rows) == len(validation - trained)
    model = load_model(store.root)
    lhs, relation, rhs = min(validation)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0 < model.predict_relation(lhs, rhs, relation) < 1
    assert "calibration" in releases.current(store).tables


def test_a_first_snapshot_leaves_out_nothing(two_snapshots: Made) -> None:
    store = two_snapshots.store
    details = store.manifest("evaluation", FIRST).details
    assert details["edges"] == store.manifest("held_out/test", FIRST).rows and details["ancestors"] == 0


@pytest.mark.parametrize("tables", [["refit/*"], []], ids=["those of the refit", "all"])
def test_the_checks_of_the_refit_run_by_hand_too(
    two_snapshots: Made, tables: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word for one in two_snapshots.overrides for word in ("--set", one)]
    home = ["--home", two_snapshots.store.root, "--config", two_snapshots.config_path, "--snapshot", SECOND]
    assert run_arguments(["check", *tables, *home, *given, "--json"]) == 0
    found = {(one["table"], one["check"]): one["status"] for one in json.loads(capsys.readouterr().out)}
    assert found["refit/twhin_model", "loss_finite"] == "passed"
    assert found["refit/training_set/positives", "held_out_unseen"] == "passed"
    assert (("evaluation", "metrics_sound") in found) == (tables == [])


def test_a_table_without_checks_is_not_called_passed_over(two_snapshots: Made, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "home"))
    shutil.copytree(two_snapshots.store.root, store.root)
    said: list[str] = []
    run_stage(run_of(two_snapshots.config_path, store, SECOND, *two_snapshots.overrides), STAGES["ingest"], said.append)
    assert said and not [line for line in said if "passed over" in line]


def test_an_earlier_table_that_nobody_has_checked_is_not_passed_over_in_silence(
    two_snapshots: Made, tmp_path: Path
) -> None:
    store = Store(str(tmp_path / "home"))
    shutil.copytree(two_snapshots.store.root, store.root)
    version = store.manifest("vocabulary/user", FIRST).version
    os.remove(store.path("vocabulary/user", FIRST, version, "_verdict.json"))
    shutil.rmtree(store.path("vocabulary/user", SECOND))
    said: list[str] = []
    run = run_of(two_snapshots.config_path, store, SECOND, *two_snapshots.overrides)
    run_stage(run, STAGES["vocabulary"], said.append)
    (line,) = [line for line in said if "passed over" in line]
    assert f"vocabulary/user of snapshot {FIRST} is passed over" in line and "twhin check vocabulary/user" in line
    assert store.manifest("vocabulary/user", SECOND).details["earlier_snapshot"] is None
