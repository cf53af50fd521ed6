"""Known true edges: the entities on the other side of each entity's edges.

Sampling, training, evaluation and baselines all look true edges up here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from twhin_pipeline.kernels import radix, sampling_kernels
from twhin_pipeline.store.array_cache import new_array
from twhin_pipeline.training_set.mapped_array import mapped_zeros

Array = np.ndarray[Any, Any]
SORTED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class KnownEdges:
    """True edges of one relation, looked up by the entity on one side.

    Entity `entities[i]` has the neighbors `neighbors[start[i]:start[i + 1]]` on the other side. `entities` is int64
    `[n]`, `start` int64 `[n + 1]`, and `neighbors` integers `[E]`. Entities ascend, and so do the neighbors of each.
    """

    entities: Array
    start: Array
    neighbors: Array

    @classmethod
    def from_pairs(cls, entities: Array, neighbors: Array) -> KnownEdges:
        """Sort edges (int64 `[E]` each) and drop duplicates."""
        order = np.lexsort((neighbors, entities))
        entities, neighbors = np.asarray(entities, np.int64)[order], np.asarray(neighbors, np.int64)[order]
        new = np.ones(len(entities), bool)
        new[1:] = (entities[1:] != entities[:-1]) | (neighbors[1:] != neighbors[:-1])
        return cls.from_sorted(entities[new], neighbors[new])

    @classmethod
    def from_sorted(cls, entities: Array, neighbors: Array) -> KnownEdges:
        """Take edges (int64 `[E]` each) in the order of entity and neighbor."""
        first = np.flatnonzero(np.diff(entities, prepend=-1))
        return cls(entities[first], np.append(first, len(entities)).astype(np.int64), neighbors)

    @classmethod
    def from_keys(cls, keys: Array, width: int) -> KnownEdges:
        """Take edges as entity * width + neighbor, int64 `[E]`; the keys are sorted, and become the neighbors."""
        radix.sort_within(keys, np.empty(max(min(len(keys), SORTED_AT_ONCE), 1), np.int64))
        width = max(width, 1)
        entities = np.empty(sampling_kernels.count_entities(keys, width), np.int64)
        begin = np.empty(len(entities) + 1, np.int64)
        sampling_kernels.split_keys(keys, width, entities, begin)
        return cls(entities, begin, keys)

    @classmethod
    def save_joined(cls, folder: Path, parts: Sequence[KnownEdges], first: Array, dtype: Any) -> None:
        """Write the edges of several relations to a new folder, for `mapped`: entity e of part i becomes first[i] + e.

        Args:
            folder: Where files are made.
            parts: The edges of each relation, all by the same side.
            first: The sum of the numbers of entities of the relations before, int64 `[R]`.
            dtype: The type of neighbors.
        """
        folder.mkdir()
        degrees = np.concatenate([np.diff(part.start) for part in parts])
        entities = np.concatenate([part.entities + offset for part, offset in zip(parts, first.tolist(), strict=True)])
        np.save(folder / "entities.npy", entities)
        np.save(folder / "start.npy", np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64))
        total = sum(len(part) for part in parts)
        # A file of one part's neighbors after another's: all of them need not fit in memory.
        into = new_array(folder / "neighbors.npy", (total,), dtype) if total else None
        if into is None:
            np.save(folder / "neighbors.npy", np.zeros(0, dtype))
            return
        filled = 0
        for part in parts:
            into[filled : filled + len(part)] = part.neighbors
            filled += len(part)

    @classmethod
    def mapped(cls, folder: Path) -> KnownEdges:
        """Map what `save_joined` has written: processes that do so share its memory."""
        return cls(*(np.asarray(np.load(folder / f"{field.name}.npy", mmap_mode="r")) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.neighbors)

    def spans(self, entities: Array) -> tuple[Array, Array]:
        """Return where the neighbors of each of `entities` `[P]` begin and end in `neighbors`: int64 `[P]` each."""
        if not len(self.entities):
            return np.zeros(len(entities), np.int64), np.zeros(len(entities), np.int64)
        position = np.minimum(np.searchsorted(self.entities, entities), len(self.entities) - 1)
        known = self.entities[position] == entities
        return np.where(known, self.start[position], 0), np.where(known, self.start[position + 1], 0)

    def degrees(self, entities: Array) -> Array:
        """Return how many edges each of `entities` `[P]` has: int64 `[P]`."""
        start, end = self.spans(entities)
        return end - start

    def of(self, entities: Array) -> tuple[Array, Array]:
        """Return the neighbors of `entities` `[P]`, end to end, and how many each has, int64 `[P]`."""
        start, end = self.spans(entities)
        return self.neighbors[ranges(start, end - start)], end - start

    def contains(self, entities: Array, neighbors: Array) -> Array:
        """Return for each pair (int64 `[P]` each, elementwise) whether it is a known edge: bool `[P]`."""
        result = np.empty(len(entities), bool)
        sampling_kernels.contains(self.neighbors, *self.spans(entities), neighbors, result)
        return result


@dataclass(frozen=True)
class ChunkedEdges:
    """Edges in chunks of one relation: `lhs`, `rhs` `[E]`; chunk i is `start[i]:start[i + 1]`, of `relation[i]`."""

    lhs: Array
    rhs: Array
    start: Array
    relation: Array

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield each relation with its consecutive chunks, from the first to before the last."""
        cuts = np.flatnonzero(np.diff(self.relation, prepend=-1, append=-1))
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            yield int(self.relation[first]), first, last


def index_edges(
    parts: Sequence[ChunkedEdges], sizes: Sequence[tuple[int, int]], threads: int, prefix: str | None = None
) -> dict[tuple[int, int], KnownEdges]:
    """Index the edges of all `parts` by both ends; the key is a relation and the side of the entity (0: `lhs`).

    In each thread sorting takes 8 MB of memory besides.

    Args:
        parts: The edges.
        sizes: How many entities there are on the two sides of each relation.
        threads: So many sort at a time.
        prefix: Neighbors are in files that begin with it, mapped into memory, so that the system may write their pages
            back to disk where memory does not suffice. None: in memory.
    """
    counts = np.zeros(len(sizes), np.int64)
    for part in parts:
        for rel, first, last in part.runs():
            counts[rel] += part.start[last] - part.start[first]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # One file for all relations: each mapped file holds a file descriptor, of which a process has few.
    keys = [_room(int(start[-1]), None if prefix is None else f"{prefix}-{side}.neighbors") for side in (0, 1)]

    def fill(side: int) -> None:
        filled = start[:-1].copy()
        for part in parts:
            entities, neighbors = (part.lhs, part.rhs) if side == 0 else (part.rhs, part.lhs)
            for rel, first, last in part.runs():
                chunk = slice(int(part.start[first]), int(part.start[last]))
                size = chunk.stop - chunk.start
                into = keys[side][filled[rel] : filled[rel] + size]
                sampling_kernels.fill_keys(entities[chunk], neighbors[chunk], sizes[rel][1 - side], into)
                filled[rel] += size

    def sort(rel: int, side: int) -> KnownEdges:
        return KnownEdges.from_keys(keys[side][start[rel] : start[rel + 1]], sizes[rel][1 - side])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, (0, 1)))
        made = {(rel, side): pool.submit(sort, rel, side) for rel in range(len(sizes)) for side in (0, 1)}
        return {key: future.result() for key, future in made.items()}


def _room(length: int, path: str | None) -> Array:
    return np.empty(length, np.int64) if path is None else mapped_zeros(path, length, np.int64)


def ranges(starts: Array, lengths: Array) -> Array:
    """Return `starts[0], …, starts[0] + lengths[0] - 1, starts[1], …` as int64."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total, dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)


def read_by_relation(
    con: duckdb.DuckDBPyConnection, query: str, files: list[str], relations: Iterable[int]
) -> dict[int, tuple[Array, Array]]:
    """Run a query of `read_parquet(?)` for `rel` and two more columns of integers, in the order of `rel`.

    Returns:
        The two columns of each relation, int64 `[K]`; empty where it has no row, or there is no file.
    """
    relations = list(relations)
    if not files or not relations:
        return {rel: (np.empty(0, np.int64), np.empty(0, np.int64)) for rel in relations}
    columns = con.execute(query, [files]).fetchnumpy().values()
    rel_of_row, first, second = (np.asarray(column, np.int64) for column in columns)
    start, end = (np.searchsorted(rel_of_row, relations, side) for side in ("left", "right"))
    return {rel: (first[a:b], second[a:b]) for rel, a, b in zip(relations, start, end, strict=True)}


def read_known(
    con: duckdb.DuckDBPyConnection, files: list[str], side: str, entities: Mapping[int, Array]
) -> dict[int, KnownEdges]:
    """Read from Parquet (`lhs`, `rhs`, `rel`) each relation's edges whose `side` is one of its `entities`.

    Only those are held in memory: a test set needs few of a big graph's edges. All relations are read at once, as a
    query for each would cost more than ranking does where there are hundreds.
    """
    other = "rhs" if side == "lhs" else "lhs"
    wanted = [(rel, np.unique(rows)) for rel, rows in entities.items()]
    columns = {
        "rel": np.repeat([rel for rel, _ in wanted], [len(rows) for _, rows in wanted]).astype(np.int64),
        "entity": np.concatenate([np.empty(0, np.int64), *(rows for _, rows in wanted)]),
    }
    con.register("wanted", pa.table(columns))
    try:
        edges = read_by_relation(
            con,
            f"SELECT DISTINCT e.rel, {side} AS entity, {other} AS neighbor FROM read_parquet(?) e "
            f"SEMI JOIN wanted ON e.rel = wanted.rel AND e.{side} = wanted.entity ORDER BY ALL",
            files,
            entities,
        )
    finally:
        con.unregister("wanted")
    return {rel: KnownEdges.from_sorted(*of_relation) for rel, of_relation in edges.items()}
