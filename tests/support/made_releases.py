"""Releases of one entity type with given vectors, as the stages make them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors import compatibility
from twhin_pipeline.vectors.model_files import vectors_array

D = 6
DAYS = ("2025-01-01", "2025-01-02", "2025-01-03")


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def export(store: Store, snapshot: str, vectors: dict[str, np.ndarray], untrained: tuple[str, ...] = ()) -> str:
    ids = sorted(vectors, key=lambda one: hash(snapshot) ^ hash(one))  # another order each day
    table = pa.table(
        {
            "id": pa.array(ids),
            "row": np.arange(len(ids)),
            "embedding": vectors_array(np.array([vectors[one] for one in ids], np.float32)),
            "trained_edges": pa.array([0 if one in untrained else 3 for one in ids]),
        }
    )
    with store.replace("embeddings/user", snapshot, config_hash="c") as draft:
        draft.write(table)
    return store.manifest("embeddings/user", snapshot).version


def publish(store: Store, snapshot: str, vectors: dict[str, np.ndarray], kind: str = "orthogonal") -> Release:
    """What the stage does with its maps."""
    tables = {"embeddings/user": export(store, snapshot, vectors)}
    before = releases.current(store)
    with store.replace("published", snapshot, config_hash="c") as draft:
        if before is None:
            draft.write(compatibility.SCHEMA.empty_table())
        else:
            with database.connect(store=store) as con:
                draft.write(compatibility.table(con, store, before, tables, snapshot, kind))
            draft.details = {"compatible_with": before.name}
    tables["published"] = store.manifest("published", snapshot).version
    release = releases.make(store, snapshot, tables, {}, None)
    releases.promote(store, release.name, "me", "test")
    return release


def vectors(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).normal(size=(count, D))
    return {f"u{i}": row for i, row in enumerate(drawn)}


def release_of(store: Store, snapshot: str, rows: dict[str, np.ndarray], untrained: tuple[str, ...] = ()) -> Release:
    return releases.make(store, snapshot, {"embeddings/user": export(store, snapshot, rows, untrained)}, {}, None)
