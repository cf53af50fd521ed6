"""The training set's positives and what is held out: edges split, encoded as rows, shuffled, and cut into chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline import scratch
from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, source
from twhin_pipeline.prefetch import Prefetcher
from twhin_pipeline.store.database import explained
from twhin_pipeline.training_set.shuffle import Edges, ShuffledEdges
from twhin_pipeline.training_set.split_edges import SplitEdges
from twhin_pipeline.words import REPEATS, TRAIN

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Draft, Manifest, Store

Array = np.ndarray[Any, Any]

ASSETS = ("training_set/positives", "held_out/validation", "held_out/test")
SCHEMA = pa.schema(
    [
        ("chunk", pa.int32()),
        ("lhs", pa.int64()),
        ("rhs", pa.int64()),
        ("rel", pa.int32()),
        ("weight", pa.float32()),
    ]
)
# A file holds complete chunks: many enough for ranks to divide, and large enough to read well.
LEAST_FILES, EDGES_PER_FILE, EDGES_PER_ROW_GROUP = 16, 2_000_000, 131_072
BATCHES_AHEAD = 8
# Rows are small beside their 64 bits, and random: a third smaller than by default, and four times as fast to write.
ENCODING = {"lhs": "BYTE_STREAM_SPLIT", "rhs": "BYTE_STREAM_SPLIT"}


def build_positives(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Manifest]:
    """Write `training_set/positives`, `held_out/validation` and `held_out/test`; return their manifests by asset.

    With `split.repeats` also `held_out/repeats`: edges of training that happen again in the test's time.

    Positives of a relation are in a seeded random order and cut into chunks of nearly equal size, at most
    `negatives.chunk_size`. Details of each: `chunk_size`, `num_chunks`, `edges_per_relation`, `weight`; of positives
    also edges `without_row` (an entity is in no vocabulary) by relation, `entities_without_training_edge` by type, and
    edges `left_out` by `limit` and `offset`; of held-out edges `leakage` by relation (the reverse, or the same pair
    under another relation, is in training) and `dropped` ones (an entity is in no vocabulary), and of a test by time
    the `repeated_edges` by relation, those of training that happen again in its time.

    Edges are read once, as indices of ids, and kept in temporary files (`TMPDIR`): 16 bytes an edge.

    Raises:
        UserError: Nothing is left to train on, or `split.later_snapshot` is not later.
    """
    names = config.model.table_names
    parents = store.versions(snapshot, ["raw_edges", *(f"vocabulary/{name}" for name in names)])
    read = settings(config, "sample")
    later = config.split.later_snapshot
    if later is not None:
        parents[f"raw_edges@{later}"] = _ingested_later(config, store, snapshot, later)
    with (
        explained("training_set/positives"),
        scratch.folder("sample") as folder,
        SplitEdges(config, store, snapshot, folder) as edges,
    ):
        total = sum(int(part.counts.sum()) for part in edges.parts)
        manifests = {}
        for part, asset in enumerate(ASSETS):
            edges_of = edges.parts[part].counts
            if part == TRAIN and not edges_of.any():
                raise UserError(
                    "training_set/positives: no edge is left to train on; lower split.validation, split.test, "
                    "vocabulary.min_count or train_data.offset"
                )
            with store.replace(asset, snapshot, config_hash=config.hash(), parents=parents, settings=read) as draft:
                draft.details = _write_part(draft, config, edges.parts[part], edges.in_order(part), total)
                draft.details |= edges.details(part)
            manifests[asset] = store.manifest(asset, snapshot)
        if edges.repeats is not None:
            with store.replace(REPEATS, snapshot, config_hash=config.hash(), parents=parents, settings=read) as draft:
                draft.details = _write_part(draft, config, edges.repeats, edges.repeats.in_order(), total)
            manifests[REPEATS] = store.manifest(REPEATS, snapshot)
    return manifests


def _ingested_later(config: TwhinConfig, store: Store, snapshot: str, later: str) -> str:
    source.check_snapshot(later)
    if later <= snapshot:
        raise UserError(f"split.later_snapshot: {later} must be later than the snapshot, {snapshot}; choose another")
    if not store.exists("raw_edges", later):
        raw_edges.ingest(config, store, later)
    return store.manifest("raw_edges", later).version


def _write_part(
    draft: Draft, config: TwhinConfig, part: ShuffledEdges, edges: Iterator[Edges], total: int
) -> dict[str, Any]:
    """Write a part's edges, and return the details of its manifest; `total` counts the edges of all parts."""
    _write(draft, part.counts, config.negatives.chunk_size, edges)
    return {
        "chunk_size": config.negatives.chunk_size,
        "num_chunks": int(_chunks(part.counts, config.negatives.chunk_size).sum()),
        "edges_per_relation": dict(zip(config.model.relation_names, part.counts.tolist(), strict=True)),
        "share": int(part.counts.sum()) / max(total, 1),
        "weight": float(part.weights.sum()),
    }


def _chunks(sizes: Array, chunk_size: int) -> Array:
    """Return into how many chunks each relation's edges are cut, int64 `[R]`."""
    return -(-sizes // chunk_size)


def _write(draft: Draft, sizes: Array, chunk_size: int, edges: Iterator[Edges]) -> None:
    """Write edges, which come by relation, `sizes` `[R]` of each; chunks are numbered across the relations."""
    chunks = _chunks(sizes, chunk_size)
    first_edge, first_chunk = np.cumsum(sizes) - sizes, np.cumsum(chunks) - chunks
    per_file = max(chunk_size, min(EDGES_PER_FILE, -(-int(sizes.sum()) // LEAST_FILES)))

    def batches() -> Iterator[pa.RecordBatch]:
        written = 0
        for some in edges:
            rel, size = some.rel, len(some)
            position = np.arange(written - first_edge[rel], written - first_edge[rel] + size)
            # Sizes of a relation's chunks differ by at most one, so that none is left with few edges and candidates.
            chunk = (first_chunk[rel] + position * chunks[rel] // sizes[rel]).astype(np.int32)
            written += size
            columns = [chunk, some.lhs, some.rhs, np.full(size, rel, np.int32), some.weight]
            yield pa.record_batch([pa.array(column) for column in columns], schema=SCHEMA)

    pending: list[pa.RecordBatch] = []
    waiting = files = 0
    # Edges are sorted while others are written.
    with Prefetcher(batches(), BATCHES_AHEAD) as ahead:
        for batch in ahead:
            pending.append(batch)
            waiting += len(batch)
            while waiting > per_file + chunk_size:
                table = pa.Table.from_batches(pending).combine_chunks()
                ends = table["chunk"].to_numpy()
                cut = int(np.searchsorted(ends, ends[per_file], side="right"))
                _write_file(draft, files, table.slice(0, cut))
                pending, waiting, files = table.slice(cut).to_batches(), waiting - cut, files + 1
        if waiting or files == 0:
            _write_file(draft, files, pa.Table.from_batches(pending, schema=SCHEMA))


def _write_file(draft: Draft, file: int, table: pa.Table) -> None:
    with (
        draft.local_file(f"part-{file:05d}.parquet") as path,
        pq.ParquetWriter(
            path, SCHEMA, compression="zstd", use_dictionary=["chunk", "rel", "weight"], column_encoding=ENCODING
        ) as writer,
    ):
        writer.write_table(table, row_group_size=EDGES_PER_ROW_GROUP)
