"""The search over hyperparameters: it finds what is better, records what fails, and leaves the store's model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import optuna
import pytest
import yaml

from twhin_pipeline import pipeline, tracking
from twhin_pipeline._dagster.assets import jobs
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import as_override, load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import generate, trial, tune
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch
from twhin_pipeline.training.reporting import ValidationRecord

SNAPSHOT = "2025-01-01"
LR = "model.embeddings.tables.user.optimizer.rowwise_adagrad.lr"
SPACE = {LR: {"choices": [1.0e-06, 0.1]}}


def write_config(folder: Path, search: dict[str, Any], **fields: Any) -> str:
    """Write a configuration of a small generated graph, and the graph."""
    edges = folder / "edges.parquet"
    if not edges.exists():
        generate.generate(str(edges), users=120, items=60, edges=2500, communities=4, within=0.95, seed=3)
    tables = [
        {"name": name, "embedding_dim": 8, "optimizer": {"rowwise_adagrad": {"lr": 0.1}}} for name in ("user", "item")
    ]
    generated = yaml.safe_load(edges.with_suffix(".yaml").read_text())
    data = {
        "source": {**generated["source"], "path": str(edges), "snapshots": [SNAPSHOT]},
        "model": {
            "embeddings": {"tables": tables},
            "relations": generated["model"]["relations"],
            "comparator": "cosine",
            "temperature": 0.1,
        },
        "training": {"num_epochs": 3, "num_eval_steps": -1, "selection_metric": "mrr"},
        "train_data": {"per_replica_batch_size": 512, "global_negatives": 32, "in_batch_negatives": 0},
        "validation_data": {"per_replica_batch_size": 512, "global_negatives": 32, "in_batch_negatives": 0},
        "negatives": {"chunk_size": 128},
        "launch": {"device": "cpu", "threads_per_process": 1, "data_threads": 1},
        "tune": {"search": search, "trials": 2, **fields},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "config.yaml")


def whole(folder: Path, path: str, *overrides: str) -> pipeline.Run:
    return pipeline.Run(load_config(path, overrides), path, list(overrides), Store(str(folder / "home")), SNAPSHOT)


def nested(run: pipeline.Run, best_or_parent: str) -> list[Any]:
    client = tracking.resume_run(run.store, best_or_parent, owned=False).client
    wanted = f"tags.`mlflow.parentRunId` = '{best_or_parent}'"
    found = client.search_runs([tracking.experiment_id(run.store)], wanted, order_by=["attributes.start_time ASC"])
    return list(found)


@pytest.fixture
def fake(monkeypatch):
    """Stand for training: the learning rate is the metric; above 1 the loss diverges."""
    seen: list[dict[str, Any]] = []

    def run(config, config_path, overrides, store, snapshot, *, log_dir, output, on_validation):
        assert load_config(config_path, overrides) == config
        lr = config.model.table("user").optimizer.rowwise_adagrad.lr
        positives = store.manifest("training_set/positives", snapshot).version
        negatives = store.manifest("training_set/negatives", snapshot).version
        seen.append({"lr": lr, "positives": positives, "negatives": negatives, "config": config, "root": store.root})
        if lr > 1:
            raise UserError("the loss is nan at step 3; lower the learning rates")
        if lr == 0.75:
            raise launch.TrainingCancelled("stopped at step 3")
        with store.replace("twhin_model", snapshot, config_hash=config.hash()) as draft:
            draft.details = {"best_validation": lr}

    monkeypatch.setattr(launch, "run", run)
    return seen


def test_the_better_of_two_learning_rates_is_found_and_the_stores_model_is_untouched(tmp_path):
    """End to end: trained trials, their nested runs, and what the search leaves behind."""
    run = whole(tmp_path, write_config(tmp_path, SPACE, trials=4))
    with run.store.replace("twhin_model", SNAPSHOT, config_hash="mine") as draft:
        draft.details = {"mine": True}
    before = run.store.manifest("twhin_model", SNAPSHOT)
    best = tune.run(run, lambda line: None)
    assert best.fields == {LR: 0.1} and best.overrides == [f"{LR}=0.1"]
    assert best.trials == 4 and best.failed == 0 and best.metric == "mrr"
    assert yaml.safe_load(Path(best.file).read_text()) == {LR: 0.1}
    assert run.store.manifest("twhin_model", SNAPSHOT) == before
    assert not list(Path(best.file).parent.glob("trial-*"))
    trials = nested(run, best.mlflow_run_id)
    # Each value once: what was trained already is not trained again.
    assert sorted(trial.data.params[LR] for trial in trials) == ["0.1", "1e-06"]
    assert all(trial.info.status == "FINISHED" and trial.data.metrics["objective"] > 0 for trial in trials)
    assert max(trial.data.metrics["objective"] for trial in trials) == pytest.approx(best.value)
    # Pruning goes by the evaluations that training reports; a search that does not get them would never prune.
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run.store.path('tune', 'optuna.db')}")
    reported = [trial for trial in study.trials if "mlflow_run_id" in trial.user_attrs]
    assert all(trial.value in trial.intermediate_values.values() for trial in reported)
    # What training itself logs is in the same run.
    assert all("validation/mrr" in trial.data.metrics for trial in trials)


def test_a_diverging_trial_is_recorded_as_failed_and_passed_over(tmp_path, fake):
    run = whole(tmp_path, write_config(tmp_path, {LR: {"choices": [0.1, 50.0]}}, trials=8))
    said: list[str] = []
    best = tune.run(run, said.append)
    assert best.fields == {LR: 0.1} and best.failed > 0 and best.trials == 8
    failed = [trial for trial in nested(run, best.mlflow_run_id) if trial.info.status == "FAILED"]
    assert len(failed) == best.failed and all(trial.data.params[LR] == "50.0" for trial in failed)
    assert any("lr=50.0: failed: the loss is nan" in line for line in said)


def test_a_search_of_failures_only_says_why(tmp_path, fake):
    run = whole(tmp_path, write_config(tmp_path, {LR: {"low": 20.0, "high": 50.0}}))
    with pytest.raises(UserError, match=r"none of 2 trial\(s\) came to its end; the last: the loss is nan"):
        tune.run(run, lambda line: None)


def test_a_search_goes_on_where_it_was_and_proposes_what_it_would_have(tmp_path, fake):
    path = write_config(tmp_path, {LR: {"low": 0.001, "high": 1.0, "log": True}})
    run = whole(tmp_path, path)
    tune.run(run, lambda line: None, trials=2)
    best = tune.run(run, lambda line: None, trials=5)
    assert best.trials == 5 and len(nested(run, best.mlflow_run_id)) == 5
    interrupted = [trial["lr"] for trial in fake]
    assert interrupted[0] == 0.1  # the configuration's own value comes first
    fake.clear()
    other = tmp_path / "other"
    other.mkdir()
    again = whole(other, path)
    tune.run(again, lambda line: None, trials=5)
    assert [trial["lr"] for trial in fake] == interrupted


def test_an_interrupted_trial_is_made_again(tmp_path, fake):
    run = whole(tmp_path, write_config(tmp_path, {LR: {"choices": [0.75]}}))
    with pytest.raises(launch.TrainingCancelled):
        tune.run(run, lambda line: None)
    with pytest.raises(launch.TrainingCancelled):
        tune.run(run, lambda line: None)
    assert [trial["lr"] for trial in fake] == [0.75, 0.75]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{run.store.path('tune', 'optuna.db')}")
    assert study.user_attrs["interrupted"] == [0]


def test_trials_share_the_training_set_unless_their_fields_change_it(tmp_path, fake):
    search = {LR: {"choices": [0.1, 0.2]}, "train_data.global_negatives": {"choices": [32, 16]}}
    run = whole(tmp_path, write_config(tmp_path, search, trials=6))
    tune.run(run, lambda line: None)
    own = run.store.manifest("training_set/negatives", SNAPSHOT)
    made = {(t["config"].train_data.global_negatives, t["negatives"]) for t in fake}
    assert len(made) == 2 and (32, own.version) in made  # as many as there are values, and one is the store's
    assert run.store.manifest("training_set/negatives", SNAPSHOT) == own
    assert {t["config"].training.save_dir for t in fake} == {None}
    assert all(t["root"].startswith(run.store.path("tune")) for t in fake)


def test_a_training_set_of_another_configuration_is_not_taken(tmp_path, fake):
    path = write_config(tmp_path, SPACE)
    other = whole(tmp_path, path, "negatives.degree_share=0")
    for name in ("ingest", "vocabulary", "sample"):
        pipeline.run_stage(other, pipeline.STAGES[name], lambda line: None)
    tune.run(whole(tmp_path, path), lambda line: None)
    own = other.store.manifest("training_set/negatives", SNAPSHOT).version
    assert len({t["negatives"] for t in fake} | {own}) == 2


def test_a_hopeless_trial_is_ended_early(tmp_path, monkeypatch):
    """Against the median of earlier trials, as Optuna's documentation has it; the signal goes to the launcher."""
    raised: list[int] = []
    monkeypatch.setattr(trial.signal, "raise_signal", raised.append)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(1, 2))
    for scale, ended in ((1.0, False), (0.5, True)):
        asked = study.ask()
        pruning = trial.Pruning(asked, "mrr")
        for step in range(1, 5):
            pruning.judge(ValidationRecord(step, {"loss": 9.0, "mrr": scale * step / 10}, complete=True))
        assert pruning.pruned == ended
        study.tell(asked, scale)
    assert len(raised) == 1


def test_an_evaluation_that_was_cut_short_or_is_no_number_judges_no_trial(monkeypatch):
    monkeypatch.setattr(trial.signal, "raise_signal", lambda number: pytest.fail("the trial was ended"))
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(0, 0))
    study.add_trial(optuna.trial.create_trial(value=1.0, intermediate_values={0: 1.0}))
    asked = study.ask()
    pruning = trial.Pruning(asked, "mrr")
    pruning.judge(ValidationRecord(1, {"mrr": 0.1}, complete=False))
    pruning.judge(ValidationRecord(2, {"mrr": float("nan")}, complete=True))
    assert not pruning.pruned and not study.trials[-1].intermediate_values


@pytest.mark.parametrize(
    ("search", "overrides", "told"),
    [
        ({}, ["recipe=none"], "tune.search: is empty"),
        ({"training.num_epoch": {"low": 1, "high": 2}}, [], "did you mean 'num_epochs'"),
        ({"model.embeddings.tables.usr.embedding_dim": {"choices": [8, 16]}}, [], "did you mean 'user'"),
        ({"split.seed": {"low": 1, "high": 2}}, [], "unknown section to search 'split'"),
        ({"training.eval_max_edges": {"low": 1, "high": 2}}, [], "must be the same for all trials"),
        pytest.param(
            {"training.early_stopping_metric": {"choices": ["loss", "auc"]}},
            [],
            "must be the same for all trials",
            marks=pytest.mark.filterwarnings("ignore:.*is now named"),
        ),
        ({"negatives.degree_share": {"low": 0.0, "high": 1.0}}, [], "selection_metric to filtered_mrr"),
        ({"model.temperature": {"low": 0.1, "high": 1.0}}, ["training.selection_metric=loss"], "the loss itself"),
        ({"model.embedding_dropout": {"low": 0.0, "high": 2.0}}, [], "less than 1"),
    ],
)
def test_what_cannot_be_searched_is_one_clear_error(tmp_path, search, overrides, told):
    run = whole(tmp_path, write_config(tmp_path, search), *overrides)
    with pytest.raises(UserError, match=r"tune\.search") as caught:
        tune.run(run, lambda line: None)
    assert told in str(caught.value) and str(caught.value).count("\n") == 0
    assert not run.store.assets()


def test_values_keep_their_types_as_overrides():
    for value in (1e-05, 0.1, 3, True, "dot", "1e5", None, [1, 2], {"sgd": {"lr": 1e-05}}):
        path, _, text = as_override("x", value).partition("=")
        assert path == "x" and yaml.safe_load(text) == value and "\n" not in text


def test_the_dagster_job_searches_and_shows_the_best(tmp_path, fake):
    path = write_config(tmp_path, SPACE, trials=9)
    snapshots = dg.StaticPartitionsDefinition([SNAPSHOT])
    resources = {
        "configuration": ConfigurationResource(path=path),
        "store": StoreResource(root=str(tmp_path / "home")),
        "tracking": TrackingResource(),
        "launcher": LauncherResource(nproc_per_node=3),
    }
    job = dg.Definitions(jobs=[jobs.tune(snapshots)], resources=resources).resolve_job_def("tune")
    done = job.execute_in_process(partition_key=SNAPSHOT, run_config={"ops": {"search": {"config": {"trials": 2}}}})
    assert done.success and 1 <= len(fake) <= 2
    assert all(trial["config"].launch.nproc_per_node == 3 for trial in fake)
    [shown] = [event.step_output_data for event in done.all_events if event.is_successful_output]
    assert shown.metadata["value"].value == 0.1 and shown.metadata["trials"].value == 2


def test_the_command_prints_the_best_as_overrides(tmp_path, fake, capsys):
    path = write_config(tmp_path, SPACE)
    arguments = ["tune", "-c", path, "--home", str(tmp_path / "home"), "-s", SNAPSHOT, "--trials", "1"]
    assert run_arguments(arguments) == 0
    assert f"  --set {LR}=0.1\n" in capsys.readouterr().out
