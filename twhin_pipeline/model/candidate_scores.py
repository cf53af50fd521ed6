"""Scores of a batch's edges, and of its queries with their candidates; or their losses without keeping scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from twhin_pipeline.model import chunk_losses
from twhin_pipeline.model.all_candidates import mask_logits
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import SumOfExponentials
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.words import SIDES, Side, other


@dataclass(frozen=True)
class FusedLoss:
    """A loss that can be computed together with the scores, which then need not be kept."""

    loss: SumOfExponentials
    weight: Mapping[Side, torch.Tensor]
    """`float32 [G, C]` of each side: the factor on each edge's loss in their sum."""
    log_q: bool
    """Whether logits are corrected by how often a candidate is expected."""


@dataclass(frozen=True)
class CandidateScores:
    """The prepared vectors of a batch's queries and candidates, and what is computed from them."""

    scorer: Scorer
    batch: EdgeBatch
    queries: Mapping[Side, torch.Tensor]
    """`[G, Q, D]` of each side."""
    answers: Mapping[Side, torch.Tensor]
    """`[G, Q', D]` of each side: its entities in the batch's edges, prepared as candidates."""
    pools: Mapping[Side, torch.Tensor]
    """`[G, K, D]` of each side that is corrupted and has a pool: its sampled entities, as they were looked up."""

    @property
    def side_groups(self) -> list[tuple[Side, ...]]:
        """The sides that are scored together: the first one's queries with all of its answers."""
        if self.scorer.reciprocal:
            return [(side,) for side in SIDES if side in self.queries]
        return [("lhs",)] if list(self.pools) == ["lhs"] else [("rhs", "lhs")]

    def logits(self) -> tuple[dict[Side, torch.Tensor], dict[Side, torch.Tensor]]:
        """Return by side the edges' logits `[G, C]`, and, where there are pools, the candidates' `[G, Q, n + K]`.

        The latter are -inf where masked.
        """
        edges: dict[Side, torch.Tensor] = {}
        candidates: dict[Side, torch.Tensor] = {}
        for group in self.side_groups:
            side, sides = group[0], [s for s in group if s in self.pools]
            each = [self._candidates(s) for s in sides]
            in_batch, pools = tuple(i for i, _ in each), tuple(pool for _, pool in each)
            of_edges, *of_candidates = self.scorer.edges(
                self.queries[side], self.answers[side], *self._rows_of_edges(side), in_batch, pools
            )
            edges |= self._by_side(group, of_edges)
            candidates |= dict(zip(sides, of_candidates, strict=True))
        for side, logits in candidates.items():
            self._mask(side, logits)
        return edges, candidates

    def can_fuse(self) -> bool:
        """Tell whether `chunk_losses` can compute the losses, and is faster than keeping scores."""
        batch = self.batch
        return (
            chunk_losses.suits(len(batch.relation))
            and all(any(side in self.pools for side in group) for group in self.side_groups)
            and all(batch.in_batch.shape[1] + pool.shape[1] for pool in self.pools.values())
            and self.scorer.multiplies(*self.queries.values(), *self.pools.values())
        )

    def fused(self, fused: FusedLoss) -> tuple[torch.Tensor, dict[Side, torch.Tensor], dict[Side, torch.Tensor]]:
        """Compute the losses chunk by chunk, without keeping scores.

        Returns:
            The weighted sum of the losses, a scalar; and by side, without gradients, the edges' logits `[G, C]` and
            losses `[G, C]`.
        """
        totals = []
        edges: dict[Side, torch.Tensor] = {}
        losses: dict[Side, torch.Tensor] = {}
        for group in self.side_groups:
            sides = [side for side in group if side in self.pools]
            candidates = []
            for side in sides:
                in_batch, pool = self._candidates(side)
                log_q = getattr(self.batch, f"{side}_log_q") if fused.log_q else None
                mask, weight = getattr(self.batch, f"{side}_mask"), fused.weight[side]
                candidates.append(chunk_losses.Candidates(in_batch, pool, mask, log_q, weight))
            a, b, rows = self.queries[group[0]], self.answers[group[0]], self._rows_of_edges(group[0])
            scale, real = self.scorer.scale, self.batch.num_in_batch
            total, of_edges, *each = chunk_losses.losses(a, b, *rows, scale, fused.loss, real, *candidates)
            totals.append(total)
            edges |= self._by_side(group, of_edges)
            losses |= dict(zip(sides, each, strict=True))
        return torch.stack(totals).sum(), edges, losses

    def _candidates(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a side's candidates: those in the batch, as rows of its answers `[G, n]`, and the prepared pool."""
        in_batch = query_of_edges(self.batch, other(side)).gather(1, self.batch.in_batch)
        return in_batch, self.scorer.candidates(side, self.pools[side], self.batch.relation)

    def _rows_of_edges(self, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        """Return each edge's row of a side's queries and of its answers, int64 `[G, C]`."""
        return query_of_edges(self.batch, side), query_of_edges(self.batch, other(side))

    def _by_side(self, group: tuple[Side, ...], edges: torch.Tensor) -> dict[Side, torch.Tensor]:
        """Return the edges' logits by side; without reciprocal relations both sides' are the same."""
        return dict.fromkeys(group if self.scorer.reciprocal else SIDES, edges)

    def _mask(self, side: Side, logits: torch.Tensor) -> None:
        """Set `logits [G, Q, n + K]` to -inf where masked."""
        width = self.batch.in_batch.shape[1]
        padding = torch.arange(width, device=logits.device) >= self.batch.num_in_batch[:, None]
        # On a GPU, asking whether there is any padding costs more than masking.
        if logits.device.type != "cpu" or bool(padding.any()):
            logits.detach()[..., :width].masked_fill_(padding.unsqueeze(1), float("-inf"))
        mask_logits(logits, getattr(self.batch, f"{side}_mask").unbind(1))


def query_of_edges(batch: EdgeBatch, side: Side) -> torch.Tensor:
    """Return each edge's query on a side, int64 `[G, C]`: its kept entity, which is an answer of the other side."""
    return batch.lhs_query if side == "lhs" else batch.rhs_query
