"""Edges in a random order, out of memory: kept in the buckets of a file, and sorted one bucket after another.

Memory is a bucket's, and the time is in proportion to the edges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from twhin_pipeline.graph.bucket_file import BucketFile
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
        self.buckets = np.maximum(-(-most // EDGES_PER_BUCKET), 1)
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
        ends = np.zeros(int(self.buckets[edges.rel]) + 1, np.int64)
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
        self.file.add(edges.rel, records, ends)
        self.counts[edges.rel] += len(edges)
        self.weights[edges.rel] += float(edges.weight.sum(dtype=np.float64))

    def as_added(self) -> Iterator[Edges]:
        """Yield the edges bucket by bucket, each as they were added; `h` has the lower halves, uint32."""
        for rel in np.flatnonzero(self.counts).tolist():
            for bucket in range(int(self.buckets[rel])):
                records = self.file.read(rel, bucket)
                yield Edges(rel, records["lhs"], records["rhs"], records["weight"], records["low"])

    def in_order(self) -> Iterator[Edges]:
        """Yield the edges by relation and order; rows as int64, without `h`."""
        for edges in self.as_added():
            size = len(edges)
            into = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.float32)
            unordered = (edges.h, edges.lhs, edges.rhs, edges.weight)
            edge_kernels.ordered(unordered, self.order.mask, self.order.factor, into)
            yield Edges(edges.rel, *into, h=np.zeros(0, np.uint64))

    def part(self, path: str, first: int, last: int, order: Order) -> ShuffledEdges:
        """Return the edges from the `first` to before the `last` of another order, in a new file."""
        total = int(self.counts.sum())
        keys = np.concatenate([np.zeros(0, np.uint32), *(order.positions(edges.h) for edges in self.as_added())])
        bounds = [
            int(np.partition(keys, position)[position]) if position < total else 2**32 for position in (first, last)
        ]
        before = {bound: int(np.count_nonzero(keys < bound)) for bound in bounds}
        chosen = ShuffledEdges(path, self.counts, self.rows, self.order)
        for edges in self.as_added():
            positions = order.positions(edges.h)
            kept = (positions > bounds[0]) & (positions < bounds[1])
            for bound in set(bounds):
                equal = np.flatnonzero(positions == bound)
                exact = before[bound] + np.arange(len(equal))
                kept[equal] = (exact >= first) & (exact < last)
                before[bound] += len(equal)
            chosen.add(edges.where(kept))
        return chosen
