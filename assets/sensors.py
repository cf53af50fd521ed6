"""Sensors: what happens when a snapshot arrives or a run fails. What starts or tells something is off until someone
switches it on in the UI; the one that registers snapshots is on, and starts nothing.

What belongs here: reactions to events. What does not: which snapshot runs (`nights.py`), runs at fixed times
(`schedules.py`), or stages that follow each other (`automation.py`).
https://docs.dagster.io/guides/automate/sensors
"""

import json
import os
import urllib.request
from collections.abc import Callable

import dagster as dg

from twhin_pipeline.words import PROMOTION

from . import execution, partitions
from .jobs import chain
from .nights import Load, next_run

LOOKS_S = 60
"""How often the sensors look for new snapshots, s."""
WEBHOOK_ENV = "TWHIN_ALERT_WEBHOOK"


def register_snapshots(find: Callable[[], list[str]]) -> dg.SensorDefinition:
    """Return the sensor that adds the source's new snapshots to the partitions; `find` lists them."""

    @dg.sensor(
        name="register_snapshots",
        description="Adds new snapshots of the source to the partitions. It starts nothing.",
        minimum_interval_seconds=LOOKS_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        target=chain,
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        problems: list[str] = []
        new = partitions.register(context.instance, partitions.listed(find, problems.append))
        for line in problems:
            context.log.warning(line)
        return dg.SkipReason("; ".join(problems) or f"new snapshots: {', '.join(new) or 'none'}")

    return sensor


def new_snapshots(load: Load, find: Callable[[], list[str]]) -> dg.SensorDefinition:
    """Return the sensor that runs every snapshot that has not run, the oldest first, as soon as the source has it.

    Args:
        load: Loads the configuration and the store.
        find: Lists the source's snapshots, oldest first.
    """

    @dg.sensor(
        name="new_snapshots",
        description="For dated files: runs every snapshot that has not run, the oldest first, one after another.",
        minimum_interval_seconds=LOOKS_S,
        job=chain,
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return next_run(context.instance, load, find, context.log.info)

    return sensor


@dg.run_failure_sensor(
    name="alert",
    description=f"When a run fails: a JSON message to the URL in {WEBHOOK_ENV}, or a line in the sensor's log.",
)
def alert(context: dg.RunFailureSensorContext) -> None:
    """Post what failed, and why, in the form that chat services take (`text`)."""
    run = context.dagster_run
    snapshot = run.tags.get("dagster/partition", "")
    causes = [f"{event.step_key}: {execution.cause(event)}" for event in context.get_step_failure_events()]
    text = f"{run.job_name} {snapshot} failed (run {run.run_id}): {'; '.join(causes) or context.failure_event.message}"
    _post(context, text)


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    name="alert_held",
    description=f"When a gate holds a release back: a JSON message as that of `alert`, to the URL in {WEBHOOK_ENV}.",
)
def alert_held(context: dg.RunStatusSensorContext) -> None:
    """Post which release a gate held back, and why: its run ends well, so that `alert` has nothing to tell."""
    run = context.dagster_run
    for entry in context.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        event = entry.get_dagster_event()
        if event.asset_key != dg.AssetKey(PROMOTION):
            continue
        shown = {name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()}
        if shown.get("held"):
            text = f"release {shown['release']} is held by a gate: {shown['reason']}; {shown['current_before']} stays "
            _post(context, f"{text}current (run {run.run_id})")


def _post(context: dg.RunStatusSensorContext, text: str) -> None:
    """Post a text about a run, or write it to the sensor's log."""
    run = context.dagster_run
    url = os.environ.get(WEBHOOK_ENV)
    if not url:
        context.log.warning(text)
        return
    snapshot = run.tags.get("dagster/partition", "")
    message = {"text": text, "run_id": run.run_id, "job": run.job_name, "snapshot": snapshot}
    request = urllib.request.Request(url, json.dumps(message).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        context.log.info(f"posted to {WEBHOOK_ENV}: {answer.status}")
