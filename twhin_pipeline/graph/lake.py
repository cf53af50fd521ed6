"""Tables of Delta Lake and Iceberg: read by their own libraries, which are needed only here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError

PACKAGES = {"delta": "deltalake", "iceberg": "pyiceberg"}
ROWS_AT_ONCE = 1 << 17


def names(path: str, kind: str) -> list[str]:
    """Return the names of a table's columns. `kind` is `delta` or `iceberg`."""
    with _opened(path, kind) as table:
        return [field.name for field in table.schema().fields]


def stage(path: str, kind: str, target: str, wanted: Sequence[str]) -> None:
    """Write the `wanted` columns of a table to the Parquet file `target`, a batch at a time."""
    columns = list(dict.fromkeys(wanted))
    with _opened(path, kind) as table:
        schema, batches = _batches(table, kind, columns)
        with pq.ParquetWriter(target, schema, compression="snappy") as writer:
            for batch in batches:
                writer.write_batch(batch)


def modified(path: str, kind: str) -> datetime:
    """Return when a table's present version was written (UTC)."""
    with _opened(path, kind) as table:
        milliseconds = table.history(1)[0]["timestamp"] if kind == "delta" else table.metadata.last_updated_ms
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _batches(table: Any, kind: str, columns: list[str]) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    if kind == "delta":
        dataset = table.to_pyarrow_dataset()
        schema = pa.schema([dataset.schema.field(name) for name in columns])
        return schema, dataset.to_batches(columns=columns, batch_size=ROWS_AT_ONCE)
    reader = table.scan(selected_fields=tuple(columns)).to_arrow_batch_reader()
    return reader.schema, reader


@contextmanager
def _opened(path: str, kind: str) -> Iterator[Any]:
    """Open a table.

    Raises:
        UserError: The library is missing, or there is no such table.
    """
    try:
        yield _open(path, kind)
    except ImportError as error:
        package = PACKAGES[kind]
        raise UserError(
            f"{path}: format {kind} needs the package {package}; install it with `{extras.install(kind)}`"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the libraries raise errors of many kinds of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a table of format {kind}: {reason}") from error


def _open(path: str, kind: str) -> Any:
    if kind == "delta":
        from deltalake import DeltaTable

        return DeltaTable(path)
    from pyiceberg.table import StaticTable

    return StaticTable.from_metadata(_metadata(path))


def _metadata(path: str) -> str:
    """Return the newest metadata of an Iceberg table in a local folder. What has a version hint stays as it is."""
    folder = Path(path, "metadata")
    if "://" in path or not os.path.isdir(path) or (folder / "version-hint.text").exists():
        return path
    versions = [(int(match[1]), file) for file in folder.glob("*.metadata.json")
             if (match := re.match(r"v?(\d+)", file.name))]  # fmt: skip
    if not versions:
        raise UserError(f"{path}: has no metadata/*.metadata.json, so it is no Iceberg table; correct the path")
    return str(max(versions)[1])
