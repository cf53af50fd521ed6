"""Distinct numbers by a radix sort, compiled for the CPU by numba. Other threads run beside it; it imports no torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline.kernels.compiled import compiled

Array = np.ndarray[Any, Any]

# Bits by which a pass parts its keys: the counts of all digits lie in the nearest cache.
_DIGIT = 11
_DIGIT_MASK = (1 << _DIGIT) - 1
# Of arrays larger than the caches: a pass writes to as many places at once as these can hold.
_BYTE = 8
_BYTE_MASK = (1 << _BYTE) - 1


@compiled()
def sort(values: Array, scratch: Array) -> None:
    """Sort `values`, int64 `[n]`, none negative, in place, using `scratch` `[n]`: several times as fast as numpy."""
    size = len(values)
    most = np.int64(0)
    for value in values:
        most = max(most, value)
    source, target, shift = values, scratch, 0
    while shift < 63 and most >> shift:
        start = np.zeros((1 << _BYTE) + 1, np.int64)
        for value in source:
            start[((value >> shift) & _BYTE_MASK) + 1] += 1
        for digit in range(1 << _BYTE):
            start[digit + 1] += start[digit]
        for i in range(size):
            digit = (source[i] >> shift) & _BYTE_MASK
            target[start[digit]] = source[i]
            start[digit] += 1
        source, target = target, source
        shift += _BYTE
    if (shift // _BYTE) % 2:
        values[:] = scratch


@compiled()
def sort_within(values: Array, scratch: Array) -> None:
    """Sort `values`, int64 `[n]`, none negative, in place, using `scratch` of any length above 0.

    What is longer than `scratch` is parted by its upper digits, each number being put where its part is; parts are then
    sorted by `sort`.
    """
    size, most = len(values), np.int64(0)
    for value in values:
        most = max(most, value)
    shift = 0
    while shift + _BYTE < 63 and most >> (shift + _BYTE):
        shift += _BYTE
    # Segments that wait: their begin, end and digit. A segment leaves at most one for each digit.
    waiting = np.empty(((63 // _BYTE + 2) << _BYTE, 3), np.int64)
    waiting[0, 0], waiting[0, 1], waiting[0, 2] = 0, size, shift
    count = 1
    while count:
        count -= 1
        begin, end, shift = waiting[count, 0], waiting[count, 1], waiting[count, 2]
        if end - begin <= len(scratch):
            sort(values[begin:end], scratch[: end - begin])
            continue
        if shift < 0:
            continue  # all are equal
        ends = np.zeros(1 << _BYTE, np.int64)
        for i in range(begin, end):
            ends[(values[i] >> shift) & _BYTE_MASK] += 1
        place = np.empty(1 << _BYTE, np.int64)
        at = begin
        for digit in range(1 << _BYTE):
            place[digit] = at
            at += ends[digit]
            ends[digit] = at
        first = begin
        for digit in range(1 << _BYTE):
            while place[digit] < ends[digit]:
                value = values[place[digit]]
                own = (value >> shift) & _BYTE_MASK
                while own != digit:
                    values[place[own]], value = value, values[place[own]]
                    place[own] += 1
                    own = (value >> shift) & _BYTE_MASK
                values[place[digit]] = value
                place[digit] += 1
            if ends[digit] - first > 1:
                waiting[count, 0], waiting[count, 1], waiting[count, 2] = first, ends[digit], shift - _BYTE
                count += 1
            first = ends[digit]


@compiled()
def in_order(keys: Array, order: Array) -> tuple[Array, Array]:
    """Sort integers `[n]`, none negative, and `order` `[n]` with them; equal ones stay as they are.

    Returns:
        Both, sorted. The arguments are overwritten.
    """
    size = len(keys)
    other_keys, other_order = np.empty_like(keys), np.empty_like(order)
    most = np.uint64(0)
    for key in keys:
        most = max(most, np.uint64(key))
    shift = 0
    while shift < 64 and most >> np.uint64(shift):
        start = np.zeros((1 << _DIGIT) + 1, np.int64)
        for key in keys:
            start[_digit(key, shift) + 1] += 1
        if start[_digit(keys[0], shift) + 1] == size:
            # All have the same digit here.
            shift += _DIGIT
            continue
        for digit in range(1 << _DIGIT):
            start[digit + 1] += start[digit]
        # Equal digits keep their order, so those sorted before stay sorted, and the first of equal keys comes first.
        for i in range(size):
            digit = _digit(keys[i], shift)
            place = start[digit]
            other_keys[place], other_order[place] = keys[i], order[i]
            start[digit] = place + 1
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
        shift += _DIGIT
    return keys, order


@compiled()
def _digit(key: Any, shift: int) -> Any:
    return np.int64((np.uint64(key) >> np.uint64(shift)) & np.uint64(_DIGIT_MASK))


@compiled()
def unique(values: Array) -> tuple[Array, Array, Array]:
    """Find the distinct ones of `values`, int64 `[n]`, none negative, by a radix sort: as `numpy.unique`, but faster.

    Returns:
        The distinct values, ascending, `[U]`; where each occurs first, `[U]`; and the number of each value among the
        distinct ones, `[n]`; int64.
    """
    size = len(values)
    keys, order = in_order(values.copy(), np.arange(size))
    distinct, first, number = np.empty_like(keys), np.empty_like(keys), np.empty_like(keys)
    count = 0
    for i in range(size):
        if i == 0 or keys[i] != keys[i - 1]:
            distinct[count], first[count] = keys[i], order[i]
            count += 1
        number[order[i]] = count - 1
    return distinct[:count].copy(), first[:count].copy(), number
