"""Edges in a random order, out of memory: kept in the buckets of a file, and sorted one bucket after another.

Memory is a bucket's, at most a 256th of a relation's edges, and the time is in proportion to the edges.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from twhin_pipeline.graph.bucket_file import MOST_BUCKETS, BucketFile
from twhin_pipeline.kernels import edge_kernels

Array = np.ndarray[Any, Any]
# So many edges sort within the caches.
EDGES_PER_BUCKET = 1 << 17


@dataclass(frozen=True)
class Order:
    """A random order of edges, by the lower halves of their hashes `h` (the split goes by the upper ones)."""

    mask: np.uint64
    factor: np.uint64

    @classmethod
    def of(cls, seed: int, purpose: str) -> Order:
        """Return another order for every seed and purpose."""
        digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
        mask, factor = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
        return cls(np.uint64(mask), np.uint64(factor | 1))

    def positions(self, low: Array) -> Array:
        """Return the positions of edges in the order, uint32 `[n]`, by the lower halves of their hashes."""
        positions = np.empty(len(low), np.uint32)
        edge_kernels.shuffled(np.ascontiguousarray(low), self.mask, self.factor, positions)
        return positions


@dataclass(frozen=True)
class Edges:
    """Edges of one relation: `lhs` and `rhs`, rows; `weight`, float32; `h`, their hashes (uint64), or lower halves."""

    rel: int
    lhs: Array
    rhs: Array
    weight: Array
    h: Array

    def __len__(self) -> int:
        return len(self.lhs)

    def where(self, test: Array) -> Edges:
        """Return those for which `test`, bool `[n]`, is true."""
        return Edges(self.rel, self.lhs[test], self.rhs[test], self.weight[test], self.h[test])


class ShuffledEdges:
    """Edges in a file, each relation's in a random order, so that buckets are of about one size."""

    def __init__(self, path: str, most: Array, rows: type, order: Order) -> None:
        """Begin without edges.

        Args:
            path: A new file.
            most: About how many edges each relation gets at most, int64 `[R]`.
            rows: NumPy's type of rows.
            order: The order in which they are read.
        """
        self.order, self.rows = order, rows
        record = np.dtype([("low", np.uint32), ("lhs", rows), ("rhs", rows), ("weight", np.float32)])
        self.file = BucketFile(path, record)
        self.buckets = np.clip(-(-most // EDGES_PER_BUCKET), 1, MOST_BUCKETS)
        self.counts = np.zeros(len(most), np.int64)
        """Edges by relation, int64 `[R]`."""
        self.weights = np.zeros(len(most), np.float64)
        """Their weights' sums, float64 `[R]`."""

    def __enter__(self) -> ShuffledEdges:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.__exit__(*exc)

    def add(self, edges: Edges) -> None:
        """Add edges; those at one position of the order stay in the order in which they are added."""
        if not len(edges):
            return
        records, ends = self._parted(edges, int(self.buckets[edges.rel]))
        self.file.add(edges.rel, records, ends)
        self.counts[edges.rel] += len(edges)
        self.weights[edges.rel] += float(edges.weight.sum(dtype=np.float64))

    def _parted(self, edges: Edges, parts: int) -> tuple[Array, Array]:
        """Return edges as records, part by part of the order's positions, and where each part begins."""
        ends = np.zeros(parts + 1, np.int64)
        records = np.empty(len(edges), self.file.record)
        edge_kernels.scatter(
            edges.h.astype(np.uint64, copy=False),
            edges.lhs,
            edges.rhs,
            edges.weight,
            self.order.mask,
            self.order.factor,
            ends,
            tuple(records[name] for name in ("low", "lhs", "rhs", "weight")),
        )
        return records, ends

    def as_added(self) -> Iterator[Edges]:
        """Yield the edges bucket by bucket, each as they were added; `h` has the lower halves, uint32."""
        for rel in np.flatnonzero(self.counts).tolist():
            for bucket in range(int(self.buckets[rel])):
                yield _edges(rel, self.file.read(rel, bucket))

    def in_order(self) -> Iterator[Edges]:
        """Yield the edges by relation and order; rows as int64, without `h`."""
        for bucket in self.as_added():
            for edges in self._in_caches(bucket):
                size = len(edges)
                into = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32)
                unordered = (edges.h, edges.lhs, edges.rhs, edges.weight)
                edge_kernels.ordered(unordered, self.order.mask, self.order.factor, into)
                yield Edges(edges.rel, *into, h=np.zeros(0, np.uint64))

    def _in_caches(self, bucket: Edges) -> Iterator[Edges]:
        """Yield a bucket in parts that sort within the caches, in the order of their positions."""
        parts = -(-len(bucket) // EDGES_PER_BUCKET)
        if parts < 2:
            yield bucket
            return
        # Positions of a bucket are in a row, so of all buckets' parts those of this one alone have edges.
        records, ends = self._parted(bucket, parts * int(self.buckets[bucket.rel]))
        for first, last in itertools.pairwise(ends):
            if last > first:
                yield _edges(bucket.rel, records[first:last])

    def _bounds(self, ranks: list[int], order: Order) -> tuple[list[int], dict[int, int]]:
        """Return which positions of an order the edges of some ranks have (past the last: 2^32), and, by position, how
        many edges are before it.

        Positions are first counted by their upper halves, then those of a bound's own half by their lower ones.
        """
        counts = np.zeros(1 << 16, np.int64)
        for edges in self.as_added():
            counts += np.bincount(order.positions(edges.h) >> 16, minlength=1 << 16)
        below = np.concatenate([[0], np.cumsum(counts)])
        upper = [int(np.searchsorted(below, rank, side="right")) - 1 for rank in ranks]
        inner = {half: np.zeros(1 << 16, np.int64) for half in upper if half < 1 << 16}
        for edges in self.as_added():
            positions = order.positions(edges.h)
            for half, lower in inner.items():
                mine = positions[positions >> 16 == half]
                lower += np.bincount(mine & 0xFFFF, minlength=1 << 16)
        bounds, before = [], {1 << 32: int(below[-1])}
        for rank, half in zip(ranks, upper, strict=True):
            if half == 1 << 16:
                bounds.append(1 << 32)
                continue
            within = below[half] + np.concatenate([[0], np.cumsum(inner[half])])
            lower_half = int(np.searchsorted(within, rank, side="right")) - 1
            bounds.append((half << 16) | lower_half)
            before[bounds[-1]] = int(within[lower_half])
        return bounds, before

    def part(self, path: str, first: int, last: int, order: Order) -> ShuffledEdges:
        """Return the edges from the `first` to before the `last` of another order, in a new file."""
        bounds, before = self._bounds([first, last], order)
        chosen = ShuffledEdges(path, self.counts, self.rows, self.order)
        for edges in self.as_added():
            positions = order.positions(edges.h)
            kept = (positions > bounds[0]) & (positions < bounds[1])
            for bound in before:
                equal = np.flatnonzero(positions == bound)
                exact = before[bound] + np.arange(len(equal))
                kept[equal] = (exact >= first) & (exact < last)
                before[bound] += len(equal)
            chosen.add(edges.where(kept))
        return chosen


def _edges(rel: int, records: Array) -> Edges:
    return Edges(rel, records["lhs"], records["rhs"], records["weight"], records["low"])
