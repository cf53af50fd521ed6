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


def schema(path: str, kind: str, wanted: Sequence[str]) -> pa.Schema:
    """Return the Arrow types of a table's `wanted` columns."""
    columns = list(dict.fromkeys(wanted))
    with _opened(path, kind) as table:
        if kind == "delta":
            found = table.to_pyarrow_dataset().schema
        else:
            from pyiceberg.io.pyarrow import schema_to_pyarrow

            found = schema_to_pyarrow(table.schema(), include_field_ids=False)
        return pa.schema([found.field(name) for name in columns])


def parts(path: str, kind: str) -> tuple[str, list[str]]:
    """Return a table's present version and its data files; `stage_part` reads one of them, on any machine."""
    with _opened(path, kind) as table:
        if kind == "delta":
            return str(table.version()), sorted(one.path for one in table.to_pyarrow_dataset().get_fragments())
        return table.metadata_location, sorted(task.file.file_path for task in table.scan().plan_files())


def stage_part(path: str, kind: str, version: str, part: str, target: str, wanted: Sequence[str]) -> None:
    """Write the `wanted` columns of a data file, as the table's version has it, to the Parquet file `target`.

    Rows that the table has deleted are left out, and columns that the file lacks are filled in, by the table's own
    library.
    """
    columns = list(dict.fromkeys(wanted))
    with _opened(path, kind, version) as table:
        schema, batches = _batches(table, kind, columns, part)
        with pq.ParquetWriter(target, schema, compression="snappy") as writer:
            for batch in batches:
                writer.write_batch(batch)


def modified(path: str, kind: str) -> datetime:
    """Return when a table's present version was written (UTC)."""
    with _opened(path, kind) as table:
        milliseconds = table.history(1)[0]["timestamp"] if kind == "delta" else table.metadata.last_updated_ms
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _batches(
    table: Any, kind: str, columns: list[str], part: str | None = None
) -> tuple[pa.Schema, Iterable[pa.RecordBatch]]:
    """Return some columns of a table, or of one of its data files."""
    if kind == "delta":
        dataset = table.to_pyarrow_dataset()
        schema = pa.schema([dataset.schema.field(name) for name in columns])
        if part is None:
            return schema, dataset.to_batches(columns=columns, batch_size=ROWS_AT_ONCE)
        (fragment,) = (one for one in dataset.get_fragments() if one.path == part)
        return schema, fragment.to_batches(schema=dataset.schema, columns=columns, batch_size=ROWS_AT_ONCE)
    scan = table.scan(selected_fields=tuple(columns))
    if part is None:
        reader = scan.to_arrow_batch_reader()
        return reader.schema, reader
    from pyiceberg.io.pyarrow import ArrowScan, schema_to_pyarrow

    tasks = [task for task in scan.plan_files() if task.file.file_path == part]
    projected = scan.projection()
    schema = schema_to_pyarrow(projected, include_field_ids=False)
    scanner = ArrowScan(table.metadata, table.io, projected, scan.row_filter, scan.case_sensitive)
    return schema, (batch.cast(schema) for batch in scanner.to_record_batches(tasks))


@contextmanager
def _opened(path: str, kind: str, version: str | None = None) -> Iterator[Any]:
    """Open a table, in a version of `parts`; left out, the present one.

    Raises:
        UserError: The library is missing, or there is no such table.
    """
    try:
        yield _open(path, kind, version)
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


def _open(path: str, kind: str, version: str | None) -> Any:
    if kind == "delta":
        from deltalake import DeltaTable

        return DeltaTable(path, version=None if version is None else int(version))
    from pyiceberg.table import StaticTable

    return StaticTable.from_metadata(version or _metadata(path))


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
