"""One entity type's vectors and ids, memory-mapped."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.array_cache import cached

BATCH_ROWS = 262_144
TRAINED_EDGES = "trained_edges"
"""The column with the number of training edges of an entity."""


class UnknownId(KeyError, UserError):  # noqa: N818 - it is a KeyError, and reads as one
    """An id that has no vector. Its message names the nearest ids that have one."""

    def __str__(self) -> str:
        return str(self.args[0])


class EntityTable:
    """N entities of one type: `vectors` float32 `[N, D]` and their ids, both in row order, mapped from local files.

    An id is found by bisection in the order of ids, so opening a table reads nothing but pages that are asked for.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.vectors: np.ndarray = np.load(folder / "vectors.npy", mmap_mode="r")
        self.trained: np.ndarray | None = None
        """Whether a training edge has the entity, bool `[N]`; None where the table does not say it."""
        if (folder / "trained.npy").exists():
            self.trained = np.load(folder / "trained.npy", mmap_mode="r")
        # The reader keeps its mapping open as long as its arrays are.
        table = pa.ipc.open_file(pa.memory_map(str(folder / "ids.arrow"))).read_all()
        self._ids: pa.Array = table.column("id").chunk(0)
        self._order: np.ndarray = table.column("order").chunk(0).to_numpy()
        self.integer_ids = pa.types.is_integer(self._ids.type)
        self._lengths: np.ndarray | None = None

    @classmethod
    def open(cls, store: Store, manifest: Manifest) -> EntityTable:
        """Open the table `embeddings/<entity>`; the first time, local files are made of its Parquet files."""
        folder = cached(store, manifest, lambda draft: _build(store, manifest, draft))
        return cls(manifest.asset.split("/")[1], folder)

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the ids of rows."""
        return self._ids.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def rows(self, ids: Sequence[Any] | np.ndarray) -> np.ndarray:
        """Return the rows of ids, int64 `[n]`. Raises UnknownId, a KeyError, at the first that has no vector."""
        wanted = [self._typed(value) for value in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if self.integer_ids:
            known = self._ids.to_numpy()
            at = np.searchsorted(known, np.asarray(wanted, np.int64), sorter=self._order)
        else:
            at = np.asarray([self._bisect(value) for value in wanted], np.int64)
        rows = self._order[np.minimum(at, len(self) - 1)] if len(self) else np.zeros(len(wanted), np.int64)
        found = self.ids(rows) if len(self) else [None] * len(wanted)
        for value, its in zip(wanted, found, strict=True):
            if value != its:
                raise UnknownId(self._unknown(value))
        return np.asarray(rows, np.int64)

    def lengths(self) -> np.ndarray:
        """Return the vectors' lengths, float32 `[N]`; 4 bytes an entity, computed at the first call."""
        if self._lengths is None:
            starts = range(0, len(self), BATCH_ROWS)
            parts = [np.linalg.norm(self.vectors[start : start + BATCH_ROWS], axis=1) for start in starts]
            self._lengths = np.concatenate([np.empty(0, np.float32), *parts])
        return self._lengths

    def nearest_ids(self, value: Any, count: int = 3) -> list[Any]:
        """Return the ids that look most like `value`: by spelling, or for integers by value."""
        if self.integer_ids and isinstance(value, int):
            bounds = np.iinfo(np.int64)
            near_value = min(max(value, bounds.min), bounds.max)
            at = int(np.searchsorted(self._ids.to_numpy(), near_value, sorter=self._order))
            near = self.ids(self._order[max(0, at - count) : at + count])
            return sorted(near, key=lambda known: (abs(known - value), known))[:count]
        import duckdb  # only a mistake needs it

        with duckdb.connect() as con:
            con.register("known", pa.table({"id": self._ids}))
            query = "SELECT id FROM known ORDER BY jaro_winkler_similarity(id::VARCHAR, ?) DESC, id LIMIT ?"
            return [row[0] for row in con.execute(query, [str(value), count]).fetchall()]

    def _typed(self, value: Any) -> Any:
        """Take an id as the table has it: a command line gives integers as strings."""
        if isinstance(value, np.generic):
            value = value.item()
        if not self.integer_ids:
            return value if isinstance(value, str) else str(value)
        try:
            if int(value) == value or isinstance(value, str):
                return np.int64(int(value)).item()
        except (TypeError, ValueError, OverflowError):
            pass
        raise UnknownId(self._unknown(value))

    def _bisect(self, value: str) -> int:
        return bisect.bisect_left(range(len(self)), value, key=lambda at: self._ids[int(self._order[at])].as_py())

    def _unknown(self, value: Any) -> str:
        near = ", ".join(repr(known) for known in self.nearest_ids(value))
        return f"no {self.name} has the id {value!r}; nearest: {near or 'none, the table is empty'}"


def _build(store: Store, manifest: Manifest, folder: Path) -> None:
    """Write `vectors.npy` and `ids.arrow` (ids in row order; rows in the order of ids) of an embeddings table.

    Where it has the column `trained_edges`, `trained.npy` says which rows have one.
    """
    vectors: np.memmap | None = None
    ids: list[pa.Array] = []
    trained: list[np.ndarray] = []
    at = 0
    for path in store.files_of(manifest):
        with store.parquet(path) as parquet:
            if vectors is None:
                dim = parquet.schema_arrow.field("embedding").type.list_size
                vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (manifest.rows, dim))
            columns = [name for name in ("id", "embedding", TRAINED_EDGES) if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                values = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
                vectors[at : at + len(batch)] = values.reshape(len(batch), -1)
                ids.append(batch.column("id"))
                if TRAINED_EDGES in columns:
                    trained.append(batch.column(TRAINED_EDGES).to_numpy(zero_copy_only=False) > 0)
                at += len(batch)
            id_type = parquet.schema_arrow.field("id").type
    assert vectors is not None and at == manifest.rows
    vectors.flush()
    if trained:
        np.save(folder / "trained.npy", np.concatenate(trained))
    # Offsets of 64 bits: ids of one table may be longer than 2 GiB together.
    kind = pa.int64() if pa.types.is_integer(id_type) else pa.large_string()
    column = pa.concat_arrays([pa.array([], kind), *(chunk.cast(kind) for chunk in ids)])
    order = pc.sort_indices(column).cast(pa.int64())
    table_schema = pa.schema([("id", kind), ("order", pa.int64())])
    with pa.ipc.new_file(str(folder / "ids.arrow"), table_schema) as writer:
        # One batch, so that each column is one contiguous array.
        writer.write_batch(pa.RecordBatch.from_arrays([column, order], schema=table_schema))
