"""Automation: when a stage runs because what it is made from was made anew, and how old what is published may be.

What belongs here: the condition that all assets share, its switch, and the freshness policy. What does not: runs of a
whole snapshot (`sensors.py`, `schedules.py`).
https://docs.dagster.io/guides/automate/declarative-automation
"""

import os
from datetime import timedelta

import dagster as dg

from twhin_pipeline.config.data import duration
from twhin_pipeline.errors import UserError
from twhin_pipeline.words import PUBLISHED

FOLLOWS = (
    dg.AutomationCondition.any_deps_updated().since_last_handled()
    & dg.AutomationCondition.all_deps_blocking_checks_passed()
    & ~dg.AutomationCondition.any_deps_missing()
    & ~dg.AutomationCondition.any_deps_in_progress()
    & ~dg.AutomationCondition.in_progress()
).with_label("follows_its_upstream")
"""A table is made anew after one that it is made from was. What reads the source has no such table: it never runs by
this, and a new snapshot starts nothing.
"""
FRESHNESS_ENV, FRESHNESS, OFF = "TWHIN_FRESHNESS", "36h", "off"


def sensor() -> dg.AutomationConditionSensorDefinition:
    """Return the switch of the condition, off until someone switches it on."""
    return dg.AutomationConditionSensorDefinition(
        "stages_follow",
        target=dg.AssetSelection.all(),
        description="When a table is made anew, the stages after it run too, for the same snapshot.",
        default_status=dg.DefaultSensorStatus.STOPPED,
    )


def freshness(table: str) -> dg.FreshnessPolicy | None:
    """Return how old a table may be; None for all but `published`, and where TWHIN_FRESHNESS is `off`.

    Raises:
        UserError: TWHIN_FRESHNESS is no length of time.
    """
    text = os.environ.get(FRESHNESS_ENV) or FRESHNESS
    if table != PUBLISHED or text == OFF:
        return None
    try:
        oldest: timedelta = duration(text)
    except ValueError as error:
        raise UserError(f"{FRESHNESS_ENV}={error}; or {OFF}, for none") from error
    return dg.FreshnessPolicy.time_window(fail_window=oldest, warn_window=oldest * 2 / 3)
