"""How recommendations by many interests are asked for; `mixture` makes them."""

from __future__ import annotations

from dataclasses import dataclass

from twhin_pipeline.errors import UserError


@dataclass(frozen=True)
class Interests:
    """How a head's interests are found."""

    top: int = 5
    """Clusters that a head is searched by, at most."""
    clusters: int | None = None
    """Clusters of all tails; None: the square root of their number."""
    smoothing: float = 0.5
    """The share of a head's weights that comes from what its neighbors engaged with, from 0 to below 1 (kNN-Embed)."""
    neighbors: int = 10
    """How many neighbors that are: the heads whose vectors are nearest by cosine."""

    own: float = 0.5
    """The share of the head's own vector in each of the vectors that it is searched by, from 0 to 1; 0 is as the papers
    have it."""

    def __post_init__(self) -> None:
        """Check the values. Raises UserError where one is out of its range."""
        if self.top < 1 or (self.clusters is not None and self.clusters < 1) or self.neighbors < 1:
            raise UserError(f"interests: top, clusters and neighbors must be 1 or more, got {self}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"interests: smoothing must be from 0 to below 1, got {self.smoothing}")
        if not 0 <= self.own <= 1:
            raise UserError(f"interests: own must be from 0 to 1, got {self.own}")
