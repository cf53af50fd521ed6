"""The plain way to a batch: chunk by chunk, where EdgesDataset works on whole arrays. What batches are tested with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.words import SIDES


@dataclasses.dataclass
class Chunk:
    """Positives of one relation that share their candidates, as NumPy arrays (c edges).

    A candidate's number counts the in-batch window first, then the side's pool.
    """

    relation: int
    """Index into the configuration's relations."""
    lhs: np.ndarray
    """`[c]` rows of the relation's left-hand table."""
    rhs: np.ndarray
    """`[c]` rows of the relation's right-hand table."""
    weight: np.ndarray
    """`[c]` edge weights."""
    in_batch: np.ndarray
    """`[n]` positions in the chunk (below c) whose entities are candidates, on either side."""
    lhs_pool: np.ndarray
    """`[K]` rows of the left-hand table, candidates for every edge of the chunk."""
    rhs_pool: np.ndarray
    """`[K']` rows of the right-hand table."""
    lhs_mask: np.ndarray
    """`[M, 2]` pairs (position, candidate) that are true edges when the candidate replaces the left-hand side; for one
    position of each kept entity, or for all."""
    rhs_mask: np.ndarray
    """`[M', 2]` the same for the right-hand side."""
    sides: str = "both"
    """Which sides are replaced; the other has no pool and no mask."""
    lhs_log_q: np.ndarray | None = None
    """`[n + K]`; left out, zeros."""
    rhs_log_q: np.ndarray | None = None
    """`[n + K']`."""


def assemble(
    chunks: Sequence[Chunk],
    model_config: TwhinModelConfig,
    global_edges: int,
    everything: Mapping[str, int] | None = None,
) -> EdgeBatch:
    """Put chunks together: unique rows a table, indices, padding to the longest chunk and widest window.

    Args:
        chunks: G chunks, possibly none.
        model_config: Names the tables and each relation's two of them.
        global_edges: Edges of all ranks in this step.
        everything: The rows of each table, all of which are candidates; masks then have rows for candidates.
    """
    tables = [{"lhs": r.lhs, "rhs": r.rhs} for r in model_config.relations]
    on = {side: [chunk.sides in ("both", side) for chunk in chunks] for side in SIDES}
    sides = tuple(side for side in SIDES if any(on[side]) or not chunks)
    rows = _Rows(model_config.table_names)
    for g, chunk in enumerate(chunks):
        for side in SIDES:
            rows.add(tables[chunk.relation][side], getattr(chunk, side), getattr(chunk, f"{side}_pool"))
            if everything and on[side][g]:
                table = tables[chunk.relation][side]
                rows.add(table, np.arange(everything[table]))
    ids = rows.unique()
    windows = [len(chunk.in_batch) for chunk in chunks]
    width = max(windows, default=0)
    fields: dict[str, torch.Tensor] = {}
    for side, kept in zip(SIDES, SIDES[::-1], strict=True):
        found = [np.unique(getattr(c, kept), return_inverse=True) for c in chunks]
        pools = [getattr(chunk, f"{side}_pool") for chunk in chunks]
        fields |= {
            f"{side}_index": _padded([rows.index(tables[c.relation][side], getattr(c, side)) for c in chunks]),
            f"{side}_query_index": _padded(
                [rows.index(tables[c.relation][kept], unique) for c, (unique, _) in zip(chunks, found, strict=True)]
            ),
            f"{side}_query": _padded([query for _, query in found]),
            f"{side}_on": torch.tensor(on[side], dtype=torch.bool),
            f"{side}_pool_index": _padded(
                [rows.index(tables[c.relation][side], pool) for c, pool in zip(chunks, pools, strict=True)]
            ),
            f"{side}_mask": _masks(
                [getattr(chunk, f"{side}_mask") for chunk in chunks], [query for _, query in found], windows, width
            ),
        }
        log_q = np.zeros((len(chunks), width + fields[f"{side}_pool_index"].shape[1]), np.float32)
        for g, chunk in enumerate(chunks):
            given = getattr(chunk, f"{side}_log_q")
            if given is not None:
                log_q[g, : windows[g]] = given[: windows[g]]
                log_q[g, width : width + len(given) - windows[g]] = given[windows[g] :]
        fields[f"{side}_log_q"] = torch.from_numpy(log_q)
    return EdgeBatch(
        ids=ids,
        relation=torch.tensor([chunk.relation for chunk in chunks], dtype=torch.int64),
        weight=_padded([c.weight for c in chunks], np.float32),
        in_batch=_padded([c.in_batch for c in chunks]),
        num_in_batch=torch.tensor(windows, dtype=torch.int64),
        num_edges=sum(len(c.lhs) for c in chunks),
        global_edges=global_edges,
        sides=sides,
        everything=everything is not None,
        **fields,
    )


def of_sample(
    batch: EdgeBatch, model_config: TwhinModelConfig, rows: Mapping[str, np.ndarray], log_q: Mapping[str, np.ndarray]
) -> EdgeBatch:
    """Let some rows of each table stand for all, in a batch of `assemble` with `everything`; masks follow."""
    there = {table: chosen for table, chosen in rows.items() if chosen.max() < len(batch.ids[table])}
    masks = {}
    for side in SIDES:
        kept = []
        for g, query, row in getattr(batch, f"{side}_mask").tolist():
            chosen = rows[getattr(model_config.relations[int(batch.relation[g])], side)].tolist()
            if row in chosen:
                kept.append((g, query, chosen.index(row)))
        masks[f"{side}_mask"] = torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)
    return dataclasses.replace(
        batch,
        sample={table: torch.from_numpy(chosen) for table, chosen in there.items()},
        sample_log_q={table: torch.from_numpy(log_q[table]).float() for table in there},
        **masks,
    )


class _Rows:
    """Unique rows of each table, and where each of them stands in the concatenation of all tables'."""

    def __init__(self, tables: Sequence[str]) -> None:
        self._parts: dict[str, list[np.ndarray]] = {table: [] for table in tables}
        self._unique: dict[str, np.ndarray] = {}
        self._offset: dict[str, int] = {}

    def add(self, table: str, *parts: np.ndarray) -> None:
        self._parts[table].extend(parts)

    def unique(self) -> dict[str, torch.Tensor]:
        offset = 0
        for table, parts in self._parts.items():
            rows = np.unique(np.concatenate(parts)) if parts else np.empty(0)
            self._unique[table] = rows.astype(np.int64, copy=False)
            self._offset[table] = offset
            offset += len(rows)
        return {table: torch.from_numpy(rows) for table, rows in self._unique.items()}

    def index(self, table: str, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._unique[table], rows) + self._offset[table]


def _padded(rows: Sequence[np.ndarray], dtype: type = np.int64) -> torch.Tensor:
    """Stack arrays of unequal length to `[len(rows), longest]`, zeros behind."""
    out: np.ndarray = np.zeros((len(rows), max((len(row) for row in rows), default=0)), dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)


def _masks(
    pairs: Sequence[np.ndarray], queries: Sequence[np.ndarray], windows: Sequence[int], width: int
) -> torch.Tensor:
    """Return `[M, 3]` (chunk, query, candidate), in order; pool candidates move behind the widest window."""
    masked = set()
    for i, (pair, query, window) in enumerate(zip(pairs, queries, windows, strict=True)):
        for position, candidate in np.asarray(pair).reshape(-1, 2).tolist():
            masked.add((i, int(query[position]), candidate if candidate < window else candidate + width - window))
    return torch.tensor(sorted(masked), dtype=torch.int64).reshape(-1, 3)
