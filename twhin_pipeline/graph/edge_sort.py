"""Edges sorted by relation and both ids, out of memory, and repeats merged.

Edges come with codes of their ids. Once all ids are known, each code is replaced by its id's rank among them. Edges are
then sorted in buckets, whose bounds are those of a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from twhin_pipeline import prefetch
from twhin_pipeline.graph.bucket_file import MOST_BUCKETS, BucketFile
from twhin_pipeline.kernels.compiled import compiled
from twhin_pipeline.kernels.radix import in_order

Array = np.ndarray[Any, Any]
Columns = dict[str, Array]

# So many rows of an edge are sorted by insertion.
_FEW_ROWS = 24
EDGES_PER_BUCKET, EDGES_AT_ONCE, SAMPLES_PER_BUCKET = 1 << 18, 1 << 18, 64
# What an edge may have besides its relation and ends.
KINDS = {"time": np.int64, "weight": np.float64, "split": np.int8}
# What a record has where it may stand for several rows: how many, and the earliest time of theirs.
COUNTED = [("rows", np.int64), ("first_time", np.int64)]


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

    def pieces(self, relations: Array, ranks: Array, most: Array, threads: int) -> Iterator[Callable[[], Columns]]:
        """Put all edges into buckets, which ascend; yield what sorts and merges a part of one, for threads to call.

        Args:
            relations: The new index of each relation, int32.
            ranks: The rank of each code's id, uint32.
            most: How many times the largest an edge's rows weigh at most, by relation (its new index),
                float64 `[R]`; inf: as much as their sum.
            threads: How many work at a time.
        """
        self.file.close()
        unsorted: Array = np.memmap(self.path, self.unsorted, "r") if self.count else np.zeros(0, self.unsorted)
        count = max(-(-self.count // EDGES_PER_BUCKET), 1)
        sample = unsorted[:: max(self.count // (count * SAMPLES_PER_BUCKET), 1)]
        rel, key = self._keys(sample, relations, ranks)
        order = np.lexsort((key, rel))
        chosen = order[(np.arange(1, count) * len(order)) // count]
        # Parts of buckets that sort within the caches, by their first edges; and buckets of several parts.
        bounds = rel[chosen], key[chosen]
        per_bucket = -(-count // MOST_BUCKETS)
        first_of = slice(per_bucket - 1, None, per_bucket)
        outer = bounds[0][first_of], bounds[1][first_of]
        # An edge that fills a part by itself has so many rows that these are merged before they are written.
        often = np.flatnonzero((np.diff(bounds[0]) == 0) & (np.diff(bounds[1]) == 0))
        repeated = np.unique(np.stack([bounds[0][often].astype(np.uint64), bounds[1][often]], 1), axis=0)
        record = self.sorted if not len(repeated) else np.dtype([*self.sorted.descr, *COUNTED])
        summed = bool((most > 1).any())

        def placed(start: int) -> tuple[Array, Array]:
            some = unsorted[start : start + EDGES_AT_ONCE]
            rel, key = self._keys(some, relations, ranks)
            records = np.empty(len(some), record)
            records["key"], records["rel"] = key, rel
            for name in self.columns:
                records[name] = some[name]
            if len(repeated):
                records["rows"], records["first_time"] = 1, records["time"] if "time" in self.columns else 0
                records = _with_fewer(records, repeated, summed=summed)
            return _parted(records, *outer)

        with BucketFile(f"{self.folder}/sorted", record) as buckets:
            sizes = np.zeros(len(outer[0]) + 1, np.int64)
            starts = ((start,) for start in range(0, self.count, EDGES_AT_ONCE))
            with ThreadPoolExecutor(threads) as pool:
                for records, ends in prefetch.in_order(pool, placed, starts, threads + 1):
                    buckets.add(0, records, ends)
                    sizes += np.diff(ends)

            def parts() -> Iterator[Callable[[], Columns]]:
                for bucket in np.flatnonzero(sizes).tolist():
                    inner = slice(bucket * per_bucket, (bucket + 1) * per_bucket - 1)
                    records, ends = _parted(buckets.read(0, bucket), bounds[0][inner], bounds[1][inner])
                    for first, last in itertools.pairwise(ends):
                        if last > first:
                            yield partial(merged, records[first:last], most)

            with prefetch.Prefetcher(parts(), threads) as ahead:
                yield from ahead

    @staticmethod
    def _keys(edges: Array, relations: Array, ranks: Array) -> tuple[Array, Array]:
        key = np.empty(len(edges), np.uint64)
        _joined(edges["lhs"], edges["rhs"], ranks, key)
        return relations[edges["rel"]], key


def _parted(records: Array, rel: Array, key: Array) -> tuple[Array, Array]:
    """Return records part by part, where part i begins with bound i - 1 (`rel`, `key`; ascending), and each's start."""
    which, ends = np.empty(len(records), np.uint32), np.zeros(len(rel) + 2, np.int64)
    _bucket(records["rel"], records["key"], rel, key, which, ends)
    if not len(rel):
        return records, ends
    _, order = in_order(which, np.arange(len(records), dtype=np.uint32))
    return records[order], ends


def _with_fewer(records: Array, repeated: Array, *, summed: bool) -> Array:
    """Merge rows of edges that are repeated very often, `[E]` pairs of relation and key, as far as nothing is lost.

    What of the weights of several rows counts depends on their times, and on their weights where these are added up.
    """
    names = records.dtype.names or ()
    mine = np.zeros(len(records), bool)
    for rel, key in repeated:
        mine |= (records["key"] == key) & (records["rel"] == rel)
    some = records[mine]
    if not len(some):
        return records
    by = ["weight"] if "weight" in names and summed else []
    if "time" in names and ("weight" in names or summed):
        by = [name for name in ("time", "weight") if name in names]
    order = np.lexsort([some[name] for name in (*by, "key", "rel")])
    some = some[order]
    new = np.ones(len(some), bool)
    new[1:] = np.any([some[name][1:] != some[name][:-1] for name in ("rel", "key", *by)], axis=0)
    start = np.flatnonzero(new)
    fewer = some[start]
    fewer["rows"] = np.add.reduceat(some["rows"], start)
    for name, least in (("time", False), ("weight", False), ("first_time", True), ("split", True)):
        if name in names:
            fewer[name] = (np.minimum if least else np.maximum).reduceat(some[name], start)
    return np.concatenate([records[~mine], fewer])


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
    times = records["rows"][order] if "rows" in names else np.ones(len(order), np.int64)
    weight = records["weight"][order] if "weight" in names else None
    if weight is None:
        edges["weight"] = np.minimum(np.add.reduceat(times, start), most).astype(np.float32)
    else:
        total = np.maximum.reduceat(weight, start)
        if summed:
            # Infinity times a weight of 0 is NaN; the sum is then the least.
            with np.errstate(invalid="ignore"):
                total = np.fmin(_sums(weight, times, rows, start), most * total)
        edges["weight"] = total.astype(np.float32)
    if "time" in names:
        time = records["time"][order]
        edges["time"] = np.maximum.reduceat(time, start)
        first_time = records["first_time"][order] if "first_time" in names else time
        edges["first_time"] = np.minimum.reduceat(first_time, start)
        if weight is not None or summed:
            edges |= _steps(time, weight, times, rows, most)
    if "split" in names:
        edges["split"] = np.minimum.reduceat(records["split"][order], start)
    return edges


def _sums(weight: Array, times: Array, rows: Array, start: Array) -> Array:
    """Add up the weights from each start to the next, so many times each.

    A sum must depend neither on the order of rows nor on which were merged before: equal weights are counted, and the
    products added by their size.
    """
    edge = np.repeat(np.arange(len(rows)), rows)
    product = weight * times
    repeated = np.flatnonzero(rows[edge] > 1)
    if len(repeated):
        order = repeated[np.lexsort((weight[repeated], edge[repeated]))]
        new = np.ones(len(order), bool)
        new[1:] = (weight[order][1:] != weight[order][:-1]) | (edge[order][1:] != edge[order][:-1])
        first = np.flatnonzero(new)
        product[order] = 0.0
        product[order[first]] = weight[order[first]] * np.add.reduceat(times[order], first)
        product[repeated] = product[order]
    return np.asarray(np.add.reduceat(product, start))


def _steps(time: Array, weight: Array | None, times: Array, rows: Array, most: Array) -> Columns:
    """Return how the weights of edges came about; see `merged`.

    Args:
        time: Of each record, edge by edge, `[n]`.
        weight: Likewise; None: 1 each.
        times: How many rows each record stands for, `[n]`.
        rows: How many records each edge has, `[E]`.
        most: How many times the largest they weigh at most, `[E]`.
    """
    # At most one step for each record of an edge that has several.
    most_steps = int(rows[rows > 1].sum())
    steps = np.zeros(len(rows), np.int32)
    step_times, weights = np.empty(most_steps, np.int64), np.empty(most_steps, np.float32)
    weight = np.ones(len(time)) if weight is None else weight.copy()
    size = _grown(time.copy(), weight, times.copy(), rows, most, steps, step_times, weights)
    return {"steps": steps, "step_time": step_times[:size], "step_weight": weights[:size]}


@compiled()
def _grown(
    time: Array,
    weight: Array,
    count: Array,
    rows: Array,
    most: Array,
    steps: Array,
    times: Array,
    weights: Array,
) -> int:
    """Write the weights that edges have from each time on, where they change; return how many these are."""
    size, start = 0, 0
    for edge in range(len(rows)):
        end = start + rows[edge]
        if rows[edge] > 1:
            _by_time(time[start:end], weight[start:end], count[start:end])
            begin, total, largest, alike = size, 0.0, 0.0, 0
            for i in range(start, end):
                # Equal rows are counted, and their product added, whether they were merged before or not.
                alike += count[i]
                if i + 1 < end and time[i + 1] == time[i] and weight[i + 1] == weight[i]:
                    continue
                total += weight[i] * alike
                alike = 0
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
def _by_time(time: Array, weight: Array, count: Array) -> None:
    """Sort all by time and then weight, in place, so that a sum does not depend on the order of rows."""
    if len(time) > _FEW_ROWS:
        order = np.argsort(weight, kind="mergesort")
        order = order[np.argsort(time[order], kind="mergesort")]
        time[:], weight[:], count[:] = time[order], weight[order], count[order]
        return
    for i in range(1, len(time)):
        at, mine, times, place = time[i], weight[i], count[i], i
        while place and (time[place - 1] > at or (time[place - 1] == at and weight[place - 1] > mine)):
            time[place], weight[place], count[place] = time[place - 1], weight[place - 1], count[place - 1]
            place -= 1
        time[place], weight[place], count[place] = at, mine, times


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
