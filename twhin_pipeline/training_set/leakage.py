"""Leakage: held-out edges whose reverse, or whose pair under another relation, is in training."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline.kernels import edge_kernels
from twhin_pipeline.training_set.split import Ends

Array = np.ndarray[Any, Any]
# Bits of a filter for each key: about one of 16 pairs that are not wanted passes it, and is then searched in vain.
BITS_PER_KEY = 16


class Pairs:
    """Wanted pairs of entities of two types, and whether training has them, as they are or reversed."""

    def __init__(self, width: int, keys: Array) -> None:
        """Take the wanted pairs as keys left * width + right, uint64."""
        self.width, self.keys = width, np.unique(keys)
        self.filter = np.zeros(max(1 << int(BITS_PER_KEY * len(self.keys) - 1).bit_length(), 8) // 8, np.uint8)
        edge_kernels.filter_of(self.keys, self.filter)
        self.trained = np.zeros((2, len(self.keys)), bool)

    def mark(self, left: Array, right: Array, how: int) -> None:
        """Mark pairs of training, rows int64 `[n]` each, as they are (0) or reversed (1)."""
        edge_kernels.mark(left, right, self.width, self.keys, self.filter, self.trained[how])


class Leakage:
    """Looks for held-out edges among training edges, which are added a piece at a time."""

    def __init__(self, held: Array, ends: Ends) -> None:
        """Take the held-out edges, records `split.HELD`."""
        self.held, self.ends = held, ends
        self.kinds = np.stack([types[held["rel"]] for types in ends.types], 1)
        self.pairs: dict[tuple[int, int], Pairs] = {}
        for left, right in {(int(a), int(b)) for a, b in np.unique(self.kinds, axis=0)}:
            self.pairs[left, right] = Pairs(ends.sizes[right], self._keys(self._of(left, right), right))

    def _of(self, left: int, right: int) -> Array:
        return (self.kinds == (left, right)).all(1)

    def _keys(self, which: Array, right: int) -> Array:
        width = np.uint64(self.ends.sizes[right])
        lhs, rhs = (self.held[name][which].astype(np.uint64) for name in ("lhs", "rhs"))
        return lhs * width + rhs

    def add(self, rel: int, lhs: Array, rhs: Array) -> None:
        """Add training edges of a relation, rows int64 `[n]` each."""
        left, right = (int(types[rel]) for types in self.ends.types)
        if (left, right) in self.pairs:
            self.pairs[left, right].mark(lhs, rhs, 0)
        if (right, left) in self.pairs:
            self.pairs[right, left].mark(rhs, lhs, 1)

    def counts(self, part: int, names: list[str]) -> dict[str, dict[str, int]]:
        """Count the part's edges, by relation, whose pair (`same_pair`) or reverse (`reverse`) training has."""
        trained = np.zeros((2, len(self.held)), bool)
        for (left, right), pairs in self.pairs.items():
            which = self._of(left, right)
            trained[:, which] = pairs.trained[:, np.searchsorted(pairs.keys, self._keys(which, right))]
        # A self-loop is its own reverse.
        trained[1] &= ~((self.held["lhs"] == self.held["rhs"]) & (self.kinds[:, 0] == self.kinds[:, 1]))
        here = self.held["part"] == part
        same, reverse = (np.bincount(self.held["rel"][here & each], minlength=len(names)) for each in trained)
        return {name: {"reverse": int(reverse[rel]), "same_pair": int(same[rel])} for rel, name in enumerate(names)}
