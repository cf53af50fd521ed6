"""The losses of a step's edges and their gradients, on the CPU: a chunk at a time, while it is in the caches.

Autograd computes the scores of all chunks, then their softmax, the losses and the gradients: each is a pass over more
than the caches hold. If a loss is a function of one sum of exponentials per query, its gradient is known as soon as
that sum is. So here a chunk's rows are read once, its scores stay in the caches, and its gradients are written once.
Chunks run in torch's threads, and each is multiplied by the BLAS that numba uses, SciPy's.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from twhin_pipeline.kernels import vector_kernels
from twhin_pipeline.kernels.compiled import compiled
from twhin_pipeline.kernels.parallel import ParallelLoop, floats, integers, size_of
from twhin_pipeline.model.losses import SumOfExponentials

Array = np.ndarray[Any, Any]

# The least share of the threads' time that is used. Below it, products in which all threads take part are faster.
MIN_BUSY = 0.6


@dataclass(frozen=True)
class Candidates:
    """The candidates of one side's queries, and the weights of its edges' losses; G chunks of C edges."""

    inside: torch.Tensor
    """`int64 [G, n]` the other side's rows that are candidates."""
    pool: torch.Tensor
    """`float32 [G, K, D]` further candidates; n + K is 1 at least."""
    mask: torch.Tensor
    """`int64 [M, 3]` (chunk, query, candidate) to be masked; chunks ascend."""
    log_q: torch.Tensor | None
    """`float32 [G, n + K]` to be subtracted from the logits, in units of the loss's temperature; None: nothing."""
    weight: torch.Tensor
    """`float32 [G, C]` by which each edge's loss is multiplied in the sum."""


def suits(chunks: int) -> bool:
    """Tell whether a step of so many chunks is better taken chunk by chunk."""
    threads = torch.get_num_threads()
    rounds = -(-chunks // threads)
    return chunks > 0 and chunks >= MIN_BUSY * rounds * threads


def losses(
    a: torch.Tensor,
    b: torch.Tensor,
    of_a: torch.Tensor,
    of_b: torch.Tensor,
    scale: float,
    loss: SumOfExponentials,
    real: torch.Tensor,
    *sides: Candidates,
) -> tuple[torch.Tensor, ...]:
    """Return the weighted sum of the edges' losses, their logits, and each edge's loss on each side.

    Args:
        a: `float32 [G, P, D]`, on the CPU.
        b: `float32 [G, Q, D]`.
        of_a: `int64 [G, C]` the edges' rows of `a`. Rows after a chunk's last are padding.
        of_b: `int64 [G, C]` the edges' rows of `b`.
        scale: A logit is the product of two rows times this.
        loss: Of an edge on one side.
        real: `int64 [G]` how many of the n rows inside are candidates.
        sides: Candidates of the rows of `a`; and, optionally, those of the rows of `b`.

    Returns:
        A scalar, the only one with a gradient; `[G, C]`; and `[G, C]` of each side.
    """
    results: tuple[torch.Tensor, ...] = _Losses.apply(
        a, b, *(side.pool for side in sides), of_a, of_b, scale, loss, real, sides
    )
    return results


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor, *inputs: Any) -> tuple[torch.Tensor, ...]:
        *pools, of_a, of_b, scale, loss, real, sides = inputs
        a, b, (chunks, edges) = a.contiguous(), b.contiguous(), of_a.shape
        positive, each = a.new_empty(chunks, edges), [a.new_empty(chunks, edges) for _ in sides]
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b, *pools)]
        terms = torch.tensor([scale, loss.positive_temperature, loss.candidate_temperature, loss.own, len(sides)])
        arguments = [a, b, of_a, of_b, *gradients[:2], positive, real, terms]
        for side, pool, loss_of_edges, change in zip(sides, pools, each, gradients[2:], strict=True):
            start = torch.searchsorted(side.mask[:, 0].contiguous(), torch.arange(chunks + 1))
            log_q = a.new_empty(0) if side.log_q is None else side.log_q
            arguments += [side.inside, pool, side.mask, start, log_q, side.weight, loss_of_edges, change]
        with _blas().limit(limits=1):
            _chunks(chunks, 1, *(_array(x) for x in arguments))
        total = torch.stack([(x * side.weight).sum() for x, side in zip(each, sides, strict=True)]).sum()
        ctx.gradients = gradients
        ctx.mark_non_differentiable(positive, *each)
        ctx.set_materialize_grads(False)
        return total, positive, *each

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor | None, *_: torch.Tensor | None) -> Any:
        gradients = ctx.gradients
        del ctx.gradients  # passed on, and perhaps changed there
        factor = 0.0 if gradient is None else float(gradient)
        if factor != 1:
            for x in gradients:
                x.mul_(factor)
        return *gradients, *(None for _ in range(6))


@functools.cache
def _blas() -> ThreadpoolController:
    """Return the limiter of BLAS threads: several threads call BLAS at a time, and it must start no others."""
    importlib.import_module("scipy.linalg.cython_blas")  # only a loaded library can be limited
    return ThreadpoolController().select(user_api="blas")


def _array(x: torch.Tensor) -> Array:
    """Return NumPy's view, rows of all chunks end to end; a copy only of what is not in order, and is only read."""
    x = x.detach().contiguous()
    if x.dtype == torch.int64:
        return x.flatten().numpy()
    return (x.view(-1, x.shape[2]) if x.dim() == 3 else x).numpy()


# Positions of the arguments in the frame: a side has eight, which begin at the first number, or eight after it.
_FIRST_SIDE, _OF_A_SIDE = 9, 8


@ParallelLoop
def _chunks(first: int, last: int, frame: int) -> None:
    chunks, terms = size_of(frame), floats(frame, 8)[:, 0]
    positive, edges = floats(frame, 6), floats(frame, 6).shape[1]
    both = terms[4] > 1
    rows = len(floats(frame, 0)) // chunks, len(floats(frame, 1)) // chunks
    a_workspace = _workspace(frame, _FIRST_SIDE, chunks, rows[0])
    b_workspace = _workspace(frame, _FIRST_SIDE + _OF_A_SIDE, chunks, rows[1]) if both else a_workspace
    # The gradient of each edge's own product, to which both sides add.
    change = np.empty(edges, np.float32)
    for g in range(first, last):
        a, b = _part(floats(frame, 0), chunks, g), _part(floats(frame, 1), chunks, g)
        a_change, b_change = _part(floats(frame, 4), chunks, g), _part(floats(frame, 5), chunks, g)
        of_a, of_b = _part(integers(frame, 2), chunks, g), _part(integers(frame, 3), chunks, g)
        vector_kernels.dots(a, of_a, b, of_b, positive[g])
        positive[g] *= terms[0]
        change[:] = 0
        _side(frame, _FIRST_SIDE, g, a, of_a, b, a_workspace, a_change, change)
        if both:
            _side(frame, _FIRST_SIDE + _OF_A_SIDE, g, b, of_b, a, b_workspace, b_change, change)
            _add_inside(frame, _FIRST_SIDE + _OF_A_SIDE, g, b_workspace, a_change)
        else:
            b_change[:] = 0
        _add_inside(frame, _FIRST_SIDE, g, a_workspace, b_change)
        change *= terms[0]
        vector_kernels.add_scaled_rows(a_change, of_a, b, of_b, change)
        vector_kernels.add_scaled_rows(b_change, of_b, a, of_a, change)


@compiled(inline="always")
def _part(x: Array, chunks: int, g: int) -> Array:
    """Return a chunk's share of the rows of all."""
    size = len(x) // chunks
    return x[g * size : (g + 1) * size]


class _Workspace(NamedTuple):
    """A thread's memory for one side of a chunk of Q queries and N candidates, used for one chunk after another."""

    candidates: Array
    """`[N, D]`, times the factor of the logits."""
    candidates_change: Array
    """`[N, D]`, their gradient."""
    scores: Array
    """`[Q, N]`; then their softmax, and then their gradient."""
    total: Array
    """`[Q]` the logarithms of the sums of exponentials."""
    total_change: Array
    """`[Q]`, their gradient."""


@compiled()
def _workspace(frame: int, at: int, chunks: int, rows: int) -> _Workspace:
    pool = floats(frame, at + 1)
    size = (len(integers(frame, at)) + len(pool)) // chunks
    candidates, scores = np.empty((2, size, pool.shape[1]), np.float32), np.empty((rows, size), np.float32)
    return _Workspace(candidates[0], candidates[1], scores, np.empty(rows, np.float32), np.empty(rows, np.float32))


@compiled()
def _side(
    frame: int,
    at: int,
    g: int,
    rows: Array,
    query: Array,
    others: Array,
    workspace: _Workspace,
    rows_change: Array,
    change: Array,
) -> None:
    """Write the losses of a chunk's edges on a side, and the gradients of its queries, of candidates and of the pool.

    The side's part of the gradient of the edges' own products is added to `change [C]`.
    """
    chunks, terms = size_of(frame), floats(frame, 8)[:, 0]
    inside, pool = _part(integers(frame, at), chunks, g), _part(floats(frame, at + 1), chunks, g)
    mask, start = integers(frame, at + 2), integers(frame, at + 3)
    log_q, weight, loss = floats(frame, at + 4), floats(frame, at + 5)[g], floats(frame, at + 6)[g]
    candidates, total, total_change = workspace.candidates, workspace.total, workspace.total_change
    positive, width = floats(frame, 6)[g], len(inside)
    tp, tn, own = terms[1], terms[2], terms[3] > 0
    # The factor goes with the candidates, of which there are fewest.
    factor = terms[0] / tn
    for j in range(width):
        candidates[j] = factor * others[inside[j]]
    for j in range(len(pool)):
        candidates[width + j] = factor * pool[j]
    # Queries after the last edge's are padding.
    used = np.max(query) + 1
    rows_change[used:] = 0
    scores = workspace.scores[:used]
    np.dot(rows[:used], candidates.T, scores)
    if len(log_q):
        scores -= log_q[g]
    real = integers(frame, 7)[g]
    if real < width:
        scores[:, real:width] = -np.inf
    for i in range(start[g], start[g + 1]):
        if mask[3 * i + 1] < used:
            scores[mask[3 * i + 1], mask[3 * i + 2]] = -np.inf
    vector_kernels.softmax_in_place(scores, total)
    total_change[:used] = 0
    for e in range(len(query)):
        q = query[e]
        x = total[q] - positive[e] / tp
        if own:
            # log(exp(positive) + exp(total)) - positive, and its derivative by the difference.
            small = np.exp(-abs(x))
            loss[e] = max(x, np.float32(0)) + np.log1p(small)
            slope = (np.float32(1) if x > 0 else small) / (np.float32(1) + small)
        else:
            has_candidate = total[q] != -np.inf
            loss[e], slope = (x, np.float32(1)) if has_candidate else (np.float32(0), np.float32(0))
        total_change[q] += slope * weight[e]
        change[e] -= slope * weight[e] / tp
    vector_kernels.scale_rows(scores, total_change)
    np.dot(scores, candidates, rows_change[:used])
    np.dot(scores.T, rows[:used], workspace.candidates_change)
    pool_change = _part(floats(frame, at + 7), chunks, g)
    for j in range(len(pool)):
        pool_change[j] = factor * workspace.candidates_change[width + j]


@compiled()
def _add_inside(frame: int, at: int, g: int, workspace: _Workspace, others_change: Array) -> None:
    """Add the gradients of candidates that are the other side's rows to those rows'."""
    terms, inside = floats(frame, 8)[:, 0], _part(integers(frame, at), size_of(frame), g)
    factor = terms[0] / terms[2]
    for j in range(len(inside)):
        others_change[inside[j]] += factor * workspace.candidates_change[j]
