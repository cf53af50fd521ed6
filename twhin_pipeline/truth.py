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
    counts = {
        int(rel): int(count)
        for rel, count in con.execute(f"SELECT rel, count(*) FROM {scanned} GROUP BY rel").fetchall()
    }
    found = {}
    for side, order in enumerate(("lhs, rhs", "rhs, lhs")):
        keys = {rel: _Appender(f"{prefix}-{side}-{rel}.keys", counts.get(rel, 0)) for rel in range(len(ends))}
        first, second = order.split(", ")
        for batch in con.sql(f"SELECT rel, {order} FROM {scanned} ORDER BY rel, {order}").to_arrow_reader(1 << 18):
            rel = batch.column("rel").to_numpy()
            here, there = batch.column(first).to_numpy(), batch.column(second).to_numpy()
            edges = np.flatnonzero(np.diff(rel)) + 1
            for part in np.split(np.arange(len(rel)), edges):
                number = int(rel[part[0]])
                keys[number].append(here[part] * ends[number][1 - side] + there[part])
        for number, appender in keys.items():
            found[number, side] = _index(appender.array, ends[number][1 - side])
    return found


def true_pairs(
    from_kept: Adjacency, from_listed: Adjacency, kept: np.ndarray, listed: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return positions in `kept` [P] and in `listed` [N] of all pairs that are true edges, by position, then candidate.

    Each distinct entity of one side is either expanded (its neighbours looked up on the other side) or, where it has
    very many, tried against each entity of the other side; the side that costs less leads.
    """
    left, left_groups = _grouped(kept)
    right, right_groups = _grouped(listed)
    forward, backward = from_kept.spans(left), from_listed.spans(right)
    costs = (
        np.minimum(forward[1], PROBE_COST * len(right)).sum(),
        np.minimum(backward[1], PROBE_COST * len(left)).sum(),
    )
    if costs[0] <= costs[1]:
        i, j = _meet(from_kept, left, forward, right)
    else:
        j, i = _meet(from_listed, right, backward, left)
    return _ungrouped(i, j, left_groups, right_groups, len(listed))


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


def _grouped(values: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return the distinct values, ascending, and where they are: an order of positions and where each group begins."""
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    first = (
        np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]])) if len(values) else np.zeros(0, np.int64)
    )
    return ranked[first], (order, np.append(first, len(values)))


def _ungrouped(
    i: np.ndarray,
    j: np.ndarray,
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    columns: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Turn pairs of distinct entities into all pairs of their positions, ordered."""
    (left_order, left_start), (right_order, right_start) = left, right
    tall, wide = left_start[i + 1] - left_start[i], right_start[j + 1] - right_start[j]
    sizes = tall * wide
    pair = np.repeat(np.arange(len(i)), sizes)
    within = np.arange(len(pair)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    position = left_order[left_start[i][pair] + within // wide[pair]]
    candidate = right_order[right_start[j][pair] + within % wide[pair]]
    both = np.sort(position * columns + candidate)
    return (both // max(columns, 1)).astype(np.int32), (both % max(columns, 1)).astype(np.int32)


class _Appender:
    """An int64 array of known length in a mapped file, filled from the front."""

    def __init__(self, path: str, length: int) -> None:
        self.array = np.memmap(path, np.int64, "w+", shape=(length,)) if length else np.zeros(0, np.int64)
        self.filled = 0

    def append(self, values: np.ndarray) -> None:
        self.array[self.filled : self.filled + len(values)] = values
        self.filled += len(values)


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
