"""The edges of a snapshot as rows of its vectors, in files that are mapped into memory: one set for all processes.

For each pair of entity types between which there are relations, sorted by head:

    <lhs>.<rhs>.start.npy       where each head's edges begin: int64 `[heads + 1]`
    <lhs>.<rhs>.tail.npy        the tail's row: int32 `[M]`
    <lhs>.<rhs>.relation.npy    the relation's number: int32 `[M]`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.array_cache import cached
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.row_pairs import RowPairs

if TYPE_CHECKING:
    from twhin_pipeline.config.model import Relation

RAW_EDGES = "raw_edges"
PARTS = ("start", "tail", "relation")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MappedEdges:
    """M edges between two entity types, as the files have them."""

    start: Array
    tail: Array
    relation: Array

    def pairs(self, heads: Array, relations: Sequence[int]) -> RowPairs:
        """Return the tails that heads, rows int64 `[Q]` with -1 for none, have by any of some relations."""
        known = heads >= 0
        first = np.where(known, self.start[heads], 0)
        length = np.where(known, self.start[heads + 1], 0) - first
        begin = np.cumsum(length) - length
        place = np.arange(int(length.sum())) + np.repeat(first - begin, length)
        chosen = np.isin(self.relation[place], relations)
        queries = np.repeat(np.arange(len(heads)), length)
        return RowPairs(queries[chosen], self.tail[place][chosen].astype(np.int64))


def mapped(
    store: Store, relations: Manifest, listed: Sequence[Relation], tables: Mapping[str, EntityTable]
) -> dict[tuple[str, str], MappedEdges] | None:
    """Map a snapshot's edges by pair of entity types; their files are made where they are missing.

    Args:
        store: Where the edges are.
        relations: The manifest of `embeddings/relations`, beside which the files are.
        listed: The model's relations.
        tables: The model's entity types.

    Returns:
        None where the snapshot has no table `raw_edges`.
    """
    if not store.exists(RAW_EDGES, relations.snapshot):
        return None
    version = store.manifest(RAW_EDGES, relations.snapshot).version
    pairs = dict.fromkeys((one.lhs, one.rhs) for one in listed)

    def build(folder: Path) -> None:
        for pair in pairs:
            names = {one.name: number for number, one in enumerate(listed) if (one.lhs, one.rhs) == pair}
            _write(folder, pair, _read(store, relations.snapshot, names, tables[pair[0]], tables[pair[1]]))

    folder = cached(store, relations, build, f"_mapped_edges-{version}")
    return {
        # As plain arrays: taking a part of a memmap makes a memmap, which takes long for a few numbers.
        pair: MappedEdges(*(np.asarray(np.load(_path(folder, pair, part), mmap_mode="r")) for part in PARTS))
        for pair in pairs
    }


def _read(store: Store, snapshot: str, names: Mapping[str, int], heads: EntityTable, tails: EntityTable) -> MappedEdges:
    """Read the edges of relations, numbered by name, as a stream; those of ids without a vector are passed over."""
    parts: list[list[Array]] = [[np.zeros(0, np.int32)] for _ in range(3)]
    edges = store.dataset(RAW_EDGES, snapshot)
    numbers = np.array(list(names.values()), np.int32)
    known = pa.array(list(names), pa.string())
    for batch in edges.to_batches(columns=["lhs", "rel", "rhs"], filter=ds.field("rel").isin(list(names))):
        if not len(batch):
            continue
        rows = []
        for column, table in (("lhs", heads), ("rhs", tails)):
            codes = batch.column(column).dictionary_encode()
            rows.append(table.find(codes.dictionary).astype(np.int32)[codes.indices.to_numpy()])
        codes = batch.column("rel").dictionary_encode()
        found = numbers[[known.index(one).as_py() for one in codes.dictionary]][codes.indices.to_numpy()]
        here = (rows[0] >= 0) & (rows[1] >= 0)
        for part, values in zip(parts, (*rows, found), strict=True):
            part.append(values[here])
    head, tail, relation = (np.concatenate(part) for part in parts)
    order = np.argsort(head, kind="stable")
    start = np.searchsorted(head[order], np.arange(len(heads) + 1)).astype(np.int64)
    return MappedEdges(start, tail[order], relation[order])


def _write(folder: Path, pair: tuple[str, str], edges: MappedEdges) -> None:
    for part in PARTS:
        np.save(_path(folder, pair, part), getattr(edges, part))


def _path(folder: Path, pair: tuple[str, str], part: str) -> Path:
    return folder / f"{pair[0]}.{pair[1]}.{part}.npy"
