"""The schedule looks at the times that the environment names; which snapshot runs is in `test_asset_nights.py`."""

from __future__ import annotations

from typing import Any

import pytest

from twhin_pipeline._dagster.assets import schedules
from twhin_pipeline.errors import UserError


def unused() -> Any:
    raise AssertionError("nothing is looked at when the code is loaded")


def test_the_schedules_time_is_the_environments(monkeypatch):
    monkeypatch.setenv("TWHIN_SCHEDULE", "30 5 * * 1")
    monkeypatch.setenv("TWHIN_SCHEDULE_TIMEZONE", "Europe/Berlin")
    schedule = schedules.retraining(unused, unused)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("30 5 * * 1", "Europe/Berlin")
    monkeypatch.delenv("TWHIN_SCHEDULE")
    monkeypatch.delenv("TWHIN_SCHEDULE_TIMEZONE")
    schedule = schedules.retraining(unused, unused)
    assert (schedule.cron_schedule, schedule.execution_timezone) == ("*/15 3-7 * * *", "UTC")


@pytest.mark.parametrize(
    ("name", "value"), [("TWHIN_SCHEDULE", "at dawn"), ("TWHIN_SCHEDULE_TIMEZONE", "Mars/Olympus")]
)
def test_a_time_that_is_none_is_a_mistake_that_names_the_variable(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"^{name}='{value}'"):
        schedules.retraining(unused, unused)
