"""Nights in Dagster: the run that a sensor or schedule starts next, as `twhin_pipeline/lifecycle/nights.py` decides."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.lifecycle import nights
from twhin_pipeline.lifecycle.nights import Attempt, Night, Outcome
from twhin_pipeline.store import Store
from twhin_pipeline.words import PROMOTION, PUBLISHED

from . import execution, partitions
from .jobs import chain

PARTITION, INPUTS, LOG = "dagster/partition", "twhin/inputs", "twhin/log"
"""Tags of runs: the snapshot, and what it is made of (`nights.inputs`, `nights.log_state`)."""
UNDER_WAY = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.MANAGED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
ENDED_EARLY = [dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
MOST_RUNS = 200
"""Runs that ended early that are looked at, the newest."""

Load = Callable[[], tuple[TwhinConfig, Store]]
"""Returns the configuration and the store as they are now."""


def next_run(
    instance: dg.DagsterInstance, load: Load, find: Callable[[], list[str]], say: Callable[[str], object]
) -> dg.RunRequest | dg.SkipReason:
    """Return the run of the oldest snapshot that has not run, or why there is none now.

    Args:
        instance: Dagster's.
        load: Loads configuration and store.
        find: Lists the source's snapshots, oldest first.
        say: Takes lines about what was found.
    """
    problems: list[str] = []
    found = partitions.listed(find, problems.append)
    if problems:
        return dg.SkipReason(problems[0])
    if not found:
        return dg.SkipReason("the source has no snapshot")
    partitions.register(instance, found)
    busy = next((run for run in instance.get_runs(dg.RunsFilter(statuses=UNDER_WAY)) if publishes(run)), None)
    if busy is not None:
        return dg.SkipReason(f"snapshot {busy.tags.get(PARTITION)} is under way (run {busy.run_id})")
    config, store = load()
    known = nights.look(config, store, found)
    if take_note(instance, config, store, known):
        known = nights.look(config, store, found)
    held = [f"{night.snapshot}: {night.reason}" for night in known if night.status == "held"]
    for line in held:
        say(f"held, {line}")
    night = nights.next_night(known)
    if night is None:
        last = f" ({known[-1].reason})" if known[-1].status == "published" and known[-1].reason else ""
        more = f"; held are {'; '.join(held)}" if held else ""
        return dg.SkipReason(f"every snapshot has run, the newest is {found[-1]}{last}{more}")
    if not night.is_due(datetime.now(UTC)):
        return dg.SkipReason(f"snapshot {night.snapshot} is tried again at {night.again}: {night.reason}")
    say(f"snapshot {night.snapshot} runs" + (f": {night.reason}" if night.reason else ""))
    made_of = {INPUTS: nights.inputs(config, night.snapshot), LOG: nights.log_state(config, night.snapshot)}
    return dg.RunRequest(tags={PARTITION: night.snapshot} | {name: text for name, text in made_of.items() if text})


def publishes(run: dg.DagsterRun) -> bool:
    """Tell whether a run is to publish its snapshot, or to decide about its release, whoever started it."""
    last = {dg.AssetKey(PUBLISHED), dg.AssetKey(PROMOTION)}
    return run.job_name == chain.name or not last.isdisjoint(run.asset_selection or ())


def take_note(instance: dg.DagsterInstance, config: TwhinConfig, store: Store, known: Sequence[Night]) -> bool:
    """Keep in the store how the last run of each unpublished snapshot ended, if it ended early; tell of any news."""
    kept, last = nights.read(store), dict[str, dg.RunRecord]()
    for one in instance.get_run_records(dg.RunsFilter(statuses=ENDED_EARLY), limit=MOST_RUNS):
        if publishes(one.dagster_run):
            last.setdefault(one.dagster_run.tags.get(PARTITION, ""), one)
    news = False
    for night in known:
        record = last.get(night.snapshot)
        if night.status == "published" or record is None:
            continue
        run = record.dagster_run
        if run.run_id in {attempt.run for attempt in kept.attempts.get(night.snapshot, [])}:
            continue
        ended = datetime.fromtimestamp(record.end_time or record.update_timestamp.timestamp(), UTC)
        inputs = run.tags.get(INPUTS) or nights.inputs(config, night.snapshot)
        outcome, reason = how_it_ended(instance, run)
        since = datetime.fromtimestamp(record.start_time or record.create_timestamp.timestamp(), UTC)
        # Of a run that someone started by hand, the log is taken for what it is now.
        began = run.tags.get(LOG) or nights.log_state(config, night.snapshot)
        log = nights.log_of(config, store, night.snapshot, since, began)
        attempt = Attempt(ended.isoformat(timespec="seconds"), outcome, reason, inputs, run.run_id, log)
        nights.note(store, night.snapshot, attempt)
        news = True
    return news


def how_it_ended(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[Outcome, str]:
    """Return `held` or `failed`, and why, of a run that ended early."""
    if run.status is dg.DagsterRunStatus.CANCELED:
        return "held", "someone cancelled its run"
    outcome: Outcome = "failed"
    reasons = []
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        event = entry.get_dagster_event()
        told, error = event.step_failure_data.user_failure_data, event.step_failure_data.error
        reasons.append(f"{event.step_key}: {execution.cause(event)}")
        # Private in Dagster, and its one name for "a blocking check failed".
        refused = error is not None and error.cls_name == "DagsterAssetCheckFailedError"
        if refused or (told is not None and execution.HELD in (told.metadata or {})):
            outcome = "held"
    return outcome, "; ".join(reasons) or "its run ended without a word, as a process that is killed does"
