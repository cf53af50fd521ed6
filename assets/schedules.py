"""Schedules: the runs of the chain at fixed times. Off until someone switches it on in the UI.

What belongs here: when a job runs by itself. What does not: which snapshot runs (`nights.py`), what a run does
(`jobs.py`), or what happens as soon as a snapshot arrives or a run fails (`sensors.py`).
https://docs.dagster.io/guides/automate/schedules
"""

import os
from collections.abc import Callable
from zoneinfo import ZoneInfo

import dagster as dg

from twhin_pipeline.errors import UserError

from .jobs import chain
from .nights import Load, next_run

CRON_ENV, TIMEZONE_ENV = "TWHIN_SCHEDULE", "TWHIN_SCHEDULE_TIMEZONE"
CRON, TIMEZONE = "*/15 3-7 * * *", "UTC"


def retraining(load: Load, find: Callable[[], list[str]]) -> dg.ScheduleDefinition:
    """Return the schedule that runs every snapshot that has not run, the oldest first; a tick starts one at most.

    Args:
        load: Loads the configuration and the store.
        find: Lists the source's snapshots, oldest first.

    Raises:
        UserError: TWHIN_SCHEDULE is no cron expression, or TWHIN_SCHEDULE_TIMEZONE no time zone.
    """
    cron, timezone = os.environ.get(CRON_ENV) or CRON, os.environ.get(TIMEZONE_ENV) or TIMEZONE
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{TIMEZONE_ENV}={timezone!r} is no time zone; write one such as Europe/Berlin") from error

    def run_next(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return next_run(context.instance, load, find, context.log.info)

    try:
        return dg.schedule(
            name="retraining",
            job=chain,
            cron_schedule=cron,
            execution_timezone=timezone,
            description="For event logs: every snapshot that has not run, the oldest first, one after another. "
            f"{CRON_ENV} says when it looks, and each time it starts one at most.",
        )(run_next)
    except dg.DagsterInvalidDefinitionError as error:
        raise UserError(f"{CRON_ENV}={cron!r} is no cron expression; write one such as '{CRON}'") from error
