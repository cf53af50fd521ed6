"""One run of the chain: the configuration, the store and the snapshot that every stage gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Store

Say = Callable[[str], None]


def train_here(run: Run) -> None:
    """Train under torchrun and print what the ranks print. Raises as `launch.run` does."""
    from twhin_pipeline.training import launch

    launch.run(run.config, run.config_path, run.overrides, run.store, run.snapshot)


@dataclass(frozen=True)
class Run:
    """What every stage is given. `config_path` and `overrides` made `config`; training's processes read them again.

    A stage but the first gets `config` with the relations found in the source. `train` starts torchrun for a run and
    waits for it: it is all that differs between the command line and Dagster.
    """

    config: TwhinConfig
    config_path: str
    overrides: Sequence[str]
    store: Store
    snapshot: str
    train: Callable[[Run], None] = train_here
