"""Definitions load fast, quietly and anywhere, and say of every asset what a user looks for."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from datetime import timedelta
from pathlib import Path

import dagster as dg
import pytest
import yaml

from twhin_pipeline._dagster.assets import provenance
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.checks import checks
from twhin_pipeline.config import default_config_path, load_config
from twhin_pipeline.definitions import build_defs, defs
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Store
from twhin_pipeline.words import PROMOTION

CONCEPTS = (
    "automation", "checks", "execution", "jobs", "metadata", "partitions", "provenance", "schedules", "sensors",
    "steps",
)  # fmt: skip
ROOT = Path(default_config_path()).parent.parent
CONFIG = load_config(default_config_path())
LOAD = """
import sys
import twhin_pipeline.definitions as module
imported = len(sys.modules)
slow = [name for name in ("torch", "torchrec", "mlflow", "duckdb", "matplotlib") if name in sys.modules]
assert not slow, slow
assert any(key.to_user_string() == "twhin_model" for key in module.defs.resolve_all_asset_keys())
assert {one.name for one in module.defs.schedules} == {'retraining', 'retention'}
model = module.defs.resolve_asset_graph().get(module.dg.AssetKey("twhin_model"))
print(imported, model.partitions_def.find())
"""


def load(folder: Path, **env: str) -> str:
    """Import the definitions in a process that has no environment variables, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", LOAD]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_they_load_few_modules_and_no_slow_one_without_environment_or_warnings():
    """Loading takes two seconds on a quiet machine, nearly all for Dagster's own modules: these are counted."""
    dagster = [sys.executable, "-c", "import sys, dagster; print(len(sys.modules))"]
    alone = int(subprocess.run(dagster, capture_output=True, text=True, check=True).stdout)
    assert int(load(ROOT).split()[0]) < alone + 800


def test_snapshots_are_those_of_the_source_from_any_working_directory(tmp_path):
    found = "['2021-08-14', '2023-06-10', '2025-08-09']"
    assert found in load(ROOT) and found in load(tmp_path)


def test_another_configuration_comes_by_one_environment_variable(tmp_path):
    data = yaml.safe_load(Path(default_config_path()).read_text())
    data["source"]["snapshots"] = ["2020-02-02"]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    assert "['2020-02-02']" in load(tmp_path, TWHIN_CONFIG=str(tmp_path / "mine.yaml"))


def specs() -> list[dg.AssetSpec]:
    return [spec for one in defs.assets or [] if isinstance(one, dg.AssetsDefinition) for spec in one.specs]


def test_there_is_one_chain_with_one_asset_a_table():
    names = {spec.key.to_user_string() for spec in specs()}
    entities = CONFIG.model.table_names
    assert names == {
        "raw_edges", "raw_edges_rejected", "training_set/positives", "training_set/negatives", "held_out/validation",
        "held_out/validation_negatives", "held_out/test", "twhin_model", "evaluation", "calibration",
        "refit/twhin_model", "embeddings/relations", "drift", "published", "promotion",
        *(f"vocabulary/{entity}" for entity in entities), *(f"embeddings/{entity}" for entity in entities),
        *(f"index/{entity}" for entity in CONFIG.indexed_types),
    }  # fmt: skip
    graph = defs.resolve_asset_graph()
    assert graph.get(dg.AssetKey("raw_edges")).parent_keys == set()
    roots = [key for key in graph.get_all_asset_keys() if not graph.get(key).parent_keys]
    assert {key.to_user_string() for key in roots} == {"raw_edges", "raw_edges_rejected"}


@pytest.mark.parametrize("spec", specs(), ids=lambda spec: spec.key.to_user_string())
def test_every_asset_has_what_a_user_looks_for(spec):
    assert spec.group_name != "default"
    assert spec.description and len(spec.description) > 20
    assert spec.kinds and spec.owners and spec.code_version
    assert spec.partitions_def is not None


def test_every_check_of_the_registry_is_there_and_blocks_as_it_says():
    graph = defs.resolve_asset_graph()
    found = {(key.name, key.asset_key.to_user_string()): graph.get_check_spec(key) for key in graph.asset_check_keys}
    wanted = {(check.name, table) for check in checks.CHECKS.values() for table in check.tables_of(CONFIG)}
    assert set(found) == wanted
    for (name, _), spec in found.items():
        assert spec.blocking == checks.CHECKS[name].blocking and spec.description


def test_the_steps_are_the_stages_of_the_chain():
    made = [one for one in defs.assets or [] if isinstance(one, dg.AssetsDefinition)]
    assert {one.op.name for one in made} == {name for name, stage in STAGES.items() if stage.tables(CONFIG)}
    assert set(STAGES) - {one.op.name for one in made} == {"map"}, (
        "which makes none unless the configuration names types"
    )
    graph = defs.resolve_asset_graph()
    for one in made:
        stage = STAGES[one.op.name]
        assert {provenance.table(key) for key in one.keys} == set(stage.tables(CONFIG))
        before = {provenance.table(key) for spec in one.specs for key in graph.get(spec.key).parent_keys}
        assert before - set(stage.tables(CONFIG)) == set(stage.upstream(CONFIG))


def test_a_model_is_registered_after_the_checks_of_its_vectors():
    graph = defs.resolve_asset_graph()
    parents = {provenance.table(key) for key in graph.get(dg.AssetKey("published")).parent_keys}
    assert parents == {
        "evaluation",
        "calibration",
        "embeddings/relations",
        "drift",
        *(f"embeddings/{n}" for n in CONFIG.model.table_names),
        *(f"index/{n}" for n in CONFIG.indexed_types),
    }


def test_a_module_is_one_concept_of_dagster_and_says_what_belongs_there():
    for path in sorted((ROOT / "assets").glob("*.py")):
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert told, path.name
        if path.stem in CONCEPTS:
            assert "What belongs here" in told and "What does not" in told and "https://docs.dagster.io/" in told
    assert len((ROOT / "assets" / "__init__.py").read_text().splitlines()) == 1


def test_embeddings_wait_for_the_gates_of_the_evaluation():
    parents = defs.resolve_asset_graph().get(dg.AssetKey(["embeddings", "package"])).parent_keys
    assert dg.AssetKey("evaluation") in parents


def test_what_runs_by_itself_is_off_and_has_a_switch_each():
    status = {one.name: one.default_status.name for one in (*(defs.schedules or []), *(defs.sensors or []))}
    assert status.pop("register_snapshots") == "RUNNING", "it starts nothing"
    assert status == dict.fromkeys(
        ("retraining", "retention", "new_snapshots", "stages_follow", "alert", "alert_held"), "STOPPED"
    )
    # A condition without a sensor of its own would get one that Dagster makes.
    repository = defs.get_repository_def()
    assert {one.name for one in (*repository.sensor_defs, *repository.schedule_defs)} == {*status, "register_snapshots"}


def test_tests_put_their_own_resources_in_place():
    mine = ConfigurationResource(set=["training.num_epochs=7"])
    made = build_defs(resource_overrides={"configuration": mine})
    assert made.resources is not None and made.resources["configuration"] is mine


def test_workspace_yaml_and_pyproject_name_the_same_module():
    [workspace] = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    names = {project["dagster"]["module_name"], project["dg"]["project"]["code_location_target_module"]}
    assert names == {workspace["python_module"]["module_name"]}
    assert workspace["python_module"]["location_name"] == project["dagster"]["code_location_name"]


def test_the_instance_template_is_taken_and_sends_nothing_home(tmp_path):
    (tmp_path / "dagster.yaml").write_text((ROOT / "resources" / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.telemetry_enabled is False
        assert instance.run_monitoring_enabled


def test_a_field_set_in_the_launchpad_reaches_the_stages_and_a_wrong_one_says_so():
    assert ConfigurationResource(set=["training.num_epochs=7"]).load().training.num_epochs == 7
    with pytest.raises(Exception, match="num_epochs"):
        ConfigurationResource(set=["training.num_epoch=7"]).load()


def test_relations_that_are_found_later_need_no_source_to_load(tmp_path):
    data = yaml.safe_load(Path(default_config_path()).read_text())
    data["source"] |= {"path": str(tmp_path / "none.parquet"), "snapshots": ["2020-02-02"]}
    data["model"]["relations"].append({"name": "*", "lhs": "package", "rhs": "package"})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(data))
    made = build_defs(config_path=str(tmp_path / "mine.yaml"))
    description = made.resolve_asset_graph().get(dg.AssetKey("raw_edges")).description
    assert description is not None and description.endswith(", every other one of the source.")


@pytest.mark.parametrize("name", ["retraining", "new_snapshots"])
def test_the_schedule_and_the_sensor_ask_the_store_which_snapshots_have_run(tmp_path, name):
    store = Store(str(tmp_path / "store"))
    definitions = build_defs(resource_overrides={"store": StoreResource(root=store.root)})
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for expected in (["2021-08-14"], ["2023-06-10"], ["2025-08-09"], []):
            if name == "retraining":
                scheduled = definitions.resolve_schedule_def(name).evaluate_tick(dg.build_schedule_context(instance))
                requests = scheduled.run_requests
            else:
                requests = (
                    definitions.resolve_sensor_def(name).evaluate_tick(dg.build_sensor_context(instance)).run_requests
                )
            assert [one.tags["dagster/partition"] for one in requests or ()] == expected
            for snapshot in expected:
                with store.replace(PROMOTION, snapshot, config_hash="c") as draft:
                    draft.details = {"release": f"{snapshot}-1", "decision": "promoted", "reason": "better"}


def test_published_has_a_freshness_policy_that_the_environment_sets(monkeypatch):
    def policy() -> dg.FreshnessPolicy | None:
        return build_defs().resolve_asset_graph().get(dg.AssetKey("published")).freshness_policy

    monkeypatch.delenv("TWHIN_FRESHNESS", raising=False)
    assert policy() == dg.FreshnessPolicy.time_window(timedelta(hours=36), timedelta(hours=24))
    monkeypatch.setenv("TWHIN_FRESHNESS", "9d")
    assert policy() == dg.FreshnessPolicy.time_window(timedelta(days=9), timedelta(days=6))
    monkeypatch.setenv("TWHIN_FRESHNESS", "off")
    assert policy() is None
    monkeypatch.setenv("TWHIN_FRESHNESS", "soon")
    with pytest.raises(UserError, match=r"^TWHIN_FRESHNESS='soon' must be a number and h, d or w"):
        build_defs()
