"""Answers for one entity as a list of (id, score), for many as a stream of Arrow record batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.vectors.chosen import Chosen
from twhin_pipeline.vectors.entity_table import EntityTable

HEADS_AT_ONCE, ROWS_AT_ONCE = 8192, 1 << 20
"""Entities of a batch, and rows of one, at most."""


def as_pairs(table: EntityTable, rows: np.ndarray, scores: np.ndarray) -> list[tuple[Any, float]]:
    """Return found rows `[k]` as (id, score); -1 stands for none."""
    there = rows >= 0
    names = table.ids(rows[there])
    return [(name, float(score)) for name, score in zip(names, scores[there], strict=True)]


def answer(
    chosen: Chosen,
    table: EntityTable,
    k: int,
    search: Callable[[slice], tuple[np.ndarray, np.ndarray]],
    names: tuple[str, str, str],
    heads: int = HEADS_AT_ONCE,
    probabilities: Callable[[np.ndarray], np.ndarray | None] | None = None,
) -> Any:
    """Return what `search` finds in `table` for the chosen entities, as a stream of batches, or one's as a list.

    Args:
        chosen: The entities.
        table: Where they are answered from.
        k: How many for each, at most.
        search: Returns rows int64 `[n, k]` and scores float32 `[n, k]` for a part of the entities.
        names: Of the columns with the entity, with what was found, and with its score.
        heads: Entities of a batch at most.
        probabilities: From scores float32 `[m]` to probabilities `[m]`, None where there are none; batches then have
            the column `probability`.
    """
    if chosen.one:
        rows, scores = search(slice(0, 1)) if k > 0 else (np.zeros((1, 0), np.int64), np.zeros((1, 0), np.float32))
        return as_pairs(table, rows[0], scores[0])
    schema = pa.schema(
        [
            pa.field(names[0], chosen.table.index.ids.type, nullable=False),
            pa.field(names[1], table.index.ids.type, nullable=False),
            pa.field("rank", pa.int32(), nullable=False),
            pa.field(names[2], pa.float32(), nullable=False),
            *([pa.field("probability", pa.float32())] if probabilities is not None else []),
        ]
    )

    def batches() -> Iterator[pa.RecordBatch]:
        size = max(1, min(heads, ROWS_AT_ONCE // max(k, 1)))
        for start in range(0, len(chosen.rows) if k > 0 else 0, size):
            part = slice(start, min(start + size, len(chosen.rows)))
            rows, scores = search(part)
            query, rank = np.nonzero(rows >= 0)
            columns = [
                chosen.ids(part).take(pa.array(query)),
                table.index.ids.take(pa.array(rows[query, rank])),
                pa.array((rank + 1).astype(np.int32)),
                pa.array(scores[query, rank]),
            ]
            if probabilities is not None:
                found = probabilities(scores[query, rank])
                columns.append(pa.nulls(len(query), pa.float32()) if found is None else pa.array(found, pa.float32()))
            yield pa.RecordBatch.from_arrays(columns, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())
