"""One run of the chain: the configuration, the store and the snapshot that every stage gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What every stage is given. `config_path` and `overrides` made `config`; training's processes read them again.

    A stage but the first gets `config` with the relations found in the source.
    """

    config: TwhinConfig
    config_path: str
    overrides: Sequence[str]
    store: Store
    snapshot: str
