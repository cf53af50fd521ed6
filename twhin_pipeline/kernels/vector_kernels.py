"""Loops over vectors' rows and scores that no library has, compiled for the CPU by numba.

They let other threads run. Those of evaluation are called on parts of the work by `in_parts`; those of training, which
come between torch's own operations, run in torch's threads (`parallel`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import carray

from twhin_pipeline.kernels.compiled import compiled, pointer

Array = np.ndarray[Any, Any]

# Of a float32's bits.
_BUT_SIGN, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


def in_parts(work: Callable[[slice], object], size: int, min_part: int = 1) -> None:
    """Call `work` with slices that make up `range(size)`, as many at a time as torch may use threads.

    Args:
        work: To be called, perhaps in another thread.
        size: Size of the range.
        min_part: Least size of a slice; a smaller range than two of these is one slice, in this thread.
    """
    parts = max(1, min(torch.get_num_threads(), size // max(min_part, 1)))
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


@compiled(inline="always", fastmath={"contract", "nsz"})
def exp(x: Any) -> Any:
    """Return e to a float32 that is at most 0, to 2 units in the last place; 0 below -87 (Cephes, `expf`).

    A call of the C library's would leave a loop with one element at a time.
    """
    bounded = max(x, np.float32(-87))
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    # x - n * log(2), the constant being in two parts, of which the first has few bits.
    r = bounded - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    # 2 to the n, by its bits.
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * power if x > np.float32(-87) else np.float32(0)


@compiled(inline="always")
def _turned(bits: Any) -> Any:
    """Turn all bits of a negative number but its sign."""
    return np.int32(bits ^ ((bits >> np.int32(31)) & _BUT_SIGN))


@compiled(fastmath={"reassoc", "nsz", "contract"})
def softmax_in_place(logits: Array, total: Array) -> None:
    """Replace each row by its softmax, and write the logarithm of the sum of its exponentials.

    A row of -inf alone has shares of 0 and the logarithm -inf; one that has a NaN has NaN for it.

    Args:
        logits: `float32 [Q, N]`, finite, -inf or NaN; written.
        total: `float32 [Q]`, written.
    """
    for q in range(len(logits)):
        row = logits[q]
        # The bits of floats, with those of negative ones inverted except the sign, are ordered as the floats are. The
        # maximum of integers is computed eight at a time, that of floats is not. Bits above infinity's are NaN.
        bits, top_bits, largest = row.view(np.int32), np.int32(-(2**31)), np.int32(0)
        for j in range(len(bits)):
            top_bits = max(top_bits, _turned(bits[j]))
            largest = max(largest, np.int32(bits[j] & _BUT_SIGN))
        top, missing = _turned(top_bits).view(np.float32), largest > _INFINITY
        if missing or top == np.float32(-np.inf):
            total[q] = np.float32(np.nan) if missing else top
            row[:] = 0
            continue
        sum_of_row = np.float32(0)
        for j in range(len(row)):
            row[j] = exp(row[j] - top)
            sum_of_row += row[j]
        total[q] = top + np.log(sum_of_row)
        part = np.float32(1) / sum_of_row
        for j in range(len(row)):
            row[j] *= part


@compiled()
def softmax(logits: Array, share: Array, total: Array) -> None:
    """Write each row's softmax to `share [Q, N]`; otherwise as `softmax_in_place`."""
    for q in range(len(logits)):
        # A row at a time, which is then in the nearest cache.
        share[q] = logits[q]
        softmax_in_place(share[q : q + 1], total[q : q + 1])


@compiled()
def scale_rows(rows: Array, factor: Array) -> None:
    """Multiply each of `rows [Q, N]` by its `factor [Q]`, in place."""
    for q in range(len(rows)):
        row, by = rows[q], factor[q]
        for j in range(len(row)):
            row[j] *= by


@compiled()
def gather(address: Array, out: Array) -> None:
    """Write the rows, `float32 [D]`, at `address` (int64 `[M]`) to `out [M, D]`."""
    size = out.shape[1]
    for i in range(len(address)):
        row, to = carray(pointer(address[i]), (size,), np.float32), out[i]
        for d in range(size):
            to[d] = row[d]


@compiled()
def sums(address: Array, start: Array, out: Array) -> None:
    """Write sums of rows, `float32 [D]`, each in the order of its rows.

    Args:
        address: `int64 [M]` the rows, one sum's after another's.
        start: `int64 [U + 1]` where each sum's begin in `address`, and where the last one's end.
        out: `float32 [U, D]`, written: 0 where a sum has no rows.
    """
    size = out.shape[1]
    for u in range(len(out)):
        total = out[u]
        if start[u] == start[u + 1]:
            total[:] = 0
            continue
        row = carray(pointer(address[start[u]]), (size,), np.float32)
        for d in range(size):
            total[d] = row[d]
        for i in range(start[u] + 1, start[u + 1]):
            row = carray(pointer(address[i]), (size,), np.float32)
            for d in range(size):
                total[d] += row[d]


@compiled()
def grouped(place: Array, value: Array, start: Array, out: Array) -> None:
    """Write `value [M]` (int64) to `out [M]` by `place`, otherwise in their order (a counting sort).

    Args:
        place: `int64 [M]`, each below U.
        value: What belongs to each.
        start: `int64 [U + 1]`, written: where each place's values begin in `out`, and their number.
        out: Written.
    """
    start[:] = 0
    for p in place:
        start[p + 1] += 1
    for u in range(1, len(start)):
        start[u] += start[u - 1]
    for i in range(len(place)):
        p = place[i]
        out[start[p]] = value[i]
        start[p] += 1
    # Each place's beginning has moved to its end, which is the next one's beginning.
    for u in range(len(start) - 1, 0, -1):
        start[u] = start[u - 1]
    start[0] = 0


@compiled()
def merged(rows: Array, cut: Array, value: Array, distinct: Array, start: Array, out: Array) -> int:
    """Merge ascending lists of distinct rows into one, each row's values in the order of the lists.

    Args:
        rows: `int64 [M]` the lists, one after another.
        cut: `int64 [L + 1]` where each of them begins in `rows`, and where the last one ends.
        value: `int64 [M]` what belongs to each of `rows`.
        distinct: `int64 [M]`, written: the distinct rows, ascending, U of them.
        start: `int64 [M + 1]`, written: where each row's values begin in `out`, and at U their number.
        out: `int64 [M]`, written: the values.

    Returns:
        U.
    """
    at = cut[:-1].copy()
    count = filled = 0
    while filled < len(rows):
        least = np.iinfo(np.int64).max
        for i in range(len(at)):
            if at[i] < cut[i + 1]:
                least = min(least, rows[at[i]])
        distinct[count], start[count] = least, filled
        count += 1
        for i in range(len(at)):
            if at[i] < cut[i + 1] and rows[at[i]] == least:
                out[filled] = value[at[i]]
                filled += 1
                at[i] += 1
    start[count] = filled
    return count


@compiled(inline="always")
def _sum(address: Array, first: int, last: int, scale: Any, out: Array) -> None:
    """Write the sum of the rows at `address[first:last]`, one at least, times `scale` to `out [D]`."""
    # One-dimensional views are what lets several elements be computed at a time.
    row = carray(pointer(address[first]), (len(out),), np.float32)
    for d in range(len(out)):
        out[d] = scale * row[d]
    for i in range(first + 1, last):
        row = carray(pointer(address[i]), (len(out),), np.float32)
        for d in range(len(out)):
            out[d] += scale * row[d]


@compiled(fastmath={"reassoc", "nsz", "contract"})
def rowwise_adagrad(
    weight: Array, momentum: Array, index: Array, start: Array, address: Array, scale: float, lr: float, eps: float
) -> None:
    """Update rows of `weight [N, D]` and `momentum [N]` in place, by sums of gradients.

    Args:
        weight: The table.
        momentum: Its state.
        index: `int64 [U]` the rows.
        start: `int64 [U + 1]` where each row's gradients, one at least, begin in `address`.
        address: `int64 [M]` where in memory the gradients lie, `float32 [D]` each.
        scale: By which gradients are multiplied.
        lr: The learning rate.
        eps: Added to the root of the momentum.
    """
    g, factor = np.empty(weight.shape[1], np.float32), np.float32(scale)
    for i in range(len(index)):
        _sum(address, start[i], start[i + 1], factor, g)
        row = weight[index[i]]
        total = np.float32(0)
        for d in range(len(g)):
            total += g[d] * g[d]
        mean = momentum[index[i]] + total / np.float32(len(g))
        momentum[index[i]] = mean
        step = np.float32(lr / (np.sqrt(mean) + eps))
        for d in range(len(g)):
            row[d] -= step * g[d]


@compiled(fastmath={"contract"})
def adagrad(
    weight: Array, momentum: Array, index: Array, start: Array, address: Array, scale: float, lr: float, eps: float
) -> None:
    """Update rows of `weight [N, D]` and `momentum [N, D]` in place; arguments as `rowwise_adagrad`'s."""
    g, factor = np.empty(weight.shape[1], np.float32), np.float32(scale)
    rate, least = np.float32(lr), np.float32(eps)
    for i in range(len(index)):
        _sum(address, start[i], start[i + 1], factor, g)
        row, sums = weight[index[i]], momentum[index[i]]
        for d in range(len(g)):
            sums[d] += g[d] * g[d]
            row[d] -= rate * g[d] / (np.sqrt(sums[d]) + least)


@compiled(fastmath={"reassoc", "nsz", "contract"})
def dots(a: Array, of_a: Array, b: Array, of_b: Array, out: Array) -> None:
    """Write the dot products of the rows `of_a [E]` of `a` and `of_b [E]` of `b`: `[E]`."""
    for e in range(len(out)):
        x, y = a[of_a[e]], b[of_b[e]]
        total = np.float32(0)
        for d in range(len(x)):
            total += x[d] * y[d]
        out[e] = total


@compiled(fastmath={"contract"})
def add_scaled_rows(total: Array, index: Array, rows: Array, of_rows: Array, scale: Array) -> None:
    """Add to the rows `index [E]` of `total`, one after another, the rows `of_rows [E]` of `rows` times `scale [E]`."""
    for e in range(len(index)):
        out, row, factor = total[index[e]], rows[of_rows[e]], scale[e]
        for d in range(len(row)):
            out[d] += factor * row[d]
