"""MLflow: runs are linked and resumed, and a registered model leads back to its store."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import SNAPSHOT, planted_config
from written_model import write_model

from twhin_pipeline import tracking
from twhin_pipeline.config import stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.tracking import runs

CONFIG = planted_config()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = Store(str(tmp_path_factory.mktemp("home")))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
            patch.delenv(name, raising=False)
        patch.setenv("TWHIN_HOME", store.root)
        yield store


def test_runs_are_in_the_store_unless_a_server_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.uri(store) == f"sqlite:///{store.root}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert tracking.uri(store) == "http://server:5000"


def test_a_run_has_every_field_as_a_parameter_and_its_metrics(store: Store) -> None:
    run = tracking.start_run(store, SNAPSHOT, CONFIG, {"note": "hello"})
    run.log_config(CONFIG)
    run.log_metrics({"train/loss": 2.0, "train/bad": float("nan"), "train/loss/likes": 1.5}, step=3)
    run.finish()
    found = run.client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["model.relations.likes.lhs"] == "user"
    assert found.data.params["training.num_epochs"] == "6"
    assert found.data.metrics == {"train/loss": 2.0, "train/loss/likes": 1.5}
    assert found.data.tags["note"] == "hello" and found.data.tags["twhin.snapshot"] == SNAPSHOT
    assert Path(store.root, "mlartifacts").exists()


def test_a_run_names_its_dataset_the_code_and_an_experiment_that_opens_under_model_training(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(str(tmp_path / "home"))
    with store.replace("training_set/positives", SNAPSHOT, config_hash="c") as draft:
        draft.write(pa.table({"lhs": pa.array([1, 2, 3]), "weight": pa.array([1.0] * 3, pa.float32())}))
        draft.details = {"edges_per_relation": {"likes": 3}}
    run = tracking.start_run(store, SNAPSHOT, CONFIG)
    run.log_dataset(store, SNAPSHOT, "training_set/positives", "training")
    found = run.client.get_run(run.run_id)
    (given,) = found.inputs.dataset_inputs
    assert given.dataset.digest == store.manifest("training_set/positives", SNAPSHOT).version
    assert json.loads(given.dataset.profile)["num_rows"] == 3 and given.tags[0].value == "training"
    assert json.loads(given.dataset.schema)["mlflow_colspec"][0] == {"name": "lhs", "type": "long"}
    commit = found.data.tags.get("mlflow.source.git.commit")
    assert found.data.tags["twhin.code_version"] and (commit is None or len(commit) == 40)
    experiment = run.client.get_experiment(tracking.experiment_id(store))
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


def test_an_experiment_of_an_earlier_version_gets_its_kind(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store(str(tmp_path / "home"))
    client = runs.connect(store)
    made = client.create_experiment(tracking.EXPERIMENT)
    assert tracking.experiment_id(store) == made
    assert client.get_experiment(made).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_resumed_training_goes_on_with_its_run(store: Store) -> None:
    first = tracking.open_run(store, SNAPSHOT, CONFIG)
    first.log_config(CONFIG)
    first.finish("KILLED")
    second = tracking.open_run(store, SNAPSHOT, CONFIG, first.run_id)
    second.log_config(CONFIG)
    assert second.run_id == first.run_id
    assert second.client.get_run(first.run_id).info.status == "RUNNING"


def test_a_run_that_was_given_is_written_to_and_not_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tracking.start_run(store, SNAPSHOT, CONFIG)
    monkeypatch.setenv("MLFLOW_RUN_ID", given.run_id)
    run = tracking.open_run(store, SNAPSHOT, CONFIG, "some other run")
    run.finish()
    assert run.run_id == given.run_id
    assert run.client.get_run(given.run_id).info.status == "RUNNING"


def test_a_run_id_that_nobody_knows_is_a_mistake(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(UserError, match="unset MLFLOW_RUN_ID"):
        tracking.start_run(store, SNAPSHOT, CONFIG)


def test_a_registered_model_has_its_metrics_and_leads_back_to_the_store(store: Store) -> None:
    run = tracking.start_run(store, SNAPSHOT, CONFIG)
    write_model(store)
    manifest = store.manifest("twhin_model", SNAPSHOT)
    with store.replace("twhin_model", SNAPSHOT, config_hash="test") as draft:
        for name in [file["path"] for file in manifest.files]:
            with draft.local_file(name) as path:
                store.fs.get_file(f"{store.root}/twhin_model/{SNAPSHOT}/{manifest.version}/{name}", path)
        draft.details = {**manifest.details, "mlflow_run_id": run.run_id, "steps": 12}
    found = tracking.register_model(store, SNAPSHOT, {"filtered_mrr": 0.25})
    assert found == "models:/twhin/1"
    assert tracking.register_model(store, SNAPSHOT) == "models:/twhin/2"
    for uri in (found, "models:/twhin@newest", f"models:/twhin@snapshot-{SNAPSHOT}", f"runs:/{run.run_id}/model"):
        there = tracking.pointer(uri)
        assert (there["store"], there["snapshot"]) == (store.root, SNAPSHOT)
    tracking.set_champion(store, found)
    assert str(run.client.get_model_version_by_alias("twhin", "champion").version) == "1"
    version = run.client.get_model_version("twhin", "1")
    assert version.tags["filtered_mrr"] == "0.25" and version.run_id == run.run_id
    assert run.client.get_run(run.run_id).data.metrics["filtered_mrr"] == 0.25


@pytest.mark.parametrize("uri", ["models:/twhin/99", "models:/nothing@newest", "runs:/123/model", "models:/twhin"])
def test_a_model_that_is_not_there_is_a_mistake(store: Store, uri: str) -> None:
    with pytest.raises(UserError, match="no such model"):
        tracking.pointer(uri)


def test_sections_become_paths_and_lists_go_by_name() -> None:
    nested = {"a": {"b": 1}, "items": [{"name": "x", "v": 2}, {"v": 3}], "plain": [1, 2]}
    assert stage_settings.flatten(nested) == {
        "a.b": 1,
        "items.x.name": "x",
        "items.x.v": 2,
        "items.1.v": 3,
        "plain": [1, 2],
    }


def test_artifacts_of_a_store_that_mlflow_cannot_write_to_are_kept_beside_its_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = Store("memory://tracked")
    assert tracking.artifact_root(store) == str(tmp_path / ".twhin" / "mlartifacts")
    run = tracking.open_run(store, SNAPSHOT, planted_config(), None)
    run.log_text("plan", "plan.txt")
    assert [path.read_text() for path in (tmp_path / ".twhin" / "mlartifacts").rglob("plan.txt")] == ["plan"]
    assert tracking.artifact_root(Store(str(tmp_path / "home"))) == str(tmp_path / "home" / "mlartifacts")


ODD = ["/a/b", "a/b", "a//b", "../a", "a/./b", "", ".", "it's", "a[1]=x", "ünï", "x" * 400, "a@3", "hits@10"]


def test_mlflow_takes_whatever_a_relation_is_called_and_keeps_them_apart(store: Store) -> None:
    """MLflow refuses a whole batch for one name with another sign, too long a name or one that is no plain path."""
    run = tracking.start_run(store, SNAPSHOT, CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.log_metrics({f"loss/{name}": float(i) for i, name in enumerate(ODD)}, step=1)
    found = run.client.get_run(run.run_id).data.metrics
    assert sorted(found.values()) == [float(i) for i in range(len(ODD))]
    assert found["loss/a/b"] == 1.0 and found["loss/hits_at_10"] == 12.0


def test_parameters_of_relations_of_any_name_are_logged(store: Store) -> None:
    named = [{"name": name, "lhs": "user", "rhs": "item"} for name in ODD if name]
    config = planted_config(model={"relations": named})
    run = tracking.start_run(store, SNAPSHOT, config)
    run.log_config(config)
    run.log_config(config)  # as a resumed run does
    found = run.client.get_run(run.run_id).data.params
    assert sum(key.endswith(".operator") or ".operator-" in key for key in found) >= len(named) - 1
    assert found["model.relations.a/b.lhs"] == "user" and found["training.num_epochs"] == "6"


def test_of_hundreds_of_relations_none_has_a_curve_or_parameters_of_its_own(store: Store) -> None:
    names = [f"r{i}" for i in range(237)]
    config = planted_config(model={"relations": [{"name": n, "lhs": "user", "rhs": "item"} for n in names]})
    run = tracking.start_run(store, SNAPSHOT, config)
    run.log_config(config)
    run.log_metrics({"train/loss": 1.0, **{f"loss/{name}": 1.0 for name in names}}, step=1)
    found = run.client.get_run(run.run_id).data
    assert found.metrics == {"train/loss": 1.0}
    assert len(found.params) < 250 and found.params["model.relations"] == "237 relations; see config.yaml"


def test_a_model_registered_in_a_store_that_was_moved_is_found_where_the_store_is(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    store = Store(str(tmp_path / "before"))
    run = tracking.start_run(store, SNAPSHOT, CONFIG)
    write_model(store, details={"mlflow_run_id": run.run_id})
    uri = tracking.register_model(store, SNAPSHOT)
    (tmp_path / "before").rename(tmp_path / "after")
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path / "after"))
    found = tracking.pointer(uri)
    assert found["store"] == str(tmp_path / "after") and found["snapshot"] == SNAPSHOT
    assert Store(found["store"]).versions_of("twhin_model", SNAPSHOT) == [found["version"]]


def test_where_a_model_was_removed_the_message_names_what_is_set_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match=r"no such model at .*it is looked for there by TWHIN_HOME; .*`twhin publish`"):
        tracking.pointer("models:/twhin@newest")
