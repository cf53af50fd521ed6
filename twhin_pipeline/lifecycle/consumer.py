"""A consumer of vectors: small models that were trained on one release's vectors and get those of the next.

What consumers downstream predict is not known here, so the labels are the graph's own: whether an entity has an edge
to one of the most popular entities, and whether it has more edges than most. A logistic regression is fitted on the
earlier vectors of half of the ids; the others' earlier vectors, later ones, and later ones through a map into the
earlier space show what it would lose (as Hu et al., KDD 2022, measure backward compatibility on tasks that were not
retrained).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from twhin_pipeline.evaluation.classification import auc
from twhin_pipeline.store import Store, database
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.compatibility import FITS, Shared

Array = np.ndarray[Any, Any]
LABELS = 5
"""Popular entities whose neighbors are predicted, at most."""
FEWEST = 40
"""Ids with the label, and without it, below which nothing is fitted."""
RIDGE = 1.0
"""The penalty on the weights of vectors that are scaled to a mean square of 1."""
POSITIVES = "training_set/positives"


@dataclass(frozen=True)
class Consumer:
    """Means over the labels, on ids that the models were not fitted to."""

    labels: int
    loss: float
    """Log loss on the earlier vectors."""
    loss_new: float | None
    """On the later ones as they are; None where their dimension is another."""
    loss_mapped: float | None
    """On the later ones through the map; None without one."""
    auc: float
    auc_new: float | None
    auc_mapped: float | None


def labels(con: duckdb.DuckDBPyConnection, store: Store, release: Release, entity: str, rows: Array) -> Array:
    """Return what is to be predicted of entities of a release: bool `[L, n]`, no rows where it has no training edges.

    Args:
        con: A connection that can read the store.
        store: Where the release is.
        release: Whose training edges are the labels.
        entity: The entity type.
        rows: The entities' rows, int64 `[n]`.

    Raises:
        UserError: A table of the release is gone.
    """
    version = release.tables.get(POSITIVES)
    if version is None or not len(rows):
        return np.zeros((0, len(rows)), bool)
    base = store.seen_as(None)
    edges = database.parquet(base.files_of(base.manifest(POSITIVES, release.snapshot, version)))
    relations = store.pinned(
        base.manifest("embeddings/relations", release.snapshot, release.tables["embeddings/relations"])
    ).read("embeddings/relations", release.snapshot, ["lhs", "rhs"])
    ends = [
        f"SELECT {number} AS rel, {place} AS side, {own} AS own, {other} AS other FROM {edges} WHERE rel = {number}"
        for number, pair in enumerate(relations.to_pylist())
        for place, (own, other) in enumerate((("lhs", "rhs"), ("rhs", "lhs")))
        if pair[own] == entity
    ]
    if not ends:
        return np.zeros((0, len(rows)), bool)
    con.register("asked_rows", pa.table({"own": rows, "position": np.arange(len(rows))}))
    with database.explained(f"{store.root}, {POSITIVES} of {release.name}"):
        con.execute(
            "CREATE OR REPLACE TEMP TABLE of_asked AS SELECT rel, side, other, position "
            f"FROM ({' UNION ALL '.join(ends)}) JOIN asked_rows USING (own)"
        )
        degree = con.execute("SELECT position, count(*) FROM of_asked GROUP BY position").fetchnumpy()
        popular = con.execute(
            "SELECT rel, side, other, count(DISTINCT position) AS ids FROM of_asked GROUP BY ALL "
            f"HAVING ids BETWEEN {FEWEST} AND {len(rows) - FEWEST} "
            f"ORDER BY abs(ids - {len(rows) // 2}), rel, side, other LIMIT {LABELS}"
        ).fetchall()
        members = [
            con.execute(
                "SELECT DISTINCT position FROM of_asked WHERE rel = ? AND side = ? AND other = ?", list(key)
            ).fetchnumpy()["position"]
            for *key, _ in popular
        ]
    con.unregister("asked_rows")
    result = np.zeros((1 + len(members), len(rows)), bool)
    counts = np.zeros(len(rows), np.int64)
    counts[degree["position"]] = degree["count_star()"]
    result[0] = counts > np.median(counts)
    for label, positions in zip(result[1:], members, strict=True):
        label[positions] = True
    frequent = result.sum(axis=1)
    return result[(frequent >= FEWEST) & (frequent <= len(rows) - FEWEST)]


def measured(both: Shared, wanted: Array, kind: str) -> Consumer | None:
    """Fit logistic regressions to earlier vectors, and see what they lose on later ones.

    Args:
        both: The ids that two releases share.
        wanted: What to predict of them, bool `[L, n]`.
        kind: The map into the earlier space, `linear`, `orthogonal` or `none`, fitted to the same half of the ids.

    Returns:
        The losses, None where there is no label or too few ids.
    """
    half = len(both.before) // 2
    if not len(wanted) or half < 2 * FEWEST:
        return None
    tested = {"": both.before[half:]}
    if both.before.shape == both.after.shape:
        tested["new"] = both.after[half:]
    if kind in FITS and half > both.after.shape[1] and (kind == "linear" or both.before.shape == both.after.shape):
        tested["mapped"] = both.after[half:] @ FITS[kind](both.before[:half], both.after[:half])
    scale = float(np.sqrt(np.square(both.before[:half]).mean())) or 1.0
    losses: dict[str, list[float]] = {name: [] for name in tested}
    areas: dict[str, list[float]] = {name: [] for name in tested}
    for label in wanted:
        if label[:half].all() or not label[:half].any() or label[half:].all() or not label[half:].any():
            continue
        weights = logistic(both.before[:half] / scale, label[:half])
        for name, vectors in tested.items():
            scores = _with_one(vectors / scale) @ weights
            losses[name].append(float(np.logaddexp(0, np.where(label[half:], -scores, scores)).mean()))
            area = auc(scores[label[half:]], scores[~label[half:]])
            assert area is not None
            areas[name].append(area)
    if not losses[""]:
        return None

    def mean(values: dict[str, list[float]], name: str) -> float | None:
        return float(np.mean(values[name])) if name in values else None

    return Consumer(
        len(losses[""]), float(np.mean(losses[""])), mean(losses, "new"), mean(losses, "mapped"),
        float(np.mean(areas[""])), mean(areas, "new"), mean(areas, "mapped"),
    )  # fmt: skip


def logistic(vectors: Array, label: Array, ridge: float = RIDGE) -> Array:
    """Fit a logistic regression by Newton's method.

    Args:
        vectors: float `[n, D]`.
        label: bool `[n]`.
        ridge: The penalty on the squared weights, which the intercept does not pay.

    Returns:
        The weights and the intercept, float64 `[D + 1]`.
    """
    rows, target = _with_one(vectors), label.astype(np.float64)
    penalty = np.full(rows.shape[1], ridge)
    penalty[-1] = 1e-9  # labels that one column separates would have no finite intercept
    weights = np.zeros(rows.shape[1])
    for _ in range(50):
        chance = 1 / (1 + np.exp(-np.clip(rows @ weights, -30, 30)))
        slope = rows.T @ (chance - target) + penalty * weights
        curve = (rows * (chance * (1 - chance))[:, None]).T @ rows + np.diag(penalty)
        step = np.linalg.solve(curve, slope)
        weights -= step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def _with_one(vectors: Array) -> Array:
    return np.hstack([vectors.astype(np.float64), np.ones((len(vectors), 1))])
