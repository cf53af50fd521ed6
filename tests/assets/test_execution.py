"""Steps run in forks of a process that has loaded the code, unless a run says otherwise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from twhin_pipeline._dagster.assets import execution
from twhin_pipeline.definitions import build_defs, defs

ROOT = Path(__file__).resolve().parents[2]
SPAWN = {"multiprocess": {"start_method": {"spawn": {}}}}
MODULE = """
import json, os, sys
was_there = "twhin_pipeline.definitions" in sys.modules
import twhin_pipeline.definitions
import dagster as dg
from twhin_pipeline._dagster.assets.execution import executor

@dg.asset
def process():
    parent = open(f"/proc/{os.getppid()}/cmdline").read()
    with open("found.json", "w") as file:
        json.dump({"parent": parent, "was_there": was_there}, file)

defs = dg.Definitions(assets=[process], executor=executor)
"""


def chosen(config: dict) -> dict:
    """Return what the chain's executor gets of a run's settings."""
    job = defs.resolve_job_def("chain")
    return dg.validate_run_config(job, {"execution": {"config": config}})["execution"][job.executor_def.name]


@pytest.mark.parametrize("config", [SPAWN, {"in_process": {}}], ids=str)
def test_a_run_may_choose_how_its_steps_start(config):
    [(kind, fields)] = chosen(config).items()
    assert kind in config and fields.get("start_method") == config[kind].get("start_method")


def test_definitions_that_are_merged_with_ones_own_leave_the_executor_to_these():
    mine = dg.Definitions(executor=dg.in_process_executor)
    merged = dg.Definitions.merge(build_defs(), mine)
    assert merged.resolve_job_def("chain").executor_def is dg.in_process_executor


def test_other_settings_of_a_run_stay(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    found = chosen({"multiprocess": {"max_concurrent": 3, "retries": {"disabled": {}}}})["multiprocess"]
    assert (found["max_concurrent"], found["retries"]) == (3, {"disabled": {}})
    assert found["start_method"] == {"forkserver": {"preload_modules": [execution.DEFINITIONS]}}


def test_steps_start_as_dagster_starts_them_where_a_fork_is_not_safe(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "start_method" not in chosen({"multiprocess": {}})["multiprocess"]


def test_where_another_module_assembled_the_definitions_ours_are_not_loaded(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, execution.DEFINITIONS)
    found = execution.forked({"multiprocess": {}})["multiprocess"]["start_method"]
    assert found == {"forkserver": {"preload_modules": ["dagster"]}}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="steps are forks on Linux alone")
@pytest.mark.parametrize("forks", [True, False], ids=["by default", "spawned"])
def test_a_step_is_a_fork_of_a_process_that_has_loaded_the_definitions(tmp_path, forks):
    (tmp_path / "one_step.py").write_text(MODULE)
    (tmp_path / "dagster").mkdir()
    shutil.copy(ROOT / "resources" / "dagster.yaml", tmp_path / "dagster")
    command = [str(Path(sys.executable).parent / "dagster"), "asset", "materialize", "-m", "one_step", "--select", "*"]
    if not forks:
        command += ["--config-json", json.dumps({"execution": {"config": SPAWN}})]
    env = {**os.environ, "DAGSTER_HOME": str(tmp_path / "dagster")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4_000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["was_there"] is forks
    assert ("multiprocessing.forkserver" in found["parent"]) is forks
