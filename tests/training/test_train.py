"""All ranks of a training read the versions that rank 0 found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from helpers import SNAPSHOT, planted_config, write_planted

from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.store import Store
from twhin_pipeline.training import train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Told(Ranks):
    """A rank that is told what rank 0 broadcasts."""

    told: Any = None

    def broadcast(self, value: Any) -> Any:
        return self.told


@dataclass(frozen=True)
class Tells(Ranks):
    """Rank 0, which remembers what it broadcasts."""

    said: Any = None

    def broadcast(self, value: Any) -> Any:
        self.said.append(value)
        return value


def test_a_rank_reads_the_versions_of_rank_0_though_a_table_was_made_anew_since(tmp_path: Path) -> None:
    config, store = planted_config(), Store(str(tmp_path))
    write_planted(store, config)
    first: list[Any] = []
    of_rank_0 = train.agreed(config, Store(store.root), SNAPSHOT, Tells(0, 2, CPU, said=first))
    write_planted(store, config, seed=1)
    of_rank_1 = train.agreed(config, Store(store.root), SNAPSHOT, Told(1, 2, CPU, told=first[0]))
    for table in ("vocabulary/user", "training_set/positives", "training_set/negatives", "held_out/validation"):
        version = of_rank_0.manifest(table, SNAPSHOT).version
        assert of_rank_1.manifest(table, SNAPSHOT).version == version != store.manifest(table, SNAPSHOT).version
    assert not of_rank_1.exists("held_out/test", SNAPSHOT), "what rank 0 did not see, no rank sees"
