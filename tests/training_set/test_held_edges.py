"""Held-out edges are never in memory together, and come out as when they were."""

from __future__ import annotations

import tracemalloc
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_files import SNAPSHOT, make_config, store_at

from twhin_pipeline.graph import bucket_file, edge_sort, raw_edges, vocabulary
from twhin_pipeline.training_set import held_edges, positives, shuffle, split_edges
from twhin_pipeline.training_set.held_edges import HELD, HeldEdges

LATER = "2025-01-02"


def some(count: int, seed: int = 0) -> np.ndarray:
    records = np.zeros(count, HELD)
    records["lhs"], records["part"] = np.arange(count), np.random.default_rng(seed).integers(0, 3, count)
    return records


def test_records_come_back_in_their_order_and_by_part(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_edges, "EDGES_AT_ONCE", 7)
    records = some(50)
    held = HeldEdges(f"{tmp_path}/held", [records[:20], records[20:20], records[20:]])
    pieces = list(held.pieces())
    assert len(held) == 50 and max(map(len, pieces)) == 7
    assert np.array_equal(np.concatenate(pieces), records)
    assert np.array_equal(np.concatenate(list(held.of(2))), records[records["part"] == 2])
    changed = held.replaced(f"{tmp_path}/changed", lambda part: part[part["part"] != 1])
    changed.add([records[:3]])
    expected = np.concatenate([records[records["part"] != 1], records[:3]])
    assert np.array_equal(np.concatenate(list(changed.pieces())), expected)
    assert not held.path.exists()


def write_edges(path: Any, count: int, first: int = 0) -> None:
    """Write different edges of one relation, with times; from `first` on they are other ones."""
    number = np.arange(first, first + count)
    start = datetime(2024, 12, 1)
    times = [start + timedelta(minutes=int(minute)) for minute in number % 40_000]
    # No two of 701 * 709 numbers have the same remainders.
    columns = {"lhs": number % 701, "rhs": number % 709, "rel": ["fav"] * count}
    pq.write_table(pa.table({**columns, "time": pa.array(times, pa.timestamp("us"))}), path)


SPLITS = {
    "random": {"strategy": "random"},
    "temporal": {"strategy": "temporal"},
    "later": {"strategy": "temporal", "later_snapshot": LATER, "validation": 0.4, "test": 0.0},
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=list(SPLITS))
def test_memory_does_not_grow_with_the_edges_that_are_held_out(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, split: dict[str, Any]
) -> None:
    for module in (shuffle, edge_sort, split_edges):
        monkeypatch.setattr(module, "EDGES_PER_BUCKET", 1000)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", 1000)
    monkeypatch.setattr(held_edges, "EDGES_AT_ONCE", 1000)
    monkeypatch.setattr(bucket_file, "BYTES_AT_ONCE", 1 << 16)
    most = {}
    # The first makes the loops be compiled.
    for edges in (1000, 20_000, 100_000):
        folder = tmp_path / str(edges)
        folder.mkdir()
        write_edges(folder / f"{SNAPSHOT}.parquet", edges)
        write_edges(folder / f"{LATER}.parquet", edges, first=edges // 2)
        source = {"path": str(folder / "{snapshot}.parquet"), "columns": {"time": "time"}}
        shares = {"validation": 0.4, "test": 0.4, **split}
        config = make_config(folder, source=source, split=shares)
        store = store_at(folder)
        for snapshot in (SNAPSHOT, LATER):
            raw_edges.ingest(config, store, snapshot)
        vocabulary.build(config, store, SNAPSHOT)
        tracemalloc.start()
        made = positives.build_positives(config, store, SNAPSHOT)
        most[edges] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert made["held_out/test"].rows + made["held_out/validation"].rows > 0.6 * edges or edges == 1000
    # A record has 49 bytes, of which there were two copies. Leakage keeps four for a pair, and files know their pieces.
    assert most[100_000] - most[20_000] < 24 * 80_000
