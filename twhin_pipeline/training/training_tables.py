"""The training set's tables as ranks read them: chunks of positives and their negatives, by position, from local files.

The first rank that opens a version of a table writes these files (`store.array_cache`), a batch of rows at a time. From
then on a rank reads the chunks of its own steps alone. What it holds in memory is some numbers for each chunk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.array_cache import cached
from twhin_pipeline.store.file_array import FileArray
from twhin_pipeline.training_set.known_edges import ChunkedEdges, KnownEdges, index_edges, ranges

Array = np.ndarray[Any, Any]
INT32_MAX = np.iinfo(np.int32).max
EDGES_AT_ONCE, POOLS_AT_ONCE = 1 << 18, 256


class Positives:
    """The positives of a table, chunk after chunk, in a file: 12 bytes an edge (20 where a row is 2^31 or more)."""

    def __init__(self, config: TwhinConfig, store: Store, manifest: Manifest, sizes: dict[str, int]) -> None:
        """Open the table, and check that its rows are within tables of these sizes. Raises UserError where not."""
        if not manifest.rows:
            raise UserError(
                f"{manifest.asset} for {manifest.snapshot} has no edges; see raw_edges_rejected and `split`"
            )
        self.store, self.manifest = store, manifest
        folder = cached(store, manifest, self._build, "_chunks")
        chunks = np.load(folder / "chunks.npy")
        self.offsets = np.append(chunks["start"], manifest.rows)
        """Where each chunk begins in the file, and where the last ends: int64 `[chunks + 1]`."""
        self.relation = chunks["rel"].astype(np.int64)
        """int64 `[chunks]`."""
        self._check_rows(config, chunks, sizes)
        self.edges = FileArray(folder / "edges", _edge(json.loads((folder / "types.json").read_text())["row"]))
        self.relations = len(config.model.relations)
        self.left_out: Array | None = None
        """Whether an edge is read with the weight 0, bool `[E]`; None: no edge is."""

    def _build(self, folder: Path) -> None:
        table = self.manifest.asset
        with ExitStack() as opened:
            files = [opened.enter_context(self.store.parquet(path)) for path in self.store.files_of(self.manifest)]
            row = np.result_type(np.int32, _integers(files, "lhs", "rhs")).str
            parts: list[Array] = []
            size = 0
            with (folder / "edges").open("wb") as into:
                for file in files:
                    for batch in file.iter_batches(EDGES_AT_ONCE, columns=["chunk", "rel", "lhs", "rhs", "weight"]):
                        columns = {
                            name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names
                        }
                        edges = np.empty(len(batch), _edge(row))
                        for name in EDGE:
                            edges[name] = columns[name]
                        into.write(edges.data)
                        parts.append(_chunks_of(columns, size))
                        size += len(batch)
            chunks = _joined(np.concatenate(parts))
            if not np.array_equal(chunks["chunk"], np.arange(len(chunks))):
                raise UserError(f"{table}: chunks are not numbered 0, 1, … in order; make it anew (`twhin sample`)")
        np.save(folder / "chunks.npy", chunks)
        (folder / "types.json").write_text(json.dumps({"row": row}))

    def _check_rows(self, config: TwhinConfig, chunks: Array, sizes: dict[str, int]) -> None:
        relations, asset = config.model.relations, self.manifest.asset
        if int(self.relation.max()) >= len(relations):
            raise UserError(f"{asset} has relations that model.relations lacks; run `twhin sample` again")
        for side in ("lhs", "rhs"):
            limit = np.array([sizes[getattr(relation, side)] for relation in relations])[self.relation]
            worst = np.flatnonzero(chunks[side] >= limit)
            if len(worst):
                relation = relations[self.relation[worst[0]]]
                raise UserError(
                    f"{asset}: chunk {worst[0]} ({relation.name}) has a {side} beyond the {limit[worst[0]]} "
                    f"rows of table {getattr(relation, side)!r}; run `twhin sample` again after the vocabulary"
                )

    @property
    def lengths(self) -> Array:
        """Edges of each chunk, int64 [chunks]."""
        return np.diff(self.offsets)

    def read(self, chunks: Array) -> tuple[Array, Array]:
        """Return the edges of some chunks, records of `lhs`, `rhs` and `weight`, end to end; and how many each has."""
        starts = self.offsets[chunks]
        lengths = self.offsets[chunks + 1] - starts
        edges = self.edges.take(starts, lengths)
        if self.left_out is not None:
            edges["weight"][self.left_out[ranges(starts, lengths)]] = 0
        return edges, lengths

    def pieces(self) -> Iterator[tuple[Array, Array]]:
        """Yield all edges in the file's order, some at a time, as records; and each one's relation."""
        for start in range(0, self.manifest.rows, EDGES_AT_ONCE):
            size = min(EDGES_AT_ONCE, self.manifest.rows - start)
            chunk = np.searchsorted(self.offsets, np.arange(start, start + size), side="right") - 1
            yield self.edges.take(np.array([start]), np.array([size])), self.relation[chunk]

    def degrees(self, bases: Sequence[Array], rows: int) -> Array:
        """Return how many edges each row of all tables has, int64 `[rows]`, mapped from a file that is written once.

        `bases`: by side, where the table of each relation's end begins among the rows; int64 `[R]` each.
        """

        def build(folder: Path) -> None:
            degree = np.zeros(rows, np.int64)
            for edges, relation in self.pieces():
                for base, side in zip(bases, ("lhs", "rhs"), strict=True):
                    sampling_kernels.count_rows(edges[side] + base[relation], degree)
            np.save(folder / "degrees.npy", degree)

        name = f"_degrees-{_digest([rows, *(base.tolist() for base in bases)])}"
        degree: Array = np.load(cached(self.store, self.manifest, build, name) / "degrees.npy", mmap_mode="r")
        return degree

    def known_edges(self, sizes: Sequence[Array], first: Sequence[Array], threads: int) -> list[KnownEdges]:
        """Return the edges of all relations by their right and by their left end, mapped from files written once.

        Args:
            sizes: By side, how many entities each relation's has, int64 `[R]`.
            first: By side that is replaced, what is added to the other end, int64 `[R]` (see `KnownEdges.joined`).
            threads: How many sort at a time.
        """

        def build(folder: Path) -> None:
            edges = np.memmap(self.edges.path, self.edges.dtype, "r")
            chunked = ChunkedEdges(edges["lhs"], edges["rhs"], self.offsets, self.relation)
            pairs = list(zip(*(size.tolist() for size in sizes), strict=True))
            by_relation = index_edges([chunked], pairs, threads, str(folder / "unjoined"))
            for kept_side, offset in zip((1, 0), first, strict=True):
                of_relations = [by_relation[rel, kept_side] for rel in range(len(pairs))]
                KnownEdges.save_joined(folder / str(kept_side), of_relations, offset, edges["lhs"].dtype)
            for path in folder.glob("unjoined*"):
                path.unlink()

        name = f"_known-{_digest([size.tolist() for size in sizes])}"
        folder = cached(self.store, self.manifest, build, name)
        return [KnownEdges.mapped(folder / str(kept_side)) for kept_side in (1, 0)]


EDGE = ("lhs", "rhs", "weight")
CHUNK = np.dtype([("chunk", np.int64), ("start", np.int64), ("rel", np.int32), ("lhs", np.int64), ("rhs", np.int64)])
"""Of a chunk: its number, its first edge, its relation, and the largest row on each side."""


def _edge(row: str) -> np.dtype[Any]:
    return np.dtype([("lhs", row), ("rhs", row), ("weight", np.float32)])


def _chunks_of(columns: dict[str, Array], first: int) -> Array:
    """Return the chunks (records `CHUNK`) of consecutive edges, of which the first is number `first`."""
    start = np.flatnonzero(np.diff(columns["chunk"], prepend=-1))
    chunks = np.empty(len(start), CHUNK)
    chunks["chunk"], chunks["rel"], chunks["start"] = columns["chunk"][start], columns["rel"][start], first + start
    for side in ("lhs", "rhs"):
        chunks[side] = np.maximum.reduceat(columns[side], start)
    return chunks


def _joined(parts: Array) -> Array:
    """Return chunks (records `CHUNK`), where the parts of one follow one another in `parts`, each once."""
    first = np.flatnonzero(np.diff(parts["chunk"], prepend=-1))
    chunks = parts[first]
    for side in ("lhs", "rhs"):
        chunks[side] = np.maximum.reduceat(parts[side], first)
    return chunks


class Negatives:
    """One epoch's pools and masks, in files: 4 bytes a candidate (8 where a row is 2^31 or more), 4 or 8 a masked pair.

    A *unit* is a chunk and a side that is replaced.
    """

    def __init__(
        self, store: Store, manifest: Manifest, paths: Sequence[str], wanted: tuple[Array, Array], pool: int
    ) -> None:
        """Open the negatives in `paths`, the table's files of one epoch.

        Args:
            store: Where the table is.
            manifest: The table's.
            paths: The files, in order.
            wanted: By side, the chunks (bool `[chunks]`) that have to have a pool there.
            pool: Candidates of each pool.

        Raises:
            UserError: A chunk lacks its pool, or pools are of another size; `twhin sample` makes them.
        """
        self.paths, self.pool, path = list(paths), pool, paths[0]
        name = "-".join(path.rpartition("/")[2].removesuffix(".parquet").split("-")[:2])
        folder = cached(store, manifest, lambda draft: self._build(store, draft), f"_{name}")
        types = json.loads((folder / "types.json").read_text())
        units = np.load(folder / "units.npy")
        if not (np.diff(units["row"], append=types["rows"]) == pool).all():
            raise UserError(
                f"{path}: pools are not of {pool} candidates, as global_negatives says; run `twhin sample` again"
            )
        self.place = []
        """By side, the unit of each chunk, or -1: int32 `[chunks]`."""
        for side in (0, 1):
            here = np.flatnonzero(units["side"] == side)
            place = np.full(len(wanted[side]), -1, np.int32)
            place[units["chunk"][here]] = here
            missing = np.flatnonzero(wanted[side] & (place < 0))
            if len(missing):
                raise UserError(
                    f"{path}: chunk {missing[0]} has no pool for side {side}; make it anew (`twhin sample`)"
                )
            self.place.append(place)
        self.rows = FileArray(folder / "rows", types["row"])
        self.pairs = FileArray(folder / "pairs", _pair(types["pair"]))
        self.pair_start = np.append(units["pair"], types["pairs"])
        self.log_q = FileArray(folder / "log_q", np.float32)
        self.log_q_start = np.append(units["log_q"], types["log_q"])
        self.has_log_q = types["has_log_q"]

    def _build(self, store: Store, folder: Path) -> None:
        lists = ["row", "mask_position", "mask_candidate"]
        counts = {"row": 0, "pair": 0, "log_q": 0}
        parts = [np.zeros(0, UNIT)]
        with ExitStack() as opened:
            files = [opened.enter_context(store.parquet(path)) for path in self.paths]
            row = _integers(files, "row.list.element", "row.list.item")
            pair = _integers(files, *(f"{name}.list.{leaf}" for name in lists[1:] for leaf in ("element", "item")))
            has_log_q = all("log_q" in file.schema_arrow.names for file in files)
            into = {name: opened.enter_context((folder / name).open("wb")) for name in ("rows", "pairs", "log_q")}
            wanted = ["chunk", "side", *lists, *["log_q"] * has_log_q]
            for batch in itertools.chain.from_iterable(
                file.iter_batches(POOLS_AT_ONCE, columns=wanted) for file in files
            ):
                has_log_q = has_log_q and not batch.column("log_q").null_count
                values = {name: batch.column(name).flatten().to_numpy(zero_copy_only=False) for name in lists}
                into["rows"].write(values["row"].astype(row))
                pairs = np.empty(len(values["mask_position"]), _pair(pair))
                pairs["position"], pairs["candidate"] = values["mask_position"], values["mask_candidate"]
                into["pairs"].write(pairs.data)
                units = np.empty(len(batch), UNIT)
                for name in ("chunk", "side"):
                    units[name] = batch.column(name).to_numpy(zero_copy_only=False)
                columns = {"row": "row", "pair": "mask_position", **({"log_q": "log_q"} if has_log_q else {})}
                units["log_q"] = 0
                for name, column in columns.items():
                    lengths = pc.list_value_length(batch.column(column)).to_numpy(zero_copy_only=False).astype(np.int64)
                    units[name] = counts[name] + np.cumsum(lengths) - lengths
                    counts[name] += int(lengths.sum())
                if has_log_q:
                    log_q = batch.column("log_q").flatten().to_numpy(zero_copy_only=False)
                    into["log_q"].write(log_q.astype(np.float32))
                parts.append(units)
        np.save(folder / "units.npy", np.concatenate(parts))
        types = {"row": row, "pair": pair, "rows": counts["row"], "pairs": counts["pair"], "log_q": counts["log_q"]}
        (folder / "types.json").write_text(json.dumps(types | {"has_log_q": has_log_q}))

    def pools(self, side: int, chunks: Array) -> Array:
        """Return the pools of some chunks, `[G, pool]`."""
        units = self.place[side][chunks].astype(np.int64)
        rows = self.rows.take(units * self.pool, np.full(len(units), self.pool))
        return rows.reshape(len(units), self.pool)

    def masks(self, side: int, chunks: Array) -> tuple[Array, Array]:
        """Return the masked pairs of some chunks, records of `position` and `candidate`; and how many each has."""
        return self._lists(self.pairs, self.pair_start, side, chunks)

    def logs(self, side: int, chunks: Array) -> tuple[Array, Array]:
        """Return the log_q of some chunks' candidates, float32, end to end; and how many each has."""
        return self._lists(self.log_q, self.log_q_start, side, chunks)

    def check_log_q(self) -> None:
        """Raise UserError where pools have no log_q."""
        if not self.has_log_q:
            raise UserError(f"{self.paths[0]}: has no log_q, which loss.log_q needs; make it anew (`twhin sample`)")

    def _lists(self, array: FileArray, start: Array, side: int, chunks: Array) -> tuple[Array, Array]:
        units = self.place[side][chunks]
        lengths = start[units + 1] - start[units]
        return array.take(start[units], lengths), lengths


UNIT = np.dtype([("chunk", np.int32), ("side", np.int8), ("row", np.int64), ("pair", np.int64), ("log_q", np.int64)])
"""Of a unit: its chunk and side, and where its pool, its masked pairs and its log_q begin in their files."""


def _pair(integer: str) -> np.dtype[Any]:
    return np.dtype([("position", integer), ("candidate", integer)])


def _integers(files: Sequence[pq.ParquetFile], *leaves: str) -> str:
    """Return the smallest type of integers that holds all of some columns, by what Parquet says of each row group."""
    largest = 0
    for file in files:
        for group in range(file.metadata.num_row_groups):
            columns = file.metadata.row_group(group)
            for number in range(columns.num_columns):
                column = columns.column(number)
                if column.path_in_schema not in leaves:
                    continue
                known = column.statistics
                if known is not None and known.has_min_max:
                    largest = max(largest, int(known.max))
                elif known is None or known.num_values:
                    return "int64"
    return "uint16" if largest < 1 << 16 else "int32" if largest <= INT32_MAX else "int64"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
