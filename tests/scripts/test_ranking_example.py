"""`examples/ranking/rank.py`: vectors as features of a ranking model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_store
from small_store import NUM, SNAPSHOT

from twhin_pipeline.vectors.export import export

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "ranking" / "rank.py"
GROUPS = 4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> small_store.Small:
    """Edges stay within groups that the vectors know and counts do not."""
    rng = np.random.default_rng(0)
    found = set()
    while len(found) < 420:
        lhs, rhs = int(rng.integers(NUM["user"])), int(rng.integers(NUM["item"]))
        if lhs % GROUPS == rhs % GROUPS or rng.random() < 0.05:
            found.add((lhs, 0, rhs))
        if len(found) > 250:
            break
    edges = rng.permutation(np.array(sorted(found), np.int64))
    splits = dict(zip(("train", "validation", "test"), np.split(edges, [110, 120]), strict=True))
    config = small_store.config(training={"refit": False}, model={"comparator": "dot"})
    made = small_store.make(tmp_path_factory.mktemp("rank"), config=config, splits=splits)
    clear = {
        name: np.tile(np.eye(small_store.DIM)[np.arange(size) % GROUPS], 1).astype(np.float32) * 3
        for name, size in NUM.items()
    }
    small_store.write_model(made.store, config, clear, made.scorer)
    export(config, made.store, SNAPSHOT)
    return made


def run(small: small_store.Small, relation: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--home", small.store.root, "--relation", relation]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_vectors_that_know_more_than_counts_rank_better(small: small_store.Small) -> None:
    done = run(small, "likes")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("counts")]
    areas = {line[:28].strip(): float(line[28:].split()[0]) for line in rows}
    assert list(areas) == ["counts", "counts and score", "counts, score and vectors"]
    assert max(list(areas.values())[1:]) > areas["counts"] + 0.05
