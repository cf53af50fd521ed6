"""The whole chain without Dagster: every stage of `stages/chain.py`, and a search between two of them."""

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

    whole = Run(config, config_path, overrides, store, snapshot)
    if config.tune.minutes is not None:
        short_search.check(whole)
    for stage in STAGES.values():
        run_stage(whole, stage, say)
        if stage.name == "sample" and config.tune.minutes is not None:
            before, whole = whole, short_search.tuned(whole, say)
            if not _samples_alike(before, whole):
                run_stage(whole, stage, say)
    return whole


def _samples_alike(one: Run, other: Run) -> bool:
    """Tell whether the stage `sample` makes the same tables of two runs."""
    from twhin_pipeline.operations.trial import data_key

    return len({data_key(relations.resolve(run.config, run.store, run.snapshot)) for run in (one, other)}) == 1
