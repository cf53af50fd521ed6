"""Jobs: `chain` makes every table of a snapshot; `tune` searches for better hyperparameters, started by hand.

What belongs here: jobs, their launchpads, and what the runs of `tune` show. What does not: when a job runs by itself
(`schedules.py`), what the chain's steps do (`steps.py`), or the search (`twhin_pipeline/operations/tune.py`).
https://docs.dagster.io/guides/build/jobs
"""

import dagster as dg
from pydantic import Field

from ..resources.configuration import ConfigurationResource
from ..resources.launcher import LauncherResource
from ..resources.store import StoreResource
from ..resources.tracking import TrackingResource
from .execution import POOL, mistakes
from .metadata import table

chain = dg.define_asset_job(
    "chain", selection=dg.AssetSelection.all(), description="Every table of one snapshot, from edges to embeddings."
)


class SearchConfig(dg.Config):
    """How long to search."""

    trials: int | None = Field(
        default=None, ge=1, description="Trials, those of earlier runs included. Empty: `tune.trials`."
    )
    timeout_s: float | None = Field(
        default=None, gt=0, description="Seconds after which no trial begins. Empty: `tune.timeout_s`."
    )


@dg.op(pool=POOL, description="Trials under torchrun, each a nested MLflow run; the same search goes on where it was.")
def search(
    context: dg.OpExecutionContext,
    config: SearchConfig,
    configuration: ConfigurationResource,
    store: StoreResource,
    tracking: TrackingResource,
    launcher: LauncherResource,
) -> None:
    """Search, and show the best values on the run's page."""
    from twhin_pipeline.config import as_override
    from twhin_pipeline.operations import tune
    from twhin_pipeline.stages.run import Run

    with mistakes():
        overrides = launcher.overrides(configuration.overrides())
        overrides += [as_override(f"launch.env.{name}", value) for name, value in launcher.env.items()]
        tables, loaded = store.open(), configuration.load()
        run = Run(loaded, configuration.file, overrides, tables, context.partition_key)
        best = tune.run(run, context.log.info, trials=config.trials, timeout_s=config.timeout_s)
    fields = {"field": list(best.fields), "value": [str(value) for value in best.fields.values()]}
    metadata = {
        "value": best.value, "metric": best.metric, "best": table(fields), "set": dg.MetadataValue.json(best.overrides),
        "trials": best.trials, "failed": best.failed, "pruned": best.pruned,
        "path": dg.MetadataValue.path(best.file),
    }  # fmt: skip
    if best.mlflow_run_id:
        metadata["mlflow_run"] = tracking.link(tables, best.mlflow_run_id)
    context.add_output_metadata(metadata)


def tune(partitions: dg.PartitionsDefinition) -> dg.JobDefinition:
    """Return the job `tune`."""

    @dg.job(
        name="tune",
        partitions_def=partitions,
        description="Search for better hyperparameters: fields and ranges are in the configuration's section `tune`.",
    )
    def job() -> None:
        search()

    return job
