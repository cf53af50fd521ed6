"""Multi-assets: a stage of the chain becomes one step of Dagster, and each of its tables an asset.

What belongs here: the factory of those steps, and how a step starts a run of its stage. What does not: what one stage's
assets are called and show (its own module), or what a stage does (`twhin_pipeline/stages/chain.py`).
https://docs.dagster.io/guides/build/assets/defining-assets#multi-asset
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig, configuration_file, relations
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.chain import Stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Manifest, Store

from ..resources.configuration import ConfigurationResource
from ..resources.launcher import LauncherResource
from ..resources.store import StoreResource
from ..resources.tracking import TrackingResource
from . import automation, checks, metadata, provenance
from .execution import POOL, mistakes

OWNERS = ["team:twhin"]


@dataclass(frozen=True)
class Step:
    """A step whose stage has run: what an asset's page is made from."""

    config: TwhinConfig
    store: Store
    snapshot: str
    tracking: TrackingResource


Page = Callable[[Step, Manifest], dict[str, Any]]
"""Returns what a table shows before what every table shows: the figures that matter most first."""


def spec(
    table: str,
    stage: Stage,
    config: TwhinConfig,
    *,
    group: str,
    description: str,
    code: str,
    kinds: Iterable[str] = ("parquet",),
    deps: Iterable[str] | None = None,
) -> dg.AssetSpec:
    """Return the spec of a table.

    Args:
        table: Its name in the store.
        stage: The stage that makes it.
        config: The configuration.
        group: Dagster's group.
        description: One sentence for a reader of the asset's page.
        code: The module of `twhin_pipeline` whose changes make the asset outdated.
        kinds: What it is made of or made by, as tags with Dagster's icons.
        deps: Tables that come before it; left out, all that the stage waits for.
    """
    return dg.AssetSpec(
        provenance.key(table),
        deps=[provenance.key(dep) for dep in (stage.upstream(config) if deps is None else deps)],
        group_name=group,
        description=description,
        kinds=set(kinds),
        owners=OWNERS,
        code_version=provenance.code(code, stage.name),
        automation_condition=automation.FOLLOWS,
        freshness_policy=automation.freshness(table),
    )


def make(
    stage: Stage,
    config: TwhinConfig,
    partitions: dg.PartitionsDefinition,
    *,
    specs: Sequence[dg.AssetSpec],
    page: Page,
    retry_policy: dg.RetryPolicy | None = None,
) -> list[dg.AssetsDefinition]:
    """Return a stage's step, and the step of its tables' checks where it has any."""

    @dg.multi_asset(name=stage.name, specs=specs, partitions_def=partitions, pool=POOL, retry_policy=retry_policy)
    def step(
        context: dg.AssetExecutionContext,
        configuration: ConfigurationResource,
        store: StoreResource,
        tracking: TrackingResource,
        launcher: LauncherResource,
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline import pipeline

        with mistakes():
            run = start(context, configuration, store, tracking, launcher)
            made = pipeline.make(run, stage, lambda line: context.log.info(line.strip()))
            config = run.config
            if run.store.exists("raw_edges", run.snapshot):
                config = relations.resolve(run.config, run.store, run.snapshot)
            done = Step(config, run.store, run.snapshot, tracking)
            for spec in specs:
                manifest = made.get(provenance.table(spec.key))
                if manifest is None:
                    shown: dict[str, Any] = {"left_out": chain.reason(run, stage) or "this configuration makes none"}
                else:
                    shown = page(done, manifest) | metadata.of_table(run.store, manifest)
                version = None if manifest is None else dg.DataVersion(manifest.version)
                yield dg.MaterializeResult(asset_key=spec.key, metadata=shown, data_version=version)
            configuration_file.remember(run.store, configuration.file)

    return [step, *checks.make(f"{stage.name}_checks", config, stage.tables(config))]


def start(
    context: dg.AssetExecutionContext,
    configuration: ConfigurationResource,
    store: StoreResource,
    tracking: TrackingResource,
    launcher: LauncherResource,
) -> Run:
    """Return the run of a step. It trains in processes that report to Dagster, in an MLflow run of their own."""

    def train(run: Run) -> None:
        with tracking.run(context, run.store, run.snapshot, run.config) as tracked:
            env = {"MLFLOW_TRACKING_URI": tracking.uri(run.store)}
            env |= {"MLFLOW_RUN_ID": tracked.run_id} if tracked.run_id else {}
            launcher.train(context, run.config_path, run.overrides, run.store, run.snapshot, env)

    config, tables, snapshot = configuration.load(), store.open(), context.partition_key
    context.log.info(f"snapshot {snapshot}, store {tables.root}, configuration {configuration.file} {config.hash()}")
    return Run(config, configuration.file, configuration.overrides(), tables, snapshot, train)
