"""Vectors as plain files in a folder, for programs that know nothing of a store: Parquet, or NumPy's with the ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq

from twhin_pipeline.errors import UserError
from twhin_pipeline.store.array_cache import new_array
from twhin_pipeline.vectors.model_files import vectors_of
from twhin_pipeline.vectors.reader import TwhinEmbeddings

FORMATS = ("parquet", "npy")
ELEMENTS = {"fp32": np.float32, "fp16": np.float16}


def write(
    model: TwhinEmbeddings,
    folder: Path,
    entities: Sequence[str],
    *,
    kind: str = "parquet",
    data_type: str = "fp32",
    untrained: bool = False,
) -> list[Path]:
    """Write each entity type's vectors, as `get_embedding` returns them: in an earlier release's space where asked.

    `parquet`: `<entity>.parquet` with `id` and `embedding`. `npy`: `<entity>.npy` `[N, D]` and `<entity>.ids.parquet`
    with `id`, in the order of its rows. A file that is there is replaced at once, when the new one is whole.

    Args:
        model: What `load_model` returned.
        folder: Where to; made where it is missing.
        entities: The entity types.
        kind: One of `FORMATS`.
        data_type: One of `ELEMENTS`.
        untrained: Entities without training edges too.

    Returns:
        The files.

    Raises:
        UserError: The folder cannot be written, or a type has no map into the space that was asked for.
    """
    writers: dict[str, Callable[..., list[Path]]] = {"parquet": _parquet, "npy": _npy}
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entity in entities:
            written += writers[kind](model, folder, entity, np.dtype(ELEMENTS[data_type]), untrained)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); give another folder") from error
    return written


def write_stream(batches: pa.RecordBatchReader, path: Path) -> int:
    """Write a stream of batches as it comes, such as that of `recommend`. A file that is there is replaced at the end.

    Args:
        batches: The stream; it is read to its end.
        path: `.parquet` or `.csv`.

    Returns:
        How many rows there were.

    Raises:
        UserError: The file has another ending, or cannot be written.
    """
    if path.suffix not in (".parquet", ".csv"):
        raise UserError(f"{path}: is neither .parquet nor .csv; name one of these")
    rows, draft = 0, _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            writer = pq.ParquetWriter(draft, batches.schema, compression="zstd")
        else:
            writer = csv.CSVWriter(draft, batches.schema)
        with writer:
            for batch in batches:
                writer.write_batch(batch)
                rows += len(batch)
        os.replace(draft, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); give another file") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return rows


def _parquet(model: TwhinEmbeddings, folder: Path, entity: str, element: np.dtype, untrained: bool) -> list[Path]:
    path = folder / f"{entity}.parquet"
    draft = _draft(path)
    try:
        with pq.ParquetWriter(draft, model.schema(entity, pa.from_numpy_dtype(element)), compression="zstd") as writer:
            for batch in model.batches(entity, untrained=untrained):
                writer.write_batch(batch.cast(writer.schema))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return [path]


def _npy(model: TwhinEmbeddings, folder: Path, entity: str, element: np.dtype, untrained: bool) -> list[Path]:
    vectors, ids = folder / f"{entity}.npy", folder / f"{entity}.ids.parquet"
    drafts = _draft(vectors), _draft(ids)
    schema = model.schema(entity)
    try:
        shape = (model.count(entity, untrained=untrained), schema.field("embedding").type.list_size)
        mapped = new_array(drafts[0], shape, element)
        at = 0
        with pq.ParquetWriter(drafts[1], pa.schema([schema.field("id")]), compression="zstd") as writer:
            for batch in model.batches(entity, untrained=untrained):
                mapped[at : at + len(batch)] = vectors_of(batch.column("embedding"))
                at += len(batch)
                writer.write_batch(batch.select(["id"]))
        mapped.flush()
        for draft, path in zip(drafts, (vectors, ids), strict=True):
            os.replace(draft, path)
    finally:
        for draft in drafts:
            draft.unlink(missing_ok=True)
    return [vectors, ids]


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
