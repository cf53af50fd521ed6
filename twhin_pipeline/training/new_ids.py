"""New ids of a warm start: each begins where the relations of its edges to known ids want it.

A tail begins at the mean of `operator(head)` over its edges, and a head at that of the inverse direction, as in
`model/placing.py`. There the estimate is the vector; here training goes on from it. An id without an edge to a known id
begins at the mean of its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from twhin_pipeline.config.model import Relation
from twhin_pipeline.model.placing import length_of, mean_wanted
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import LocalShards, local_shards, table_weights, unwrapped
from twhin_pipeline.store import Store
from twhin_pipeline.words import SIDES, other

Array = np.ndarray[Any, Any]
BLOCK = 65_536
"""Edges that are read, and neighbors that are looked up, at a time."""


@dataclass(frozen=True)
class Known:
    """The ids of an entity type whose vectors an earlier model gave."""

    rows: Array
    """Whether a row is one of them, or of an id without an edge, bool `[ids]`; the same on all ranks."""
    mean: Array | None
    """The mean of the earlier model's vectors, float32 `[D]`; None where it has none of the type."""
    length: float = 0.0
    """The mean of their lengths."""


@torch.no_grad()
def start_from_neighbors(
    model: nn.Module, store: Store, snapshot: str, relations: list[Relation], known: Mapping[str, Known], ranks: Ranks
) -> dict[str, tuple[int, int]]:
    """Move the new ids of this rank's shards from their random start; all ranks call it together.

    A new id's vector becomes the estimate plus its random start, so that no two are alike. Estimates from neighbors are
    scaled to the mean length of the type's known vectors, as a mean is shorter than what it is the mean of; not where
    the comparator is a distance, for which the length is part of the place. Each rank reads all training
    edges in order, a block at a time, and adds up only for rows that it holds: 4 bytes a number of a new id's vector.
    The sums do not depend on the number of ranks.

    Args:
        model: The model, sharded or not, filled with the earlier model's vectors and operators.
        store: Has `training_set/positives`.
        snapshot: Its snapshot.
        relations: The configuration's, in order.
        known: By entity type the ids that are not new.
        ranks: This process among the others.

    Returns:
        By entity type, how many ids are new, and how many of these have a known neighbor; of all ranks.
    """
    inner = unwrapped(model)
    weights = table_weights(model)
    sums = {name: _Sums(local_shards(weights[name]), known[name].rows, inner.dim) for name in inner.table_names}
    pieces = _pieces(store, snapshot, relations, known, sums)
    piece = next(pieces, None)
    while ranks.any(piece is not None):  # a lookup needs all ranks
        _add(inner, relations, piece or _Ends.none(), sums)
        piece = next(pieces, None)
    ranks.barrier()  # from here on rows change that other ranks may have read
    counts = {}
    for name, of_table in sums.items():
        of_table.move(known[name], length_of(inner.scorer.comparator, known[name].length))
        new, placed = ranks.sum([len(of_table.new), int((of_table.weight > 0).sum())])
        counts[name] = int(new), int(placed)
    return counts


@dataclass(frozen=True)
class _Ends:
    """Edges' ends that are new, with the known ends at the other side: arrays `[M]`, in the order of the edges."""

    relation: Array
    side: Array
    """0: the new end is the head; 1: the tail."""
    new: Array
    neighbor: Array
    weight: Array

    @classmethod
    def none(cls) -> _Ends:
        integers = np.zeros(0, np.int64)
        return cls(integers, integers, integers, integers, np.zeros(0, np.float32))


class _Sums:
    """Weighted sums of estimates for the new ids in this rank's shards of a table."""

    def __init__(self, shards: LocalShards, known: Array, dim: int) -> None:
        self.shards = shards
        self.is_new = np.zeros(len(known), bool)
        """Whether a row is new and in this rank's shards, bool `[ids]`."""
        for first, rows in shards:
            part = slice(first, first + len(rows))
            self.is_new[part] = ~known[part]
        self.new = np.flatnonzero(self.is_new)
        self.total = torch.zeros(len(self.new), dim)
        self.weight = torch.zeros(len(self.new), dtype=torch.float64)

    def add(self, rows: Array, vectors: torch.Tensor, weight: torch.Tensor) -> None:
        """Add `vectors [M, D]` times `weight [M]` to the new `rows` `[M]`, in order."""
        place = torch.from_numpy(np.searchsorted(self.new, rows))
        self.total.index_add_(0, place, vectors * weight.unsqueeze(1))
        self.weight.index_add_(0, place, weight.double())

    def move(self, known: Known, length: float) -> None:
        """Add each new id's estimate to its row: the mean of its neighbors', of that length, else its type's."""
        estimate = mean_wanted(self.total, self.weight, length)
        if known.mean is not None:
            estimate[self.weight == 0] = torch.from_numpy(known.mean)
        for first, rows in self.shards:
            begin, end = np.searchsorted(self.new, (first, first + len(rows)))
            where = torch.from_numpy(self.new[begin:end] - first).to(rows.device)
            rows[where] = (rows[where].float() + estimate[begin:end].to(rows.device)).to(rows.dtype)


def _pieces(
    store: Store, snapshot: str, relations: list[Relation], known: Mapping[str, Known], sums: Mapping[str, _Sums]
) -> Iterator[_Ends]:
    """Yield the training edges' new ends that this rank holds and that have a known neighbor, about a block at a time.

    Tails come before heads within a block of edges, and blocks are the same on all ranks.
    """
    pending: list[_Ends] = []
    columns = ["rel", "lhs", "rhs", "weight"]
    for batch in store.batches(store.files("training_set/positives", snapshot), columns, BLOCK):
        rel, weight = (batch.column(name).to_numpy() for name in ("rel", "weight"))
        ends = {side: batch.column(side).to_numpy() for side in SIDES}
        for number, side in reversed(list(enumerate(SIDES))):
            chosen = np.zeros(len(rel), bool)
            for r in np.unique(rel).tolist():
                here = np.flatnonzero((rel == r) & (weight > 0))
                new = sums[getattr(relations[r], side)].is_new[ends[side][here]]
                there = known[getattr(relations[r], other(side))].rows[ends[other(side)][here]]
                chosen[here] = new & there
            where = np.flatnonzero(chosen)
            if len(where):
                sides = np.full(len(where), number)
                pending.append(_Ends(rel[where], sides, ends[side][where], ends[other(side)][where], weight[where]))
        if sum(len(one.new) for one in pending) >= BLOCK:
            yield _joined(pending)
            pending = []
    if pending:
        yield _joined(pending)


def _joined(parts: list[_Ends]) -> _Ends:
    fields = ("relation", "side", "new", "neighbor", "weight")
    return _Ends(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))


def _add(model: TwhinModel, relations: list[Relation], ends: _Ends, sums: Mapping[str, _Sums]) -> None:
    """Look the neighbors up and add what they want to the sums."""
    groups = [
        (r, side, np.flatnonzero((ends.relation == r) & (ends.side == number)))
        for r in np.unique(ends.relation).tolist()
        for number, side in enumerate(SIDES)
    ]
    wanted_rows: dict[str, list[Array]] = {name: [] for name in model.table_names}
    for r, side, where in groups:
        wanted_rows[getattr(relations[r], other(side))].append(ends.neighbor[where])
    unique = {name: np.unique(np.concatenate([np.zeros(0, np.int64), *rows])) for name, rows in wanted_rows.items()}
    device = model.scorer.device
    vectors = dict(
        zip(
            model.table_names,
            model.lookup({name: torch.from_numpy(rows).to(device) for name, rows in unique.items()}),
            strict=True,
        )
    )
    estimate = torch.empty(len(ends.new), model.dim)
    of_table: dict[str, list[Array]] = {}
    for r, side, where in groups:
        if len(where):
            table = getattr(relations[r], other(side))
            place = torch.from_numpy(np.searchsorted(unique[table], ends.neighbor[where])).to(device)
            relation = torch.tensor([r], device=device)
            x = model.scorer.wanted(side, vectors[table][place].unsqueeze(0), relation)[0]
            estimate[torch.from_numpy(where)] = x.float().cpu()
            of_table.setdefault(getattr(relations[r], side), []).append(where)
    weight = torch.from_numpy(ends.weight.astype(np.float32))
    for name, parts in of_table.items():
        order = np.sort(np.concatenate(parts))  # as the edges are, so that sums do not depend on the blocks
        sums[name].add(ends.new[order], estimate[torch.from_numpy(order)], weight[torch.from_numpy(order)])
