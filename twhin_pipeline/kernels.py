"""Loops over vectors' rows and scores that no library has, compiled for the CPU by numba.

They let other threads run, and are called on parts of the work by `in_parts`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from twhin_pipeline.compiled import compiled

Array = np.ndarray[Any, Any]


def in_parts(work: Callable[[slice], object], size: int, least: int = 1) -> None:
    """Call `work` with slices that make up `range(size)`, as many at a time as torch may use threads.

    Args:
        work: To be called, perhaps in another thread.
        size: Of the whole.
        least: Of a slice; a whole smaller than two of these is one slice, in this thread.
    """
    parts = max(1, min(torch.get_num_threads(), size // max(least, 1)))
    if parts == 1:
        work(slice(0, size))
        return
    cuts = [size * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts - 1) as pool:
        futures = [pool.submit(work, slice(*cuts[i : i + 2])) for i in range(1, parts)]
        work(slice(cuts[0], cuts[1]))
        for future in futures:
            future.result()


@compiled()
def count_rivals(scores: Array, size: int, row: Array, true: Array, above: Array, tied: Array) -> None:
    """Count, for E edges, the first `size` scores of a row above the true score, and those equal to it.

    Args:
        scores: `float32 [Q, N]`.
        size: How many of the N scores are candidates'.
        row: `int64 [E]` each edge's row of scores.
        true: `float32 [E]`.
        above: `int64 [E]`, written.
        tied: `int64 [E]`, written.
    """
    zero, one = np.int32(0), np.int32(1)
    for e in range(len(row)):
        r, t = row[e], true[e]
        # 32-bit counters are as wide as the scores, so that eight are counted at a time.
        higher, equal = zero, zero
        for j in range(size):
            score = scores[r, j]
            higher = np.int32(higher + (one if score > t else zero))
            equal = np.int32(equal + (one if score == t else zero))
        above[e], tied[e] = higher, equal


@compiled()
def count_listed(
    scores: Array,
    columns: Array,
    start: Array,
    end: Array,
    row: Array,
    true: Array,
    own: Array,
    above: Array,
    tied: Array,
) -> None:
    """Count, for E edges, the scores of a list of columns above the true score, and those equal to it.

    Args:
        scores: `[Q, N]`, of any type.
        columns: `int64 [K]` the lists, end to end; below 0, not among the N.
        start: `int64 [Q]` where each row's list begins in `columns`.
        end: `int64 [Q]` where it ends.
        row: `int64 [E]` each edge's row of scores.
        true: `[E]`, of the same type.
        own: `int64 [E]` a column that is not counted.
        above: `int64 [E]`, written.
        tied: `int64 [E]`, written.
    """
    for e in range(len(row)):
        r, t = row[e], true[e]
        higher, equal = 0, 0
        for k in range(start[r], end[r]):
            column = columns[k]
            if column >= 0 and column != own[e]:
                score = scores[r, column]
                higher += score > t
                equal += score == t
        above[e], tied[e] = higher, equal


@compiled(fastmath={"reassoc", "nsz", "contract"})
def rowwise_adagrad(weight: Array, momentum: Array, index: Array, grad: Array, lr: float, eps: float) -> None:
    """Update the rows `index [M]` of `weight [N, D]` and `momentum [N]` by `grad [M, D]` in place."""
    for i in range(len(index)):
        # One-dimensional views are what lets several elements be computed at a time.
        row, g = weight[index[i]], grad[i]
        total = np.float32(0)
        for d in range(len(g)):
            total += g[d] * g[d]
        mean = momentum[index[i]] + total / np.float32(len(g))
        momentum[index[i]] = mean
        scale = np.float32(lr / (np.sqrt(mean) + eps))
        for d in range(len(g)):
            row[d] -= scale * g[d]


@compiled(fastmath={"contract"})
def adagrad(weight: Array, momentum: Array, index: Array, grad: Array, lr: float, eps: float) -> None:
    """Update the rows `index [M]` of `weight [N, D]` and `momentum [N, D]` by `grad [M, D]` in place."""
    rate, least = np.float32(lr), np.float32(eps)
    for i in range(len(index)):
        row, sums, g = weight[index[i]], momentum[index[i]], grad[i]
        for d in range(len(g)):
            sums[d] += g[d] * g[d]
            row[d] -= rate * g[d] / (np.sqrt(sums[d]) + least)
