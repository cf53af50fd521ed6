"""Known true edges of one relation, looked up by one of their sides."""

from __future__ import annotations

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

    def counts(self, queries: np.ndarray) -> np.ndarray:
        """Return how many answers each of `queries` `[P]` has: int64 `[P]`."""
        start, end = self.spans(queries)
        return end - start

    def pairs(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return every (position in `queries` `[P]`, answer) as two int64 arrays `[M]`, ordered by position."""
        first, end = self.spans(queries)
        counts = end - first
        position = np.repeat(np.arange(len(queries)), counts)
        within = np.arange(len(position)) - np.repeat(np.cumsum(counts) - counts, counts)
        return position, self.answer[np.repeat(first, counts) + within]

    def contains(self, queries: np.ndarray, answers: np.ndarray) -> np.ndarray:
        """Tell for each pair (`[P]` each, elementwise) whether it is a known edge: bool `[P]`."""
        if not len(self):
            return np.zeros(len(queries), bool)
        base = np.int64(max(self.answer.max(), answers.max(initial=0)) + 1)
        keys = self.query * base + self.answer
        asked = np.asarray(queries, np.int64) * base + answers
        at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        return keys[at] == asked


def read_known(
    con: duckdb.DuckDBPyConnection, files: list[str], relation: int, query_side: str, queries: np.ndarray
) -> KnownEdges:
    """Read from Parquet (`lhs`, `rhs`, `rel`) the edges of a relation whose `query_side` is one of `queries`.

    Only those are held in memory: a test set asks about few of a big graph's edges.
    """
    if not files or not len(queries):
        return KnownEdges(np.empty(0, np.int64), np.empty(0, np.int64))
    answer_side = "rhs" if query_side == "lhs" else "lhs"
    con.register("asked", pa.table({"entity": np.unique(queries)}))
    try:
        found = con.execute(
            f"SELECT {query_side} AS query, {answer_side} AS answer FROM read_parquet(?) e "
            f"SEMI JOIN asked ON e.{query_side} = asked.entity WHERE e.rel = ?",
            [files, relation],
        ).fetchnumpy()
    finally:
        con.unregister("asked")
    return KnownEdges.from_pairs(found["query"], found["answer"])
