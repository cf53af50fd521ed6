"""Ranks of true edges among their candidates, by blocked matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from twhin_pipeline.errors import UserError
from twhin_pipeline.kernels.vector_kernels import count_listed, count_rivals, in_parts
from twhin_pipeline.training_set.known_edges import KnownEdges
from twhin_pipeline.words import Side

# Fewer edges than these are not worth a second thread.
EDGES_A_THREAD = 16


class Scores(Protocol):
    """One relation's scores of queries against candidates, a block of queries at a time.

    The candidates are entities of `side`, and the queries entities of the other side.
    """

    def encode_queries(self, side: Side, rows: np.ndarray) -> torch.Tensor:
        """Return whatever `compare` takes for the queries `rows` (int64 `[Q]`): `[Q, …]`."""

    def encode_candidates(self, side: Side, rows: np.ndarray | None) -> torch.Tensor:
        """Return whatever `compare` takes for the candidates `rows` (int64 `[N]`; None: all of them): `[N, …]`."""

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Return the scores `[Q, N]` of encoded queries and candidates."""

    def block(self, num_candidates: int, block_size: int) -> int:
        """Return how many queries to score at a time, at most `block_size`."""


@dataclass(frozen=True)
class Counts:
    """How many of each edge's other candidates score `above` it and how many are `tied` with it, `[E]` each."""

    above: np.ndarray
    tied: np.ndarray

    def at(self, positions: np.ndarray) -> Counts:
        """Return those of some edges, int64 `[P]` positions."""
        return Counts(self.above[positions], self.tied[positions])

    def less(self, left_out: Counts) -> Counts:
        """Leave some candidates out."""
        return Counts(self.above - left_out.above, self.tied - left_out.tied)

    @property
    def ranks(self) -> np.ndarray:
        """Ranks from 1, float64 `[E]`: the mean of the best one, 1 + above, and the worst, 1 + above + tied."""
        return 1 + self.above + self.tied / 2


class CandidateSet:
    """The entities of one type that edges are ranked against: all `num_entities`, or some `rows` (int64, ascending).

    `columns` (int64 `[num_entities]`) is each entity's position among them, -1 where it is none.
    """

    def __init__(self, num_entities: int, rows: np.ndarray | None = None, *, sampled: bool = False) -> None:
        self.rows, self.sampled = rows, sampled
        self.size = num_entities if rows is None else len(rows)
        self.columns = np.arange(num_entities)
        if rows is not None:
            self.columns = np.full(num_entities, -1)
            self.columns[rows] = np.arange(len(rows))

    @classmethod
    def sample(
        cls, num_entities: int, size: int | None, rng: np.random.Generator, present: np.ndarray | None = None
    ) -> CandidateSet:
        """Draw `size` entities without replacement; all of them where `size` is None or not fewer.

        `present`: the rows that may be candidates, int64 `[P]`, ascending; None: all.
        """
        count = num_entities if present is None else len(present)
        if size is None or size >= count:
            return cls(num_entities, present)
        drawn = np.sort(rng.choice(count, size, replace=False))
        return cls(num_entities, drawn if present is None else present[drawn], sampled=True)

    def others(self, targets: np.ndarray) -> np.ndarray:
        """Return how many candidates there are beside each of `targets` `[P]`."""
        return self.size - (self.columns[targets] >= 0)


@torch.inference_mode()
def rank_edges(
    scores: Scores,
    side: Side,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    filters: Sequence[KnownEdges],
    block_size: int,
) -> list[Counts]:
    """Rank E edges: `targets` (rows of `side`) among candidates, for `queries` (rows of the other side), int64 `[E]`.

    Ties count by the mean of the best and the worst rank (the "realistic" rank of Berrendorf et al., 2020), so a model
    that scores everything alike gets the middle and not the top. The true edge's score is an element of the same matrix
    product as its rivals', so that equal vectors are equal to the last bit. Edges that ask the same query share its
    scores.

    Returns:
        The raw ranks, then for each filter those without its known edges (the ranked edge itself stays).

    Raises:
        UserError: A vector or a true edge's score is not finite.
    """
    distinct, query_of = np.unique(queries, return_inverse=True)
    order = np.argsort(query_of, kind="stable")
    raw = Counts(*np.zeros((2, len(queries))))
    known = [Counts(*np.zeros((2, len(queries)))) for _ in filters]
    listed_columns = [candidates.columns[listed.neighbors] for listed in filters]
    fixed = _finite(scores.encode_candidates(side, candidates.rows))
    block = scores.block(candidates.size, block_size)
    starts = range(0, len(distinct), block)
    cuts = np.searchsorted(query_of[order], [*starts, len(distinct)])
    for i, start in enumerate(starts):
        edges = order[cuts[i] : cuts[i + 1]]
        row = query_of[edges] - start
        matrix, true, own = _block_scores(
            scores, side, distinct[start : start + block], row, targets[edges], candidates, fixed
        )
        raw.above[edges], raw.tied[edges] = _count(matrix, candidates.size, row, true)
        here = own >= 0
        value = _elements(matrix, row[here], own[here])
        raw.above[edges[here]] -= value > true[here]
        raw.tied[edges[here]] -= value == true[here]
        for counts, listed, columns in zip(known, filters, listed_columns, strict=True):
            above_and_tied = _count_listed(
                matrix, columns, *listed.spans(distinct[start : start + block]), row, true, own
            )
            counts.above[edges], counts.tied[edges] = above_and_tied
    return [raw, *(raw.less(counts) for counts in known)]


def _block_scores(
    scores: Scores,
    side: Side,
    queries: np.ndarray,
    row: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    fixed: torch.Tensor,
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Score Q queries, of which E edges are.

    Returns:
        Scores `[Q, N]` or more, the candidates' first; the true edges' scores float32 `[E]`; and each edge's own column
        among the candidates, int64 `[E]`, -1 where its target is none.
    """
    encoded = scores.encode_queries(side, queries)
    own = candidates.columns[targets]
    column = own
    if not candidates.sampled and (own >= 0).all():
        matrix = scores.compare(encoded, fixed)
    else:
        beside, place = np.unique(targets, return_inverse=True)
        matrix = scores.compare(encoded, torch.cat([fixed, scores.encode_candidates(side, beside)]))
        column = candidates.size + place
    matrix = matrix.float().contiguous()
    return matrix, _finite(torch.from_numpy(_elements(matrix, row, column))).numpy(), own


def _compiled(matrix: torch.Tensor) -> bool:
    """Return whether the compiled loops can read it; on a GPU torch counts."""
    return matrix.device.type == "cpu"


def _elements(matrix: torch.Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Return `matrix[row, column]`, `[M]`."""
    if _compiled(matrix):
        return matrix.numpy()[row, column]
    return matrix[torch.from_numpy(row), torch.from_numpy(column)].cpu().numpy()


def _count(matrix: torch.Tensor, size: int, row: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Count, for each edge, the candidates whose score is above the true one, and those tied: int64 `[2, E]`."""
    counts = np.zeros((2, len(row)), np.int64)
    if _compiled(matrix):
        values = matrix.numpy()
        in_parts(lambda e: count_rivals(values, size, row[e], true[e], *counts[:, e]), len(row), EDGES_A_THREAD)
        return counts
    for start in range(0, len(row), len(matrix)):
        part = slice(start, start + len(matrix))
        others = matrix[torch.from_numpy(row[part]).to(matrix.device), :size]
        own = torch.from_numpy(true[part]).to(matrix.device).unsqueeze(1)
        counts[:, part] = torch.stack([(others > own).sum(1), (others == own).sum(1)]).cpu().numpy()
    return counts


def _count_listed(
    matrix: torch.Tensor,
    columns: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    row: np.ndarray,
    true: np.ndarray,
    own: np.ndarray,
) -> np.ndarray:
    """Count likewise the candidates in `columns[start:end]` of each row, but the edge's own: int64 `[2, E]`."""
    counts = np.zeros((2, len(row)), np.int64)
    if _compiled(matrix):
        values = matrix.numpy()

        def count(e: slice) -> None:
            count_listed(values, columns, start, end, row[e], true[e], own[e], *counts[:, e])

        in_parts(count, len(row), EDGES_A_THREAD)
        return counts
    lengths = (end - start)[row]
    position = np.repeat(np.arange(len(row)), lengths)
    within = np.arange(len(position)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    column = columns[np.repeat(start[row], lengths) + within]
    keep = (column >= 0) & (column != own[position])
    position = position[keep]
    value = _elements(matrix, row[position], column[keep])
    counts[0] = np.bincount(position, value > true[position], len(row))
    counts[1] = np.bincount(position, value == true[position], len(row))
    return counts


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Return the values. NaN is neither above a score nor below it, so it would pass for the worst rival."""
    # A sum shows what is not finite at a tenth of the cost of testing each value; where it overflows, each is tested.
    if not values.sum().isfinite() and not values.isfinite().all():
        raise UserError("the model's vectors or scores are not finite; train again, at a lower learning rate")
    return values
