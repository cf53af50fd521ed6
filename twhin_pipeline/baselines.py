"""The most-popular baseline: a candidate's score is its number of training edges in that relation and on that side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np

from twhin_pipeline.kernels import count_listed, in_parts
from twhin_pipeline.known_edges import KnownEdges, read_by_relation
from twhin_pipeline.ranking import EDGES_A_THREAD, CandidateSet, Counts


@dataclass(frozen=True)
class Degrees:
    """Entities that have an edge of a relation on one side, and how many: int64 `[K]` each."""

    entity: np.ndarray
    count: np.ndarray

    def of_all(self, num_entities: int) -> np.ndarray:
        """Return every entity's number, int64 `[num_entities]`."""
        degrees = np.zeros(num_entities, np.int64)
        degrees[self.entity] = self.count
        return degrees


def read_degrees(
    con: duckdb.DuckDBPyConnection, files: list[str], side: str, relations: Iterable[int]
) -> dict[int, Degrees]:
    """Count entities' edges on `side` by relation, from Parquet (`lhs`, `rhs`, `rel`)."""
    relations = list(relations)
    query = (
        f"SELECT rel, {side} AS entity, count(*) AS count FROM read_parquet(?) "
        f"WHERE rel IN ({', '.join(map(str, relations))}) GROUP BY ALL ORDER BY rel"
    )
    return {n: Degrees(*columns) for n, columns in read_by_relation(con, query, files, relations).items()}


def popular_ranks(
    degrees: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    filters: Sequence[KnownEdges],
) -> list[Counts]:
    """Rank the same edges as `ranking.rank_edges` by the candidates' `degrees` `[num_entities]`; returns the same.

    The score does not depend on the query, so one sort answers for all edges.
    """
    values = degrees if candidates.rows is None else degrees[candidates.rows]
    ordered = np.sort(values)
    own = degrees[targets]
    below = np.searchsorted(ordered, own, "left")
    above = len(ordered) - np.searchsorted(ordered, own, "right")
    raw = Counts(above.astype(float), (candidates.others(targets) - above - below).astype(float))
    return [raw, *(raw.less(_known(values, own, queries, targets, candidates, edges)) for edges in filters)]


def _known(
    values: np.ndarray,
    own: np.ndarray,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    edges: KnownEdges,
) -> Counts:
    """Count a filter's candidates above and tied, by degrees: `values` `[N]` of candidates, `own` `[E]` of targets."""
    each = np.arange(len(queries))
    # The same values for every edge, without a copy.
    scores = np.broadcast_to(values, (len(queries), len(values)))
    columns, column = candidates.columns[edges.answer], candidates.columns[targets]
    start, end = edges.spans(queries)
    found = np.zeros((2, len(queries)), np.int64)

    def count(e: slice) -> None:
        count_listed(scores, columns, start, end, each[e], own[e], column[e], *found[:, e])

    in_parts(count, len(queries), EDGES_A_THREAD)
    return Counts(*found.astype(float))
