"""Loops over edges that make the training set, compiled for the CPU by numba. They let other threads run."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline.kernels.compiled import compiled
from twhin_pipeline.kernels.radix import in_order

Array = np.ndarray[Any, Any]

_LOW, _HALF, _TURN = 0xFFFFFFFF, 32, 29
# Odd, with bits all over: from the golden ratio, xxHash and MurmurHash3.
_FEISTEL = np.array([0x9E3779B1, 0x85EBCA77, 0xC2B2AE35], np.uint64)
_GOLDEN, _OTHER = 0x9E3779B9, 0x5BD1E994


@compiled()
def _mixed(lhs: Any, relation: Any, rhs: Any) -> Any:
    """Return an edge's hash from the hashes (uint64) of its parts: three rounds of a Feistel network on halves.

    The right end's hash is turned, so that a pair and its reverse differ.
    """
    half, low = np.uint64(_HALF), np.uint64(_LOW)
    joined = lhs ^ relation ^ ((rhs >> np.uint64(_TURN)) | (rhs << np.uint64(64 - _TURN)))
    a, b = joined >> half, joined & low
    for factor in _FEISTEL:
        product = b * factor + factor
        a, b = b, a ^ (product >> half) ^ (product & low)
    return (a << half) | b


@compiled()
def _shuffled(low: Any, mask: Any, factor: Any) -> Any:
    """Return the position of the lower half of an edge's hash (uint32) in an order, which `mask` and `factor` make."""
    bits = np.uint64(_LOW)
    once = ((np.uint64(low) ^ mask) * factor) & bits
    # A second round, on the halves exchanged: a product alone leaves the low bits as ordered as they were.
    turned = (once >> np.uint64(16)) | ((once & np.uint64(0xFFFF)) << np.uint64(16))
    return np.uint32(((turned ^ mask ^ np.uint64(_GOLDEN)) * (factor ^ np.uint64(_OTHER))) & bits)


@compiled()
def shuffled(low: Array, mask: Any, factor: Any, into: Array) -> None:
    """Write the position of each of `low`, uint32 `[n]`, in an order; uint32 `[n]`."""
    for i in range(len(low)):
        into[i] = _shuffled(low[i], mask, factor)


@compiled()
def encode(
    lhs: Array, rhs: Array, relation: Any, hashes: Array, left: Array, right: Array, rows: tuple[Array, Array], h: Array
) -> int:
    """Write the rows and the hashes of edges, whose ends `[n]` are indices of ids; return how many lack a row.

    Args:
        lhs: Indices of ids.
        rhs: Indices of ids.
        relation: The relation's hash, uint64.
        hashes: Each id's, uint64 `[ids]`.
        left: Each id's row as an entity of the relation's left type, or -1; `[ids]`.
        right: The same for its right type.
        rows: Of both ends, `[n]` each.
        h: uint64 `[n]`.
    """
    lost = 0
    for i in range(len(lhs)):
        a, b = lhs[i], rhs[i]
        rows[0][i], rows[1][i] = left[a], right[b]
        h[i] = _mixed(hashes[a], relation, hashes[b])
        lost += left[a] < 0 or right[b] < 0
    return lost


@compiled()
def scatter(
    h: Array, lhs: Array, rhs: Array, weight: Array, mask: Any, factor: Any, ends: Array, into: tuple[Array, ...]
) -> None:
    """Put edges into buckets by their positions in an order: bucket i begins at i / B of all positions.

    Args:
        h: The edges' hashes, uint64 `[n]`.
        lhs: Rows `[n]`.
        rhs: Rows `[n]`.
        weight: `[n]`.
        mask: The order's.
        factor: The order's.
        ends: int64 `[B + 1]`, all 0: where each bucket begins in the result.
        into: The lower half of `h`, `lhs`, `rhs` and `weight` `[n]`, bucket after bucket, each as they came.
    """
    buckets = np.uint64(len(ends) - 1)
    which = np.empty(len(h), np.int32)
    for i in range(len(h)):
        place = _shuffled(np.uint32(h[i] & np.uint64(_LOW)), mask, factor)
        which[i] = (np.uint64(place) * buckets) >> np.uint64(_HALF)
        ends[which[i] + 1] += 1
    for bucket in range(len(ends) - 1):
        ends[bucket + 1] += ends[bucket]
    filled = ends.copy()
    for i in range(len(h)):
        place = filled[which[i]]
        filled[which[i]] += 1
        into[0][place] = np.uint32(h[i] & np.uint64(_LOW))
        into[1][place], into[2][place], into[3][place] = lhs[i], rhs[i], weight[i]


@compiled()
def ordered(edges: tuple[Array, ...], mask: Any, factor: Any, into: tuple[Array, ...]) -> None:
    """Write `edges` `[n]` (lower half of h, lhs, rhs, weight), but for the first, in an order that keeps equal ones."""
    keys = np.empty(len(edges[0]), np.uint32)
    for i in range(len(keys)):
        keys[i] = _shuffled(edges[0][i], mask, factor)
    _, order = in_order(keys, np.arange(len(keys)).astype(np.uint32))
    for i in range(len(order)):
        k = order[i]
        into[0][i], into[1][i], into[2][i] = edges[1][k], edges[2][k], edges[3][k]


@compiled()
def filter_of(keys: Array, bits: Array) -> None:
    """Set a bit for each of `keys` (uint64) in `bits`, uint8, 2^k of them."""
    for key in keys:
        spot = _spot(key, len(bits))
        bits[spot >> 3] |= np.uint8(1 << (spot & 7))


@compiled()
def _spot(key: Any, size: int) -> Any:
    # The upper bits of a product by the golden ratio; a filter has 8 spots a byte.
    return np.int64((key * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(8)) & (8 * size - 1)


@compiled()
def mark(left: Array, right: Array, width: int, keys: Array, bits: Array, found: Array) -> None:
    """Set `found` where one of `keys`, ascending, is a pair's left * width + right; `bits` is their filter."""
    for i in range(len(left)):
        key = np.uint64(left[i]) * np.uint64(width) + np.uint64(right[i])
        spot = _spot(key, len(bits))
        if not (bits[spot >> 3] >> (spot & 7)) & 1:
            continue
        place = np.searchsorted(keys, key)
        if place < len(keys) and keys[place] == key:
            found[place] = True
