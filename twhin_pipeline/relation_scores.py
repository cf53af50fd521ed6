"""Scores of one relation's queries against candidates, by the scorer that training uses."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from twhin_pipeline.scorer import Scorer

SIDES = ("lhs", "rhs")
# An allocation above 32 MiB goes back to the system when it is freed, and its page faults then cost more than the
# matrix product that fills it (glibc's largest mmap threshold); 6M floats stay below.
CPU_TILE_ELEMENTS = 6_000_000


def other(side: str) -> str:
    """Return the opposite side."""
    return "lhs" if side == "rhs" else "rhs"


def to_tensor(vectors: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """Wrap float32 `[N, D]`, also a read-only memory map, as a tensor that is only read; a device gets a copy."""
    with warnings.catch_warnings():
        # torch has no read-only tensors; we never write.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(vectors)).to(device)


class RelationScores:
    """One relation's view of the scorer: `lhs` `[N_l, D]` and `rhs` `[N_r, D]` are its two entity types' tables.

    A "side" is the one whose entities are candidates; the queries are the other side's.
    """

    def __init__(self, scorer: Scorer, relation: int, lhs: torch.Tensor, rhs: torch.Tensor) -> None:
        self.scorer = scorer
        self.tables = {"lhs": lhs, "rhs": rhs}
        self.device = lhs.device
        self._relation = torch.tensor([relation], device=lhs.device)

    def num_entities(self, side: str) -> int:
        """Entities of the type on `side`."""
        return self.tables[side].shape[0]

    def encode(self, side: str, rows: np.ndarray | None = None) -> torch.Tensor:
        """Return what is compared, `[N, D]`, for `rows` (int64 `[N]`) of a side, or for all of them."""
        table = self.tables[side]
        vectors = table if rows is None else table[torch.from_numpy(np.ascontiguousarray(rows)).to(self.device)]
        return self.encode_vectors(side, vectors)

    def encode_vectors(self, side: str, vectors: torch.Tensor) -> torch.Tensor:
        """Apply the relation's operator (lhs) and the comparator's preparation (both) to `[N, D]`."""
        if side == "lhs":
            return self.scorer.transform(vectors.unsqueeze(0), self._relation)[0]
        return self.scorer.prepare(vectors)

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores `[..., P, N]` of encoded queries `[..., P, D]` and candidates `[..., N, D]`."""
        return self.scorer.compare(queries, candidates)

    def block(self, num_candidates: int, block_size: int) -> int:
        """Return how many queries to score at a time: at most `block_size`, fewer where that is faster."""
        if self.device.type != "cpu":
            return block_size
        return min(block_size, max(16, CPU_TILE_ELEMENTS // max(num_candidates, 1)))
