"""Sensors: what happens when a run fails. Off until someone switches it on in the UI.

What belongs here: reactions to events of Dagster. What does not: runs at fixed times (`schedules.py`).
https://docs.dagster.io/guides/automate/sensors
"""

import json
import os
import urllib.request

import dagster as dg

WEBHOOK_ENV = "TWHIN_ALERT_WEBHOOK"


@dg.run_failure_sensor(
    name="alert",
    description=f"When a run fails: a JSON message to the URL in {WEBHOOK_ENV}, or a line in the sensor's log.",
)
def alert(context: dg.RunFailureSensorContext) -> None:
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
