"""A tiny planted graph, written straight in the store's format: training is tested apart from data stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.store import Store

SNAPSHOT = "2025-01-01"
USERS, ITEMS, COMMUNITIES = 60, 48, 4
MASKS = pa.list_(pa.int32())


def planted_config(**sections: dict[str, Any]) -> TwhinConfig:
    """Return a small configuration; `training={"num_epochs": 3}` changes single fields."""
    data: dict[str, Any] = {
        "source": {"path": "unused.parquet"},
        "model": {
            "embeddings": {
                "tables": [
                    {"name": name, "embedding_dim": 16, "optimizer": {"rowwise_adagrad": {"lr": 0.1}}}
                    for name in ("user", "item")
                ]
            },
            "relations": [
                {"name": "likes", "lhs": "user", "rhs": "item"},
                {"name": "follows", "lhs": "user", "rhs": "user"},
            ],
            "comparator": "cosine",
            "temperature": 0.1,
        },
        "training": {
            "num_epochs": 6,
            "train_log_every_n": 4,
            "eval_log_every_n": 10,
            "checkpoint_every_n": 7,
            "num_eval_steps": -1,
        },
        "train_data": {"per_replica_batch_size": 64, "global_negatives": 8, "in_batch_negatives": 6},
        "validation_data": {"per_replica_batch_size": 64, "global_negatives": 8, "in_batch_negatives": 6},
        "negatives": {"chunk_size": 32, "epochs": 2},
        "loss": {"name": "softmax"},
        "launch": {"device": "cpu", "threads_per_process": 1, "nproc_per_node": 2},
    }
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields}
    return parse_config(data)


def write_config(config: TwhinConfig, folder: Path) -> str:
    """Write the configuration and return its path."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_none=True)))
    return str(path)


def planted_edges(seed: int = 0) -> dict[int, np.ndarray]:
    """Return each relation's unique edges int64 [N, 2]; nearly all stay inside a community (row modulo 4)."""
    rng = np.random.default_rng(seed)
    edges = {}
    for relation, tails in ((0, ITEMS), (1, USERS)):
        lhs = rng.integers(0, USERS, 900)
        rhs = rng.integers(0, tails // COMMUNITIES, 900) * COMMUNITIES + lhs % COMMUNITIES
        noise = rng.random(900) < 0.03
        rhs[noise] = rng.integers(0, tails, int(noise.sum()))
        edges[relation] = np.unique(np.stack([lhs, rhs], 1), axis=0)
    return edges


def write_planted(store: Store, config: TwhinConfig, snapshot: str = SNAPSHOT, seed: int = 0) -> None:
    """Write vocabularies, positives, negatives and held-out edges as the data stages would."""
    rng = np.random.default_rng(seed)
    for name, rows in (("user", USERS), ("item", ITEMS)):
        ids = pa.array([f"{name}-{i}" for i in range(rows)])
        table = {"id": ids, "row": np.arange(rows), "degree": np.ones(rows, np.int64)}
        table["first_snapshot"] = pa.array([snapshot] * rows)
        with store.replace(f"vocabulary/{name}", snapshot, config_hash="test") as draft:
            draft.write(pa.table(table))
    edges = planted_edges(seed)
    held, kept = {}, {}
    for relation, pairs in edges.items():
        order = rng.permutation(len(pairs))
        held[relation], kept[relation] = pairs[order[:60]], pairs[order[60:]]
    for asset, pairs, negatives, epochs, data in (
        ("training_set/positives", kept, "training_set/negatives", config.epochs_of_negatives, config.train_data),
        ("held_out/validation", held, "held_out/validation_negatives", 1, config.validation_data),
    ):
        chunks = _chunks(pairs, config.negatives.chunk_size)
        known = edges if asset.startswith("held_out") else kept
        _write_positives(store, asset, snapshot, chunks, config.negatives.chunk_size)
        with store.replace(negatives, snapshot, config_hash="test") as draft:
            for epoch in range(epochs):
                pool = 0 if data.global_negatives == "all" else data.global_negatives
                table = _negatives(chunks, known, epoch, data.in_batch_negatives, pool, config, rng)
                draft.write(table, f"epoch-{epoch:05d}.parquet")


def _chunks(pairs: dict[int, np.ndarray], size: int) -> list[tuple[int, np.ndarray]]:
    return [(r, edges[i : i + size]) for r, edges in pairs.items() for i in range(0, len(edges), size)]


def _write_positives(store: Store, asset: str, snapshot: str, chunks: list[Any], chunk_size: int) -> None:
    with store.replace(asset, snapshot, config_hash="test") as draft:
        half = len(chunks) // 2
        for i, numbers in enumerate((range(half), range(half, len(chunks)))):
            rows = [(n, int(a), int(b), chunks[n][0], 1.0 + (a % 3)) for n in numbers for a, b in chunks[n][1]]
            columns = zip(("chunk", "lhs", "rhs", "rel", "weight"), zip(*rows, strict=True), strict=True)
            types = {"chunk": pa.int32(), "rel": pa.int32(), "weight": pa.float32()}
            table = {name: pa.array(values, types.get(name, pa.int64())) for name, values in columns}
            draft.write(pa.table(table), f"part-{i:05d}.parquet")
        draft.details = {"chunk_size": chunk_size, "num_chunks": len(chunks)}


def _negatives(
    chunks: list[Any], known: dict[int, np.ndarray], epoch: int, window: int, pool: int, config: TwhinConfig, rng: Any
) -> pa.Table:
    true = {relation: {tuple(pair) for pair in pairs.tolist()} for relation, pairs in known.items()}
    rows: dict[str, list[Any]] = {
        name: [] for name in ("epoch", "chunk", "side", "row", "mask_position", "mask_candidate")
    }
    for number, (relation, edges) in enumerate(chunks):
        count = len(edges)
        places = [(epoch * window + j) % count for j in range(min(window, count))]
        for side in (0, 1):
            entities = USERS if side == 0 or relation == 1 else ITEMS
            drawn = rng.integers(0, entities, pool)
            candidates = [*edges[places, side].tolist(), *drawn.tolist()]
            masked = [
                (position, j)
                for position, edge in enumerate(edges.tolist())
                for j, candidate in enumerate(candidates)
                if ((candidate, edge[1]) if side == 0 else (edge[0], candidate)) in true[relation]
            ]
            values = (epoch, number, side, drawn.tolist(), [p for p, _ in masked], [c for _, c in masked])
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
    types = {"epoch": pa.int32(), "chunk": pa.int32(), "side": pa.int8(), "row": pa.list_(pa.int64())}
    return pa.table({name: pa.array(values, types.get(name, MASKS)) for name, values in rows.items()})
