"""Ranks of true edges among their candidates, by blocked matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twhin_pipeline.errors import UserError
from twhin_pipeline.known_edges import KnownEdges
from twhin_pipeline.relation_scores import RelationScores, other

# float32 counts exactly up to here.
EXACT_FLOAT = 2**24


@dataclass(frozen=True)
class Ranks:
    """Ranks of E edges, from 1: `raw` float64 `[E]`, and `filtered` float64 `[E]` for each filter that was given."""

    raw: np.ndarray
    filtered: tuple[np.ndarray, ...]

    @staticmethod
    def of(others: np.ndarray, balance: np.ndarray, known: Sequence[tuple[np.ndarray, np.ndarray]]) -> Ranks:
        """Make ranks from counts, each `[E]`.

        `others` is how many other candidates an edge has and `balance` how many of them score above it less how many
        score below. With a above, b below and t tied, the best rank is 1 + a, the worst 1 + a + t, and their mean
        1 + (others + balance) / 2. `known` holds, for each filter, the same two counts of the candidates to leave out.
        """
        raw = 1 + (others + balance) / 2
        filtered = tuple(1 + (others - count + balance - its_balance) / 2 for count, its_balance in known)
        return Ranks(raw, filtered)


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
    side: str,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    filters: Sequence[KnownEdges],
    block_size: int,
) -> Ranks:
    """Rank E edges: `targets` (rows of `side`) among candidates, for `queries` (rows of the other side), int64 `[E]`.

    Ties count by the mean of the best and the worst rank (the "realistic" rank of Berrendorf et al., 2020), so a model
    that scores everything alike gets the middle and not the top. The true edge's score is an element of the same matrix
    product as its rivals', so that equal vectors are equal to the last bit.

    Raises:
        UserError: A score is not a number.
    """
    size = len(queries)
    balance = np.empty(size)
    known = [(np.empty(size), np.empty(size)) for _ in filters]
    fixed = scores.encode(side, candidates.rows)
    block = scores.block(candidates.size, block_size)
    for start in range(0, size, block):
        part = slice(start, min(start + block, size))
        signs, own = _signs(scores, side, queries[part], targets[part], candidates, fixed)
        total = signs.sum(1, dtype=torch.float64 if candidates.size >= EXACT_FLOAT else None)
        balance[part] = total.double().cpu().numpy() - own
        for (count, its_balance), edges in zip(known, filters, strict=True):
            position, entity = candidates.left_out(edges, queries[part], targets[part])
            count[part], its_balance[part] = _count(signs, position, candidates.columns[entity])
    if not np.isfinite(balance).all():
        raise UserError("the model scores some edges as NaN, so its vectors are not finite; train at a lower rate")
    return Ranks.of(candidates.others(targets), balance, known)


def _signs(
    scores: RelationScores,
    side: str,
    queries: np.ndarray,
    targets: np.ndarray,
    candidates: CandidateSet,
    fixed: torch.Tensor,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return the sign of (candidate's score - true score), `[P, N]`, and the true edge's own sign there, `[P]`."""
    encoded = scores.encode(other(side), queries)
    if candidates.rows is None:
        signs = scores.compare(encoded, fixed)
        true = signs.gather(1, torch.from_numpy(targets)[:, None].to(signs.device))
        # In place, since fresh memory for a second matrix would cost more than the arithmetic.
        return signs.sub_(true).sign_(), np.zeros(len(queries))
    both = scores.compare(encoded, torch.cat([fixed, scores.encode(side, targets)]))
    true = both[:, candidates.size :].diagonal()[:, None].clone()
    signs = both[:, : candidates.size].sub_(true).sign_()
    column = candidates.columns[targets]
    own = signs[torch.arange(len(column)), torch.from_numpy(np.maximum(column, 0))].double().cpu().numpy()
    return signs, np.where(column >= 0, own, 0.0)


def _count(signs: torch.Tensor, position: np.ndarray, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of `signs` `[P, N]` how many pairs it has and the sum of their signs: float64 `[P]` each."""
    values = signs[torch.from_numpy(position), torch.from_numpy(column)].double().cpu().numpy()
    rows = signs.shape[0]
    return np.bincount(position, minlength=rows).astype(float), np.bincount(position, values, rows)
