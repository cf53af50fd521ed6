"""Edges sorted by relation and both ids, out of memory, and repeats merged.

Edges come with codes of their ids. Once all ids are known, each code is replaced by its id's rank among them. Edges are
then sorted in buckets, whose bounds are those of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twhin_pipeline import prefetch
from twhin_pipeline.graph.bucket_file import BucketFile
from twhin_pipeline.kernels.compiled import compiled
from twhin_pipeline.kernels.radix import in_order

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

# So many rows of an edge are sorted by insertion.
_FEW_ROWS = 24
EDGES_PER_BUCKET, EDGES_AT_ONCE, SAMPLES_PER_BUCKET = 1 << 18, 1 << 18, 64
# What an edge may have besides its relation and ends.
KINDS = {"time": np.int64, "weight": np.float64, "split": np.int8}


class EdgeSorter:
    """Takes edges a piece at a time, and gives them back sorted and merged: 24 bytes an edge in temporary files."""

    def __init__(self, folder: str, columns: Sequence[str]) -> None:
        """Begin without edges; files are made in `folder`. Of time, weight and split, edges have the `columns`."""
        self.folder, self.columns = folder, list(columns)
        extra = [(name, KINDS[name]) for name in self.columns]
        self.unsorted = np.dtype([("rel", np.int32), ("lhs", np.uint32), ("rhs", np.uint32), *extra])
        self.sorted = np.dtype([("key", np.uint64), ("rel", np.int32), *extra])
        self.path = f"{folder}/unsorted"
        self.files = ExitStack()
        self.file = self.files.enter_context(Path(self.path).open("wb"))  # noqa: SIM115 (closed by `__exit__`)
        self.count = 0
        """How many edges have been added."""

    def __enter__(self) -> EdgeSorter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.close()

    def add(self, edges: Columns) -> None:
        """Add edges: `rel` (an index), `lhs`, `rhs` (codes) and the columns; `[n]` each."""
        records = np.empty(len(edges["rel"]), self.unsorted)
        for name in self.unsorted.names or ():
            records[name] = edges[name]
        self.file.write(records.data)
        self.count += len(records)

    def pieces(self, relations: Array, ranks: Array, most: Array, threads: int) -> list[Callable[[], Columns]]:
        """Put all edges into buckets, which ascend; return what reads, sorts and merges each, for threads to call.

        Args:
            relations: The new index of each relation, int32.
            ranks: The rank of each code's id, uint32.
            most: How many times the largest an edge's rows weigh at most, by relation (its new index),
                float64 `[R]`; inf: as much as their sum.
            threads: How many work at a time.
        """
        self.file.close()
        buckets = self.files.enter_context(BucketFile(f"{self.folder}/sorted", self.sorted))
        unsorted: Array = np.memmap(self.path, self.unsorted, "r") if self.count else np.zeros(0, self.unsorted)
        count = max(-(-self.count // EDGES_PER_BUCKET), 1)
        sample = unsorted[:: max(self.count // (count * SAMPLES_PER_BUCKET), 1)]
        rel, key = self._keys(sample, relations, ranks)
        order = np.lexsort((key, rel))
        chosen = order[(np.arange(1, count) * len(order)) // count]
        bounds = rel[chosen], key[chosen]

        def placed(start: int) -> tuple[Array, Array]:
            some = unsorted[start : start + EDGES_AT_ONCE]
            rel, key = self._keys(some, relations, ranks)
            which, ends = np.empty(len(some), np.uint32), np.zeros(count + 1, np.int64)
            _bucket(rel, key, *bounds, which, ends)
            _, order = in_order(which, np.arange(len(some), dtype=np.uint32))
            records = np.empty(len(some), self.sorted)
            records["key"], records["rel"] = key[order], rel[order]
            for name in self.columns:
                records[name] = some[name][order]
            return records, ends

        sizes = np.zeros(count, np.int64)
        starts = ((start,) for start in range(0, self.count, EDGES_AT_ONCE))
        with ThreadPoolExecutor(threads) as pool:
            for records, ends in prefetch.in_order(pool, placed, starts, threads + 1):
                buckets.add(0, records, ends)
                sizes += np.diff(ends)
        return [partial(_bucket_of, buckets, bucket, most) for bucket in np.flatnonzero(sizes).tolist()]

    @staticmethod
    def _keys(edges: Array, relations: Array, ranks: Array) -> tuple[Array, Array]:
        key = np.empty(len(edges), np.uint64)
        _joined(edges["lhs"], edges["rhs"], ranks, key)
        return relations[edges["rel"]], key


def _bucket_of(file: BucketFile, bucket: int, most: Array) -> Columns:
    return merged(file.read(0, bucket), most)


def merged(records: Array, most: Array) -> Columns:
    """Sort a bucket's records and make one of those with equal (rel, lhs, rhs).

    Args:
        records: Edges, as `EdgeSorter` keeps them.
        most: How many times the largest an edge's rows weigh at most, by relation, float64 `[R]`.

    Returns:
        `rel`, int32, `lhs` and `rhs`, uint32; `time`, the latest, and `first_time`, the earliest, if there are times;
        `weight`, float32, of all rows together; `split`, the least, if there is one; `[edges]` each. Where weights
        depend on which rows are there, also how they came about: `steps`, int32 `[edges]`, says for how many times an
        edge's weight from then on is in `step_time`, int64, and `step_weight`, float32, `[steps.sum()]`, ascending; 0
        where it never changed.
    """
    first = records["key"].min() if len(records) else np.uint64(0)
    key, order = in_order(records["key"] - first, np.arange(len(records), dtype=np.uint32))
    rel = records["rel"][order]
    if len(rel) and (rel != rel[0]).any():
        rel, place = in_order(rel, np.arange(len(records), dtype=np.uint32))
        key, order = key[place], order[place]
    new = np.ones(len(key), bool)
    new[1:] = (key[1:] != key[:-1]) | (rel[1:] != rel[:-1])
    start = np.flatnonzero(new)
    key = key[start] + first
    edges = {
        "rel": rel[start],
        "lhs": (key >> np.uint64(32)).astype(np.uint32),
        "rhs": (key & np.uint64(2**32 - 1)).astype(np.uint32),
    }
    names = records.dtype.names or ()
    summed = bool((most > 1).any())
    most = most[edges["rel"]]
    rows = np.diff(start, append=len(order))
    weight = records["weight"][order] if "weight" in names else None
    if weight is None:
        edges["weight"] = np.minimum(rows, most).astype(np.float32)
    else:
        total = np.maximum.reduceat(weight, start)
        if summed:
            # Infinity times a weight of 0 is NaN; the sum is then the least.
            with np.errstate(invalid="ignore"):
                total = np.fmin(_sums(weight, rows, start), most * total)
        edges["weight"] = total.astype(np.float32)
    if "time" in names:
        time = records["time"][order]
        edges["time"] = np.maximum.reduceat(time, start)
        edges["first_time"] = np.minimum.reduceat(time, start)
        if weight is not None or summed:
            edges |= _steps(time, weight, rows, most)
    if "split" in names:
        edges["split"] = np.minimum.reduceat(records["split"][order], start)
    return edges


def _sums(weight: Array, rows: Array, start: Array) -> Array:
    """Add up the weights from each start to the next, by their size: a sum must not depend on the order of rows."""
    edge = np.repeat(np.arange(len(rows)), rows)
    repeated = np.flatnonzero(rows[edge] > 1)
    weight = weight.copy()
    weight[repeated] = weight[repeated][np.lexsort((weight[repeated], edge[repeated]))]
    return np.asarray(np.add.reduceat(weight, start))


def _steps(time: Array, weight: Array | None, rows: Array, most: Array) -> Columns:
    """Return how the weights of edges came about; see `merged`.

    Args:
        time: Of each row, edge by edge, `[n]`.
        weight: Likewise; None: 1 each.
        rows: How many rows each edge has, `[E]`.
        most: How many times the largest they weigh at most, `[E]`.
    """
    # At most one step for each row of an edge that has several.
    most_steps = int(rows[rows > 1].sum())
    steps = np.zeros(len(rows), np.int32)
    times, weights = np.empty(most_steps, np.int64), np.empty(most_steps, np.float32)
    weight = np.ones(len(time)) if weight is None else weight.copy()
    size = _grown(time.copy(), weight, rows, most, steps, times, weights)
    return {"steps": steps, "step_time": times[:size], "step_weight": weights[:size]}


@compiled()
def _grown(time: Array, weight: Array, rows: Array, most: Array, steps: Array, times: Array, weights: Array) -> int:
    """Write the weights that edges have from each time on, where they change; return how many these are."""
    size, start = 0, 0
    for edge in range(len(rows)):
        end = start + rows[edge]
        if rows[edge] > 1:
            _by_time(time[start:end], weight[start:end])
            begin, total, largest = size, 0.0, 0.0
            for i in range(start, end):
                total += weight[i]
                largest = max(largest, weight[i])
                if i + 1 == end or time[i + 1] != time[i]:
                    # 0 times infinity is NaN.
                    known = np.float32(min(total, most[edge] * largest) if largest > 0 else 0.0)
                    if size == begin or known != weights[size - 1]:
                        times[size], weights[size] = time[i], known
                        size += 1
            if size - begin == 1:
                size = begin
            steps[edge] = size - begin
        start = end
    return size


@compiled()
def _by_time(time: Array, weight: Array) -> None:
    """Sort both by time and then weight, in place, so that a sum does not depend on the order of rows."""
    if len(time) > _FEW_ROWS:
        order = np.argsort(weight, kind="mergesort")
        order = order[np.argsort(time[order], kind="mergesort")]
        time[:], weight[:] = time[order], weight[order]
        return
    for i in range(1, len(time)):
        at, mine, place = time[i], weight[i], i
        while place and (time[place - 1] > at or (time[place - 1] == at and weight[place - 1] > mine)):
            time[place], weight[place] = time[place - 1], weight[place - 1]
            place -= 1
        time[place], weight[place] = at, mine


@compiled()
def _joined(lhs: Array, rhs: Array, ranks: Array, into: Array) -> None:
    for i in range(len(into)):
        into[i] = (np.uint64(ranks[lhs[i]]) << np.uint64(32)) | np.uint64(ranks[rhs[i]])


@compiled()
def _bucket(rel: Array, key: Array, bound_rel: Array, bound_key: Array, which: Array, ends: Array) -> None:
    """Write how many bounds (ascending) are not above each edge, and where each bucket begins when they are sorted."""
    for i in range(len(which)):
        low, high = 0, len(bound_rel)
        while low < high:
            middle = (low + high) >> 1
            if bound_rel[middle] < rel[i] or (bound_rel[middle] == rel[i] and bound_key[middle] <= key[i]):
                low = middle + 1
            else:
                high = middle
        which[i] = low
        ends[low + 1] += 1
    for bucket in range(len(ends) - 1):
        ends[bucket + 1] += ends[bucket]
