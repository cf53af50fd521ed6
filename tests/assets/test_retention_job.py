"""The job `retention` removes nothing by default; Dagster's runs go by age, but for the latest of what stays."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import days
import pytest
import yaml

from twhin_pipeline._dagster.assets import retention
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.store import Store, releases

DAYS = dg.StaticPartitionsDefinition(["d1", "d2"])


@dg.asset(partitions_def=DAYS)
def daily() -> None: ...


@dg.asset
def once() -> None: ...


@pytest.fixture
def instance(tmp_path: Path) -> Any:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as made:
        yield made


def materialize(instance: dg.DagsterInstance, asset: Any, key: str | None = None) -> str:
    return dg.materialize([asset], partition_key=key, instance=instance).run_id


def later() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=2)


def test_runs_that_hold_the_latest_of_what_stays_are_kept_and_the_others_go(instance: dg.DagsterInstance) -> None:
    first, second = materialize(instance, daily, "d1"), materialize(instance, daily, "d1")
    other, newest = materialize(instance, daily, "d2"), materialize(instance, daily, "d2")
    alone = materialize(instance, once)
    assert retention.outdated_runs(instance, datetime.now(UTC) - timedelta(days=1), set()) == []
    assert set(retention.outdated_runs(instance, later(), {"d1"})) == {first, other}
    # Of a partition that has gone from the store, nothing has to stay but the asset's very last.
    assert set(retention.outdated_runs(instance, later(), set())) == {first, second, other}
    for run_id in retention.outdated_runs(instance, later(), {"d1"}):
        retention.delete_run(instance, run_id)
    assert {run.run_id for run in instance.get_runs()} == {second, newest, alone}
    assert instance.get_materialized_partitions(daily.key) == {"d1", "d2"}
    assert instance.get_latest_materialization_event(once.key).run_id == alone  # type: ignore[union-attr]


def test_deleting_a_run_takes_its_materializations_and_its_files_with_it(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    first, second = materialize(instance, daily, "d1"), materialize(instance, daily, "d2")
    assert list(tmp_path.rglob(f"*{first}*"))
    retention.delete_run(instance, first)
    assert not list(tmp_path.rglob(f"*{first}*")) and list(tmp_path.rglob(f"*{second}*"))
    assert instance.get_materialized_partitions(daily.key) == {"d2"}


def test_runs_in_progress_are_never_deleted(instance: dg.DagsterInstance) -> None:
    run = instance.create_run_for_job(retention.job)
    instance.report_run_canceling(run)
    waiting = instance.create_run_for_job(retention.job)
    assert retention.outdated_runs(instance, later(), set()) == []
    assert waiting.run_id in {one.run_id for one in instance.get_runs()}


@pytest.mark.parametrize("dry", [None, True, False])
def test_the_job_shows_what_goes_and_removes_it_only_when_it_is_no_dry_run(
    instance: dg.DagsterInstance, tmp_path: Path, dry: bool | None
) -> None:
    store = Store(str(tmp_path / "home"))
    made = [days.make(store, day) for day in range(4)]
    data = days.CONFIG.model_dump(mode="json", exclude_none=True)
    data["retention"] = {"releases": 1, "snapshots": 1, "grace_hours": 0}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(data))
    result = retention.job.execute_in_process(
        instance=instance,
        resources={
            "configuration": ConfigurationResource(path=str(tmp_path / "c.yaml")),
            "store": StoreResource(root=store.root),
        },
        run_config={} if dry is None else {"ops": {"prune": {"config": {"dry_run": dry}}}},
    )
    [event] = [e for e in result.all_events if e.event_type == dg.DagsterEventType.STEP_OUTPUT]
    shown = event.step_output_data.metadata
    assert shown["dry_run"].value is (dry is not False) and shown["mib"].value > 0
    tables = {record.data["table"] for record in shown["goes"].records}
    assert {"releases", "twhin_model", "embeddings/user"} <= tables
    assert "the current release" in {record.data["what stays"] for record in shown["stays"].records}
    left = releases.names(store)
    assert left == [one.name for one in (made[2:] if dry is False else made)]
    if dry is False:
        record = json.loads(next(Path(store.root, "retention").glob("*.json")).read_text())
        assert result.run_id in record["by"]


def test_the_schedule_is_off_and_removes() -> None:
    schedule = retention.schedule()
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    with dg.DagsterInstance.ephemeral() as instance:
        [request] = schedule.evaluate_tick(dg.build_schedule_context(instance)).run_requests or ()
    assert request.run_config["ops"]["prune"]["config"]["dry_run"] is False
