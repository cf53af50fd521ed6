"""Edges that are too many to sort in memory: kept in buckets of a file, and sorted one bucket after another.

Memory is a bucket's, and the time is in proportion to the edges.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from twhin_pipeline.kernels import edge_kernels

Array = np.ndarray[Any, Any]
# So many edges sort within the caches.
EDGES_PER_BUCKET = 1 << 17


@dataclass(frozen=True)
class Order:
    """A random order of edges, by the lower halves of their numbers `h` (the split goes by the upper ones)."""

    mask: np.uint64
    factor: np.uint64

    @classmethod
    def of(cls, seed: int, purpose: str) -> Order:
        """Return another order for every seed and purpose."""
        digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
        mask, factor = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4))
        return cls(np.uint64(mask), np.uint64(factor | 1))

    def places(self, low: Array) -> Array:
        """Return the places (uint32) of edges, by the lower halves of their numbers, uint32 `[n]`."""
        found = np.empty(len(low), np.uint32)
        edge_kernels.shuffled(np.ascontiguousarray(low), self.mask, self.factor, found)
        return found


@dataclass(frozen=True)
class Edges:
    """Edges of one relation: `lhs` and `rhs`, rows; `weight`, float32; `h`, their numbers (uint64), or lower halves."""

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


class BucketFile:
    """Records in a file, written a piece at a time, read a bucket at a time; buckets are of groups."""

    def __init__(self, path: str, record: np.dtype[Any]) -> None:
        """Begin a new file."""
        self.record = record
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
        self.size = 0
        # By group and piece: where it lies, and where each bucket begins in it.
        self.pieces: dict[int, list[tuple[int, Array]]] = {}

    def __enter__(self) -> BucketFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def add(self, group: int, records: Array, ends: Array) -> None:
        """Add a piece `[n]` to a group of B buckets: bucket i gets those from `ends[i]` on, int64 `[B + 1]`."""
        view = records.view(np.uint8).data
        while len(view):
            view = view[os.write(self.file.fileno(), view) :]
        self.pieces.setdefault(group, []).append((self.size, ends))
        self.size += len(records)

    def read(self, group: int, bucket: int) -> Array:
        """Return a bucket's records in the order in which they were added. Threads may read at once."""
        pieces = self.pieces.get(group, [])
        sizes = [int(ends[bucket + 1] - ends[bucket]) for _, ends in pieces]
        records = np.empty(sum(sizes), self.record)
        done = 0
        for (start, ends), size in zip(pieces, sizes, strict=True):
            view = records[done : done + size].view(np.uint8).data
            place = (start + int(ends[bucket])) * self.record.itemsize
            while len(view):
                read = os.preadv(self.file.fileno(), [view], place)
                if read == 0:
                    raise OSError(f"{self.file.name}: ended early; was it changed?")
                view, place = view[read:], place + read
            done += size
        return records


class Buckets:
    """Edges in a file, each relation's in an order, which is a random one, so that buckets are of about one size."""

    def __init__(self, path: str, most: Array, rows: type, order: Order) -> None:
        """Begin with none.

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

    def __enter__(self) -> Buckets:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.__exit__(*exc)

    def add(self, edges: Edges) -> None:
        """Add edges; those at one place of the order stay in the order in which they are added."""
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
            given = (edges.h, edges.lhs, edges.rhs, edges.weight)
            edge_kernels.ordered(given, self.order.mask, self.order.factor, into)
            yield Edges(edges.rel, *into, h=np.zeros(0, np.uint64))

    def part(self, path: str, first: int, last: int, order: Order) -> Buckets:
        """Return those from the `first` to before the `last` of another order, in a new file."""
        total = int(self.counts.sum())
        keys = np.concatenate([np.zeros(0, np.uint32), *(order.places(edges.h) for edges in self.as_added())])
        bounds = [int(np.partition(keys, place)[place]) if place < total else 2**32 for place in (first, last)]
        before = {bound: int(np.count_nonzero(keys < bound)) for bound in bounds}
        chosen = Buckets(path, self.counts, self.rows, self.order)
        for edges in self.as_added():
            places = order.places(edges.h)
            kept = (places > bounds[0]) & (places < bounds[1])
            for bound in set(bounds):
                equal = np.flatnonzero(places == bound)
                exact = before[bound] + np.arange(len(equal))
                kept[equal] = (exact >= first) & (exact < last)
                before[bound] += len(equal)
            chosen.add(edges.where(kept))
        return chosen
