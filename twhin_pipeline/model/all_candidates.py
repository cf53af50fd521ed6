"""Every entity of a type as a candidate (1-vs-all): the loss and its gradients, without ever holding all scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import Loss
from twhin_pipeline.words import Side

Compare = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

BLOCK_BYTES = 24 << 20
"""The size of a block's scores on a CPU. A few tensors of this size are alive at a time; larger ones do not fit the
caches."""
GPU_SHARE = 128
"""On a GPU a block takes this part of its memory: small ones leave it waiting for kernels (benchmarks/gpu.py)."""


def block_bytes(device: torch.device) -> int:
    """Return the size of a block's scores on a device."""
    if device.type != "cuda":
        return BLOCK_BYTES
    return int(torch.cuda.get_device_properties(device).total_memory) // GPU_SHARE


@dataclass(frozen=True)
class AllCandidates:
    """Edges of one side whose candidates are the same: P queries, N candidates, E edges."""

    queries: torch.Tensor
    """`float32 [P, D]`, prepared; each is asked by an edge."""
    candidates: torch.Tensor
    """`float32 [N, D]`, prepared."""
    edge: torch.Tensor
    """`int64 [E]` where the edges are in the batch's `[G * C]`, ordered by query."""
    query: torch.Tensor
    """`int64 [E]` each edge's query; ascending."""
    mask: torch.Tensor
    """`int64 [M, 2]` (query, candidate) to be masked; queries ascend."""
    compare: Compare
    """The logits `[P', N]` of queries `[P', D]` and candidates `[N, D]`."""
    log_q: torch.Tensor | None = None
    """`float32 [N]` the log of the probability with which each candidate is one; None where it makes no difference."""

    @classmethod
    def of_chunks(
        cls,
        side: Side,
        batch: EdgeBatch,
        chosen: torch.Tensor,
        queries: torch.Tensor,
        candidates: torch.Tensor,
        compare: Compare,
        log_q: torch.Tensor | None = None,
    ) -> AllCandidates:
        """Take the real edges of some chunks.

        Args:
            side: The side that is corrupted.
            batch: G chunks of C edges, with `everything`.
            chosen: `bool [G]` the chunks.
            queries: `[G, Q, D]` of all chunks, prepared.
            candidates: `[N, D]` of the chosen chunks, prepared.
            compare: The scorer's.
            log_q: `[N]` the log of the probability with which each candidate is one.
        """
        width = queries.shape[1]
        chunk = torch.arange(len(chosen), device=chosen.device).unsqueeze(1)
        edge = ((batch.weight > 0) & chosen.unsqueeze(1)).flatten().nonzero().squeeze(1)
        requested, query = (getattr(batch, f"{side}_query") + chunk * width).flatten()[edge].unique(return_inverse=True)
        order = query.argsort(stable=True)
        pairs = getattr(batch, f"{side}_mask")
        owner = pairs[:, 0] * width + pairs[:, 1]
        row = torch.searchsorted(requested, owner)
        # Chunks that are not chosen have masks too, and so have queries whose edges weigh nothing.
        kept = (requested[row.clamp(max=len(requested) - 1)] == owner) if len(requested) else row < 0
        return cls(
            queries=F.embedding(requested, queries.flatten(0, 1)).float(),
            candidates=candidates.float(),
            edge=edge[order],
            query=query[order],
            mask=torch.stack([row[kept], pairs[kept, 2]], dim=1),
            compare=compare,
            log_q=log_q,
        )

    def loss(
        self, positive: torch.Tensor, weight: torch.Tensor, loss: Loss, autocast: torch.autocast
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the edges' losses, and each edge's loss.

        Args:
            positive: `[E]` logits of the edges.
            weight: `[E]`.
            loss: Of the edges on this side.
            autocast: What comparisons run under.

        Returns:
            A scalar with gradient, and `[E]` without.
        """

        correction = None if self.log_q is None else loss.candidate_temperature * self.log_q

        def compare(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
            with autocast:
                logits = self.compare(queries, candidates).float()
            return logits if correction is None else logits - correction

        total, edge_loss = _BlockedLoss.apply(
            self.queries, self.candidates, positive, weight, self.query, self.mask, compare, loss
        )
        return total, edge_loss


class _BlockedLoss(torch.autograd.Function):
    """The sum of the edges' losses, a block of queries at a time.

    The gradient of a sum over edges is a sum over blocks, and a block's needs nothing of another's: it is taken as soon
    as the block is scored, whose scores are then freed. What is kept for the backward pass has the sizes of the
    inputs. (The weights are constants.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        candidates: torch.Tensor,
        positive: torch.Tensor,
        weight: torch.Tensor,
        query: torch.Tensor,
        mask: torch.Tensor,
        compare: Compare,
        loss: Loss,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(1, block_bytes(queries.device) // (4 * max(len(candidates), 1)))
        starts = torch.arange(0, len(queries) + size, size, device=queries.device)
        edge_cuts = torch.searchsorted(query, starts).tolist()
        mask_cuts = torch.searchsorted(mask[:, 0].contiguous(), starts).tolist()
        query_gradient, positive_gradient = torch.empty_like(queries), torch.empty_like(positive)
        candidate_gradient = torch.zeros_like(candidates)
        edge_loss = torch.empty_like(positive)
        all_candidates = candidates.detach().requires_grad_()
        for block in range(len(starts) - 1):
            first = block * size
            span = slice(first, first + size)
            requested = queries[span].detach().requires_grad_()
            masked = mask[mask_cuts[block] : mask_cuts[block + 1]]
            with torch.enable_grad():
                logits = compare(requested, all_candidates)
                mask_logits(logits, (masked[:, 0] - first, masked[:, 1]))
                pooled = loss.pool(logits)
            shared = pooled.detach().requires_grad_()
            pooled_gradient = torch.zeros_like(shared)
            begin, end = edge_cuts[block], edge_cuts[block + 1]
            # Where a loss looks at each candidate beside each edge, that too is bounded by a block's size.
            stride = size if pooled.dim() == 2 else max(end - begin, 1)
            for i in range(begin, end, stride):
                part = slice(i, min(i + stride, end))
                own = positive[part].detach().requires_grad_()
                with torch.enable_grad():
                    losses = loss.edge(own, _rows(shared, query[part] - first))
                    gradients = torch.autograd.grad((losses * weight[part]).sum(), (own, shared))
                edge_loss[part] = losses.detach()
                positive_gradient[part] = gradients[0]
                pooled_gradient += gradients[1]
            query_gradient[span], part_gradient = torch.autograd.grad(
                pooled, (requested, all_candidates), pooled_gradient
            )
            candidate_gradient += part_gradient
        ctx.save_for_backward(query_gradient, candidate_gradient, positive_gradient)
        ctx.mark_non_differentiable(edge_loss)
        return (edge_loss * weight).sum(), edge_loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        queries, candidates, positive = (saved * gradients[0] for saved in ctx.saved_tensors)
        return queries, candidates, positive, None, None, None, None, None


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `x[index]`; an embedding's backward pass is faster where there are rows to add up."""
    return F.embedding(index, x) if x.dim() == 2 else x.index_select(0, index)


def mask_logits(logits: torch.Tensor, index: tuple[torch.Tensor, ...]) -> None:
    """Set `logits[index]` to -inf in place.

    Autograd need not know: a loss gives such logits no gradient, and so there is none to take away again, which would
    cost a copy of all of them. (Should a comparator's last operation need its result, the backward pass says so.)
    """
    logits.detach().index_put_(index, logits.new_tensor(float("-inf")))
