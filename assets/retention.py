"""The job `retention`: removes tables by policy, and Dagster's own runs. Its schedule is off until it is switched on.

What belongs here: the job, its launchpad and page, its schedule, and which of Dagster's runs go. What does not: which
tables go (`twhin_pipeline/lifecycle/retention.py`).

Deleting a run deletes its events: an asset's page then lacks what that run materialized. So a run stays as long as it
was the last to materialize a partition of an asset whose tables are in the store, or the last to materialize an asset
at all. A partition whose run was deleted counts as not materialized, as its tables have gone too.
https://docs.dagster.io/guides/build/jobs
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from .execution import POOL, mistakes
from .metadata import rounded, table

CRON, TIMEZONE_ENV = "30 6 * * *", "TWHIN_SCHEDULE_TIMEZONE"
ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
AT_ONCE = 1_000


class PruneConfig(dg.Config):
    """Whether anything is removed."""

    dry_run: bool = Field(default=True, description="Only show what would go.")
    without_registry: bool = Field(
        default=False, description="Do not ask MLflow which models must stay; it is put on the record."
    )


@dg.op(pool=POOL, description="Removes tables, releases, checkpoints and Dagster's runs that no rule keeps.")
def prune(
    context: dg.OpExecutionContext, config: PruneConfig, configuration: ConfigurationResource, store: StoreResource
) -> None:
    """Plan, remove unless it is a dry run, and show both on the run's page."""
    from twhin_pipeline.lifecycle import removal, retention
    from twhin_pipeline.store import releases
    from twhin_pipeline.views import retention_tables

    with mistakes():
        tables, loaded = store.open(), configuration.load()
        plan = retention.plan(
            tables, loaded.retention, save_dir=loaded.training.save_dir, registry=not config.without_registry
        )
        by = f"{releases.user()}, Dagster run {context.run.run_id}"
        done = None if config.dry_run else removal.carry_out(tables, plan, by)
    kept = {one.snapshot for one in plan.stays if one.kind == "version"}
    runs = outdated_runs(context.instance, datetime.now(UTC) - timedelta(days=loaded.retention.dagster_days), kept)
    if done is not None:
        for run_id in runs:
            delete_run(context.instance, run_id)
    gone = plan.goes if done is None else done.removed
    notes = plan.notes if done is None else done.notes
    context.add_output_metadata(
        {
            "dry_run": config.dry_run,
            "mib": rounded(sum(one.bytes for one in gone) / 2**20),
            "goes": _columns(retention_tables.GOES, retention_tables.gone(gone)),
            "stays": _columns(retention_tables.STAYS, plan.reasons()),
            "dagster_runs": len(runs),
            "notes": dg.MetadataValue.md("\n".join(f"- {line}" for line in notes) or "none"),
            "path": dg.MetadataValue.path(tables.path("retention")),
        }
    )
    verb = "would go" if done is None else "removed"
    context.log.info(f"{len(gone)} of the store and {len(runs)} of Dagster's runs {verb}")


def _columns(names: Iterable[str], rows: Iterable[Iterable[Any]]) -> dg.MetadataValue:
    columns = list(zip(*rows, strict=True))
    return table({name: list(columns[i]) if columns else [] for i, name in enumerate(names)})


@dg.job(name="retention", description="Remove what the section `retention` does not keep; a dry run by default.")
def job() -> None:
    """Remove by policy."""
    prune()


def schedule() -> dg.ScheduleDefinition:
    """Return the schedule of the job, which removes what goes."""
    return dg.ScheduleDefinition(
        name="retention",
        job=job,
        cron_schedule=CRON,
        execution_timezone=os.environ.get(TIMEZONE_ENV) or "UTC",
        run_config={"ops": {"prune": {"config": {"dry_run": False}}}},
        description="Each day: remove what the section `retention` does not keep.",
    )


def outdated_runs(instance: dg.DagsterInstance, before: datetime, kept: set[str]) -> list[str]:
    """Return the runs that ended, were made before a time, and hold no latest materialization that is to stay.

    Args:
        instance: Dagster's.
        before: The time.
        kept: Partitions whose tables are in the store.
    """
    old, cursor = [], None
    filters = dg.RunsFilter(statuses=list(ENDED), created_before=before)
    while found := instance.get_run_records(filters, limit=AT_ONCE, cursor=cursor):
        old += [one.dagster_run.run_id for one in found]
        cursor = old[-1]
    if not old:
        return []
    needed: set[str] = set()
    for key in instance.all_asset_keys():
        last = instance.get_latest_materialization_event(key)
        needed |= {last.run_id} if last is not None else set()
        latest = instance.get_latest_storage_id_by_partition(key, dg.DagsterEventType.ASSET_MATERIALIZATION)
        wanted = [number for partition, number in latest.items() if partition in kept]
        for start in range(0, len(wanted), AT_ONCE):
            some = dg.AssetRecordsFilter(asset_key=key, storage_ids=wanted[start : start + AT_ONCE])
            needed |= {record.run_id for record in instance.fetch_materializations(some, limit=AT_ONCE).records}
    return [run_id for run_id in old if run_id not in needed]


def delete_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Delete a run, its events and what its steps printed."""
    instance.delete_run(run_id)
    with suppress(Exception):  # of managers that keep the output elsewhere
        instance.compute_log_manager.delete_logs(prefix=[run_id])
    # SQLite keeps the events of each run in a file of its own, and does not give its pages back.
    if (place := getattr(instance.event_log_storage, "path_for_shard", None)) is not None:
        for ending in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{place(run_id)}{ending}")
