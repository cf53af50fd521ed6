"""The entities sampled as candidates of a step (`train_data.sampled_per_step`), and the probability of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepSample:
    """Distinct rows of all tables, one table after the other, ascending (int64 `[S]`), and `log_q`, float32 `[S]`."""

    rows: Array
    log_q: Array
    """The log of the probability that the row is in the sample: a score less its log_q makes the sum over the sample an
    unbiased estimate of the sum over all (Horvitz and Thompson, 1952)."""

    def span(self, start: int, end: int) -> slice:
        """Return where the rows from `start` to before `end` are."""
        first, last = np.searchsorted(self.rows, (start, end)).tolist()
        return slice(first, last)


class StepSampler:
    """Draws a step's sample: of each table `size` rows, a share of them in proportion to degree^alpha.

    Even rows are drawn without repeats, those by degree with repeats, of which one is kept; so where the two overlap a
    sample has fewer rows than `size`. All rows of a table no larger than `size` are taken, and those of a table without
    edges are drawn evenly. Where some rows are `present` only, the others are never drawn.

    Popular entities are those that compete for the first ranks. Few candidates, drawn evenly among many, seldom have
    them; drawn by degree they are nearly always there, with a weight near 1.
    """

    def __init__(
        self,
        size: int,
        degree_share: float,
        alpha: float,
        seed: int,
        degrees: Sequence[Array],
        present: Sequence[Array | None] | None = None,
    ) -> None:
        """Take the training edges that each row of each table has, int64 `[N]`, table after table.

        `present`: by table the rows that may be drawn, int64 `[P]`, ascending; None: all.
        """
        self.size, self.seed = size, seed & (2**64 - 1)
        self.present = present or [None] * len(degrees)
        self.share: list[Array | None] = []
        """By table each row's part of the draw by degree, float64 `[N]`; None where all are drawn evenly."""
        self.rows = [
            len(degree) if rows is None else len(rows) for degree, rows in zip(degrees, self.present, strict=True)
        ]
        """By table, how many rows may be drawn."""
        self.starts = np.cumsum([0, *map(len, degrees)])[:-1].tolist()
        for degree, rows in zip(degrees, self.rows, strict=True):
            mass = np.where(degree > 0, degree.astype(np.float64) ** alpha, 0.0)
            by_degree = degree_share > 0 and rows > size and mass.sum() > 0
            self.share.append(mass / mass.sum() if by_degree else None)
        self.cumulative = [None if share is None else np.cumsum(share) for share in self.share]
        self.popular = round(size * degree_share)

    def draw(self, epoch: int, position: int) -> StepSample:
        """Draw the sample of the step at this position of an epoch; it depends on these and the seed alone."""
        rows_of, log_q = [], []
        for table, (rows, share, cumulative) in enumerate(zip(self.rows, self.share, self.cumulative, strict=True)):
            present = self.present[table]
            generator = np.random.default_rng([self.seed, epoch, position, table])
            popular = 0 if share is None else self.popular
            evenly = min(self.size - popular, rows)
            drawn = np.sort(generator.choice(rows, evenly, replace=False, shuffle=False))
            if present is not None:
                drawn = present[drawn]
            absent = np.full(len(drawn), 1 - evenly / max(rows, 1))
            if share is not None and cumulative is not None and popular:
                repeated = np.searchsorted(cumulative, generator.random(popular) * cumulative[-1], side="right")
                drawn = np.union1d(drawn, repeated)
                absent = (1 - evenly / rows) * (1 - share[drawn]) ** popular
            rows_of.append(self.starts[table] + drawn)
            log_q.append(np.log1p(-absent).astype(np.float32))
        return StepSample(np.concatenate(rows_of).astype(np.int64), np.concatenate(log_q))
