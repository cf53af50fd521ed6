"""The store: where tables live. A table exists when its manifest does.

    <root>/<asset>/<snapshot>/<version>/*.parquet     the data of one version
    <root>/<asset>/<snapshot>/<version>/_*            what belongs to it besides; no rows of the table
    <root>/<asset>/<snapshot>/manifest.json           written last; names the version that counts

A writer fills a new version's folder and then replaces the manifest, so a crash leaves the old table as it was and
nothing that a reader would take for finished.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from twhin_pipeline.errors import UserError

DEFAULT_HOME = ".twhin"
MAKERS = {
    "raw_edges": "ingest",
    "raw_edges_rejected": "ingest",
    "vocabulary": "vocabulary",
    "training_set": "sample",
    "held_out": "sample",
    "twhin_model": "train",
    "evaluation": "evaluate",
    "embeddings": "export",
    "refit": "refit",
    "published": "publish",
}
"""The command that makes a table, by the first part of the table's name."""
ROWS_IN = {"twhin_model": "tables/"}
"""Where a version's rows are, by the last part of the table's name, if not in all of its Parquet files. The other files
are parts of their own: of a model, whose rows are vectors, these are the relations, the losses and the metrics."""
CHECKED = "_checked.json"
"""Written into a version's folder when its blocking checks have run."""
VIEWS = {"refit": {name: f"refit/{name}" for name in ("training_set", "held_out", "twhin_model")}}
"""Views of a store, by name: each shows tables of its own under the usual names, so that the same stages make them.
`refit` has the model that is trained once more on all edges, and its training set (`refit.py`)."""


@dataclass(frozen=True)
class Manifest:
    """What one version of a table is and where it comes from.

    `rows` and `schema` are those of the table itself, and `parts` has the same of Parquet files beside it, by their
    names (see `ROWS_IN`). `parents` maps a parent table to the version that was read; `details` is what the stage
    counted (JSON values).
    """

    asset: str
    snapshot: str
    version: str
    created: str
    rows: int
    bytes: int
    files: list[dict[str, Any]]
    schema: dict[str, str]
    config_hash: str
    code_version: str
    parents: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)


class Store:
    """Tables under one root: a folder, or any fsspec URL."""

    def __init__(self, root: str | None = None, view: str | None = None) -> None:
        """Open a store, or one of its `VIEWS`."""
        self.view = view
        root = str(root or os.environ.get("TWHIN_HOME") or DEFAULT_HOME)
        self.fs, path = fsspec.core.url_to_fs(root)
        protocol = self.fs.protocol if isinstance(self.fs.protocol, str) else self.fs.protocol[0]
        self.is_local = protocol in ("file", "local")
        self.root: str = os.path.abspath(path) if self.is_local else f"{protocol}://{path.rstrip('/')}"

    def __repr__(self) -> str:
        return f"Store({self.root!r})" if self.view is None else f"Store({self.root!r}, {self.view!r})"

    def seen_as(self, view: str | None) -> Store:
        """Return a view of the same store; None: the store itself."""
        return Store(self.root, view)

    def real(self, asset: str) -> str:
        """Return a table's name in the store, where this view shows one of its own under the usual name."""
        first, slash, rest = asset.partition("/")
        return f"{VIEWS[self.view].get(first, first)}{slash}{rest}" if self.view else asset

    def path(self, *parts: str) -> str:
        """Return the path or URL of something under the root."""
        return "/".join([self.root, *(self.real(part) if i == 0 else part for i, part in enumerate(parts))])

    def exists(self, asset: str, snapshot: str) -> bool:
        """Tell whether the table is finished."""
        return bool(self.fs.exists(self.path(asset, snapshot, "manifest.json")))

    def manifest(self, asset: str, snapshot: str) -> Manifest:
        """Read the table's manifest. Raises UserError, with the command that makes the table, where there is none."""
        try:
            with self.fs.open(self.path(asset, snapshot, "manifest.json"), "r") as file:
                return Manifest(**json.load(file))
        except FileNotFoundError:
            stage = MAKERS.get(asset.split("/")[0], "run")
            there = ", ".join(self.snapshots(asset)) or "none"
            raise UserError(
                f"{self.root}: no table {asset} for snapshot {snapshot} (snapshots with one: {there}); "
                f"make it with `twhin {stage} --snapshot {snapshot}`"
            ) from None

    def snapshots(self, asset: str) -> list[str]:
        """List the snapshots for which the table is finished, oldest first."""
        found = self.fs.glob(self.path(asset, "*", "manifest.json"))
        return sorted(str(path).rstrip("/").split("/")[-2] for path in found)

    def latest_before(self, asset: str, snapshot: str) -> str | None:
        """Return the newest finished snapshot that is older than `snapshot`, or None."""
        older = [s for s in self.snapshots(asset) if s < snapshot]
        return older[-1] if older else None

    def assets(self) -> list[str]:
        """List every table of which some snapshot is finished, such as `vocabulary/user`."""
        found = self.fs.glob(self.path("*", "*", "manifest.json")) + self.fs.glob(
            self.path("*", "*", "*", "manifest.json")
        )
        root = self.fs._strip_protocol(self.root).rstrip("/") + "/"
        return sorted({str(path)[len(root) :].rsplit("/", 2)[0] for path in found})

    def files(self, asset: str, snapshot: str) -> list[str]:
        """Return the table's Parquet files (paths, or URLs in a remote store), in order."""
        return self.files_of(self.manifest(asset, snapshot))

    def files_of(self, manifest: Manifest) -> list[str]:
        """Return the Parquet files of a manifest's rows."""
        base = self.path(manifest.asset, manifest.snapshot, manifest.version)
        return [f"{base}/{file['path']}" for file in manifest.files if _has_rows(manifest.asset, file["path"])]

    def part_files(self, manifest: Manifest) -> dict[str, str]:
        """Return the Parquet files beside a manifest's rows, by the part's name, such as `losses`."""
        base = self.path(manifest.asset, manifest.snapshot, manifest.version)
        paths = [file["path"] for file in manifest.files]
        return {
            path.removesuffix(".parquet"): f"{base}/{path}"
            for path in paths
            if _is_data(path) and not _has_rows(manifest.asset, path)
        }

    def note_checks(self, manifest: Manifest, failed: Iterable[str]) -> None:
        """Write beside a version which of its blocking checks failed, once all of them have run."""
        path = self.path(manifest.asset, manifest.snapshot, manifest.version, CHECKED)
        at = datetime.now(UTC).isoformat(timespec="seconds")
        self.fs.pipe_file(path, json.dumps({"checked": at, "failed": sorted(failed)}).encode())

    def has_passed(self, manifest: Manifest) -> bool:
        """Tell whether the blocking checks of this version have run, and none failed when they last did."""
        path = self.path(manifest.asset, manifest.snapshot, manifest.version, CHECKED)
        return bool(self.fs.exists(path)) and not json.loads(self.fs.cat_file(path))["failed"]

    @contextmanager
    def parquet(self, path: str) -> Iterator[pq.ParquetFile]:
        """Open one of the store's Parquet files (a path or URL, as `files` gives them).

        Arrow opens local files by itself: of one that Python reads for it a thread of Arrow's may hold a part when the
        interpreter ends, which aborts the process (exit code 134).
        """
        if self.is_local:
            with pq.ParquetFile(path, pre_buffer=False) as file:
                yield file
        else:
            with self.fs.open(path, "rb") as opened, pq.ParquetFile(opened, pre_buffer=False) as file:
                yield file

    def batches(
        self, files: list[str], columns: list[str], size: int, first: int = 0, count: int | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Stream rows of Parquet files that follow one another, in batches of at most `size` rows.

        Args:
            files: The files (paths or URLs), in order.
            columns: The columns to read.
            size: Rows of a batch.
            first: The first row, counted from the first file's.
            count: The number of rows; fewer come where the files end before. None: all that follow.
        """
        left = sys.maxsize if count is None else count
        for path in files:
            if left <= 0:
                return
            with self.parquet(path) as file:
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                groups = list(range(len(rows)))
                while groups and first >= rows[groups[0]]:
                    first -= rows[groups.pop(0)]
                for batch in file.iter_batches(size, row_groups=groups, columns=columns) if groups else ():
                    passed = min(first, len(batch))
                    first -= passed
                    taken = batch.slice(passed, left)
                    left -= len(taken)
                    if len(taken):
                        yield taken
                    if left <= 0:
                        return

    def dataset(self, asset: str, snapshot: str) -> ds.Dataset:
        """Open the table as an Arrow dataset, its files in order."""
        files = self.files(asset, snapshot)
        if self.is_local:
            return ds.dataset(files, format="parquet")
        return ds.dataset([self.fs._strip_protocol(f) for f in files], format="parquet", filesystem=self.fs)

    def read(self, asset: str, snapshot: str, columns: list[str] | None = None) -> pa.Table:
        """Read the whole table into memory, in the order it was written."""
        return self.dataset(asset, snapshot).to_table(columns=columns)

    def versions(self, snapshot: str, assets: Iterable[str]) -> dict[str, str]:
        """Return the present version of each table, for a child's `parents`. Raises UserError where one is missing."""
        return {self.real(asset): self.manifest(asset, snapshot).version for asset in assets}

    def stale(self, asset: str, snapshot: str) -> list[str]:
        """Return the parents of a finished table that have been made anew (or are gone) since it read them."""
        if self.view:
            return self.seen_as(None).stale(self.real(asset), snapshot)
        stale = []
        for parent, version in self.manifest(asset, snapshot).parents.items():
            name, _, at = parent.partition("@")
            at = at or snapshot
            if not self.exists(name, at) or self.manifest(name, at).version != version:
                stale.append(parent)
        return stale

    def refuse_stale(self, snapshot: str, assets: Iterable[str]) -> None:
        """Raise UserError where one of these tables, or one above it, was made from what has been replaced since.

        Tables that are not there are passed over: who reads them says so.
        """
        if self.view:  # parents are named as they are in the store
            self.seen_as(None).refuse_stale(snapshot, [self.real(asset) for asset in assets])
            return
        waiting = [asset for asset in assets if self.exists(asset, snapshot)]
        seen = set()
        while waiting:
            asset = waiting.pop(0)
            if asset in seen:
                continue
            seen.add(asset)
            stale = self.stale(asset, snapshot)
            if stale:
                stage = MAKERS.get(asset.split("/")[0], "run")
                raise UserError(
                    f"{asset} of snapshot {snapshot} is stale: {', '.join(sorted(stale))} changed after it was made; "
                    f"make it and what follows it again, from `twhin {stage} --snapshot {snapshot}` on"
                )
            waiting += [parent for parent in self.manifest(asset, snapshot).parents if "@" not in parent]

    def begin(self, asset: str, snapshot: str) -> Draft:
        """Start a new version of a table. Nothing is visible until `Draft.commit`."""
        version = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
        return Draft(self, asset, snapshot, version)

    @contextmanager
    def replace(
        self, asset: str, snapshot: str, *, config_hash: str, parents: dict[str, str] | None = None
    ) -> Iterator[Draft]:
        """Write a new version of a table: committed where the block ends well, discarded where it raises.

        Set `draft.details` inside the block for what the stage counted.
        """
        draft = self.begin(asset, snapshot)
        try:
            yield draft
            draft.commit(config_hash=config_hash, parents=parents or {})
        except BaseException:
            draft.discard()
            raise


class Draft:
    """A version of a table in the making. Any process may open one by its version; one of them commits."""

    def __init__(self, store: Store, asset: str, snapshot: str, version: str) -> None:
        self.store, self.asset, self.snapshot, self.version = store, asset, snapshot, version
        self.location = store.path(asset, snapshot, version)
        self.details: dict[str, Any] = {}
        store.fs.makedirs(self.location, exist_ok=True)

    @contextmanager
    def local_file(self, name: str) -> Iterator[str]:
        """Yield a local path to write the file `name` to; in a remote store it is uploaded when the block ends."""
        if self.store.is_local:
            path = f"{self.location}/{name}"
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            yield path
            return
        with tempfile.TemporaryDirectory(prefix="twhin-") as folder:
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

    def commit(self, *, config_hash: str, parents: dict[str, str]) -> Manifest:
        """Make this version the one that counts, and remove the one before."""
        fs = self.store.fs
        base = fs._strip_protocol(self.location).rstrip("/") + "/"
        names = sorted(str(path)[len(base) :] for path in fs.find(self.location))
        files: list[dict[str, Any]] = []
        schema: dict[str, str] = {}
        parts: dict[str, dict[str, Any]] = {}
        rows = 0
        for name in names:
            entry: dict[str, Any] = {"path": name, "bytes": int(fs.size(f"{self.location}/{name}"))}
            if _is_data(name):
                with self.store.parquet(f"{self.location}/{name}") as parquet:
                    entry["rows"] = parquet.metadata.num_rows
                    columns = {f.name: str(f.type) for f in parquet.schema_arrow}
                if _has_rows(self.asset, name):
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
        )
        target = self.store.path(self.asset, self.snapshot, "manifest.json")
        text = json.dumps(asdict(manifest), indent=1, allow_nan=False)
        if self.store.is_local:
            draft = f"{target}.{self.version}"
            Path(draft).write_text(text)
            os.replace(draft, target)
        else:
            fs.pipe_file(target, text.encode())
        self._remove_others()
        return manifest

    def discard(self) -> None:
        """Remove what was written."""
        if self.store.fs.exists(self.location):
            self.store.fs.rm(self.location, recursive=True)

    def _remove_others(self) -> None:
        folder = self.store.path(self.asset, self.snapshot)
        for path in self.store.fs.ls(folder, detail=False):
            name = str(path).rstrip("/").split("/")[-1]
            # A version's name begins with its date; other folders (checkpoints) are not ours to remove.
            if name != self.version and name[:8].isdigit() and "-" in name:
                self.store.fs.rm(path, recursive=True)


def code_version() -> str:
    """Return the version of this package that is installed."""
    try:
        return metadata.version("twhin-pipeline")
    except metadata.PackageNotFoundError:
        return "unknown"


def _is_data(path: str) -> bool:
    """Tell whether a version's file, by its path in the folder, is a Parquet file of the table or of its parts.

    Files whose names begin with `_` are not, as in Spark.
    """
    return path.endswith(".parquet") and not path.startswith("_")


def _has_rows(asset: str, path: str) -> bool:
    """Tell whether a version's file holds rows of the table itself."""
    return _is_data(path) and path.startswith(ROWS_IN.get(asset.rpartition("/")[2], ""))


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
