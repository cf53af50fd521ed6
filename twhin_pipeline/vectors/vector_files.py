"""Vectors as plain files in a folder, for programs that know nothing of a store: Parquet, NumPy's or safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError
from twhin_pipeline.store.array_cache import new_array
from twhin_pipeline.vectors import compression
from twhin_pipeline.vectors.compression import CODEBOOKS, VECTORS, Codec, DataType
from twhin_pipeline.vectors.model_files import vectors_of
from twhin_pipeline.vectors.reader import TwhinEmbeddings

FORMATS = ("parquet", "npy", "safetensors")
SAMPLE_ROWS = 100_000
"""Vectors by which compression is measured, and from which codebooks are learned, at most."""


def write(
    model: TwhinEmbeddings,
    folder: Path,
    entities: Sequence[str],
    *,
    kind: str = "parquet",
    data_type: DataType = "fp32",
    untrained: bool = False,
) -> list[Path]:
    """Write each entity type's vectors, as `get_embedding` returns them: in an earlier release's space where asked.

    `parquet`: `<entity>.parquet` with `id` and `embedding`. `npy`: `<entity>.npy` `[N, D]` and `<entity>.ids.parquet`
    with `id`, in the order of its rows. `safetensors`: `<entity>.safetensors` with the tensor `embedding`, and the same
    ids. A file that is there is replaced at once, when the new one is whole.

    `int8` adds a `scale` for each vector, which is `scale * embedding`. With `pq`, `embedding` is codes uint8 `[N, M]`,
    and `codebooks` float32 `[M, 256, D / M]` has what they stand for: part m of a vector is `codebooks[m, code[m]]`.
    What is no column, array or tensor of its file is `<entity>.<name>.npy` beside it. What compression costs is
    measured and written to `<entity>.compression.json`.

    Args:
        model: What `load_model` returned.
        folder: Where to; made where it is missing.
        entities: The entity types.
        kind: One of `FORMATS`.
        data_type: One of `compression.DATA_TYPES`.
        untrained: Entities without training edges too.

    Returns:
        The files.

    Raises:
        UserError: The folder cannot be written, a type has no map into the space that was asked for or too few vectors
            for `pq`, or an extra is missing.
    """
    if kind == "safetensors":
        extras.need("safetensors", "--format safetensors")
    writer = _parquet if kind == "parquet" else _npy if kind == "npy" else _safetensors
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for entity in entities:
            sample = _sample(model, entity, untrained) if data_type != "fp32" else np.zeros((0, 0), np.float32)
            codec = compression.codec(data_type, sample, entity)
            with _drafts(folder) as drafts:
                writer(model, drafts, entity, codec, untrained)
                if data_type != "fp32":
                    _describe(drafts, entity, codec, sample, data_type)
            written += drafts.values()
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


def _sample(model: TwhinEmbeddings, entity: str, untrained: bool) -> np.ndarray:
    """Return vectors, drawn by chance and in random order, float32 `[S, D]`."""
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.permutation(model.count(entity, untrained=untrained))[:SAMPLE_ROWS])
    parts, at = [np.zeros((0, model.schema(entity).field(VECTORS).type.list_size), np.float32)], 0
    for batch in model.batches(entity, untrained=untrained):
        own = drawn[(drawn >= at) & (drawn < at + len(batch))] - at
        if len(own):
            parts.append(vectors_of(batch.column(VECTORS).take(pa.array(own))))
        at += len(batch)
    return rng.permutation(np.concatenate(parts))


@contextmanager
def _drafts(folder: Path) -> Iterator[_Folder]:
    """Yield names for files of a folder; they get them when the block ends, and are gone where it raises."""
    made = _Folder(folder)
    try:
        yield made
        for draft, path in made.items():
            os.replace(draft, path)
    finally:
        for draft in made:
            draft.unlink(missing_ok=True)


class _Folder(dict[Path, Path]):
    """Files of a folder in the making, each with the one that it becomes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def new(self, name: str) -> Path:
        """Return the draft of a file."""
        path = self.folder / name
        draft = _draft(path)
        self[draft] = path
        return draft

    def forget(self, name: str) -> None:
        """Remove the draft of a file."""
        draft = next(draft for draft, path in self.items() if path.name == name)
        del self[draft]
        draft.unlink()


def _parquet(model: TwhinEmbeddings, drafts: _Folder, entity: str, codec: Codec, untrained: bool) -> None:
    ids = model.schema(entity).field("id")
    empty = _columns(pa.array([], ids.type), _empty(model, entity, codec))
    with pq.ParquetWriter(drafts.new(f"{entity}.parquet"), empty.schema, compression="zstd") as writer:
        for batch in model.batches(entity, untrained=untrained):
            writer.write_batch(_columns(batch.column("id"), codec.encode(vectors_of(batch.column(VECTORS)))))
    _write_shared(drafts, entity, codec)


def _columns(ids: pa.Array, arrays: compression.Arrays) -> pa.RecordBatch:
    columns = {"id": ids}
    for name, values in arrays.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.RecordBatch.from_arrays(
        list(columns.values()),
        schema=pa.schema([pa.field(name, column.type, nullable=False) for name, column in columns.items()]),
    )


def _empty(model: TwhinEmbeddings, entity: str, codec: Codec) -> compression.Arrays:
    """Return what becomes of no vectors."""
    return codec.encode(np.zeros((0, model.schema(entity).field(VECTORS).type.list_size), np.float32))


def _npy(model: TwhinEmbeddings, drafts: _Folder, entity: str, codec: Codec, untrained: bool) -> None:
    names = {VECTORS: f"{entity}.npy"}
    _write_arrays(model, drafts, entity, codec, untrained, names)
    _write_shared(drafts, entity, codec)


def _write_arrays(
    model: TwhinEmbeddings, drafts: _Folder, entity: str, codec: Codec, untrained: bool, names: dict[str, str]
) -> compression.Arrays:
    """Write the ids, and each array as a file of `names`, else `<entity>.<name>.npy`; return the arrays, mapped."""
    count = model.count(entity, untrained=untrained)
    mapped = {
        name: new_array(drafts.new(names.get(name, f"{entity}.{name}.npy")), (count, *none.shape[1:]), none.dtype)
        for name, none in _empty(model, entity, codec).items()
    }
    at, ids = 0, pa.schema([model.schema(entity).field("id")])
    with pq.ParquetWriter(drafts.new(f"{entity}.ids.parquet"), ids, compression="zstd") as writer:
        for batch in model.batches(entity, untrained=untrained):
            for name, values in codec.encode(vectors_of(batch.column(VECTORS))).items():
                mapped[name][at : at + len(batch)] = values
            at += len(batch)
            writer.write_batch(batch.select(["id"]))
    for array in mapped.values():
        array.flush()
    return dict(mapped)


def _safetensors(model: TwhinEmbeddings, drafts: _Folder, entity: str, codec: Codec, untrained: bool) -> None:
    from safetensors.numpy import save_file

    tensors = _write_arrays(model, drafts, entity, codec, untrained, {})
    save_file({**tensors, **codec.shared}, drafts.new(f"{entity}.safetensors"))
    for name in tensors:
        drafts.forget(f"{entity}.{name}.npy")


def _write_shared(drafts: _Folder, entity: str, codec: Codec) -> None:
    for name, array in codec.shared.items():
        with drafts.new(f"{entity}.{name}.npy").open("wb") as file:
            np.save(file, array)


def _describe(drafts: _Folder, entity: str, codec: Codec, sample: np.ndarray, data_type: DataType) -> None:
    """Write what the vectors are in, and what that costs."""
    arrays = codec.encode(sample[:1])
    described = {
        "data_type": data_type,
        "dimension": sample.shape[1],
        "bytes_per_vector": sum(array.nbytes for array in arrays.values()),
        **({"parts": len(codec.shared[CODEBOOKS])} if codec.shared else {}),
        **compression.loss(codec, sample),
    }
    drafts.new(f"{entity}.compression.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def _draft(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
