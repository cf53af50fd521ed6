"""Schedules: the nightly run of the chain. It is off until someone switches it on in the UI.

What belongs here: when a job runs by itself. What does not: what it runs (`jobs.py`), or what happens when a run fails
(`sensors.py`).
https://docs.dagster.io/guides/automate/schedules
"""

import os
from collections.abc import Callable
from zoneinfo import ZoneInfo

import dagster as dg

from twhin_pipeline.errors import UserError

from .jobs import chain

CRON_ENV, TIMEZONE_ENV = "TWHIN_SCHEDULE", "TWHIN_SCHEDULE_TIMEZONE"
CRON, TIMEZONE = "0 3 * * *", "UTC"


def retraining(find_snapshots: Callable[[], list[str]], is_published: Callable[[str], bool]) -> dg.ScheduleDefinition:
    """Return the schedule that runs the chain for the newest snapshot, until it has been published.

    Args:
        find_snapshots: Lists the source's snapshots, oldest first.
        is_published: Tells whether the chain has come to its end for a snapshot.

    Raises:
        UserError: TWHIN_SCHEDULE is no cron expression, or TWHIN_SCHEDULE_TIMEZONE no time zone.
    """
    cron, timezone = os.environ.get(CRON_ENV) or CRON, os.environ.get(TIMEZONE_ENV) or TIMEZONE
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError) as error:
        raise UserError(f"{TIMEZONE_ENV}={timezone!r} is no time zone; write one such as Europe/Berlin") from error

    def run_newest(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        found = find_snapshots()
        if not found:
            return dg.SkipReason("the source has no snapshot")
        # A tag and no partition_key: the key may be newer than this process's list; the run's own process lists anew.
        newest = found[-1]
        if is_published(newest):
            return dg.SkipReason(f"the newest snapshot, {newest}, has been published")
        context.log.info(f"newest snapshot: {newest}")
        # Of a schedule, a run key makes one run a tick: a night that failed is tried again the next.
        return dg.RunRequest(run_key=newest, tags={"dagster/partition": newest})

    try:
        return dg.schedule(
            name="retraining",
            job=chain,
            cron_schedule=cron,
            execution_timezone=timezone,
            description=f"The newest snapshot's chain, until it is published. {CRON_ENV} sets the time.",
        )(run_newest)
    except dg.DagsterInvalidDefinitionError as error:
        raise UserError(f"{CRON_ENV}={cron!r} is no cron expression; write one such as '{CRON}'") from error
