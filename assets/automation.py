"""When things run by themselves: the job of the whole chain, its schedule, and what happens when a run fails.

What belongs here: jobs, schedules and sensors; all are off until someone switches them on in the UI. What does not:
what a run does (the stages beside this module).
https://docs.dagster.io/guides/automate
"""

import json
import os
import urllib.request
from collections.abc import Callable

import dagster as dg

WEBHOOK_ENV = "TWHIN_ALERT_WEBHOOK"

chain = dg.define_asset_job(
    "chain", selection=dg.AssetSelection.all(), description="Every table of one snapshot, from edges to embeddings."
)


def retraining(find_snapshots: Callable[[], list[str]]) -> dg.ScheduleDefinition:
    """Return the schedule that runs the chain for the newest snapshot, once each."""

    @dg.schedule(
        name="retraining",
        job=chain,
        cron_schedule="0 3 * * *",
        description="Each night, the newest snapshot's chain, where it has not run yet.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        found = find_snapshots()
        if not found:
            return dg.SkipReason("the source has no snapshot")
        # A tag and no partition_key: the key may be newer than this process's list; the run's own process lists anew.
        newest = found[-1]
        context.log.info(f"newest snapshot: {newest}")
        return dg.RunRequest(run_key=newest, tags={"dagster/partition": newest})

    return schedule


@dg.run_failure_sensor(
    name="tell_failure",
    description=f"When a run fails: a JSON message to the URL in {WEBHOOK_ENV}, or a line in the sensor's log.",
)
def tell_failure(context: dg.RunFailureSensorContext) -> None:
    """Post what failed, and why, in the form that chat services take (`text`)."""
    run = context.dagster_run
    snapshot = run.tags.get("dagster/partition", "")
    causes = [
        f"{event.step_key}: {failure.error.message.strip() if (failure := event.step_failure_data).error else 'failed'}"
        for event in context.get_step_failure_events()
    ]
    text = f"{run.job_name} {snapshot} failed (run {run.run_id}): {'; '.join(causes) or context.failure_event.message}"
    url = os.environ.get(WEBHOOK_ENV)
    if not url:
        context.log.warning(text)
        return
    message = {"text": text, "run_id": run.run_id, "job": run.job_name, "snapshot": snapshot}
    request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        context.log.info(f"posted to {WEBHOOK_ENV}: {answer.status}")
