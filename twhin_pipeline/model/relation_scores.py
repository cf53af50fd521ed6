"""Scores of one relation's queries against candidates, by the scorer that training uses."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.words import Side, other

# An allocation above 32 MiB goes back to the system when it is freed, and its page faults then cost more than the
# matrix product that fills it (glibc's largest mmap threshold); 6M floats stay below.
CPU_TILE_ELEMENTS = 6_000_000


def queries_at_once(device: torch.device, num_candidates: int, block_size: int) -> int:
    """Return how many queries to score at a time: at most `block_size`, on a CPU fewer where that is faster."""
    if device.type != "cpu":
        return block_size
    return min(block_size, max(16, CPU_TILE_ELEMENTS // max(num_candidates, 1)))


def to_tensor(vectors: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Wrap float32 `[N, D]`, also a read-only memory map, as a tensor that is only read; a device gets a copy."""
    with warnings.catch_warnings():
        # torch has no read-only tensors; we never write.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(vectors)).to(device)


class RelationScores:
    """One relation's view of the scorer: `lhs` `[N_l, D]` and `rhs` `[N_r, D]` are its two entity types' tables.

    A *side* is the one whose entities are candidates; the queries are the other side's.
    """

    def __init__(self, scorer: Scorer, relation: int, lhs: torch.Tensor, rhs: torch.Tensor) -> None:
        self.scorer = scorer
        self.tables: dict[Side, torch.Tensor] = {"lhs": lhs, "rhs": rhs}
        self.device = lhs.device
        self._relation = torch.tensor([relation], device=lhs.device)

    def num_entities(self, side: Side) -> int:
        """Entities of the type on `side`."""
        return self.tables[side].shape[0]

    def encode_queries(self, side: Side, rows: np.ndarray | slice | None = None) -> torch.Tensor:
        """Return queries for candidates of `side`, `[Q, D]`: `rows` (int64 `[Q]`) of the other side, or all of it."""
        return self.scorer.queries(side, self._vectors(other(side), rows), self._relation)[0]

    def encode_candidates(self, side: Side, rows: np.ndarray | slice | None = None) -> torch.Tensor:
        """Return candidates, `[N, D]`: `rows` (int64 `[N]`) of `side`, or all of it."""
        return self.scorer.candidates(side, self._vectors(side, rows), self._relation)[0]

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores `[..., P, N]` of encoded queries `[..., P, D]` and candidates `[..., N, D]`."""
        return self.scorer.compare(queries, candidates)

    def _vectors(self, side: Side, rows: np.ndarray | slice | None) -> torch.Tensor:
        """Return a side's vectors as the one chunk that the scorer takes, `[1, N, D]`."""
        table = self.tables[side]
        if isinstance(rows, np.ndarray):
            return table[torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)].unsqueeze(0)
        return table[rows or slice(None)].unsqueeze(0)

    def block(self, num_candidates: int, block_size: int) -> int:
        """Return how many queries to score at a time."""
        return queries_at_once(self.device, num_candidates, block_size)
