"""Export: the trained tables as Parquet keyed by the original ids, streamed in several files at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.training import ExportConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.prefetch import in_order
from twhin_pipeline.store import Draft, Manifest, Store, database
from twhin_pipeline.vectors import entity_table
from twhin_pipeline.vectors.model_files import ModelTables, parameters_array, vectors_of, vectors_type

BATCH_ROWS, BATCH_BYTES = 65_536, 32 << 20  # at most; a batch is a row group
THREADS = 8  # more hold more in memory, and a disk is not faster for them
ELEMENT = {"fp32": pa.float32(), "fp16": pa.float16()}


def export(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `embeddings/<entity>` for every entity type, then `embeddings/relations`, which completes the set.

    Vocabulary and model parts are both in row order, so they are read side by side in batches; memory grows with the
    threads (`launch.data_threads`, eight at most) and not with the tables.

    Returns:
        The manifests by table name.

    Raises:
        UserError: The model or a vocabulary is missing, or they do not belong together.
    """
    tables = ModelTables.open(store, snapshot)
    model = tables.manifest
    trained = trained_edges(store, snapshot, tables)
    threads = min(database.threads(config), THREADS)
    with ExitStack() as drafts:
        files = []
        for entity in tables.names:
            parents = {model.asset: model.version, **tables.trained_on([f"vocabulary/{entity}"])}
            source = _Source.open(tables, entity, config.export, trained[entity])
            draft = drafts.enter_context(
                store.replace(f"embeddings/{entity}", snapshot, config_hash=config.hash(), parents=parents)
            )
            draft.details = {
                "data_type": config.export.data_type,
                "normalize": config.export.normalize,
                "untrained": int((trained[entity] == 0).sum()) - source.evicted,
                "evicted": source.evicted,
            }
            starts = range(0, max(source.rows, 1), config.export.rows_per_file)
            files += [(draft, source, number, first) for number, first in enumerate(starts)]
        with ThreadPoolExecutor(threads, "export") as pool:
            for _ in in_order(pool, _write_file, files, threads + 1):
                pass
    written = {asset: store.manifest(asset, snapshot) for asset in (f"embeddings/{name}" for name in tables.names)}
    asset = "embeddings/relations"
    parents = {model.asset: model.version, **{name: manifest.version for name, manifest in written.items()}}
    with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.write(_relations(tables))
        draft.details = {
            "model": tables.config.model_dump(mode="json"),
            "normalize": config.export.normalize,
            "mlflow_run_id": model.details.get("mlflow_run_id"),
        }
    written[asset] = store.manifest(asset, snapshot)
    if store.is_local:  # so that who opens the model first does not wait for it
        for name in tables.names:
            entity_table.prepare(store, written[f"embeddings/{name}"])
    return written


def trained_edges(store: Store, snapshot: str, tables: ModelTables) -> dict[str, np.ndarray]:
    """Count, by entity type, the training edges of each row, at either end: int64 `[N]`.

    A vector of 0 edges is as it was drawn, or as an earlier model left it.
    """
    sizes = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in tables.names}
    result = {name: np.zeros(size, np.int64) for name, size in sizes.items()}
    relations = tables.config.relations
    manifest = store.manifest("training_set/positives", snapshot)
    for batch in store.batches(store.files_of(manifest), ["lhs", "rhs", "rel"], BATCH_ROWS):
        rel = batch.column("rel").to_numpy()
        for side in ("lhs", "rhs"):
            rows = batch.column(side).to_numpy()
            for number in np.unique(rel).tolist():
                counts = result[getattr(relations[number], side)]
                counts += np.bincount(rows[rel == number], minlength=len(counts))[: len(counts)]
    return result


@dataclass(frozen=True)
class _Source:
    """An entity type's ids and vectors, and how they are written."""

    store: Store
    entity: str
    vocabulary: list[str]
    parts: list[str]
    rows: int
    evicted: int
    """How many of the rows have no vector any more; they are left out."""
    schema: pa.Schema
    options: ExportConfig
    trained: np.ndarray

    @property
    def dim(self) -> int:
        return int(self.schema.field("embedding").type.list_size)

    @classmethod
    def open(cls, tables: ModelTables, entity: str, options: ExportConfig, trained: np.ndarray) -> _Source:
        store, vocabulary = tables.store, f"vocabulary/{entity}"
        manifest = store.manifest(vocabulary, tables.manifest.snapshot)
        files = store.files_of(manifest)
        with store.parquet(files[0]) as file:
            ids = file.schema_arrow.field("id").type
        vectors = vectors_type(tables.config.embedding_dim, ELEMENT[options.data_type])
        schema = pa.schema(
            [
                ("id", ids),
                ("row", pa.int64()),
                pa.field("embedding", vectors, nullable=False),
                ("trained_edges", pa.int64()),
            ]
        )
        evicted = int(manifest.details.get("evicted", 0))
        return cls(store, entity, files, tables.parts(entity), manifest.rows, evicted, schema, options, trained)


def _write_file(draft: Draft, source: _Source, number: int, first: int) -> None:
    """Write the rows from `first` on, as many as a file holds."""
    store, count = source.store, min(source.options.rows_per_file, source.rows - first)
    size = max(1, min(BATCH_ROWS, BATCH_BYTES // (4 * source.dim)))
    columns = ["id", "row", *(["evicted"] if source.evicted else [])]
    rows = store.batches(source.vocabulary, columns, size, first, count)
    vectors = _Vectors(store.batches(source.parts, ["row", "embedding"], size, first, count), source.entity)
    with draft.writer(f"part-{number:05d}.parquet", source.schema) as writer:
        for batch in rows:
            result = vectors.take(batch.column("row"))
            if source.evicted:
                kept = pc.invert(batch.column("evicted"))
                batch, result = batch.filter(kept), result[kept.to_numpy(zero_copy_only=False)]
            writer.write_table(_encode(batch, result, source.trained, source.schema, source.options))


def _encode(
    batch: pa.RecordBatch, vectors: np.ndarray, trained: np.ndarray, schema: pa.Schema, options: ExportConfig
) -> pa.Table:
    if options.normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(lengths > 0, lengths, 1)
    kind = schema.field("embedding").type
    values = pa.array(vectors.astype(kind.value_type.to_pandas_dtype(), copy=False).ravel(), kind.value_type)
    embedding = pa.FixedSizeListArray.from_arrays(values, type=kind)
    edges = pa.array(trained[batch.column("row").to_numpy()])
    return pa.Table.from_arrays([batch.column("id"), batch.column("row"), embedding, edges], schema=schema)


class _Vectors:
    """The vectors of one table, in row order, a batch of any size at a time."""

    def __init__(self, batches: Iterator[pa.RecordBatch], entity: str) -> None:
        self.batches, self.entity = batches, entity
        self.rest: pa.RecordBatch | None = None

    def take(self, rows: pa.Array) -> np.ndarray:
        """Return the next vectors, float32 `[n, D]`. Raises UserError where they are not those of `rows` `[n]`."""
        taken: list[pa.RecordBatch] = []
        wanted = len(rows)
        while wanted:
            batch = self.rest if self.rest is not None else next(self.batches, None)
            if batch is None:
                raise UserError(
                    f"twhin_model has fewer rows of {self.entity} than its vocabulary; train again with `twhin train`"
                )
            taken.append(batch.slice(0, wanted))
            self.rest = batch.slice(wanted) if len(batch) > wanted else None
            wanted -= len(taken[-1])
        result = pa.Table.from_batches(taken).combine_chunks()
        if not result.column("row").equals(pa.chunked_array([rows])):
            raise UserError(f"twhin_model's rows of {self.entity} are not its vocabulary's; train again")
        return vectors_of(result.column("embedding"))


def _relations(tables: ModelTables) -> pa.Table:
    relations = tables.config.relations
    vectors = tables.relation_rows()
    return pa.table(
        {
            "relation": pa.array([r.name for r in relations], pa.string()),
            "lhs": pa.array([r.lhs for r in relations], pa.string()),
            "rhs": pa.array([r.rhs for r in relations], pa.string()),
            "operator": pa.array([r.operator for r in relations], pa.string()),
            "embedding": parameters_array([vectors[r.name] for r in relations]),
        }
    )
