"""A store with a small graph and a model of random vectors, for tests of evaluation, export and the read API."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plain_scores
import pyarrow as pa
import torch

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import Store
from twhin_pipeline.vectors.model_files import Writer, manifest_details

SNAPSHOT = "2024-05-01"
DIM = 8
NUM = {"user": 30, "item": 40}
RELATIONS = {"likes": ("user", "item"), "follows": ("user", "user"), "rates": ("user", "item")}
OPERATOR = {"likes": "translation", "follows": "translation", "rates": "identity"}


@dataclass(frozen=True)
class Small:
    """What was written: `edges[split]` int64 `[E, 3]` (lhs, relation, rhs); `vectors[entity]`; `scorer`."""

    config: TwhinConfig
    store: Store
    edges: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    scorer: Scorer


def config(**sections: Any) -> TwhinConfig:
    """Return the configuration; `sections` are merged over it, `model` included."""
    model = {
        "embeddings": {"tables": [{"name": name, "embedding_dim": DIM} for name in NUM]},
        "relations": [
            {"name": name, "lhs": lhs, "rhs": rhs, "operator": OPERATOR[name]} for name, (lhs, rhs) in RELATIONS.items()
        ],
        **sections.pop("model", {}),
    }
    return parse_config({"source": {"path": "edges.csv"}, "model": model, **sections})


def ids(entity: str) -> list[Any]:
    """Return an entity type's ids in row order: strings for users, integers for items; neither in the order of rows."""
    numbers = np.random.default_rng(5).permutation(NUM[entity])
    return [f"u{n:02d}" for n in numbers] if entity == "user" else [int(n) * 10 for n in numbers]


def edges(size: int = 900) -> dict[str, np.ndarray]:
    """Return distinct random edges by split."""
    rng = np.random.default_rng(1)
    found = set()
    for _ in range(size):
        relation = int(rng.integers(len(RELATIONS)))
        lhs, rhs = list(RELATIONS.values())[relation]
        # Popular entities have low numbers.
        found.add((int(NUM[lhs] * rng.random() ** 2), relation, int(NUM[rhs] * rng.random() ** 2)))
    shuffled = rng.permutation(np.array(sorted(found), np.int64))
    cuts = [int(0.7 * len(shuffled)), int(0.8 * len(shuffled))]
    return dict(zip(("train", "validation", "test"), np.split(shuffled, cuts), strict=True))


def write_edges(store: Store, asset: str, rows: np.ndarray) -> None:
    """Write `[E, 3]` as positives of one chunk."""
    columns = {
        "chunk": pa.array(np.zeros(len(rows)), pa.int32()),
        "lhs": pa.array(rows[:, 0]),
        "rhs": pa.array(rows[:, 2]),
        "rel": pa.array(rows[:, 1].astype(np.int32)),
        "weight": pa.array(np.ones(len(rows)), pa.float32()),
    }
    with store.replace(asset, SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table(columns))


def write_vocabulary(store: Store, entity: str) -> None:
    """Write an entity type's vocabulary."""
    size = NUM[entity]
    rows = pa.table(
        {
            "id": ids(entity),
            "row": pa.array(range(size), pa.int64()),
            "degree": pa.array([1] * size, pa.int64()),
            "first_snapshot": pa.array([SNAPSHOT] * size, pa.string()),
            "last_snapshot": pa.array([SNAPSHOT] * size, pa.string()),
            "evicted": pa.array([False] * size),
        }
    )
    with store.replace(f"vocabulary/{entity}", SNAPSHOT, config_hash="test") as draft:
        draft.write(rows)


def write_model(store: Store, config: TwhinConfig, vectors: dict[str, np.ndarray], scorer: Scorer) -> None:
    """Write a model as two ranks would."""
    data = ["training_set/positives", *(f"vocabulary/{name}" for name in NUM)]
    with store.replace("twhin_model", SNAPSHOT, config_hash="test", parents=store.versions(SNAPSHOT, data)) as draft:
        for name, table in vectors.items():
            cut = len(table) // 3
            tensor = torch.from_numpy(table)
            Writer(draft, 0).table(name, [(0, tensor[:cut])])
            Writer(draft, 1).table(name, [(cut, tensor[cut:])])
        Writer(draft, 0).relations(config.model, scorer.state_rows())
        draft.details = {**manifest_details(config), "mlflow_run_id": "abc"}


def make(
    folder: Path | str,
    *,
    config: TwhinConfig,
    splits: dict[str, np.ndarray] | None = None,
    vectors: dict[str, np.ndarray] | None = None,
) -> Small:
    """Write everything, below a folder or URL. The table `item` has more rows than its vocabulary, unless given."""
    store = Store(f"{folder}/home")
    splits = edges() if splits is None else splits
    for entity in NUM:
        write_vocabulary(store, entity)
    write_edges(store, "training_set/positives", splits["train"])
    write_edges(store, "held_out/validation", splits["validation"])
    write_edges(store, "held_out/test", splits["test"])
    rng = np.random.default_rng(2)
    rows = {"user": NUM["user"], "item": NUM["item"] + 5}
    drawn = {name: rng.normal(size=(n, DIM)).astype(np.float32) for name, n in rows.items()}
    vectors = drawn if vectors is None else vectors
    fresh = Scorer(config.model).state_rows()
    moved = {name: torch.from_numpy(rng.normal(size=len(row)).astype(np.float32)) for name, row in fresh.items()}
    scorer = Scorer.from_rows(config.model, moved)
    write_model(store, config, vectors, scorer)
    return Small(config, store, splits, {name: v[: NUM[name]] for name, v in vectors.items()}, scorer)


def score(small: Small, relation: int, lhs: int, rhs: int) -> float:
    """Score one edge plainly, from vectors and the formula: its tail's score, where relations are reciprocal."""
    name = list(RELATIONS)[relation]
    left, right = (small.vectors[entity][row] for entity, row in zip(RELATIONS[name], (lhs, rhs), strict=True))
    row = small.scorer.state_rows()[name].tolist()
    if small.config.model.reciprocal:
        row = row[: len(row) // 2]
    moved = plain_scores.operate(small.config.model.relations[relation].operator, left.tolist(), row)
    model = small.config.model
    return plain_scores.compare(model.comparator, moved, right.tolist()) / model.temperature
