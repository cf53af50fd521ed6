"""The training set's tables as a rank holds them in memory: positives and their negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.training_set.known_edges import ChunkedEdges, ranges

Array = np.ndarray[Any, Any]
INT32_MAX = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Ragged:
    """Lists of unequal length: list i is `values[offsets[i]:offsets[i + 1]]`."""

    values: Array
    offsets: Array

    @classmethod
    def from_lists(cls, lists: list[pa.Array], dtype: Any) -> Ragged:
        """Join Arrow list arrays."""
        lengths = [a.value_lengths().to_numpy(zero_copy_only=False) for a in lists]
        values = [a.flatten().to_numpy(zero_copy_only=False).astype(dtype, copy=False) for a in lists]
        offsets = np.zeros(sum(len(part) for part in lengths) + 1, np.int64)
        if lists:
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return cls(np.concatenate(values) if values else np.zeros(0, dtype), offsets)

    def take(self, lists: Array) -> tuple[Array, Array]:
        """Return the values of some lists, end to end, and the length of each."""
        starts = self.offsets[lists]
        lengths = self.offsets[lists + 1] - starts
        return self.values[ranges(starts, lengths)], lengths


class Positives:
    """All positives in memory, chunk after chunk: 12 bytes an edge (20 where a table has over 2^31 rows)."""

    def __init__(self, config: TwhinConfig, store: Store, manifest: Manifest, sizes: dict[str, int]) -> None:
        dtype = np.int32 if max(sizes.values()) <= INT32_MAX else np.int64
        parts: dict[str, list[Array]] = {name: [] for name in ("chunk", "rel", "lhs", "rhs", "weight")}
        dtypes = {"chunk": np.int32, "rel": np.int32, "lhs": dtype, "rhs": dtype, "weight": np.float32}
        for path in store.files_of(manifest):
            with store.parquet(path) as file:
                for batch in file.iter_batches(1 << 20, columns=list(parts)):
                    for name, arrays in parts.items():
                        arrays.append(batch.column(name).to_numpy(zero_copy_only=False).astype(dtypes[name]))
        joined = {name: np.concatenate(arrays) if arrays else np.zeros(0, int) for name, arrays in parts.items()}
        if not len(joined["lhs"]):
            raise UserError(
                f"{manifest.asset} for {manifest.snapshot} has no edges; see raw_edges_rejected and `split`"
            )
        starts = np.flatnonzero(np.diff(joined["chunk"], prepend=-1))
        self.offsets = np.append(starts, len(joined["lhs"])).astype(np.int64)
        self.relation = joined["rel"][starts].astype(np.int64)
        self.lhs, self.rhs, self.weight = joined["lhs"], joined["rhs"], joined["weight"]
        if not np.array_equal(joined["chunk"][starts], np.arange(len(starts))):
            raise UserError(
                f"{manifest.asset}: chunks are not numbered 0, 1, … in order; make it anew (`twhin sample`)"
            )
        self._check_rows(config, manifest, sizes)

    def _check_rows(self, config: TwhinConfig, manifest: Manifest, sizes: dict[str, int]) -> None:
        relations = config.model.relations
        if int(self.relation.max()) >= len(relations):
            raise UserError(f"{manifest.asset} has relations that model.relations lacks; run `twhin sample` again")
        for side, rows in (("lhs", self.lhs), ("rhs", self.rhs)):
            limit = np.array([sizes[getattr(relation, side)] for relation in relations])[self.relation]
            worst = np.flatnonzero(np.maximum.reduceat(rows, self.offsets[:-1]) >= limit)
            if len(worst):
                relation = relations[self.relation[worst[0]]]
                raise UserError(
                    f"{manifest.asset}: chunk {worst[0]} ({relation.name}) has a {side} beyond the {limit[worst[0]]} "
                    f"rows of table {getattr(relation, side)!r}; run `twhin sample` again after the vocabulary"
                )

    @property
    def lengths(self) -> Array:
        """Edges of each chunk, int64 [chunks]."""
        return np.diff(self.offsets)

    @property
    def edges(self) -> ChunkedEdges:
        """The edges without their weights."""
        return ChunkedEdges(self.lhs, self.rhs, self.offsets, self.relation)


class Negatives:
    """One epoch's pools and masks of some chunks: about 8 * (pool + masked pairs) bytes a chunk and side."""

    def __init__(self, store: Store, path: str, wanted: tuple[Array, Array], pool: int, log_q: bool) -> None:
        """Read the chunks for which `wanted` (bool `[chunks]`, by side) is true, and log_q if it is asked for.

        Raises:
            UserError: A chunk lacks its pool, or pools have no log_q; `twhin sample` makes them.
        """
        columns = ["row", "mask_position", "mask_candidate", *(["log_q"] if log_q else [])]
        chunks_of: tuple[list[Array], list[Array]] = ([], [])
        lists: tuple[dict[str, list[pa.Array]], ...] = ({name: [] for name in columns}, {name: [] for name in columns})
        with store.parquet(path) as parquet:
            if not set(columns) <= set(parquet.schema_arrow.names):
                raise _no_log_q(path)
            for batch in parquet.iter_batches(256, columns=["chunk", "side", *columns]):
                chunk = batch.column("chunk").to_numpy(zero_copy_only=False)
                side = batch.column("side").to_numpy(zero_copy_only=False)
                for s in (0, 1):
                    picked = batch.filter(pa.array((side == s) & wanted[s][chunk]))
                    chunks_of[s].append(picked.column("chunk").to_numpy(zero_copy_only=False))
                    for name in columns:
                        lists[s][name].append(picked.column(name))
                        if name == "log_q" and picked.column(name).null_count:
                            raise _no_log_q(path)
        self.place: list[Array] = []
        self.pool: list[Array] = []
        self.mask: list[tuple[Ragged, Ragged]] = []
        self.log_q: list[Ragged] = []
        for s in (0, 1):
            chunks = np.concatenate(chunks_of[s]) if chunks_of[s] else np.zeros(0, np.int64)
            place = np.full(len(wanted[s]), -1, np.int64)
            place[chunks] = np.arange(len(chunks))
            missing = np.flatnonzero(wanted[s] & (place < 0))
            if len(missing):
                raise UserError(f"{path}: chunk {missing[0]} has no pool for side {s}; make it anew (`twhin sample`)")
            rows = Ragged.from_lists(lists[s]["row"], np.int64)
            if not (np.diff(rows.offsets) == pool).all():
                raise UserError(
                    f"{path}: pools are not of {pool} candidates, as global_negatives says; run `twhin sample` again"
                )
            self.place.append(place)
            self.pool.append(rows.values.reshape(len(chunks), pool))
            self.mask.append(
                (
                    Ragged.from_lists(lists[s]["mask_position"], np.int32),
                    Ragged.from_lists(lists[s]["mask_candidate"], np.int32),
                )
            )
            if log_q:
                self.log_q.append(Ragged.from_lists(lists[s]["log_q"], np.float32))


def _no_log_q(path: str) -> UserError:
    return UserError(f"{path}: has no log_q, which loss.log_q needs; make it anew (`twhin sample`)")
