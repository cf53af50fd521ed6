"""The ways in to the chain: the whole of it, as `twhin run`, and one stage, as its command or its Dagster step.

The stages are in `stages/chain.py`. Here is what the whole chain has besides: a search between two stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.chain import STAGES, Stage
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Manifest, Store


def make(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage without its tables' checks, as `chain.make` does; before training, say what it leaves unused."""
    _say_unused(run, stage, say)
    return chain.make(run, stage, say)


def run_stage(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage and its tables' checks, as `chain.run_stage` does; before training, say what it leaves unused."""
    _say_unused(run, stage, say)
    return chain.run_stage(run, stage, say)


def _say_unused(run: Run, stage: Stage, say: Say) -> None:
    """Say which values a search has found for this training that it does not use."""
    if stage.name == "train" and not run.config.launch.node_rank:
        from twhin_pipeline.operations import short_search

        for line in short_search.unused(replace(run, config=relations.resolve(run.config, run.store, run.snapshot))):
            say(line)


def run(
    config: TwhinConfig,
    config_path: str,
    overrides: Sequence[str],
    store: Store,
    snapshot: str,
    say: Say,
    skip_unchanged: bool = False,
) -> Run:
    """Run the whole chain for a snapshot; return the run with the values that a search found (`tune.minutes`).

    A node other than the first (`launch.node_rank`) takes part in the trainings, and does nothing else.
    With `skip_unchanged` a stage is left out where nothing that it reads has changed since it made its tables.

    Raises:
        UserError: A stage or a blocking check says what is wrong; tables of finished stages stay.
        twhin_pipeline.training.launch.TrainingFailed: Training ended with an error that is not the user's.
        twhin_pipeline.training.launch.TrainingCancelled: It was told to stop.
    """
    from twhin_pipeline.operations import short_search
    from twhin_pipeline.training import nodes

    this_run = Run(config, config_path, overrides, store, snapshot)
    if nodes.joins(config):
        for stage in STAGES.values():
            chain.join(this_run, stage, say)
        return this_run
    if config.tune.minutes is not None:
        short_search.check(this_run)
    chain.look_at_tracking(store)  # before the stages that come before training
    for stage in STAGES.values():
        if skip_unchanged and chain.made_before(this_run, stage, say) is not None:
            continue
        run_stage(this_run, stage, say)
        if stage.name == "sample" and config.tune.minutes is not None:
            before, this_run = this_run, short_search.tuned(this_run, say)
            if not _samples_alike(before, this_run):
                run_stage(this_run, stage, say)
    return this_run


def _samples_alike(one: Run, other: Run) -> bool:
    """Tell whether the stage `sample` makes the same tables of two runs."""
    from twhin_pipeline.operations.trial import data_key

    return len({data_key(relations.resolve(run.config, run.store, run.snapshot)) for run in (one, other)}) == 1
