"""Rows picked out of a matrix, with a backward pass that adds up all of their gradients at once; and dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def take(x: torch.Tensor, *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `x[i]` for each index: of `x [U, D]` and `i` int64 `[...]`, `[..., D]`.

    Several indices into the same matrix cost one gradient of its size, and not one each.
    """
    found: tuple[torch.Tensor, ...] = _Take.apply(x, *index)
    return found


def pick(x: torch.Tensor, *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `x[g, i[g]]` for each chunk g and each index: of `x [G, Q, D]` and `i` int64 `[G, C]`, `[G, C, D]`."""
    return take(x.flatten(0, 1), *(i + starts(x) for i in index))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*index)
        ctx.shape = x.shape
        return tuple(x.index_select(0, i.flatten()).view(*i.shape, x.shape[1]) for i in index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].new_zeros(ctx.shape)
        for index, gradient in zip(ctx.saved_tensors, gradients, strict=True):
            add_to_rows(total, index.flatten(), gradient.reshape(-1, ctx.shape[1]))
        return total, *(None for _ in gradients)


def starts(x: torch.Tensor) -> torch.Tensor:
    """Return where each chunk's rows begin in `x.flatten(0, 1)`, of `x [G, Q, D]`: int64 `[G, 1]`."""
    return torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]


def add_to_rows(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `rows [M, D]` to the rows `index` (int64 `[M]`) of `total [U, D]`, in an order that every run repeats."""
    if _adds_in_order(total):
        total.index_add_(0, index, rows)
    else:
        total += torch.ops.aten.embedding_dense_backward(rows, index, len(total), -1, False)


def _adds_in_order(total: torch.Tensor) -> bool:
    """Tell whether `index_add_` does: on CUDA its order differs from run to run, and an embedding's gradient's not."""
    return total.device.type == "cpu"


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements to 0 with probability `p` and divide the others by 1 - p (p to 1 in 65,536): `x`'s shape.

    On the CPU torch draws a number an element, which takes longer than the arithmetic; here one draw serves four.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    level = round(p * 2**16)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = drawn[: x.numel()].view(x.shape) >= level - 2**15
    return x * (kept * (1 / (1 - level / 2**16)))
