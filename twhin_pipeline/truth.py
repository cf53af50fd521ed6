"""True edges as sorted arrays in mapped files, and which pairs of a chunk and its candidates are among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from twhin_pipeline import database

if TYPE_CHECKING:
    import duckdb

# Following a neighbour and looking it up costs about an eighth of finding a pair among all edges by bisection.
PROBE_COST = 8


@dataclass(frozen=True)
class Adjacency:
    """A relation's edges seen from one side: `keys` [E] = entity * width + neighbour, ascending; entity i of `entities`
    [n] (ascending) has `keys[start[i]:start[i + 1]]`. `width` is the number of entities of the neighbours' type."""

    keys: np.ndarray
    entities: np.ndarray
    start: np.ndarray
    width: int

    def spans(self, entities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where each entity's edges begin, and how many there are."""
        if len(self.entities) == 0:
            return np.zeros(len(entities), np.int64), np.zeros(len(entities), np.int64)
        place = np.minimum(np.searchsorted(self.entities, entities), len(self.entities) - 1)
        found = self.entities[place] == entities
        begin = self.start[place]
        return begin, np.where(found, self.start[place + 1] - begin, 0)


def write_adjacency(
    con: duckdb.DuckDBPyConnection, files: list[str], ends: list[tuple[int, int]], prefix: str
) -> dict[tuple[int, int], Adjacency]:
    """Sort the edges of Parquet `files` (rel, lhs, rhs) both ways into mapped files; key: relation, side of the entity.

    `ends` gives the numbers of entities of each relation's sides. DuckDB sorts, on disk where memory does not suffice.
    """
    scanned = database.parquet(files)
    counts = dict(con.execute(f"SELECT rel, count(*) FROM {scanned} GROUP BY rel").fetchall())
    start = np.concatenate([[0], np.cumsum([counts.get(rel, 0) for rel in range(len(ends))])]).astype(np.int64)
    found = {}
    for side, order in enumerate(("lhs, rhs", "rhs, lhs")):
        width = np.array([end[1 - side] for end in ends], np.int64)
        # One file for all relations: each mapped file holds a file descriptor, of which a process has few.
        keys = np.memmap(f"{prefix}-{side}.keys", np.int64, "w+", shape=(max(int(start[-1]), 1),))
        filled = 0
        for batch in con.sql(f"SELECT rel, {order} FROM {scanned} ORDER BY rel, {order}").to_arrow_reader(1 << 18):
            rel, here, there = (batch.column(i).to_numpy() for i in range(3))
            keys[filled : filled + len(rel)] = here * width[rel] + there
            filled += len(rel)
        for rel in range(len(ends)):
            found[rel, side] = _index(np.asarray(keys[start[rel] : start[rel + 1]]), int(width[rel]))
    return found


def adjacency(kept: np.ndarray, listed: np.ndarray, width: int) -> Adjacency:
    """Return the adjacency of some edges, int64 `[E]` their ends, `listed` below `width`."""
    return _index(np.unique(np.asarray(kept, np.int64) * width + listed), width)


def true_pairs(
    from_kept: Adjacency, from_listed: Adjacency, queries: np.ndarray, position: np.ndarray, listed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return where queries and candidates are joined by a true edge: two int32 arrays [M].

    `queries` [Q] are distinct and ascend; the first array has their `position` [Q]. The second has places in `listed`
    [N]: of an entity that is listed more than once, all. Pairs are ordered by position, then by place.

    Each distinct entity of one side is either expanded (its neighbours looked up on the other side) or, where it has
    very many, tried against each entity of the other side; the side that costs less leads.
    """
    candidates, order, start = _grouped(listed)
    forward, backward = from_kept.spans(queries), from_listed.spans(candidates)
    costs = (
        np.minimum(forward[1], PROBE_COST * len(candidates)).sum(),
        np.minimum(backward[1], PROBE_COST * len(queries)).sum(),
    )
    if costs[0] <= costs[1]:
        i, j = _meet(from_kept, queries, forward, candidates)
    else:
        j, i = _meet(from_listed, candidates, backward, queries)
    counts = start[j + 1] - start[j]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    place = order[np.repeat(start[j], counts) + within]
    pairs = np.sort(np.repeat(position[i], counts) * max(len(listed), 1) + place)
    found, place = np.divmod(pairs, max(len(listed), 1))
    return found.astype(np.int32), place.astype(np.int32)


def _meet(
    adjacency: Adjacency, entities: np.ndarray, spans: tuple[np.ndarray, np.ndarray], others: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return index pairs of distinct `entities` and `others` (both ascending) that are joined by an edge."""
    begin, degree = spans
    light = np.flatnonzero((degree > 0) & (degree <= PROBE_COST * len(others)))
    owner = np.repeat(light, degree[light])
    shift = np.cumsum(degree[light]) - degree[light]
    places = np.arange(len(owner)) + np.repeat(begin[light] - shift, degree[light])
    neighbours = adjacency.keys[places] - entities[owner] * adjacency.width
    at = np.minimum(np.searchsorted(others, neighbours), len(others) - 1)
    hit = others[at] == neighbours
    i, j = owner[hit], at[hit]
    heavy = np.flatnonzero(degree > PROBE_COST * len(others))
    if len(heavy):
        wanted = entities[heavy][:, None] * adjacency.width + others
        place = np.minimum(np.searchsorted(adjacency.keys, wanted), len(adjacency.keys) - 1)
        more, which = np.nonzero(adjacency.keys[place] == wanted)
        i, j = np.concatenate([i, heavy[more]]), np.concatenate([j, which])
    return i, j


def _grouped(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the n distinct values, ascending, the order that sorts all, and where each value begins in it [n + 1]."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])[: len(values)])
    return ranked[first], order, np.append(first, len(values))


def _index(keys: np.ndarray, width: int) -> Adjacency:
    """Find where entities begin, a block of keys at a time."""
    entities, starts, last = [], [], -1
    for begin in range(0, len(keys), 1 << 20):
        here = np.asarray(keys[begin : begin + (1 << 20)]) // max(width, 1)
        first = np.flatnonzero(np.concatenate([[here[0] != last], here[1:] != here[:-1]]))
        entities.append(here[first])
        starts.append(first + begin)
        last = int(here[-1])
    joined = np.concatenate(entities) if entities else np.zeros(0, np.int64)
    start = np.concatenate([*starts, [len(keys)]]).astype(np.int64)
    return Adjacency(keys, joined, start, width)
