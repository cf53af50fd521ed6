"""The nearest vectors of one, by numpy alone: what needs no torch."""

from __future__ import annotations

import numpy as np

from twhin_pipeline.vectors.entity_table import BATCH_ROWS, EntityTable


def nearest(table: EntityTable, row: int, k: int, untrained: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the k rows whose vectors are nearest to a row's by cosine, best first, by blocks of rows.

    Args:
        table: The entities.
        row: Which of them; it is not its own neighbor.
        k: How many, 0 or more.
        untrained: Entities without training edges too.

    Returns:
        Rows int64 `[min(k, n)]` and cosines float32 `[min(k, n)]`, equal ones in the order of rows.
    """
    query = np.array(table.vectors[row])
    lengths = table.lengths() * np.linalg.norm(query)
    rows, values = np.empty(0, np.int64), np.empty(0, np.float32)
    for start in range(0, len(table) if k else 0, BATCH_ROWS):
        part = slice(start, min(start + BATCH_ROWS, len(table)))
        cosines = table.vectors[part] @ query / np.maximum(lengths[part], np.float32(1e-30))
        if not untrained and table.trained is not None:
            cosines[~table.trained[part]] = -np.inf
        if part.start <= row < part.stop:
            cosines[row - part.start] = -np.inf
        top = np.flatnonzero(cosines > -np.inf)
        if k < len(top):
            top = top[cosines[top] >= np.partition(cosines[top], -k)[-k]]
        rows, values = np.concatenate([rows, top + start]), np.concatenate([values, cosines[top]])
        best = np.lexsort((rows, -values))[:k]
        rows, values = rows[best], values[best]
    return rows, values
