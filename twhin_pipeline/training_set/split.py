"""Which edges are held out.

Each edge gets a hash `h` of seed, relation and ids, uniform over 64 bits. It depends neither on threads nor on the
snapshot: an edge that one snapshot holds out, a model that was warm-started from another has not trained on either.

Edges are read once, a piece at a time. A `Strategy` holds edges out by what is known of each alone. When all have been
read, it decides which of those held out go back to training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from twhin_pipeline.training_set.held_edges import HeldEdges
from twhin_pipeline.words import TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

Array = np.ndarray[Any, Any]

# Validation only if the source has none of its own.
CARVED = 3
# Bits by which hashes are counted.
_UPPER = 16


@dataclass(frozen=True)
class Ends:
    """The entity types (indices) of each relation's ends, `[R]`, and the number of rows of each type, `[T]`."""

    types: tuple[Array, Array]
    sizes: list[int]

    @classmethod
    def of(cls, config: TwhinConfig, sizes: list[int]) -> Ends:
        """Return them as the model has them; `sizes` in the order of its tables."""
        tables = config.model.table_names
        left, right = (
            np.array([tables.index(getattr(relation, side)) for relation in config.model.relations], np.int64)
            for side in ("lhs", "rhs")
        )
        return cls((left, right), sizes)

    def flags(self) -> list[Array]:
        """Return a false for each entity, bool `[N]`, by type."""
        return [np.zeros(size, bool) for size in self.sizes]

    def each(self, held: Array) -> Iterable[tuple[int, Array, Array]]:
        """Yield a type, which held-out edges have an end of it on a side (bool), and the rows on that side."""
        for side, name in enumerate(("lhs", "rhs")):
            kinds = self.types[side][held["rel"]]
            for kind in range(len(self.sizes)):
                yield kind, kinds == kind, held[name]


class Strategy(Protocol):
    """How edges are held out."""

    columns: tuple[str, ...]
    """What it goes by, of `raw_edges`."""
    before: int | None
    """When the time that is held out begins (microseconds); None where it does not go by time."""

    def parts(self, rel: int, h: Array, columns: dict[str, Array]) -> Array:
        """Return the part of each edge `[n]` of a relation, int8; what is in training stays there."""
        ...

    def settle(self, held: HeldEdges, trained: list[Array], ends: Ends) -> Iterator[Array]:
        """Yield the edges that are held out, some at a time, with the part of each: some are given back to training.

        `trained`: by type, whether an entity has an edge that was not held out, bool `[N]`.
        """
        ...


class Random:
    """Holds out the edges with the smallest hashes; an entity's largest stays in training, if none other does."""

    columns: tuple[str, ...] = ()
    before: int | None = None

    def __init__(self, config: TwhinConfig, *, validation: float, test: float) -> None:
        self.splittable = splittable(config)
        self.connected = config.split.keep_connected
        self.test_below, self.held_below = _bound(test), _bound(test + validation)

    def parts(self, rel: int, h: Array, columns: dict[str, Array]) -> Array:
        part = np.zeros(len(h), np.int8)
        if self.splittable[rel]:
            part[_below(h, self.held_below)] = VALIDATION
            part[_below(h, self.test_below)] = TEST
        return part

    def settle(self, held: HeldEdges, trained: list[Array], ends: Ends) -> Iterator[Array]:
        largest = _largest(held.pieces(), ends) if self.connected else None
        for edges in held.pieces():
            if largest is not None:
                edges["part"][_needed(edges, largest, trained, ends)] = TRAIN
            yield edges


class Given:
    """The source has decided: by a split column, or the published system's two `data_root`s.

    A split column without `validation` gets `split.validation` of its training edges as such, those with the smallest
    hashes, so that nothing is tuned on the test.
    """

    columns: tuple[str, ...] = ("split",)
    before: int | None = None

    def __init__(self, config: TwhinConfig) -> None:
        self.splittable = splittable(config)
        self.connected = config.split.keep_connected
        self.below = _bound(config.split.validation if config.split.strategy == "given" else 0.0)

    def parts(self, rel: int, h: Array, columns: dict[str, Array]) -> Array:
        part = columns["split"].copy()
        if self.splittable[rel]:
            part[_below(h, self.below) & (part == TRAIN)] = CARVED
        return part

    def settle(self, held: HeldEdges, trained: list[Array], ends: Ends) -> Iterator[Array]:
        has_validation = any((edges["part"] == VALIDATION).any() for edges in held.pieces())
        carved = (edges[edges["part"] == CARVED] for edges in held.pieces())
        largest = _largest(carved, ends) if self.connected and not has_validation else None
        for edges in held.pieces():
            taken = np.flatnonzero(edges["part"] == CARVED)
            edges["part"][taken] = TRAIN if has_validation else VALIDATION
            if largest is not None:
                edges["part"][taken[_needed(edges[taken], largest, trained, ends)]] = TRAIN
            yield edges


class Temporal:
    """Holds out the edges that are new last as the test and those new just before them for validation.

    It goes by the time when an edge first happened; equal times go by hash. Edges without a time stay in training.
    """

    columns: tuple[str, ...] = ("time", "first_time")

    def __init__(self, config: TwhinConfig, size: int, time_of: Callable[[int], int]) -> None:
        """Find the times.

        Args:
            config: Has the shares.
            size: The number of dated edges of relations that may be held out.
            time_of: Returns the first time at a place among those of these edges, ascending.
        """
        self.splittable = splittable(config)
        self.test = round(size * config.split.test)
        self.held = round(size * (config.split.test + config.split.validation))
        self.before = time_of(size - self.held) if self.held else None
        self.test_from = time_of(size - self.test) if self.test else None

    def parts(self, rel: int, h: Array, columns: dict[str, Array]) -> Array:
        if self.before is None or not self.splittable[rel]:
            return np.zeros(len(h), np.int8)
        return np.where(columns["first_time"] >= self.before, np.int8(TEST), np.int8(TRAIN))

    def settle(self, held: HeldEdges, trained: list[Array], ends: Ends) -> Iterator[Array]:
        of_held, of_test = (
            _last(held, count, time) for count, time in ((self.held, self.before), (self.test, self.test_from))
        )
        for edges in held.pieces():
            divide(edges, of_held, of_test)
            yield edges

    def repeated(self, rel: int | Array, time: Array, first_time: Array) -> Array:
        """Return which edges `[n]` of training happen again in the test's time, bool; `rel` may be one for all."""
        if self.test_from is None:
            return np.zeros(len(time), bool)
        return np.asarray((time >= self.test_from) & (time > first_time) & self.splittable[rel])


@dataclass(frozen=True)
class Last:
    """The last edges by first time; of those of equal times the ones with the least hashes, then ends."""

    time: int | None
    """That of the first of them; None: there is none."""
    cut: tuple[Any, int, int] = (np.uint64(0), 0, 0)
    """Of those with this time, the last one: its hash and its ends."""

    def among(self, edges: Array) -> Array:
        """Return which of some edges (records `HELD`) are among them, bool."""
        if self.time is None:
            return np.zeros(len(edges), bool)
        h, lhs, rhs = self.cut
        before = (edges["lhs"] < lhs) | ((edges["lhs"] == lhs) & (edges["rhs"] <= rhs))
        least = (edges["h"] < h) | ((edges["h"] == h) & before)
        return np.asarray((edges["first_time"] > self.time) | ((edges["first_time"] == self.time) & least))


def divide(edges: Array, of_held: Last, of_test: Last) -> None:
    """Write the parts of some edges (records `HELD`): the last ones are the test, those before them validation."""
    edges["part"] = TRAIN
    edges["part"][of_held.among(edges)] = VALIDATION
    edges["part"][of_test.among(edges)] = TEST


def _last(held: HeldEdges, count: int, time: int | None) -> Last:
    """Find where the last `count` of the held edges begin; the first of them has this `time` (None: there is none).

    Hashes at that time are first counted by their upper digits, so that few edges are compared.
    """
    if time is None:
        return Last(None)
    later, counts = 0, np.zeros(1 << _UPPER, np.int64)
    for edges in held.pieces():
        later += int((edges["first_time"] > time).sum())
        tied = edges["h"][edges["first_time"] == time] >> np.uint64(64 - _UPPER)
        counts += np.bincount(tied.astype(np.int64), minlength=1 << _UPPER)
    left = count - later
    below = np.concatenate([[0], np.cumsum(counts)])
    digit = int(np.searchsorted(below, left, side="left")) - 1
    close = np.concatenate(
        [
            edges[(edges["first_time"] == time) & (edges["h"] >> np.uint64(64 - _UPPER) == digit)]
            for edges in held.pieces()
        ]
    )
    close = close[np.lexsort((close["rhs"], close["lhs"], close["h"]))]
    last = close[left - int(below[digit]) - 1]
    return Last(time, (last["h"], int(last["lhs"]), int(last["rhs"])))


def splittable(config: TwhinConfig) -> Array:
    """Return, by relation, whether its edges may be held out; bool `[R]`."""
    chosen = config.split.relations
    return np.array([chosen is None or name in chosen for name in config.model.relation_names], bool)


def untrained(held: HeldEdges, trained: list[Array], ends: Ends) -> list[int]:
    """Count, by type, entities with a held-out edge but none in training (`trained`, bool `[N]`)."""
    held_out = ends.flags()
    for edges in held.pieces():
        for kind, here, rows in ends.each(edges):
            held_out[kind][rows[here]] = True
    return [int((flags & ~seen).sum()) for flags, seen in zip(held_out, trained, strict=True)]


def _largest(pieces: Iterable[Array], ends: Ends) -> list[Array]:
    """Return the largest hash of each entity's edges (records `HELD`, some at a time), by type: uint64 `[N]`."""
    largest = [np.zeros(size, np.uint64) for size in ends.sizes]
    for edges in pieces:
        for kind, here, rows in ends.each(edges):
            np.maximum.at(largest[kind], rows[here], edges["h"][here])
    return largest


def _needed(edges: Array, largest: list[Array], trained: list[Array], ends: Ends) -> Array:
    """Return which of some edges held out, bool, entities without a training edge get back: that with the largest `h`.

    An entity is without a training edge just when all of its edges are held out. Giving back one for each such entity
    is enough, and giving back more cannot undo it.
    """
    back = np.zeros(len(edges), bool)
    for kind, here, rows in ends.each(edges):
        chosen = rows[here]
        back[here] |= ~trained[kind][chosen] & (largest[kind][chosen] == edges["h"][here])
    return back


def _bound(share: float) -> int:
    """Return the hash below which a share of all hashes is."""
    return int(share * 2**64)


def _below(h: Array, bound: int) -> Array:
    return h < np.uint64(bound) if bound < 2**64 else np.ones(len(h), bool)
