"""The plain way to a batch: chunk by chunk, where EdgesDataset works on whole arrays. What batches are tested with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from twhin_pipeline.batch import EdgeBatch
from twhin_pipeline.sections.model import TwhinModelConfig


@dataclasses.dataclass
class Chunk:
    """Positives of one relation that share their candidates, as NumPy arrays (c edges).

    A candidate's number counts the in-batch window first, then the side's pool.
    """

    relation: int
    """Index into the configuration's relations."""
    lhs: np.ndarray
    """`[c]` rows of the relation's left-hand table."""
    rhs: np.ndarray
    """`[c]` rows of the relation's right-hand table."""
    weight: np.ndarray
    """`[c]` edge weights."""
    in_batch: np.ndarray
    """`[n]` positions in the chunk (below c) whose entities are candidates, on either side."""
    lhs_pool: np.ndarray
    """`[K]` rows of the left-hand table, candidates for every edge of the chunk."""
    rhs_pool: np.ndarray
    """`[K']` rows of the right-hand table."""
    lhs_mask: np.ndarray
    """`[M, 2]` pairs (position, candidate) that are true edges when the candidate replaces the left-hand side."""
    rhs_mask: np.ndarray
    """`[M', 2]` the same for the right-hand side."""


def assemble(chunks: Sequence[Chunk], model_config: TwhinModelConfig, global_edges: int) -> EdgeBatch:
    """Put chunks together: unique rows a table, indices, padding to the longest chunk and widest window.

    Args:
        chunks: G chunks, possibly none.
        model_config: Names the tables and each relation's two of them.
        global_edges: Edges of all ranks in this step.
    """
    sides = [(r.lhs, r.rhs) for r in model_config.relations]
    rows = _Rows(model_config.table_names)
    for chunk in chunks:
        lhs, rhs = sides[chunk.relation]
        rows.add(lhs, chunk.lhs, chunk.lhs_pool)
        rows.add(rhs, chunk.rhs, chunk.rhs_pool)
    ids = rows.unique()
    width = max((len(chunk.in_batch) for chunk in chunks), default=0)
    return EdgeBatch(
        ids=ids,
        relation=torch.tensor([chunk.relation for chunk in chunks], dtype=torch.int64),
        lhs_index=_padded([rows.index(sides[c.relation][0], c.lhs) for c in chunks]),
        rhs_index=_padded([rows.index(sides[c.relation][1], c.rhs) for c in chunks]),
        weight=_padded([c.weight for c in chunks], np.float32),
        in_batch=_padded([c.in_batch for c in chunks]),
        num_in_batch=torch.tensor([len(c.in_batch) for c in chunks], dtype=torch.int64),
        lhs_pool_index=_padded([rows.index(sides[c.relation][0], c.lhs_pool) for c in chunks]),
        rhs_pool_index=_padded([rows.index(sides[c.relation][1], c.rhs_pool) for c in chunks]),
        lhs_mask=_masks([c.lhs_mask for c in chunks], [len(c.in_batch) for c in chunks], width),
        rhs_mask=_masks([c.rhs_mask for c in chunks], [len(c.in_batch) for c in chunks], width),
        num_edges=sum(len(c.lhs) for c in chunks),
        global_edges=global_edges,
    )


class _Rows:
    """Unique rows of each table, and where each of them stands in the concatenation of all tables'."""

    def __init__(self, tables: Sequence[str]) -> None:
        self._parts: dict[str, list[np.ndarray]] = {table: [] for table in tables}
        self._unique: dict[str, np.ndarray] = {}
        self._offset: dict[str, int] = {}

    def add(self, table: str, *parts: np.ndarray) -> None:
        self._parts[table].extend(parts)

    def unique(self) -> dict[str, torch.Tensor]:
        offset = 0
        for table, parts in self._parts.items():
            rows = np.unique(np.concatenate(parts)) if parts else np.empty(0)
            self._unique[table] = rows.astype(np.int64, copy=False)
            self._offset[table] = offset
            offset += len(rows)
        return {table: torch.from_numpy(rows) for table, rows in self._unique.items()}

    def index(self, table: str, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._unique[table], rows) + self._offset[table]


def _padded(rows: Sequence[np.ndarray], dtype: type = np.int64) -> torch.Tensor:
    """Stack arrays of unequal length to `[len(rows), longest]`, zeros behind."""
    out: np.ndarray = np.zeros((len(rows), max((len(row) for row in rows), default=0)), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _masks(pairs: Sequence[np.ndarray], windows: Sequence[int], width: int) -> torch.Tensor:
    """Return `[M, 3]` (chunk, position, candidate); pool candidates move behind the widest window."""
    parts = [np.empty((0, 3), np.int64)]
    for i, (pair, window) in enumerate(zip(pairs, windows, strict=True)):
        position, candidate = np.asarray(pair, np.int64).reshape(-1, 2).T
        moved = np.where(candidate < window, candidate, candidate + (width - window))
        parts.append(np.stack([np.full_like(position, i), position, moved], axis=1))
    return torch.from_numpy(np.concatenate(parts))
