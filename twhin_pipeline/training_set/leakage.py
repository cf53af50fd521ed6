"""Leakage: held-out edges whose reverse, or whose pair under another relation, is in training."""

from __future__ import annotations

from typing import Any

import numpy as np

from twhin_pipeline.kernels import edge_kernels, radix, sampling_kernels
from twhin_pipeline.training_set.held_edges import HeldEdges
from twhin_pipeline.training_set.known_edges import SORTED_AT_ONCE
from twhin_pipeline.training_set.mapped_array import mapped_zeros
from twhin_pipeline.training_set.split import Ends

Array = np.ndarray[Any, Any]
# Bits of a filter for each key: about one of 16 pairs that are not wanted passes it, and is then searched in vain.
BITS_PER_KEY = 16


class Pairs:
    """Wanted pairs of entities of two types, and whether training has them, as they are or reversed."""

    def __init__(self, width: int, keys: Array) -> None:
        """Take the wanted pairs as keys left * width + right, int64, in any order; they are sorted in place."""
        radix.sort_within(keys, np.empty(max(min(len(keys), SORTED_AT_ONCE), 1), np.int64))
        self.width, self.keys = width, keys[: sampling_kernels.without_repeats(keys)].view(np.uint64)
        self.filter = np.zeros(max(1 << int(BITS_PER_KEY * len(self.keys) - 1).bit_length(), 8) // 8, np.uint8)
        edge_kernels.filter_of(self.keys, self.filter)
        self.trained = np.zeros((2, len(self.keys)), bool)

    def mark(self, left: Array, right: Array, how: int) -> None:
        """Mark pairs of training, rows int64 `[n]` each, as they are (0) or reversed (1)."""
        edge_kernels.mark(left, right, self.width, self.keys, self.filter, self.trained[how])


class Leakage:
    """Looks for held-out edges among training edges, which are added a piece at a time.

    Memory: 4 bytes for each held-out pair, and 8 in a file that is mapped.
    """

    def __init__(self, held: HeldEdges, ends: Ends, folder: str) -> None:
        """Take the held-out edges; their pairs' files are in `folder`."""
        self.held, self.ends = held, ends
        types = len(ends.sizes)
        counts = np.zeros(types * types, np.int64)
        for edges in held.pieces():
            counts += np.bincount(self._kinds(edges), minlength=len(counts))
        keys = {
            kind: mapped_zeros(f"{folder}/{kind}.pairs", int(counts[kind]), np.int64)
            for kind in np.flatnonzero(counts).tolist()
        }
        filled = np.zeros_like(counts)
        for edges in held.pieces():
            kinds = self._kinds(edges)
            for kind in np.unique(kinds).tolist():
                result = self._keys(edges[kinds == kind], kind % types)
                keys[kind][filled[kind] : filled[kind] + len(result)] = result
                filled[kind] += len(result)
        self.pairs = {divmod(kind, types): Pairs(ends.sizes[kind % types], result) for kind, result in keys.items()}

    def _kinds(self, edges: Array) -> Array:
        """Return a number for the types of each edge's ends, int64 `[n]`."""
        left, right = (types[edges["rel"]] for types in self.ends.types)
        return np.asarray(left * len(self.ends.sizes) + right)

    def _keys(self, edges: Array, right: int) -> Array:
        return np.asarray(edges["lhs"] * self.ends.sizes[right] + edges["rhs"])

    def add(self, rel: int, lhs: Array, rhs: Array) -> None:
        """Add training edges of a relation, rows int64 `[n]` each."""
        left, right = (int(types[rel]) for types in self.ends.types)
        if (left, right) in self.pairs:
            self.pairs[left, right].mark(lhs, rhs, 0)
        if (right, left) in self.pairs:
            self.pairs[right, left].mark(rhs, lhs, 1)

    def counts(self, part: int, names: list[str]) -> dict[str, dict[str, int]]:
        """Count the part's edges, by relation, whose pair (`same_pair`) or reverse (`reverse`) training has."""
        counts = np.zeros((2, len(names)), np.int64)
        for edges in self.held.of(part):
            kinds = self._kinds(edges)
            for left, right in self.pairs:
                mine = edges[kinds == left * len(self.ends.sizes) + right]
                pairs = self.pairs[left, right]
                place = np.searchsorted(pairs.keys, self._keys(mine, right).view(np.uint64))
                trained = pairs.trained[:, place]
                # A self-loop is its own reverse.
                trained[1] &= ~((mine["lhs"] == mine["rhs"]) & (left == right))
                counts += [np.bincount(mine["rel"][each], minlength=len(names)) for each in trained]
        same, reverse = counts
        return {name: {"reverse": int(reverse[rel]), "same_pair": int(same[rel])} for rel, name in enumerate(names)}
