"""The edges of a snapshot as rows of its vectors, in files that are mapped into memory: one set for all processes.

For each pair of entity types between which there are relations, sorted by head:

    <lhs>.<rhs>.start.npy       where each head's edges begin: int64 `[heads + 1]`
    <lhs>.<rhs>.tail.npy        the tail's row: int32 `[M]`
    <lhs>.<rhs>.relation.npy    the relation's number: int32 `[M]`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.array_cache import cached
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.row_pairs import RowPairs, places_of

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
        queries, places = places_of(self.start, heads)
        chosen = np.isin(self.relation[places], relations)
        return RowPairs(queries[chosen], self.tail[places[chosen]].astype(np.int64))


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


def edge_rows(
    store: Store, snapshot: str, relations: Sequence[str], heads: EntityTable, tails: EntityTable
) -> Iterator[tuple[Array, Array, Array]]:
    """Stream the edges that `raw_edges` has of some relations between two entity types.

    Yields:
        Of M edges the head's row and the tail's, int32 `[M]`, and the place of the relation in `relations`, int32
        `[M]`. Edges of ids without a vector are passed over.
    """
    known = pa.array(relations, pa.string())
    edges = store.dataset(RAW_EDGES, snapshot)
    for batch in edges.to_batches(columns=["lhs", "rel", "rhs"], filter=pc.field("rel").isin(list(relations))):
        columns = [batch.column(name).dictionary_encode() for name in ("lhs", "rhs", "rel")]
        found = [heads.find(columns[0].dictionary), tails.find(columns[1].dictionary)]
        found.append(pc.index_in(columns[2].dictionary.cast(pa.string()), known).to_numpy(zero_copy_only=False))
        rows = [
            of.astype(np.int32)[codes.indices.to_numpy(zero_copy_only=False)]
            for of, codes in zip(found, columns, strict=True)
        ]
        here = (rows[0] >= 0) & (rows[1] >= 0)
        yield rows[0][here], rows[1][here], rows[2][here]


def _read(store: Store, snapshot: str, names: Mapping[str, int], heads: EntityTable, tails: EntityTable) -> MappedEdges:
    """Read the edges of relations, numbered by name, as a stream."""
    nothing = [np.zeros(0, np.int32)] * 3
    parts = zip(nothing, *edge_rows(store, snapshot, list(names), heads, tails), strict=True)
    head, tail, relation = (np.concatenate(part) for part in parts)
    order = np.argsort(head, kind="stable")
    start = np.searchsorted(head[order], np.arange(len(heads) + 1)).astype(np.int64)
    return MappedEdges(start, tail[order], np.array(list(names.values()), np.int32)[relation[order]])


def _write(folder: Path, pair: tuple[str, str], edges: MappedEdges) -> None:
    for part in PARTS:
        np.save(_path(folder, pair, part), getattr(edges, part))


def _path(folder: Path, pair: tuple[str, str], part: str) -> Path:
    return folder / f"{pair[0]}.{pair[1]}.{part}.npy"
