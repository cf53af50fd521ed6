"""Export: the trained tables as Parquet keyed by the original ids, streamed part by part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model_files import ModelTables, parameters_array, vectors_of
from twhin_pipeline.prefetch import Prefetcher
from twhin_pipeline.sections.training import ExportConfig
from twhin_pipeline.store import Draft, Manifest, Store

BATCH_ROWS, BATCHES_AHEAD = 65_536, 2
ELEMENT = {"fp32": pa.float32(), "fp16": pa.float16()}


def export(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `embeddings/<entity>` for every entity type, then `embeddings/relations`, which completes the set.

    Vocabulary and model parts are both in row order, so they are read side by side in batches; memory does not grow
    with the tables.

    Returns:
        The manifests by table name.

    Raises:
        UserError: The model or a vocabulary is missing, or they do not belong together.
    """
    tables = ModelTables.open(store, snapshot)
    model, model_config = tables.manifest, tables.config
    written: dict[str, Manifest] = {}
    for entity in tables.names:
        vocabulary = f"vocabulary/{entity}"
        asset = f"embeddings/{entity}"
        parents = {"twhin_model": model.version, **tables.trained_on([vocabulary])}
        with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents) as draft:
            rows = _batches(store, store.files(vocabulary, snapshot), ["id", "row"])
            parts = _batches(store, tables.parts(entity), ["row", "embedding"])
            # Vectors are read while others are written; each takes about as long.
            with Prefetcher(parts, BATCHES_AHEAD) as ahead:
                vectors = _Vectors(iter(ahead), entity)
                _write_entity(draft, rows, vectors, model_config.embedding_dim, config.export)
            draft.details = {"data_type": config.export.data_type, "normalize": config.export.normalize}
        written[asset] = store.manifest(asset, snapshot)
    asset = "embeddings/relations"
    parents = {"twhin_model": model.version, **{name: manifest.version for name, manifest in written.items()}}
    with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.write(_relations(tables))
        draft.details = {
            "model": model_config.model_dump(mode="json"),
            "normalize": config.export.normalize,
            "mlflow_run_id": model.details.get("mlflow_run_id"),
        }
    written[asset] = store.manifest(asset, snapshot)
    return written


def _write_entity(
    draft: Draft, rows: Iterator[pa.RecordBatch], vectors: _Vectors, dim: int, options: ExportConfig
) -> None:
    schema: pa.Schema | None = None
    pending = next(rows, None)
    file = 0
    while pending is not None or file == 0:
        schema = schema or _schema(pending, dim, options)
        room = options.rows_per_file
        with draft.writer(f"part-{file:05d}.parquet", schema) as writer:
            while pending is not None and room:
                batch, rest = pending.slice(0, room), pending.slice(room)
                writer.write_table(_encode(batch, vectors.take(batch.column("row")), schema, options))
                room -= len(batch)
                pending = rest if len(rest) else next(rows, None)
        file += 1


def _schema(batch: pa.RecordBatch | None, dim: int, options: ExportConfig) -> pa.Schema:
    id_type = pa.string() if batch is None else batch.schema.field("id").type
    embedding = pa.list_(ELEMENT[options.data_type], dim)
    return pa.schema([("id", id_type), ("row", pa.int64()), ("embedding", embedding)])


def _encode(batch: pa.RecordBatch, vectors: np.ndarray, schema: pa.Schema, options: ExportConfig) -> pa.Table:
    if options.normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.where(lengths > 0, lengths, 1)
    kind = schema.field("embedding").type
    values = pa.array(vectors.astype(kind.value_type.to_pandas_dtype(), copy=False).ravel(), kind.value_type)
    embedding = pa.FixedSizeListArray.from_arrays(values, type=kind)
    return pa.Table.from_arrays([batch.column("id"), batch.column("row"), embedding], schema=schema)


def _batches(store: Store, files: list[str], columns: list[str]) -> Iterator[pa.RecordBatch]:
    for path in files:
        with store.parquet(path) as file:
            for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                if len(batch):
                    yield batch


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
        found = pa.Table.from_batches(taken).combine_chunks()
        if not found.column("row").equals(pa.chunked_array([rows])):
            raise UserError(f"twhin_model's rows of {self.entity} are not its vocabulary's; train again")
        return vectors_of(found.column("embedding"))


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
