"""Refit: the model that is published is trained once more, on all edges, after the evaluation.

What belongs here: the step in Dagster. What does not: why and how (`twhin_pipeline/stages/refit.py`).
"""

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.run import Run

from ..resources.configuration import ConfigurationResource
from ..resources.launcher import LauncherResource
from ..resources.store import StoreResource
from ..resources.tracking import TrackingResource
from . import provenance, twhin_model
from .stage import OWNERS, POOL, opened

TABLE = "refit/twhin_model"


def exists(config: TwhinConfig) -> bool:
    """Tell whether a configuration's chain has this stage."""
    return config.training.refit and bool(config.all_sources)


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage; nothing where the configuration has none."""
    if not exists(config):
        return []
    vocabularies = [f"vocabulary/{entity}" for entity in config.model.table_names]
    # The evaluation is above so that its gates hold back a second training.
    above = ["twhin_model", "evaluation", *vocabularies]

    @dg.asset(
        key=provenance.key(TABLE),
        deps=[provenance.key(name) for name in above],
        partitions_def=partitions,
        group_name="model",
        description="The model that is published: trained once more, on all edges, for the epochs that were chosen.",
        kinds={"torch", "torchrec", "mlflow"},
        owners=OWNERS,
        code_version=provenance.code("stages.refit"),
        retry_policy=dg.RetryPolicy(max_retries=2, delay=5),
        pool=POOL,
    )
    def refit(
        context: dg.AssetExecutionContext,
        configuration: ConfigurationResource,
        store: StoreResource,
        tracking: TrackingResource,
        launcher: LauncherResource,
    ) -> dg.MaterializeResult:
        from twhin_pipeline.checks import checks
        from twhin_pipeline.stages import refit as again

        with opened(context, configuration, store, above) as (loaded, tables, snapshot):
            reason = again.reason_against(loaded, tables, snapshot)
            if reason is not None:
                return dg.MaterializeResult(metadata={"left_out": reason})
            run = Run(loaded, configuration.file, configuration.overrides(), tables, snapshot)
            prepared, made = again.prepare(run)
            checks.run_blocking(prepared.config, prepared.store, snapshot, made)
            metadata = twhin_model.trained(context, prepared, tracking, launcher)
            checks.run_blocking(prepared.config, prepared.store, snapshot, ["twhin_model"])
            return dg.MaterializeResult(metadata=metadata)

    return [refit]
