"""What `table_formats.py` runs in the environment of each format: versions of a table written, opened and replaced.

    python benchmarks/peers/table_format.py ours|iceberg|lance FOLDER FILES

Prints one line of JSON. Iceberg's catalog is SQLite, and its files are ours (`add_files`); Lance writes its own.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1_000
"""Of a file."""
REPLACEMENTS = 20


class Format(Protocol):
    """A table of which versions are written and read."""

    def prepare(self, files: int) -> Any:
        """Write a version's files."""

    def commit(self, prepared: Any) -> None:
        """Make them the table's newest version, in place of all older ones."""

    def read(self) -> int:
        """Open the newest version, read all of it, and return its number of rows."""

    def files(self) -> int:
        """Open the newest version, and return its number of files."""


def table() -> pa.Table:
    """The content of a file: ids and vectors of 16."""
    values = pa.array(np.random.default_rng(0).random(ROWS * 16, np.float32))
    return pa.table({"row": np.arange(ROWS), "embedding": pa.FixedSizeListArray.from_arrays(values, 16)})


class Ours:
    def __init__(self, folder: Path) -> None:
        from twhin_pipeline.store import Store

        self.store = Store(str(folder / "store"))

    def prepare(self, files: int) -> Any:
        draft = self.store.begin("embeddings/user", "2025-01-01")
        for number in range(files):
            draft.write(table(), f"part-{number:05d}.parquet")
        return draft

    def commit(self, prepared: Any) -> None:
        prepared.commit(config_hash="", parents={})

    def read(self) -> int:
        return self.store.read("embeddings/user", "2025-01-01").num_rows

    def files(self) -> int:
        return len(self.store.files("embeddings/user", "2025-01-01"))


class Iceberg:
    def __init__(self, folder: Path) -> None:
        from pyiceberg.catalog.sql import SqlCatalog

        folder.mkdir(parents=True)
        self.folder, self.versions = folder, 0
        # A catalog's connection belongs to its thread.
        self.open: Callable[[], Any] = lambda: SqlCatalog(
            "t", uri=f"sqlite:///{folder}/catalog.db", warehouse=f"file://{folder}"
        )
        self.open().create_namespace("twhin")
        self.open().create_table("twhin.user", schema=table().schema)

    def prepare(self, files: int) -> list[str]:
        self.versions += 1
        paths = []
        for number in range(files):
            path = self.folder / f"v{self.versions}" / f"part-{number:05d}.parquet"
            path.parent.mkdir(exist_ok=True)
            pq.write_table(table(), path)
            paths.append(f"file://{path}")
        return paths

    def commit(self, prepared: list[str]) -> None:
        with self.open().load_table("twhin.user").transaction() as transaction:
            if self.versions > 1:
                transaction.delete("row >= 0")
            transaction.add_files(prepared, check_duplicate_files=False)

    def read(self) -> int:
        return self.open().load_table("twhin.user").scan().to_arrow().num_rows

    def files(self) -> int:
        return len(list(self.open().load_table("twhin.user").scan().plan_files()))


class Lance:
    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "user.lance")

    def prepare(self, files: int) -> list[Any]:
        import lance

        return [lance.fragment.LanceFragment.create(self.path, table()) for _ in range(files)]

    def commit(self, prepared: list[Any]) -> None:
        import lance

        lance.LanceDataset.commit(self.path, lance.LanceOperation.Overwrite(table().schema, prepared))

    def read(self) -> int:
        import lance

        return lance.dataset(self.path).to_table().num_rows

    def files(self) -> int:
        import lance

        return len(lance.dataset(self.path).get_fragments())


FORMATS: dict[str, type[Any]] = {"ours": Ours, "iceberg": Iceberg, "lance": Lance}


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(made: Format, files: int) -> dict[str, Any]:
    """Commit many files; then replace a small version many times while another thread reads."""
    prepared = made.prepare(files)
    commit = seconds(lambda: made.commit(prepared))
    opened = min(seconds(made.files) for _ in range(5))
    assert made.read() == files * ROWS
    made.commit(made.prepare(5))
    ended, reads, wrong, errors = threading.Event(), 0, 0, []

    def reader() -> None:
        nonlocal reads, wrong
        while not ended.is_set():
            try:
                wrong += made.read() != 5 * ROWS
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:200])
            reads += 1

    thread = threading.Thread(target=reader)
    thread.start()
    replace = seconds(lambda: [made.commit(made.prepare(5)) for _ in range(REPLACEMENTS)]) / REPLACEMENTS
    ended.set()
    thread.join()
    many = min(seconds(made.files) for _ in range(5))
    return {
        "commit_s": commit, "open_ms": 1000 * opened, "replace_ms": 1000 * replace, "open_after_ms": 1000 * many,
        "reads": reads, "wrong_reads": wrong, "failed_reads": len(errors), "first_error": errors[:1],
    }  # fmt: skip


def installed_mib() -> float:
    """Return the size of this environment's packages, but pip's."""
    sizes = [
        path.stat().st_size
        for distribution in importlib.metadata.distributions()
        if distribution.name not in ("pip", "setuptools")
        for file in distribution.files or []
        if (path := Path(str(file.locate()))).exists()
    ]
    return sum(sizes) / 2**20


def main() -> None:
    name, folder, files = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    print(json.dumps({**measure(FORMATS[name](folder), files), "installed_mib": installed_mib()}))


if __name__ == "__main__":
    main()
