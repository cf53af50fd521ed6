"""Held-out edges to rank: which, against what, and what does not count. All of it is known before any model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.evaluation.baselines import popular_ranks
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts, Scores, rank_edges
from twhin_pipeline.store import Store, database
from twhin_pipeline.training_set.known_edges import KnownEdges, read_by_relation, read_known
from twhin_pipeline.words import SIDES, Side, other

Edges = dict[str, np.ndarray]
"""`lhs` and `rhs`, rows int64 `[E]`, of one relation's edges."""


@dataclass(frozen=True)
class HeldOut:
    """Parquet files (`lhs`, `rhs`, `rel`) of the edges to rank, of the training edges, and of edges seen in tuning.

    `before` are held-out edges that are not ranked, because a model that this one started from was trained on them.
    """

    split: str
    test: list[str]
    train: list[str]
    validation: list[str]
    before: list[str] = field(default_factory=list)

    @property
    def seen(self) -> list[str]:
        """What the model or its tuning has seen, which retrieval leaves out."""
        return [*self.train, *self.validation, *self.before]

    @property
    def known(self) -> list[str]:
        """All of these: true edges, which filtered ranks do not count as rivals."""
        return list(dict.fromkeys([*self.seen, *self.test]))

    @classmethod
    def open(cls, store: Store, snapshot: str) -> HeldOut:
        """Take the test edges, or the validation edges where there are no test edges."""
        manifest = store.manifest("held_out/test", snapshot)
        if not manifest.rows:
            return cls.for_selection(store, snapshot)
        train = store.files("training_set/positives", snapshot)
        return cls("test", store.files_of(manifest), train, store.files("held_out/validation", snapshot))

    def without(self, con: duckdb.DuckDBPyConnection, edges: pa.Table, folder: str) -> HeldOut:
        """Return the same without some of the edges to rank: `rel`, `lhs` and `rhs`. They are written to `folder`."""
        if not edges.num_rows:
            return self
        kept, before = f"{folder}/kept.parquet", f"{folder}/before.parquet"
        pq.write_table(edges, before)
        left = f"{database.parquet(self.test)} e ANTI JOIN {database.parquet([before])} b USING (rel, lhs, rhs)"
        con.execute(f"COPY (SELECT rel, lhs, rhs FROM {left}) TO {database.literal(kept)} (FORMAT parquet)")
        return replace(self, test=[kept], before=[before])

    @classmethod
    def for_selection(cls, store: Store, snapshot: str) -> HeldOut:
        """Take the validation edges; no test edge is among any of the files."""
        train = store.files("training_set/positives", snapshot)
        manifest = store.manifest("held_out/validation", snapshot)
        return cls("validation", store.files_of(manifest), train, []) if manifest.rows else cls("none", [], train, [])


@dataclass(frozen=True)
class Questions:
    """E edges of one relation to rank on one side: `targets` (rows of `side`) for `queries` (rows of the other side).

    `filters` are the known edges that are left out, as `ranking.rank_edges` takes them.
    """

    side: Side
    queries: np.ndarray
    targets: np.ndarray
    candidates: CandidateSet
    filters: Sequence[KnownEdges]

    @classmethod
    def of(cls, side: Side, edges: Edges, candidates: CandidateSet, filters: Sequence[KnownEdges]) -> Questions:
        """Ask for `side` of the edges."""
        return cls(side, edges[other(side)], edges[side], candidates, filters)

    def rank(self, scores: Scores, block_size: int) -> list[Counts]:
        """Rank by scores: raw, then by each filter."""
        return rank_edges(scores, self.side, self.queries, self.targets, self.candidates, self.filters, block_size)

    def popular(self, degrees: np.ndarray) -> list[Counts]:
        """Rank likewise by the candidates' `degrees` `[entities]`."""
        return popular_ranks(degrees, self.queries, self.targets, self.candidates, self.filters)


def read_edges(con: duckdb.DuckDBPyConnection, files: list[str], num_relations: int) -> list[Edges]:
    """Read each relation's edges, in the order of (lhs, rhs)."""
    query = "SELECT rel, lhs, rhs FROM read_parquet(?) ORDER BY ALL"
    by_relation = read_by_relation(con, query, files, range(num_relations))
    return [dict(zip(SIDES, columns, strict=True)) for columns in by_relation.values()]


def read_filters(
    con: duckdb.DuckDBPyConnection, files: list[str], side: Side, edges: Mapping[int, Edges]
) -> dict[int, KnownEdges]:
    """Read, for each relation, what is known in `files` of the queries that its `edges` ask `side` of."""
    return read_known(con, files, other(side), {number: one[other(side)] for number, one in edges.items()})


def some_edges(edges: Edges, limit: int | None, rng: np.random.Generator) -> Edges:
    """Draw `limit` of the edges without replacement; all of them where there are not more, or it is None."""
    total = len(edges["lhs"])
    if limit is None or limit >= total:
        return edges
    return taken(edges, np.sort(rng.choice(total, limit, replace=False)))


def some_heads(edges: Edges, limit: int | None, rng: np.random.Generator) -> Edges:
    """Draw heads, with all of their edges, until these would be more than `limit`; at least one head (None: all)."""
    if limit is None or limit >= len(edges["lhs"]):
        return edges
    return taken(edges, of_some_heads(edges, limit, rng))


def of_some_heads(edges: Edges, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Draw heads as `some_heads` does, and return their edges' positions, int64 `[P]` in order."""
    heads, counts = np.unique(edges["lhs"], return_counts=True)
    order = rng.permutation(len(heads))
    enough = np.searchsorted(np.cumsum(counts[order]), limit, "right")
    return np.flatnonzero(np.isin(edges["lhs"], heads[order[: max(1, enough)]]))


def taken(edges: Edges, positions: np.ndarray) -> Edges:
    """Return the edges at `positions`, int64 `[P]`."""
    return {side: edges[side][positions] for side in SIDES}


def read_retrieval(
    con: duckdb.DuckDBPyConnection,
    edges: Mapping[int, Edges],
    catalogue: Mapping[int, CandidateSet],
    held_out: HeldOut,
) -> dict[int, Questions]:
    """Return the questions of retrieval, by relation: all tails of `some_heads` in the catalogue less what was seen.

    Args:
        con: Reads what was seen.
        edges: The heads' edges.
        catalogue: The tails that are candidates.
        held_out: Says what was seen.
    """
    seen = read_filters(con, held_out.seen, "rhs", edges)
    return {n: Questions.of("rhs", one, catalogue[n], [seen[n]]) for n, one in edges.items()}


def shares(counts: np.ndarray, limit: int) -> np.ndarray:
    """Divide `limit` edges among relations of `counts` int64 `[R]` edges: one each, and the rest in proportion.

    Returns:
        int64 `[R]`: at most `counts`, 0 where there is no edge, together at most `limit` (or one for each relation
        that has an edge, where these are more); `counts` where they fit.
    """
    total = int(counts.sum())
    if total <= limit:
        return counts
    rest = max(limit - int((counts > 0).sum()), 0)
    return np.where(counts > 0, 1 + counts * rest // total, 0)
