"""Words that every folder uses: the sides of an edge, and the parts that a snapshot's edges are divided into."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Side = Literal["lhs", "rhs"]
SIDES: tuple[Side, Side] = ("lhs", "rhs")
BOTH = "both"
"""What configurations and tables call the two sides together."""

TRAIN, VALIDATION, TEST = range(3)
PARTS = ("train", "validation", "test")
"""The parts' names, in the order of their numbers."""
DRIFT, PROMOTION = "drift", "promotion"
"""The tables of how a snapshot's release compares with the current one, and of what was decided about it."""
PUBLISHED = "published"
"""The table of what was published: its rows map the vectors into the space of the release before."""
CALIBRATION = "calibration"
"""The table of each relation's map from scores to probabilities."""
RELATIONS = "embeddings/relations"
"""The table with what a reader needs to score an edge; it completes the set of a snapshot's vectors."""
MODELS = ("twhin_model", "refit/twhin_model")
"""The tables of models."""
INDEX = "index"
"""The first part of the names of the tables about indexes: `index/<entity>`."""
REPEATS = "held_out/repeats"
"""The table of training edges that happen again in the test's time (`split.repeats`)."""


def other(side: Side) -> Side:
    """Return the side that is not `side`."""
    return "lhs" if side == "rhs" else "rhs"


def sides_word(sides: Iterable[Side]) -> str:
    """Return what tables call these sides: `lhs`, `rhs`, or `both` of them."""
    distinct = set(sides)
    return BOTH if len(distinct) > 1 else distinct.pop()
