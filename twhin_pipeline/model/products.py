"""Dot products of a batch's edges, and of their queries with candidates, on the CPU, in few passes over the rows."""

from __future__ import annotations

from typing import Any

import torch

from twhin_pipeline.kernels import parallel
from twhin_pipeline.model.rows import starts

# Fewer are not worth a second thread.
PAIRS_A_THREAD = 500


def products(
    a: torch.Tensor,
    b: torch.Tensor,
    of_a: torch.Tensor,
    of_b: torch.Tensor,
    scale: float,
    inside: tuple[torch.Tensor, ...],
    pools: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, ...]:
    """Return, times `scale`, the products of pairs of rows, and those of rows with their chunk's candidates.

    Written out by hand, since each of autograd's copies, sums and gradients of 0 is a pass over all rows.

    Args:
        a: `float32 [G, P, D]`, on the CPU.
        b: `float32 [G, Q, D]`.
        of_a: `int64 [G, C]` the pairs' rows of `a` in each chunk.
        of_b: `int64 [G, C]` the pairs' rows of `b`.
        scale: A factor.
        inside: `int64 [G, n]` the rows of `b` that are candidates of all rows of `a`; and, optionally, `[G, n]` the
            rows of `a` that are candidates of those of `b`.
        pools: As many, `float32 [G, K, D]` each: further candidates.

    Returns:
        `[G, C]`; `[G, P, n + K]`; and, for two pools, `[G, Q, n + K]`.
    """
    results: tuple[torch.Tensor, ...] = _Products.apply(a, b, of_a, of_b, scale, len(pools), *pools, *inside)
    return results


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        of_a: torch.Tensor,
        of_b: torch.Tensor,
        scale: float,
        sides: int,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        a, b, shape = a.contiguous(), b.contiguous(), of_a.shape
        of_a, of_b = ((index + starts(x)).flatten() for x, index in ((a, of_a), (b, of_b)))
        pools, inside = inputs[:sides], inputs[sides:]
        pairs = a.new_empty(len(of_a))
        parallel.dots(len(pairs), PAIRS_A_THREAD, *_arrays(a, of_a, b, of_b), pairs.numpy())
        results, candidates, window = [pairs.mul_(scale).view(shape)], [], []
        for x, y, index, pool in zip((a, b), (b, a), inside, pools, strict=False):
            window.append((index + starts(y)).flatten())
            own = y.flatten(0, 1).index_select(0, window[-1]).view(*index.shape, y.shape[2])
            # The candidates are the fewest rows, so they get the factor.
            candidates.append(torch.cat([own, pool], dim=1).mul_(scale))
            results.append(x @ candidates[-1].transpose(1, 2))
        ctx.save_for_backward(a, b, of_a, of_b, *candidates, *window)
        ctx.scale, ctx.sides, ctx.width = scale, sides, inside[0].shape[1] if inside else 0
        return tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, pairs: torch.Tensor, *gradients: torch.Tensor) -> Any:
        a, b, of_a, of_b, *saved = ctx.saved_tensors
        candidates, window = saved[: ctx.sides], saved[ctx.sides :]
        totals = [g @ others for g, others in zip(gradients, candidates, strict=True)]
        totals += [torch.zeros_like(x) for x in (a, b)[len(totals) :]]
        pools = []
        for x, gradient, index, other in zip((a, b), gradients, window, totals[::-1], strict=False):
            change = (gradient.transpose(1, 2) @ x).mul_(ctx.scale)
            other.view(-1, x.shape[2]).index_add_(0, index, change[:, : ctx.width].reshape(-1, x.shape[2]))
            pools.append(change[:, ctx.width :])
        change = (pairs * ctx.scale).reshape(-1).contiguous()
        parallel.dots_gradient(2, 1, *_arrays(a, of_a, b, of_b, change, *totals))
        return *totals, None, None, None, None, *pools, *(None for _ in pools)


def _arrays(*tensors: torch.Tensor) -> list[Any]:
    """Return NumPy's views, rows of all chunks end to end; never copies, since some are written to."""
    return [x.detach().view(-1, x.shape[2]).numpy() if x.dim() == 3 else x.detach().numpy() for x in tensors]
