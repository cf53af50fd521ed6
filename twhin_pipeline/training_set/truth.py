"""True edges as sorted arrays in mapped files, which `truth_kernels` searches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from twhin_pipeline.kernels import radix, sampling_kernels

# Following a neighbour and looking it up costs about a sixteenth of finding a pair among an entity's by bisection.
PROBE_COST = 16


@dataclass(frozen=True)
class Positives:
    """Positives mapped into memory: `lhs`, `rhs` [E]; chunk i is `start[i]:start[i + 1]`, of relation `rel[i]`."""

    lhs: np.ndarray
    rhs: np.ndarray
    start: np.ndarray
    rel: np.ndarray

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield relations and the chunks that follow one another, from the first to before the last."""
        cuts = np.flatnonzero(np.diff(self.rel, prepend=-1, append=-1))
        for first, last in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            yield int(self.rel[first]), first, last


@dataclass(frozen=True)
class Adjacency:
    """A relation's edges seen from one side: `keys` [E] = entity * width + neighbour, ascending; entity i of `entities`
    [n] (ascending) has `keys[start[i]:start[i + 1]]`. `width` is the number of entities of the neighbours' type."""

    keys: np.ndarray
    entities: np.ndarray
    start: np.ndarray
    width: int

    def degrees(self, entities: np.ndarray) -> np.ndarray:
        """Return how many edges each entity has."""
        if len(self.entities) == 0:
            return np.zeros(len(entities), np.int64)
        place = np.minimum(np.searchsorted(self.entities, entities), len(self.entities) - 1)
        return np.where(self.entities[place] == entities, self.start[place + 1] - self.start[place], 0)


def adjacencies(
    parts: list[Positives], ends: list[tuple[int, int]], prefix: str, threads: int
) -> dict[tuple[int, int], Adjacency]:
    """Sort the edges of all `parts` both ways into mapped files; key: relation, side of the entity.

    `ends` gives the numbers of entities of each relation's sides. The system may write the files' pages back to disk
    where memory does not suffice; in each thread sorting takes as much memory besides as a relation's keys.
    """
    counts = np.zeros(len(ends), np.int64)
    for part in parts:
        for rel, first, last in part.runs():
            counts[rel] += part.start[last] - part.start[first]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    # One file for all relations: each mapped file holds a file descriptor, of which a process has few.
    keys = [mapped(f"{prefix}-{side}.keys", int(start[-1]), np.int64) for side in (0, 1)]

    def fill(side: int) -> None:
        filled = start[:-1].copy()
        for part in parts:
            here, there = (part.lhs, part.rhs) if side == 0 else (part.rhs, part.lhs)
            for rel, first, last in part.runs():
                taken = slice(int(part.start[first]), int(part.start[last]))
                size = taken.stop - taken.start
                into = keys[side][filled[rel] : filled[rel] + size]
                sampling_kernels.fill_keys(here[taken], there[taken], ends[rel][1 - side], into)
                filled[rel] += size

    def sort(rel: int, side: int) -> Adjacency:
        sorted_keys = keys[side][start[rel] : start[rel + 1]]
        radix.sort(sorted_keys, np.empty_like(sorted_keys))
        width = max(ends[rel][1 - side], 1)
        entities = np.empty(sampling_kernels.count_entities(sorted_keys, width), np.int64)
        begin = np.empty(len(entities) + 1, np.int64)
        sampling_kernels.index_entities(sorted_keys, width, entities, begin)
        return Adjacency(sorted_keys, entities, begin, width)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, (0, 1)))
        found = {(rel, side): pool.submit(sort, rel, side) for rel in range(len(ends)) for side in (0, 1)}
        return {key: future.result() for key, future in found.items()}


def mapped(path: str, length: int, kind: type) -> np.ndarray:
    """Return zeros in a new file mapped into memory (an empty file cannot be mapped)."""
    return np.asarray(np.memmap(path, dtype=kind, mode="w+", shape=(length,))) if length else np.zeros(0, kind)
