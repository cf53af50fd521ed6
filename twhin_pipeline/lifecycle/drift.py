"""How far the vectors of two releases are apart, by entity type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import duckdb
import numpy as np

from twhin_pipeline.lifecycle import consumer
from twhin_pipeline.lifecycle.consumer import Consumer
from twhin_pipeline.store import Store
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.compatibility import Shared, entities, orthogonal, shared

Array = np.ndarray[Any, Any]
SAMPLE = 20_000
"""Kept ids of a type that are looked at."""
QUERIES = 500
"""Of these, those whose neighbors are compared."""


@dataclass(frozen=True)
class Drift:
    """One entity type. None where there is nothing to measure: no kept id, or another dimension."""

    entity: str
    kept: int
    """Ids that are trained in both releases."""
    added: int
    departed: int
    cosine: float | None
    """Mean cosine between a kept id's two vectors."""
    cosine_p05: float | None
    """Below it are 5 % of the kept ids."""
    aligned_cosine: float | None
    """The mean cosine after an orthogonal map of the later vectors, fitted to half of the ids and measured on the
    others: near 1 where only the axes have turned."""
    distance: float | None
    """Mean Euclidean distance between a kept id's two vectors, as a share of the earlier ones' mean length."""
    length: float | None
    """Mean length of the later vectors, as a share of the earlier ones'."""
    neighbors: float | None
    """Share of an id's nearest `k` among the kept ids that are its nearest in the later release too."""
    consumer: Consumer | None = None
    """What small models that were trained on the earlier vectors make of the later ones."""

    @property
    def new(self) -> float:
        """The share of the later release's trained ids that are new."""
        return self.added / max(self.kept + self.added, 1)

    @property
    def gone(self) -> float:
        """The share of the earlier release's trained ids that departed."""
        return self.departed / max(self.kept + self.departed, 1)


def drift(
    con: duckdb.DuckDBPyConnection, store: Store, before: Release, after: Release, k: int = 10, kind: str = "linear"
) -> list[Drift]:
    """Compare two releases, entity type by entity type.

    Args:
        con: A connection that can read the store.
        store: Where both are.
        before: The earlier release.
        after: The later one.
        k: How many neighbors of an id are compared.
        kind: The map through which consumers get the later vectors: `linear`, `orthogonal` or `none`.

    Raises:
        UserError: A release's table is gone.
    """
    result = []
    for entity in entities(after):
        if f"embeddings/{entity}" in before.tables:
            both = shared(con, store, before, after, entity, SAMPLE)
            wanted = consumer.labels(con, store, after, entity, both.rows)
            result.append(replace(compared(entity, both, k), consumer=consumer.measured(both, wanted, kind)))
    return result


def compared(entity: str, both: Shared, k: int) -> Drift:
    """Return the drift of one entity type."""
    counts = (entity, both.kept, both.added, both.departed)
    if not len(both.before) or both.before.shape != both.after.shape:
        return Drift(*counts, None, None, None, None, None, None)
    lengths = [np.linalg.norm(vectors, axis=1).mean() for vectors in (both.before, both.after)]
    cosine = _cosines(both.before, both.after)
    apart = np.linalg.norm(both.after - both.before, axis=1).mean()
    scale = max(float(lengths[0]), 1e-12)
    return Drift(
        *counts,
        float(cosine.mean()),
        float(np.quantile(cosine, 0.05)),
        _aligned(both),
        float(apart) / scale,
        float(lengths[1]) / scale,
        _neighbors_kept(both, k),
    )


def _cosines(a: Array, b: Array) -> Array:
    product = np.einsum("nd,nd->n", a, b)
    return product / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def _aligned(both: Shared) -> float | None:
    half = len(both.before) // 2
    if half <= both.before.shape[1]:
        return None
    turned = both.after[half:] @ orthogonal(both.before[:half], both.after[:half]).astype(np.float32)
    return float(_cosines(both.before[half:], turned).mean())


def _neighbors_kept(both: Shared, k: int) -> float | None:
    k = min(k, len(both.before) - 1)
    if k < 1:
        return None
    queries = np.arange(min(QUERIES, len(both.before)))
    first, second = (_nearest(vectors, queries, k) for vectors in (both.before, both.after))
    same = [len(np.intersect1d(a, b)) for a, b in zip(first, second, strict=True)]
    return float(np.mean(same)) / k


def _nearest(vectors: Array, queries: Array, k: int) -> Array:
    """Return the k nearest of each query by cosine, without itself: int64 `[Q, k]`."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    scores = unit[queries] @ unit.T
    scores[np.arange(len(queries)), queries] = -np.inf
    return np.argpartition(-scores, k - 1, axis=1)[:, :k]
