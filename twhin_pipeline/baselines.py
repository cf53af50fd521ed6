"""The most-popular baseline: a candidate's score is its number of training edges in that relation and on that side."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import numpy as np

from twhin_pipeline.known_edges import KnownEdges
from twhin_pipeline.ranking import CandidateSet, Counts

PAIRS_AT_A_TIME = 4_000_000


def read_degrees(
    con: duckdb.DuckDBPyConnection, files: list[str], relation: int, side: str, num_entities: int
) -> np.ndarray:
    """Count each entity's edges of a relation on `side`, from Parquet (`lhs`, `rhs`, `rel`): int64 `[num_entities]`."""
    degrees = np.zeros(num_entities, np.int64)
    if files:
        found = con.execute(
            f"SELECT {side} AS entity, count(*) AS degree FROM read_parquet(?) WHERE rel = ? GROUP BY 1",
            [files, relation],
        ).fetchnumpy()
        degrees[found["entity"]] = found["degree"]
    return degrees


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
    ordered = np.sort(degrees if candidates.rows is None else degrees[candidates.rows])
    own = degrees[targets]
    below = np.searchsorted(ordered, own, "left")
    above = len(ordered) - np.searchsorted(ordered, own, "right")
    raw = Counts(above.astype(float), (candidates.others(targets) - above - below).astype(float))
    return [raw, *(raw.less(_known(degrees, queries, targets, candidates, edges)) for edges in filters)]


def _known(
    degrees: np.ndarray, queries: np.ndarray, targets: np.ndarray, candidates: CandidateSet, edges: KnownEdges
) -> Counts:
    """Count a filter's candidates above and tied, some millions of pairs at a time."""
    above, tied = np.zeros(len(queries)), np.zeros(len(queries))
    pairs = np.cumsum(edges.counts(queries))
    cuts = [0, *np.searchsorted(pairs, np.arange(PAIRS_AT_A_TIME, int(pairs.max(initial=0)), PAIRS_AT_A_TIME))]
    for start, end in zip(cuts, [*cuts[1:], len(queries)], strict=True):
        position, entity = candidates.left_out(edges, queries[start:end], targets[start:end])
        difference = degrees[entity] - degrees[targets[start:end]][position]
        above[start:end] = np.bincount(position, difference > 0, end - start)
        tied[start:end] = np.bincount(position, difference == 0, end - start)
    return Counts(above, tied)
