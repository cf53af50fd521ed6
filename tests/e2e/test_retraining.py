"""Day after day in Dagster: its daemon backfills snapshots in the order of their dates."""

from __future__ import annotations

import subprocess

import dagster as dg
import pytest
from dagster_home import BIN, ROOT, Home, end, graph
from patience import wait_for

from twhin_pipeline._dagster.assets import partitions

FIRST, SECOND, THIRD = "2025-01-01", "2025-01-02", "2025-01-03"
SMALL_LOCATION = """
import dagster as dg
from twhin_pipeline.definitions import build_defs
edges = dg.define_asset_job("edges", selection=["raw_edges", "raw_edges_rejected"])
defs = dg.Definitions.merge(build_defs(), dg.Definitions(executor=dg.in_process_executor, jobs=[edges]))
"""


@pytest.fixture
def home(tmp_path) -> Home:
    made = Home(tmp_path)
    for snapshot in (SECOND, THIRD):
        graph(tmp_path / f"edges-{snapshot}.parquet", users=60, items=40)
    (tmp_path / "small_location.py").write_text(SMALL_LOCATION)
    made.env["PYTHONPATH"] = f"{ROOT}:{tmp_path}"
    return made


def test_dagsters_daemon_backfills_the_oldest_first_and_one_after_another(home):
    """In whatever order they are asked for, and where a snapshot was registered after later ones."""
    with dg.DagsterInstance.from_config(home.env["DAGSTER_HOME"]) as instance:
        partitions.register(instance, [THIRD, FIRST])
        partitions.register(instance, [SECOND])
        command = [str(BIN / "dagster"), "job", "backfill", "-m", "small_location", "-j", "edges", "--noprompt"]
        asked = subprocess.run([*command, "--partitions", f"{THIRD},{SECOND}"], cwd=home.folder, env=home.env,
                               capture_output=True, text=True)  # fmt: skip
        assert asked.returncode == 0, asked.stderr[-3_000:]
        daemon = [str(BIN / "dagster-daemon"), "run", "-m", "small_location"]
        log = home.folder / "daemon.log"
        with log.open("wb") as output:
            process = subprocess.Popen(daemon, cwd=home.folder, env=home.env, stdout=output, stderr=output)
        try:
            ended = dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE])
            wait_for(lambda: len(instance.get_runs(ended)) == 2, 120, "both runs ended")
        finally:
            end(process)
        records = sorted(instance.get_run_records(), key=lambda record: record.start_time or 0)
        assert [one.dagster_run.tags["dagster/partition"] for one in records] == [SECOND, THIRD]
        assert {one.dagster_run.status for one in records} == {dg.DagsterRunStatus.SUCCESS}, log.read_text()[-4_000:]
        assert records[0].end_time <= records[1].start_time
