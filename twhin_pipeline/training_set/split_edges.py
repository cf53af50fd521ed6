"""Splits the edges of a snapshot into training, validation and test, out of memory: they are read once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from twhin_pipeline.graph.bucket_file import MOST_BUCKETS, BucketFile
from twhin_pipeline.graph.edge_file import NO_TIME
from twhin_pipeline.kernels.radix import in_order
from twhin_pipeline.prefetch import Prefetcher
from twhin_pipeline.training_set import split
from twhin_pipeline.training_set.encoding import Encoded, Encoder
from twhin_pipeline.training_set.held_edges import HELD, HeldEdges
from twhin_pipeline.training_set.leakage import Leakage
from twhin_pipeline.training_set.mapped_array import mapped_zeros
from twhin_pipeline.training_set.shuffle import EDGES_PER_BUCKET, Edges, Order, ShuffledEdges
from twhin_pipeline.words import PARTS, TEST, TRAIN, VALIDATION

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]
PIECES_AHEAD = 4


class SplitEdges:
    """The edges by part, in temporary files: 16 bytes an edge, 24 where a type has 2^31 rows or more."""

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, folder: str) -> None:
        """Read, encode and split the edges of a snapshot; temporary files are in `folder`."""
        self.config, self.folder = config, folder
        self.files = ExitStack()
        encoder = Encoder(config, store, snapshot, snapshot, folder)
        self.by_time = config.split.strategy == "temporal" and config.split.later_snapshot is None
        self.rows, self.order = encoder.rows, Order.of(config.negatives.seed, "chunks")
        self.ends = split.Ends.of(config, encoder.sizes)
        relations = len(config.model.relations)
        self.without_row = np.zeros((len(PARTS), relations), np.int64)
        """Raw edges with an entity in no vocabulary, by part (training, unless the source has a split) and relation."""
        self.later: Later | None = None
        if config.split.later_snapshot is not None:
            of_later = Encoder(config, store, snapshot, config.split.later_snapshot, folder)
            self.later = Later(config, of_later, folder, self.files)
        train = self._shuffled("train", encoder.counts)
        self.repeated = np.zeros(relations, np.int64)
        """Training edges that happen again in the test's time, by relation."""
        self.repeats = self._shuffled("repeats", encoder.counts) if config.split.repeats else None
        """These edges themselves, with `split.repeats`."""
        self.held = self._hold_out(encoder, train)
        """Edges that are held out."""
        self.parts = [train]
        """The edges of each part."""
        for part in (VALIDATION, TEST):
            counts = np.zeros(relations, np.int64)
            for records in self.held.of(part):
                counts += np.bincount(records["rel"], minlength=relations)
            self.parts.append(self._shuffled(PARTS[part], counts))
            _add(self.parts[part], self.held.of(part))
        self.left_out = self._limit()
        """Edges that `limit` and `offset` leave out."""
        self.trained = self.ends.flags()
        self.leakage = Leakage(self.held, self.ends, folder)

    def __enter__(self) -> SplitEdges:
        return self

    def __exit__(self, *exc: object) -> None:
        self.files.close()

    def in_order(self, part: int) -> Iterator[Edges]:
        """Yield a part's edges by relation and then in their random order."""
        for edges in self.parts[part].in_order():
            if part == TRAIN:
                self._mark(self.trained, edges)
                self.leakage.add(edges.rel, edges.lhs, edges.rhs)
            yield edges

    def details(self, part: int) -> dict[str, Any]:
        """Return further details for a part's manifest; `in_order` must have yielded all training edges before."""
        names = self.config.model.relation_names
        if part == TRAIN:
            unseen = split.untrained(self.held, self.trained, self.ends)
            return {
                "without_row": dict(zip(names, self.without_row.sum(0).tolist(), strict=True)),
                "entities_without_training_edge": dict(zip(self.config.model.table_names, unseen, strict=True)),
                "left_out": self.left_out,
            }
        dropped = int(self.without_row[part].sum())
        if part == TEST and self.later is not None:
            dropped += self.later.without_row
        details: dict[str, Any] = {"leakage": self.leakage.counts(part, names), "dropped": dropped}
        if part == TEST and self.by_time:
            details["repeated_edges"] = dict(zip(names, self.repeated.tolist(), strict=True))
        return details

    def _shuffled(self, name: str, most: Array) -> ShuffledEdges:
        return self.files.enter_context(ShuffledEdges(f"{self.folder}/{name}", most, self.rows, self.order))

    def _mark(self, flags: list[Array], edges: Edges | Encoded) -> None:
        for types, rows in zip(self.ends.types, (edges.lhs, edges.rhs), strict=True):
            flags[int(types[edges.rel])][rows] = True

    def _hold_out(self, encoder: Encoder, train: ShuffledEdges) -> HeldEdges:
        """Add the training edges to `train`; return the others."""
        strategy = _strategy(self.config, encoder, self.folder)
        trained = self.ends.flags()
        pieces = encoder.pieces(strategy.columns, strategy.before)

        def held_out() -> Iterator[Array]:
            for piece in ahead:
                edges = self._with_rows(piece)
                if self.later is not None:
                    self.later.mark_earlier(edges)
                part = strategy.parts(edges.rel, edges.h, edges.columns)
                out = np.flatnonzero(part)
                if len(out):
                    yield _records(edges.where(out), part[out])
                    edges = edges.where(part == TRAIN)
                self._mark(trained, edges)
                train.add(edges.edges())
                if isinstance(strategy, split.Temporal):
                    times = (edges.columns[name] for name in ("time", "first_time"))
                    self._repeat(edges.where(strategy.repeated(edges.rel, *times)).edges())

        with Prefetcher(pieces, PIECES_AHEAD) as ahead:
            proposed = HeldEdges(f"{self.folder}/proposed", held_out())
        held = HeldEdges(f"{self.folder}/held", self._settled(strategy, proposed, trained, train))
        proposed.path.unlink()
        if self.later is not None:
            held.add(self.later.new())
        return held

    def _settled(
        self, strategy: split.Strategy, proposed: HeldEdges, trained: list[Array], train: ShuffledEdges
    ) -> Iterator[Array]:
        """Yield those of the edges proposed that are held out, and add the others to `train`."""
        for records in strategy.settle(proposed, trained, self.ends):
            back = records["part"] == TRAIN
            _add(train, [records[back]])
            if isinstance(strategy, split.Temporal):
                again = strategy.repeated(records["rel"], records["time"], records["first_time"])
                for repeats in _edges(records[back & again], self.rows):
                    self._repeat(repeats)
            yield records[~back]

    def _repeat(self, edges: Edges) -> None:
        """Count training edges that happen again in the test's time, and keep them with `split.repeats`."""
        self.repeated[edges.rel] += len(edges)
        if self.repeats is not None:
            self.repeats.add(edges)

    def _with_rows(self, piece: Encoded) -> Encoded:
        """Leave out edges with an entity in no vocabulary, and count them."""
        if not piece.lost:
            return piece
        lost = (piece.lhs < 0) | (piece.rhs < 0)
        part = piece.columns["split"][lost] if "split" in piece.columns else np.zeros(piece.lost, np.int8)
        self.without_row[:, piece.rel] += np.bincount(part, minlength=len(PARTS))
        return piece.where(~lost)

    def _limit(self) -> int:
        """Keep `limit` edges of training and validation after `offset`, by random order; return how many are left out.

        Where there is no `source`, both have counted rows of the files already.
        """
        before = sum(int(part.counts.sum()) for part in self.parts)
        for part, data in ((TRAIN, self.config.train_data), (VALIDATION, self.config.validation_data)):
            if not self.config.all_sources or (data.limit is None and data.offset is None):
                continue
            first = data.offset or 0
            last = first + data.limit if data.limit is not None else 1 << 62
            by = Order.of(self.config.split.seed, "limit")
            chosen = self.parts[part].part(f"{self.folder}/{PARTS[part]}-limited", first, last, by)
            self.parts[part] = self.files.enter_context(chosen)
            if part == VALIDATION:
                self.held = self.held.replaced(f"{self.folder}/limited", lambda some: some[some["part"] != VALIDATION])
                self.held.add(_records(edges, np.int8(part)) for edges in chosen.as_added())
        return before - sum(int(part.counts.sum()) for part in self.parts)


class Later:
    """The edges of a later snapshot between entities of the vocabularies; those that are new are the test.

    An edge's hash is the same in every snapshot. So both snapshots' edges are put into buckets by their hashes, in
    files, and compared bucket by bucket.
    """

    def __init__(self, config: TwhinConfig, encoder: Encoder, folder: str, files: ExitStack) -> None:
        """Read the edges of relations that may be held out, into a file in `folder` that `files` closes."""
        self.splittable = split.splittable(config)
        self.without_row = 0
        """Edges with an entity in no vocabulary."""
        self.buckets = int(np.clip(-(-int(encoder.counts.sum()) // EDGES_PER_BUCKET), 1, MOST_BUCKETS))
        self.later, self.earlier = (
            files.enter_context(BucketFile(f"{folder}/{name}", HELD)) for name in ("later", "earlier")
        )
        for piece in encoder.pieces():
            if self.splittable[piece.rel]:
                self.without_row += piece.lost
                self._add(self.later, piece.where((piece.lhs >= 0) & (piece.rhs >= 0)))

    def _add(self, file: BucketFile, edges: Encoded) -> None:
        records = _records(edges, np.int8(TEST))
        which = ((records["h"] >> np.uint64(32)) * np.uint64(self.buckets)) >> np.uint64(32)
        which, order = in_order(which.astype(np.uint32), np.arange(len(records), dtype=np.uint32))
        file.add(0, records[order], np.searchsorted(which, np.arange(self.buckets + 1)))

    def mark_earlier(self, edges: Encoded) -> None:
        """Take edges that the earlier snapshot has."""
        if self.splittable[edges.rel]:
            self._add(self.earlier, edges)

    def new(self) -> Iterator[Array]:
        """Yield the edges that the earlier snapshot lacks, records `HELD`, by their hashes."""
        for bucket in range(self.buckets):
            records = self.later.read(0, bucket)
            records = records[np.argsort(records["h"], kind="stable")]
            yield records[~_among(records, self.earlier.read(0, bucket))]


def _among(records: Array, others: Array) -> Array:
    """Return which edges (records `HELD`, by their hashes) are among others, bool."""
    result = np.zeros(len(records), bool)
    h = np.ascontiguousarray(records["h"])
    position, which = np.searchsorted(h, others["h"]), np.arange(len(others))
    # Two edges seldom have the same hash. Where they do, the next ones are compared too.
    while len(which := which[position[which] < len(h)]):
        which = which[h[position[which]] == others["h"][which]]
        there, these = records[position[which]], others[which]
        same = np.all([there[name] == these[name] for name in ("rel", "lhs", "rhs")], axis=0)
        result[position[which[same]]] = True
        which = which[~same]
        position[which] += 1
    return result


def _strategy(config: TwhinConfig, encoder: Encoder, folder: str) -> split.Strategy:
    """Return how edges are held out, as `split` says."""
    chosen = config.split
    if not config.all_sources or chosen.strategy == "given":
        return split.Given(config)
    if chosen.later_snapshot is not None:
        return split.Random(config, validation=chosen.validation, test=0.0)
    if chosen.strategy == "temporal":
        times = _times(config, encoder, f"{folder}/times")

        def time_of(place: int) -> int:
            times.partition(place)
            return int(times[place])

        return split.Temporal(config, len(times), time_of)
    return split.Random(config, validation=chosen.validation, test=chosen.test)


def _times(config: TwhinConfig, encoder: Encoder, path: str) -> Array:
    """Return the first times of all dated edges that may be held out, int64, in a new file."""
    splittable = split.splittable(config)
    times = mapped_zeros(path, int(encoder.counts[splittable].sum()), np.int64)
    size = 0
    for piece in encoder.pieces(["first_time"]):
        if splittable[piece.rel]:
            first = piece.columns["first_time"]
            first = first[(piece.lhs >= 0) & (piece.rhs >= 0) & (first != NO_TIME)]
            times[size : size + len(first)] = first
            size += len(first)
    return times[:size]


def _records(edges: Encoded | Edges, part: Any) -> Array:
    """Return edges as records `HELD`."""
    records = np.zeros(len(edges.lhs), HELD)
    for name in ("rel", "lhs", "rhs", "h"):
        records[name] = getattr(edges, name)
    records["part"] = part
    records["weight"] = edges.columns["weight"] if isinstance(edges, Encoded) else edges.weight
    if isinstance(edges, Encoded):
        for name in ("time", "first_time"):
            if name in edges.columns:
                records[name] = edges.columns[name]
    return records


def _add(shuffled: ShuffledEdges, pieces: Iterable[Array]) -> None:
    """Add records `HELD`, some at a time, to shuffled edges."""
    for records in pieces:
        for edges in _edges(records, shuffled.rows):
            shuffled.add(edges)


def _edges(records: Array, rows: type) -> Iterator[Edges]:
    """Yield records `HELD` as edges, relation by relation."""
    for rel in np.unique(records["rel"]):
        mine = records[records["rel"] == rel]
        lhs, rhs = (mine[side].astype(rows) for side in ("lhs", "rhs"))
        yield Edges(int(rel), lhs, rhs, mine["weight"].copy(), mine["h"].copy())
