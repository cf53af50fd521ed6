"""Known true edges of one relation, looked up by one of their sides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class KnownEdges:
    """For every query entity, the entities that are truly on the other side.

    Both arrays are int64 `[K]`, sorted by `query`, then by `answer`, without duplicates: a CSR whose row pointers are
    found by bisection, so that it costs nothing for entities that are never asked for.
    """

    query: np.ndarray
    answer: np.ndarray

    @classmethod
    def from_pairs(cls, query: np.ndarray, answer: np.ndarray) -> KnownEdges:
        """Sort pairs (int64 `[K]` each) and drop duplicates."""
        order = np.lexsort((answer, query))
        query, answer = np.asarray(query, np.int64)[order], np.asarray(answer, np.int64)[order]
        new = np.ones(len(query), bool)
        new[1:] = (query[1:] != query[:-1]) | (answer[1:] != answer[:-1])
        return cls(query[new], answer[new])

    def __len__(self) -> int:
        return len(self.query)

    def spans(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the answers of each of `queries` `[P]` begin and end in `answer`: int64 `[P]` each."""
        return np.searchsorted(self.query, queries, "left"), np.searchsorted(self.query, queries, "right")

    def contains(self, queries: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Tell for each pair (`[P]` each, elementwise) whether it is a known edge: bool `[P]`."""
        if not len(self):
            return np.zeros(len(queries), bool)
        base = np.int64(max(self.answer.max(), answers.max(initial=0)) + 1)
        keys = self.query * base + self.answer
        asked = np.asarray(queries, np.int64) * base + answers
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        return keys[at] == asked


def read_by_relation(
    con: duckdb.DuckDBPyConnection, query: str, files: list[str], relations: Iterable[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Run a query of `read_parquet(?)` for `rel` and two more columns of integers, in the order of `rel`.

    Returns:
        The two columns of each relation, int64 `[K]`; empty where it has no row, or there is no file.
    """
    relations = list(relations)
    if not files or not relations:
        return {number: (np.empty(0, np.int64), np.empty(0, np.int64)) for number in relations}
    found = con.execute(query, [files]).fetchnumpy().values()
    rel, first, second = (np.asarray(column, np.int64) for column in found)
    start, end = (np.searchsorted(rel, relations, side) for side in ("left", "right"))
    return {number: (first[a:b], second[a:b]) for number, a, b in zip(relations, start, end, strict=True)}


def read_known(
    con: duckdb.DuckDBPyConnection, files: list[str], query_side: str, queries: Mapping[int, np.ndarray]
) -> dict[int, KnownEdges]:
    """Read from Parquet (`lhs`, `rhs`, `rel`) the edges whose `query_side` is one of their relation's `queries`.

    Only those are held in memory: a test set asks about few of a big graph's edges. All relations are read at once, as
    a query for each would cost more than ranking does where there are hundreds.
    """
    answer_side = "rhs" if query_side == "lhs" else "lhs"
    asked = [(number, np.unique(entities)) for number, entities in queries.items()]
    columns = {
        "rel": np.repeat([number for number, _ in asked], [len(entities) for _, entities in asked]).astype(np.int64),
        "entity": np.concatenate([np.empty(0, np.int64), *(entities for _, entities in asked)]),
    }
    con.register("asked", pa.table(columns))
    try:
        found = read_by_relation(
            con,
            f"SELECT DISTINCT e.rel, {query_side} AS query, {answer_side} AS answer FROM read_parquet(?) e "
            f"SEMI JOIN asked ON e.rel = asked.rel AND e.{query_side} = asked.entity ORDER BY ALL",
            files,
            queries,
        )
    finally:
        con.unregister("asked")
    return {number: KnownEdges(*columns) for number, columns in found.items()}
