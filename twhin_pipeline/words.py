"""Words that every folder uses: the sides of an edge, and the parts that a snapshot's edges are divided into."""

from __future__ import annotations

from typing import Literal

Side = Literal["lhs", "rhs"]
SIDES: tuple[Side, Side] = ("lhs", "rhs")

TRAIN, VALIDATION, TEST = range(3)
PARTS = ("train", "validation", "test")
"""The parts' names, in the order of their numbers."""
REPEATS = "held_out/repeats"
"""The table of training edges that happen again in the test's time (`split.repeats`)."""


def other(side: Side) -> Side:
    """Return the side that is not `side`."""
    return "lhs" if side == "rhs" else "rhs"
