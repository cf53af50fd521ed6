"""Dagster's front door: the one place where assets, checks, resources and schedules are put together.

What belongs here: the assembly. What does not: anything else. This is the only module of `twhin_pipeline` that knows
Dagster; tests assemble with resources of their own.
https://docs.dagster.io/guides/build/projects-and-components
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from twhin_pipeline._dagster.assets import (
    automation,
    edges,
    embeddings,
    evaluation,
    execution,
    indexes,
    jobs,
    maps,
    models,
    partitions,
    promotion_jobs,
    published,
    releases,
    retention,
    schedules,
    sensors,
    training_set,
    vocabularies,
)
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.graph.source import find_snapshots
from twhin_pipeline.store import Store

STAGES = (
    edges.make,
    vocabularies.make,
    training_set.make,
    models.make,
    evaluation.make,
    embeddings.make,
    indexes.make,
    maps.make,
    releases.comparison,
    published.make,
    releases.decision,
)
"""What makes the chain's assets, stage by stage (`twhin_pipeline/stages/chain.py`)."""


def build_defs(
    *,
    config_path: str | None = None,
    resource_overrides: Mapping[str, Any] | None = None,
    executor: dg.ExecutorDefinition | None = None,
) -> dg.Definitions:
    """Assemble everything for one configuration.

    Args:
        config_path: A YAML file; left out, the one TWHIN_CONFIG names, else the bundled example's.
        resource_overrides: Resources by name, in place of the usual ones.
        executor: What runs the steps; left out, Dagster's default or that of the definitions these are merged with.

    Raises:
        UserError: The configuration is wrong; definitions cannot be made without its entity types.
    """
    configuration = ConfigurationResource(path=config_path or "")
    config = configuration.load()

    def find() -> list[str]:
        return find_snapshots(configuration.load())

    snapshots = partitions.Snapshots(find)
    resources = {
        "configuration": configuration,
        "store": StoreResource(),
        "tracking": TrackingResource(),
        "launcher": LauncherResource(),
        **(resource_overrides or {}),
    }
    store = resources["store"]

    def load() -> tuple[TwhinConfig, Store]:
        return configuration.load(), store.open()

    partitions.register_at_load(find)
    made = [definition for stage in STAGES for definition in stage(config, snapshots)]
    return dg.Definitions(
        assets=[one for one in made if not isinstance(one, dg.AssetChecksDefinition)],
        asset_checks=[one for one in made if isinstance(one, dg.AssetChecksDefinition)],
        resources=resources,
        executor=executor,
        jobs=[jobs.chain, jobs.tune(snapshots), promotion_jobs.promote, promotion_jobs.rollback, retention.job],
        schedules=[schedules.retraining(load, find), retention.schedule()],
        sensors=[
            sensors.register_snapshots(find),
            sensors.new_snapshots(load, find),
            automation.sensor(),
            sensors.alert,
            sensors.alert_held,
        ],
    )


defs = build_defs(executor=execution.executor)
