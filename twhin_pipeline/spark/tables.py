"""Tables of the store as data frames, and files that tasks write into a draft.

Tasks read and write the store as all of this package does: by a path that each machine has, or through fsspec. So a
store's URL and its credentials are the same for every stage, and Spark needs no Hadoop connector.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import scratch
from twhin_pipeline.errors import UserError
from twhin_pipeline.spark.session import ROWS_AT_ONCE
from twhin_pipeline.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.store import Draft, Manifest

Batches = Iterator[pa.RecordBatch]
GROUPS_AT_ONCE = 1_000_000
"""Row groups that follow one another are one task up to so many rows."""
REPORT = "name string, rows bigint, sha256 string, numbers array<double>"
"""What a task that writes says of a file: its name, its rows, its checksum, and what was counted besides."""


def each(spark: SparkSession, items: Sequence[Any], function: Callable[[Any], Batches], schema: str) -> DataFrame:
    """Return the rows that `function` makes of each item, in a task of its own."""
    if not items:
        return spark.createDataFrame([], schema)
    broadcast = spark.sparkContext.broadcast(list(items))

    def work(batches: Batches) -> Batches:
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from function(broadcast.value[number])

    return spark.range(0, len(items), 1, len(items)).mapInArrow(work, schema)


def row_groups(store: Store, files: Iterable[str], per_task: int = GROUPS_AT_ONCE) -> list[tuple[str, list[int]]]:
    """Return tasks for reading files: a file, and row groups of it that follow one another."""
    result: list[tuple[str, list[int]]] = []
    for path in files:
        with store.parquet(path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        rows = per_task
        for group, size in enumerate(sizes):
            if rows + size > per_task:
                result.append((path, []))
                rows = 0
            result[-1][1].append(group)
            rows += size
    return result


def read(
    spark: SparkSession,
    store: Store,
    files: Sequence[str],
    columns: Sequence[str],
    schema: str,
    change: Callable[[pa.RecordBatch], Batches] | None = None,
) -> DataFrame:
    """Return columns of Parquet files of the store, or what `change` makes of each batch of them."""
    root = store.root

    def rows(item: tuple[str, list[int]]) -> Batches:
        path, groups = item
        with Store(root).parquet(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=list(columns)):
                yield from (batch,) if change is None else change(batch)

    return each(spark, row_groups(store, files), rows, schema)


def sql_type(kind: str) -> str:
    """Return Spark's name of the type of ids, as a manifest or Arrow names it."""
    return "string" if kind in ("string", "large_string") else "bigint"


class Place:
    """A draft's folder, where tasks of any machine write files."""

    def __init__(self, root: str, location: str) -> None:
        self.root, self.location = root, location

    @classmethod
    def of(cls, draft: Draft) -> Place:
        """Return the folder of a draft."""
        return cls(draft.store.root, draft.location)

    @contextmanager
    def file(self, name: str) -> Iterator[str]:
        """Yield a local path to write the file `name` to. It appears as a whole, also where a task runs twice."""
        store = Store(self.root)
        with ExitStack() as stack:
            if store.is_local:
                final = Path(self.location, name)
                final.parent.mkdir(parents=True, exist_ok=True)
                path = f"{final.parent}/.{final.name}.{uuid.uuid4().hex[:8]}"
            else:
                path = f"{stack.enter_context(scratch.folder('spark'))}/{Path(name).name}"
            try:
                yield path
            except BaseException:
                Path(path).unlink(missing_ok=True)
                raise
            if store.is_local:
                os.replace(path, final)
            else:
                store.fs.put_file(path, f"{store.fs._strip_protocol(self.location)}/{name}")

    def local(self, name: str, folder: str) -> str:
        """Return a local path of a file: its own, or that of a copy in `folder`, which is made once."""
        from filelock import FileLock

        store = Store(self.root)
        if store.is_local:
            return f"{self.location}/{name}"
        path = f"{folder}/{hashlib.sha256(f'{self.location}/{name}'.encode()).hexdigest()[:16]}"
        with FileLock(f"{path}.lock"):
            if not os.path.exists(path):
                store.fs.get_file(f"{store.fs._strip_protocol(self.location)}/{name}", f"{path}.draft")
                os.replace(f"{path}.draft", path)
        return path


def report(name: str, path: str, rows: int, numbers: Sequence[float] = ()) -> pa.RecordBatch:
    """Return what is said (`REPORT`) of a file that was written to `path`, while it is still there."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return pa.record_batch(
        {
            "name": pa.array([name]),
            "rows": pa.array([rows], pa.int64()),
            "sha256": pa.array([digest]),
            "numbers": pa.array([list(map(float, numbers))], pa.list_(pa.float64())),
        }
    )


def part_number() -> int:
    """Return the number of this task among those of its stage."""
    from pyspark import TaskContext

    task = TaskContext.get()
    assert task is not None
    return int(task.partitionId())


def part_name(prefix: str = "part") -> str:
    """Return the name of the file of this task: names are in the order of tasks."""
    return f"{prefix}-{part_number():05d}.parquet"


def on_disk() -> Any:
    """Return how data frames are kept that are used more than once: on the workers' disks."""
    from pyspark import StorageLevel

    return StorageLevel.DISK_ONLY


def first_filled(batches: Batches) -> Batches | None:
    """Return the batches that have rows; None where none has."""
    filled = (batch for batch in batches if len(batch))
    first = next(filled, None)
    return None if first is None else itertools.chain([first], filled)


def finish(draft: Draft, reports: Sequence[Any]) -> None:
    """Remove what no finished task has written, and note the checksums that tasks have computed.

    Raises:
        UserError: What a worker has written is not there.
    """
    draft.digests = {row["name"]: row["sha256"] for row in reports}
    base = draft.store.fs._strip_protocol(draft.location)
    draft.store.fs.invalidate_cache()  # others have written
    there = set(draft.store.sizes(draft.location))
    if missing := sorted(set(draft.digests) - there):
        raise UserError(
            f"{draft.location}: a worker of Spark has written {missing[0]}, and it is not there; give a store (--home) "
            "that all machines see by the same path or URL: a shared folder, or an object store"
        )
    for name in there - set(draft.digests):
        draft.store.fs.rm(f"{base}/{name}")


def written(store: Store, manifest: Manifest) -> list[str]:
    """Return the Parquet files of a manifest, those without rows left out."""
    rows = {file["path"]: file.get("rows", 0) for file in manifest.files}
    base = f"{store.root}/{manifest.asset}/{manifest.snapshot}/{manifest.version}"
    return [path for path in store.files_of(manifest) if rows[path[len(base) + 1 :]]]


@contextmanager
def parquet_writer(path: str, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of a Parquet file."""
    with pq.ParquetWriter(path, schema, compression="zstd", **options) as writer:
        yield writer
