"""A tiny configuration and random batches, for tests of the model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from plain_batches import Chunk, assemble

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.placement import init_tables
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

ROWS = {"user": 24, "item": 33}
DIM = 8


def config(**model: Any) -> TwhinConfig:
    """Users like and hide items; items resemble items. `model` overrides fields of the model section."""
    tables = [{"name": name, "embedding_dim": DIM, "optimizer": {"sgd": {"lr": 0.1}}} for name in ROWS]
    relations = [
        {"name": "likes", "lhs": "user", "rhs": "item"},
        {"name": "resembles", "lhs": "item", "rhs": "item", "operator": "identity"},
        {"name": "hides", "lhs": "user", "rhs": "item", "weight": 0.5},
    ]
    section = {"embeddings": {"tables": tables}, "relations": relations, **model}
    return parse_config({"source": {"path": "edges.parquet"}, "model": section})


def random_model(config: TwhinConfig) -> TwhinModel:
    """A model whose vectors and operators are drawn, so that none is where it begins."""
    made = TwhinModel(config.model, UnshardedTables(config.model, ROWS))
    init_tables(made, seed=1)
    torch.manual_seed(0)
    for parameter in made.scorer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def chunk(
    rng: np.random.Generator,
    model: TwhinModelConfig,
    relation: int,
    edges: int,
    window: int,
    pool: int,
    everything: bool = False,
) -> Chunk:
    """Random edges of one relation, with the masks that the training set would have for them.

    Of three edges or more, two keep the same head and two the same tail. With `everything` all rows are candidates.
    """
    chosen = model.relations[relation]
    rows = {side: ROWS[getattr(chosen, side)] for side in ("lhs", "rhs")}
    drawn = {side: rng.integers(0, rows[side], edges) for side in rows}
    if edges > 2:
        drawn["lhs"][1], drawn["rhs"][-1] = drawn["lhs"][0], drawn["rhs"][0]
    pools = {side: rng.integers(0, rows[side], pool) for side in rows}
    window = min(window, edges)
    in_batch = (np.arange(window) + int(rng.integers(edges))) % edges
    if everything:
        in_batch, pools = np.zeros(0, np.int64), {side: np.zeros(0, np.int64) for side in rows}
    true = set(zip(drawn["lhs"].tolist(), drawn["rhs"].tolist(), strict=True))
    sides = chosen.sides or "both"

    def mask(side: str) -> np.ndarray:
        candidates = np.arange(rows[side]) if everything else np.concatenate([drawn[side][in_batch], pools[side]])
        if sides not in ("both", side):
            pools[side], candidates = np.zeros(0, np.int64), np.zeros(0, np.int64)
        pairs = []
        for i in range(edges):
            for j, candidate in enumerate(candidates.tolist()):
                edge = (candidate, drawn["rhs"][i]) if side == "lhs" else (drawn["lhs"][i], candidate)
                if edge in true:
                    pairs.append((i, j))
        return np.array(pairs, np.int64).reshape(-1, 2)

    masks = [mask("lhs"), mask("rhs")]
    weight = rng.uniform(0.5, 2.0, edges).astype(np.float32)
    return Chunk(relation, drawn["lhs"], drawn["rhs"], weight, in_batch, pools["lhs"], pools["rhs"], *masks, sides)


def chunks(seed: int, model: TwhinModelConfig, everything: bool = False) -> list[Chunk]:
    """One chunk of each relation, of different lengths; the last is shorter than the in-batch window."""
    rng = np.random.default_rng(seed)
    lengths = [6, 5, 2]
    relations = range(len(model.relations))
    return [chunk(rng, model, r, lengths[r % 3], window=3, pool=4, everything=everything) for r in relations]


def batch(seed: int, model: TwhinModelConfig, everything: bool = False) -> EdgeBatch:
    """`chunks` as one batch."""
    made = chunks(seed, model, everything)
    return assemble(made, model, sum(len(c.lhs) for c in made), ROWS if everything else None)
