"""Vectors of an earlier model that hold known ids: by a pull towards them, or for good.

The pull is the L2 penalty on the distance to the earlier parameters that TwHIN proposes against parameter drift
(El-Kishky et al., 2022, arXiv 2202.05387).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from twhin_pipeline.model.batch import EdgeBatch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Anchor:
    """The earlier vectors of one entity type, and how they hold its known ids."""

    vectors: Array
    """float32 `[M, D]` of the earlier model, mapped from a file: a step reads the rows that it needs."""
    earlier_row: Array
    """The row there of each id, int64 `[ids]`; -1 where the earlier model has not trained it."""
    pull: float = 0.0
    """Weight of the squared distance to the earlier vector, once for each edge of the id in a step."""
    frozen: bool = False
    """Whether known ids keep their vectors."""

    def rows_of(self, ids: torch.Tensor) -> Array:
        """Return the earlier rows of `ids` (int64 `[U]`), or -1. A table may have rows that are no id's."""
        wanted = ids.cpu().numpy()
        rows = np.full(len(wanted), -1, np.int64)
        inside = wanted < len(self.earlier_row)
        rows[inside] = self.earlier_row[wanted[inside]]
        return rows

    def frozen_rows(self, ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Return `vectors` `[U, D]` of the rows `ids`, without a gradient where they are known."""
        known = torch.from_numpy(self.rows_of(ids) >= 0).to(vectors.device)
        return torch.where(known.unsqueeze(1), vectors.detach(), vectors)

    def penalty(self, ids: torch.Tensor, vectors: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """Return the pull on rows, a scalar.

        Args:
            ids: `int64 [U]`, the rows.
            vectors: `float32 [U, D]`, theirs.
            count: `int64 [U]` how many ends of edges each one is.
        """
        earlier = self.rows_of(ids)
        held = torch.from_numpy(np.flatnonzero(earlier >= 0)).to(vectors.device)
        before = torch.from_numpy(np.ascontiguousarray(self.vectors[earlier[earlier >= 0]])).to(vectors.device)
        squares = (vectors[held] - before).square().sum(1)
        return self.pull * (squares * count[held]).sum()


def pull(
    anchors: Mapping[str, Anchor], tables: Sequence[str], vectors: Sequence[torch.Tensor], batch: EdgeBatch
) -> torch.Tensor:
    """Return the pull on the vectors that the batch's edges use, a scalar.

    Args:
        anchors: By table.
        tables: All tables, in the configuration's order.
        vectors: `float32 [U_t, D]` of each table: the batch's rows.
        batch: The edges; those of weight 0 do not count.
    """
    total = vectors[0].new_zeros(())
    if not any(anchor.pull for anchor in anchors.values()):
        return total
    real = batch.weight > 0
    index = torch.cat([batch.lhs_index[real], batch.rhs_index[real]])
    counts = torch.bincount(index, minlength=sum(map(len, vectors))).split([len(part) for part in vectors])
    for table, part, count in zip(tables, vectors, counts, strict=True):
        anchor = anchors.get(table)
        if anchor is not None and anchor.pull:
            used = count.nonzero().squeeze(1)
            total = total + anchor.penalty(batch.ids[table][used], part[used], count[used])
    return total
