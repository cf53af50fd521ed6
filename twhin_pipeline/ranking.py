"""Ranks of true edges among their candidates, by blocked matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twhin_pipeline.errors import UserError
from twhin_pipeline.known_edges import KnownEdges
from twhin_pipeline.relation_scores import RelationScores
from twhin_pipeline.scorer import Side

# float32 counts exactly up to here.
EXACT_FLOAT = 2**24


@dataclass(frozen=True)
class Counts:
    """How many of each edge's other candidates score `above` it and how many are `tied` with it, `[E]` each."""

    above: np.ndarray
    tied: np.ndarray

    @classmethod
    def of_signs(cls, candidates: np.ndarray, total: np.ndarray, unequal: np.ndarray) -> Counts:
        """Count from the signs of (candidate's score - edge's score): their sum, and that of their absolute values."""
        return cls((unequal + total) / 2, candidates - unequal)

    def less(self, left_out: Counts) -> Counts:
        """Leave some candidates out."""
        return Counts(self.above - left_out.above, self.tied - left_out.tied)

    @property
    def ranks(self) -> np.ndarray:
        """Ranks from 1, float64 `[E]`: the mean of the best one, 1 + above, and the worst, 1 + above + tied."""
        return 1 + self.above + self.tied / 2


class CandidateSet:
    """The entities of one type that edges are ranked against: all `num_entities`, or the sampled `rows`.

    `columns` (int64 `[num_entities]`) is where an entity stands among them, -1 where it was not sampled.
    """

    def __init__(self, num_entities: int, rows: np.ndarray | None = None) -> None:
        self.rows = rows
        self.size = num_entities if rows is None else len(rows)
        self.columns = np.arange(num_entities)
        if rows is not None:
            self.columns = np.full(num_entities, -1)
            self.columns[rows] = np.arange(len(rows))

    @classmethod
    def sample(cls, num_entities: int, size: int | None, rng: np.random.Generator) -> CandidateSet:
        """Draw `size` entities without replacement; all of them where `size` is None or not fewer."""
        if size is None or size >= num_entities:
            return cls(num_entities)
        return cls(num_entities, np.sort(rng.choice(num_entities, size, replace=False)))

    def others(self, targets: np.ndarray) -> np.ndarray:
        """Return how many candidates there are beside each of `targets` `[P]`."""
        return self.size - (self.columns[targets] >= 0)

    def left_out(self, known: KnownEdges, queries: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (position in `queries`, entity) of every known edge among the candidates but the edge itself."""
        position, entity = known.pairs(queries)
        keep = (self.columns[entity] >= 0) & (entity != targets[position])
        return position[keep], entity[keep]


@torch.inference_mode()
def rank_edges(
    scores: RelationScores,
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
    product as its rivals', so that equal vectors are equal to the last bit.

    Returns:
        The raw ranks, then for each filter those without its known edges (the ranked edge itself stays).

    Raises:
        UserError: A vector or a true edge's score is not finite.
    """
    size = len(queries)
    # Sums of signs and of their absolute values: of all candidates, then of each filter's.
    sums = np.zeros((1 + len(filters), 2, size))
    numbers = np.zeros((len(filters), size))
    fixed = _finite(scores.encode_candidates(side, candidates.rows))
    block = scores.block(candidates.size, block_size)
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        signs, own = _signs(scores, side, queries[part], targets[part], candidates, fixed)
        exact = torch.float64 if candidates.size >= EXACT_FLOAT else None
        sums[0, 0, part] = signs.sum(1, dtype=exact).double().cpu().numpy() - own
        for i, edges in enumerate(filters):
            position, entity = candidates.left_out(edges, queries[part], targets[part])
            column = torch.from_numpy(candidates.columns[entity])
            values = signs[torch.from_numpy(position), column].double().cpu().numpy()
            rows = len(signs)
            sums[1 + i, 0, part] = np.bincount(position, values, rows)
            sums[1 + i, 1, part] = np.bincount(position, abs(values), rows)
            numbers[i, part] = np.bincount(position, minlength=rows)
        sums[0, 1, part] = signs.abs_().sum(1, dtype=exact).double().cpu().numpy() - abs(own)
    raw = Counts.of_signs(candidates.others(targets), *sums[0])
    return [raw, *(raw.less(Counts.of_signs(numbers[i], *sums[1 + i])) for i in range(len(filters)))]


def _signs(
    scores: RelationScores,
    side: Side,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    fixed: torch.Tensor,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the sign of (candidate's score - true score), `[P, N]`, and the true edge's own sign there, `[P]`."""
    encoded = scores.encode_queries(side, queries)
    if candidates.rows is None:
        signs = scores.compare(encoded, fixed)
        true = _finite(signs.gather(1, torch.from_numpy(targets)[:, None].to(signs.device)))
        # In place, since fresh memory for a second matrix would cost more than the arithmetic.
        return signs.sub_(true).sign_(), np.zeros(len(queries))
    both = scores.compare(encoded, torch.cat([fixed, scores.encode_candidates(side, targets)]))
    true = _finite(both[:, candidates.size :].diagonal()[:, None].clone())
    signs = both[:, : candidates.size].sub_(true).sign_()
    column = candidates.columns[targets]
    own = signs[torch.arange(len(column)), torch.from_numpy(np.maximum(column, 0))].double().cpu().numpy()
    return signs, np.where(column >= 0, own, 0.0)


def _finite(values: torch.Tensor) -> torch.Tensor:
    """Return the values. The sign of NaN is 0 in torch, so it would pass for a tie."""
    if not values.isfinite().all():
        raise UserError("the model's vectors or scores are not finite; train again, at a lower learning rate")
    return values
