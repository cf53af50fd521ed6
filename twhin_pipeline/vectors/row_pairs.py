"""Pairs of a query and a row of another table, such as a head and a tail that it already has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RowPairs:
    """M pairs: `queries` int64 `[M]`, ascending, and `rows` int64 `[M]`."""

    queries: Array
    rows: Array

    @classmethod
    def joined(cls, parts: Iterable[RowPairs]) -> RowPairs:
        """Return the pairs of all parts."""
        parts = list(parts)
        queries = np.concatenate([np.zeros(0, np.int64), *(part.queries for part in parts)])
        rows = np.concatenate([np.zeros(0, np.int64), *(part.rows for part in parts)])
        order = np.argsort(queries, kind="stable")
        return cls(queries[order], rows[order])

    def of(self, first: int, last: int) -> RowPairs:
        """Return the pairs of the queries from `first` to before `last`, which count from 0 then."""
        start, end = np.searchsorted(self.queries, (first, last))
        return RowPairs(self.queries[start:end] - first, self.rows[start:end])

    def among(self, queries: Array) -> RowPairs:
        """Return the pairs of some queries, int64 `[Q]`, ascending, which count from 0 then."""
        place = np.searchsorted(queries, self.queries)
        inside = (place < len(queries)) & (queries[np.minimum(place, len(queries) - 1)] == self.queries)
        return RowPairs(place[inside], self.rows[inside])

    def by_row(self) -> RowPairs:
        """Return the same pairs in the order of rows."""
        order = np.argsort(self.rows, kind="stable")
        return RowPairs(self.queries[order], self.rows[order])

    def contain(self, queries: Array, rows: Array) -> Array:
        """Tell which of `rows` int64 `[Q, k]` are paired with their query, of int64 `[Q]`: bool `[Q, k]`."""
        size = int(max(self.rows.max(initial=0), rows.max(initial=0))) + 1
        own = self.queries * size + self.rows
        return np.isin(queries[:, None] * size + rows, own) & (rows >= 0)


@dataclass(frozen=True)
class RowLists:
    """Rows for each of N entities: entity i has `rows[start[i]:start[i + 1]]`; int64 `[N + 1]` and int32 `[M]`."""

    start: Array
    rows: Array

    @classmethod
    def of_pairs(cls, entities: Array, rows: Array, count: int) -> RowLists:
        """Gather pairs (integers `[M]` each) by entity, of which there are `count`.

        It is fast where an entity's pairs are in few runs, as in a table that is sorted by another key of entities.
        """
        first = np.flatnonzero(np.diff(entities, prepend=-1))
        length = np.diff(first, append=len(entities))
        start = np.zeros(count + 1, np.int64)
        np.add.at(start, entities[first].astype(np.int64) + 1, length)
        order = np.argsort(entities[first], kind="stable")
        return cls(np.cumsum(start), rows[_ranges(first[order], length[order])])

    def pairs(self, entities: Array) -> RowPairs:
        """Return the pairs of `entities` int64 `[Q]`, which are queries 0 … Q-1; -1 has none."""
        queries, places = places_of(self.start, entities)
        return RowPairs(queries, self.rows[places].astype(np.int64))


def places_of(start: Array, entities: Array) -> tuple[Array, Array]:
    """Return where lists have what `entities` int64 `[Q]` have, -1 having nothing.

    Args:
        start: Where each entity's list begins, and where the last ends, int64 `[N + 1]`.
        entities: Queries 0 … Q-1.

    Returns:
        Of each of M places the query, int64 `[M]`, ascending, and the place, int64 `[M]`.
    """
    known = entities >= 0
    first = np.where(known, start[entities], 0)
    length = np.where(known, start[entities + 1], 0) - first
    return np.repeat(np.arange(len(entities)), length), _ranges(first, length)


def _ranges(first: Array, length: Array) -> Array:
    """Return first[0], first[0] + 1, … of `length[0]` numbers, then those of first[1], and so on."""
    begin = np.cumsum(length) - length
    return np.arange(int(length.sum())) + np.repeat(first - begin, length)
