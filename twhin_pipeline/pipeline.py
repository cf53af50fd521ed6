"""The whole chain without Dagster: each stage, a search between two of them, the catalog, the registered model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.chain import STAGES, Stage
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Manifest, Store


def run_stage(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage as `chain.run_stage` does; before training, say which found values it does not use."""
    if stage.name == "train":
        from twhin_pipeline.operations import short_search

        for line in short_search.unused(replace(run, config=relations.resolve(run.config, run.store, run.snapshot))):
            say(line)
    return chain.run_stage(run, stage, say)


def run(config: TwhinConfig, config_path: str, overrides: Sequence[str], store: Store, snapshot: str, say: Say) -> Run:
    """Run the whole chain for a snapshot; return the run with the values that a search found (`tune.minutes`).

    Raises:
        UserError: A stage or a blocking check says what is wrong; tables of finished stages stay.
        twhin_pipeline.training.launch.TrainingFailed: Training ended with an error that is not the user's.
        twhin_pipeline.training.launch.TrainingCancelled: It was told to stop.
    """
    from twhin_pipeline.operations import short_search
    from twhin_pipeline.store import catalog

    whole = Run(config, config_path, overrides, store, snapshot)
    if config.tune.minutes is not None:
        short_search.check(whole)
    for stage in STAGES.values():
        run_stage(whole, stage, say)
        if stage.name == "sample" and config.tune.minutes is not None:
            before, whole = whole, short_search.tuned(whole, say)
            if not _samples_alike(before, whole):
                run_stage(whole, stage, say)
    catalog.refresh(store)
    register(whole, say)
    return whole


def _samples_alike(one: Run, other: Run) -> bool:
    """Tell whether the stage `sample` makes the same tables of two runs."""
    from twhin_pipeline.operations.trial import data_key

    return len({data_key(relations.resolve(run.config, run.store, run.snapshot)) for run in (one, other)}) == 1


def register(run: Run, say: Say) -> None:
    """Register the model in MLflow with what evaluation measured; where its run is not to be found, say so."""
    from twhin_pipeline import tracking
    from twhin_pipeline.stages import refit as again

    config = relations.resolve(run.config, run.store, run.snapshot)
    published = again.published(config, run.store, run.snapshot)
    run_id = published.manifest("twhin_model", run.snapshot).details.get("mlflow_run_id")
    if not run_id or not tracking.run_exists(run.store, run_id):
        say(f"  note: the model is not registered: no run of it at {tracking.uri(run.store)}")
        return
    measured = run.store.manifest("evaluation", run.snapshot).details["metrics"]
    metrics = {tracking.allowed_name(name): float(value) for name, value in measured.items() if value is not None}
    say(f"registered {tracking.register_model(published, run.snapshot, metrics)} at {tracking.uri(run.store)}")
