"""The schedule takes the newest snapshot until it is published, at the time that the environment names."""

from __future__ import annotations

import dagster as dg
import pytest

from twhin_pipeline._dagster.assets import jobs, schedules
from twhin_pipeline.errors import UserError


def chain_of(*snapshots: str, published: str | None = None) -> dg.Definitions:
    @dg.asset(partitions_def=dg.StaticPartitionsDefinition(list(snapshots)))
    def one() -> None: ...

    return dg.Definitions(
        [one],
        jobs=[jobs.chain],
        schedules=[schedules.retraining(lambda: list(snapshots), lambda one: one == published)],
    )


@pytest.mark.parametrize("published", [None, "2024-01-01"])
def test_the_schedule_takes_the_newest_snapshot(published):
    schedule = chain_of("2024-01-01", "2025-01-01", published=published).resolve_schedule_def("retraining")
    with dg.DagsterInstance.ephemeral() as instance:
        ticked = schedule.evaluate_tick(dg.build_schedule_context(instance))
    assert ticked.run_requests is not None
    [request] = ticked.run_requests
    assert request.tags["dagster/partition"] == "2025-01-01" and request.run_key == "2025-01-01"


def test_the_schedule_rests_once_the_newest_snapshot_is_published():
    schedule = chain_of("2024-01-01", "2025-01-01", published="2025-01-01").resolve_schedule_def("retraining")
    with dg.DagsterInstance.ephemeral() as instance:
        ticked = schedule.evaluate_tick(dg.build_schedule_context(instance))
    assert not ticked.run_requests and "2025-01-01, has been published" in str(ticked.skip_message)


def test_the_schedule_says_so_where_there_is_nothing():
    schedule = chain_of().resolve_schedule_def("retraining")
    with dg.DagsterInstance.ephemeral() as instance:
        ticked = schedule.evaluate_tick(dg.build_schedule_context(instance))
    assert not ticked.run_requests and "no snapshot" in str(ticked.skip_message)


def test_the_schedules_time_is_the_environments(monkeypatch):
    monkeypatch.setenv("TWHIN_SCHEDULE", "30 5 * * 1")
    monkeypatch.setenv("TWHIN_SCHEDULE_TIMEZONE", "Europe/Berlin")
    schedule = schedules.retraining(list, bool)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 5 * * 1", "Europe/Berlin")
    monkeypatch.delenv("TWHIN_SCHEDULE")
    monkeypatch.delenv("TWHIN_SCHEDULE_TIMEZONE")
    schedule = schedules.retraining(list, bool)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("0 3 * * *", "UTC")


@pytest.mark.parametrize(
    ("name", "value"), [("TWHIN_SCHEDULE", "at dawn"), ("TWHIN_SCHEDULE_TIMEZONE", "Mars/Olympus")]
)
def test_a_time_that_is_none_is_a_mistake_that_names_the_variable(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{name}='{value}'"):
        schedules.retraining(list, bool)
