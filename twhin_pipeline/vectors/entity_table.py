"""One entity type's vectors and ids, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.array_cache import cached, new_array
from twhin_pipeline.vectors import id_index
from twhin_pipeline.vectors.id_index import IdIndex

BATCH_ROWS = 262_144
FOLDER = "_index"
SEARCHED_ROWS = 2_000_000
"""Of a larger table the ids that look like an unknown one are not searched: that reads all of them."""
SEARCHED_LENGTH = 1_000
"""Nor for an id of more characters."""
TRAINED_EDGES = "trained_edges"
"""The column with the number of training edges of an entity."""


class UnknownId(KeyError, UserError):  # noqa: N818 - it is a KeyError, and reads as one
    """An id that has no vector. Its message names the nearest ids that have one."""

    def __str__(self) -> str:
        return str(self.args[0])


class UnknownName(UnknownId):
    """An entity type or a relation that the model does not have: a KeyError that names the nearest ones."""


class EntityTable:
    """N entities of one type: `vectors` float32 `[N, D]` and their ids, both in row order, mapped from local files.

    An id is found by its index, so opening a table reads nothing but pages that are asked for.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.vectors: np.ndarray = np.asarray(np.load(folder / "vectors.npy", mmap_mode="r"))
        self.trained: np.ndarray | None = None
        """Whether a training edge has the entity, bool `[N]`; None where the table does not say it."""
        if (folder / "trained.npy").exists():
            self.trained = np.asarray(np.load(folder / "trained.npy", mmap_mode="r"))
        self.index = IdIndex(folder)
        self.searched_rows = SEARCHED_ROWS
        self._lengths: np.ndarray | None = None

    @classmethod
    def open(cls, store: Store, manifest: Manifest) -> EntityTable:
        """Open the table `embeddings/<entity>`.

        Its local files are made by the export; of a remote store, or of an export of an earlier version, they are made
        of its Parquet files when it is opened first.
        """
        return cls(manifest.asset.split("/")[1], prepare(store, manifest))

    def __len__(self) -> int:
        return len(self.index)

    def ids(self, rows: Sequence[int] | np.ndarray) -> list[Any]:
        """Return the ids of rows."""
        return self.index.ids.take(pa.array(np.asarray(rows, np.int64))).to_pylist()

    def rows(self, ids: Any) -> np.ndarray:
        """Return the rows of ids, int64 `[n]`. Raises UnknownId, a KeyError, at the first that has no vector."""
        rows = self.find(ids)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            raise UnknownId(self.unknown(as_list(ids)[int(unknown[0])]))
        return rows

    def find(self, ids: Any) -> np.ndarray:
        """Return the rows of ids, int64 `[n]`, -1 for those that have no vector.

        Args:
            ids: A sequence, or an array of NumPy, pandas or Arrow; integers may come as texts.
        """
        array = self.typed(ids)
        if array is not None:
            return self.index.find_array(array)
        values = as_list(ids)
        rows = np.full(len(values), -1, np.int64)
        stored = {}
        for i, value in enumerate(values):
            with suppress(ValueError):
                stored[i] = self.as_stored(value)
        rows[list(stored)] = self.index.find(list(stored.values()))
        return rows

    def typed(self, ids: Any) -> pa.Array | None:
        """Return ids as one array of the index's type; None where that does not go for all of them at once."""
        kind = self.index.ids.type
        try:
            array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids)
            if isinstance(array, pa.ChunkedArray):
                array = pa.concat_arrays([pa.array([], array.type), *array.chunks])
            if pa.types.is_dictionary(array.type):
                array = array.dictionary_decode()
            if not len(array):
                return pa.array([], kind)
            if self.index.integer and is_text(array.type):
                numbers = pc.match_substring_regex(array, "^-?[0-9]+$")
                return array.cast(kind) if pc.all(numbers).as_py() and not array.null_count else None
            wanted = pa.types.is_integer if self.index.integer else is_text
            return array.cast(kind) if wanted(array.type) and not array.null_count else None
        except (pa.ArrowException, OverflowError, UnicodeEncodeError):
            return None

    def has(self, value: Any) -> bool:
        """Tell whether an id has a vector."""
        try:
            return bool(self.index.find([self.as_stored(value)])[0] >= 0)
        except ValueError:
            return False

    def lengths(self) -> np.ndarray:
        """Return the vectors' lengths, float32 `[N]`; 4 bytes an entity, computed at the first call."""
        if self._lengths is None:
            starts = range(0, len(self), BATCH_ROWS)
            parts = [np.linalg.norm(self.vectors[start : start + BATCH_ROWS], axis=1) for start in starts]
            self._lengths = np.concatenate([np.empty(0, np.float32), *parts])
        return self._lengths

    def nearest_ids(self, value: Any, count: int = 3) -> list[Any]:
        """Return the ids that look most like `value`: by spelling, or for integers by value."""
        if self.index.integer and isinstance(value, int):
            bounds = np.iinfo(np.int64)
            near_value = min(max(value, bounds.min), bounds.max)
            at = int(np.searchsorted(self.index.keys, near_value))
            near = self.index.keys[max(0, at - count) : at + count].tolist()
            return sorted(near, key=lambda known: (abs(known - value), known))[:count]
        if len(self) > self.searched_rows or len(str(value)) > SEARCHED_LENGTH:
            return []
        import duckdb  # only a mistake needs it

        with duckdb.connect() as con:
            con.register("known", pa.table({"id": self.index.ids}))
            query = "SELECT id FROM known ORDER BY jaro_winkler_similarity(id::VARCHAR, ?) DESC, id LIMIT ?"
            return [row[0] for row in con.execute(query, [str(value), count]).fetchall()]

    def as_stored(self, value: Any) -> int | str:
        """Take an id as the table has it: a command line gives integers as strings. Raises ValueError."""
        if isinstance(value, np.generic):
            value = value.item()
        if not self.index.integer:
            return value if isinstance(value, str) else str(value)
        try:
            if int(value) == value or isinstance(value, str):
                return int(np.int64(int(value)))
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(value)

    def unknown(self, value: Any) -> str:
        """Say that an id has no vector, and which ones look like it."""
        with suppress(ValueError):
            value = self.as_stored(value)  # an integer that came as text is near to others by value
        near = ", ".join(repr(known) for known in self.nearest_ids(value))
        if not near:
            near = f"not searched among {len(self):,}" if len(self) else "none, the table is empty"
        return f"no {self.name} has the id {value!r}; nearest: {near}"


def as_list(ids: Any) -> Sequence[Any]:
    """Return ids as a sequence of Python's values: those of NumPy, pandas and Arrow are copied."""
    result: Sequence[Any] = ids
    for method in ("to_pylist", "tolist"):
        if hasattr(ids, method):
            result = getattr(ids, method)()
            break
    return result


def is_text(kind: pa.DataType) -> bool:
    """Tell whether an Arrow type is one of texts."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def prepare(store: Store, manifest: Manifest) -> Path:
    """Return the folder of an embeddings table's local files; they are made where they are missing."""
    return cached(store, manifest, lambda draft: _build(store, manifest, draft), FOLDER)


def _build(store: Store, manifest: Manifest, folder: Path) -> None:
    """Write `vectors.npy` and the index of ids of an embeddings table.

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
                vectors = new_array(folder / "vectors.npy", (manifest.rows, dim))
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
    id_index.write(folder, [chunk.cast(kind) for chunk in ids], kind)
