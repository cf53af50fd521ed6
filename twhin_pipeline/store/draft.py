"""A version of a table in the making, and what its files are."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

import twhin_pipeline.store.locks as locks
from twhin_pipeline import scratch
from twhin_pipeline.store.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    from twhin_pipeline.store.store import Store

ROWS_IN = {"twhin_model": "tables/", "calibration": "part-"}
"""How the paths of the files with a version's rows begin, by the last part of the table's name, if not all of its
Parquet files have them. The others are parts of their own: of a model, whose rows are vectors, these are the relations,
the losses and the metrics."""
unfinished: set[str] = set()
"""Locations of the versions that this process is writing."""
_HASHING_THREADS = 4


class Draft:
    """A version of a table in the making. Any process may open one by its version; the one that began it commits."""

    def __init__(self, store: Store, asset: str, snapshot: str, version: str) -> None:
        self.store, self.asset, self.snapshot, self.version = store, asset, snapshot, version
        self.location = store.path(asset, snapshot, version)
        self.details: dict[str, Any] = {}
        self.digests: dict[str, str] = {}
        """Checksums that who wrote a file has computed, by its name; `commit` computes the others."""
        self.held = ExitStack()
        """The lock of the process that began it; closed by `commit` and `discard`."""
        store.fs.makedirs(store.fs._strip_protocol(self.location), exist_ok=True)

    @contextmanager
    def local_file(self, name: str) -> Iterator[str]:
        """Yield a local path to write the file `name` to; in a remote store it is uploaded when the block ends."""
        if self.store.is_local:
            path = f"{self.location}/{name}"
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            yield path
            return
        with scratch.folder("draft") as folder:
            path = f"{folder}/{Path(name).name}"
            yield path
            self.store.fs.put_file(path, f"{self.location}/{name}")

    @contextmanager
    def writer(self, name: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """Yield a streaming Parquet writer of the file `name`."""
        with self.local_file(name) as path, pq.ParquetWriter(path, schema, **_encoding(schema)) as writer:
            yield writer

    def write(self, table: pa.Table, name: str = "part-00000.parquet") -> None:
        """Write a whole table as the file `name`."""
        with self.writer(name, table.schema) as writer:
            writer.write_table(table)

    def commit(self, *, config_hash: str, parents: dict[str, str], settings: dict[str, Any] | None = None) -> Manifest:
        """Finish the version: readers get it from now on. Older versions stay as they are."""
        base = f"{self.location}/"
        names = sorted(self.store.sizes(self.location).items())
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            digests = list(pool.map(lambda one: self.digests.get(one[0]) or self.store.sha256(base + one[0]), names))
        files: list[dict[str, Any]] = []
        schema: dict[str, str] = {}
        parts: dict[str, dict[str, Any]] = {}
        rows = 0
        for (name, size), digest in zip(names, digests, strict=True):
            entry: dict[str, Any] = {"path": name, "bytes": size, "sha256": digest}
            if is_data(name):
                with self.store.parquet(base + name) as parquet:
                    entry["rows"] = parquet.metadata.num_rows
                    columns = {f.name: str(f.type) for f in parquet.schema_arrow}
                if has_rows(self.asset, name):
                    rows += entry["rows"]
                    schema = schema or columns
                else:
                    parts[name.removesuffix(".parquet")] = {"rows": entry["rows"], "schema": columns}
            files.append(entry)
        manifest = Manifest(
            asset=self.store.real(self.asset),
            snapshot=self.snapshot,
            version=self.version,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            rows=rows,
            bytes=sum(f["bytes"] for f in files),
            files=files,
            schema=schema,
            config_hash=config_hash,
            code_version=code_version(),
            parents=parents,
            details=self.details,
            parts=parts,
            settings=settings or {},
        )
        locks.confirm(self.store.path(self.asset, self.snapshot))
        self.store.put(base + MANIFEST, manifest.to_json())
        if self.store._pins is not None:
            self.store._pins[self.asset, self.snapshot] = self.version
        self._close()
        return manifest

    def discard(self) -> None:
        """Remove what was written, unless it was committed."""
        place = self.store.fs._strip_protocol(self.location)
        if self.store.fs.exists(place) and not self.store.fs.exists(f"{place}/{MANIFEST}"):
            self.store.fs.rm(place, recursive=True)
        self._close()

    def _close(self) -> None:
        unfinished.discard(self.location)
        self.held.close()


def code_version() -> str:
    """Return the version of this package that is installed."""
    try:
        return metadata.version("twhin-pipeline")
    except metadata.PackageNotFoundError:
        return "unknown"


def is_data(path: str) -> bool:
    """Tell whether a version's file, by its path in the folder, is a Parquet file of the table or of its parts.

    Files whose names begin with `_` are not, as in Spark.
    """
    return path.endswith(".parquet") and not path.startswith("_")


def has_rows(asset: str, path: str) -> bool:
    """Tell whether a version's file holds rows of the table itself."""
    return is_data(path) and path.startswith(ROWS_IN.get(asset.rpartition("/")[2], ""))


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """Return how a table's columns are written: compressed, but for vectors, whose bits are as good as random.

    To look for repeats in them takes several times as long as a disk does, and saves one byte of twenty.
    """
    if not any(_is_vector(field.type) for field in schema):
        return {"compression": "zstd"}
    others = [field.name for field in schema if not _is_vector(field.type)]
    return {"compression": dict.fromkeys(others, "zstd"), "use_dictionary": others, "write_statistics": others}


def _is_vector(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)
