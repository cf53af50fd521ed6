"""Pairs that several relations join are counted: all of them, and those that were known before the latest tenth."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_files import SNAPSHOT, make_config, pass_checks, store_at, write

from twhin_pipeline.config import TwhinConfig, recipes
from twhin_pipeline.graph import pairs, raw_edges, vocabulary
from twhin_pipeline.graph.edge_file import NO_TIME
from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]


def plain(relation: Array, heads: Array, tails: Array, times: Array) -> list[dict[str, int]]:
    """Count with loops."""
    seen: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for number, head, tail, time in zip(relation, heads, tails, times, strict=True):
        seen[head, tail].append((number, time))
    dated = sorted(time for time in times if time != NO_TIME)
    # The smallest time that nine tenths are not after.
    start = next((time for n, time in enumerate(dated, start=1) if n >= 0.9 * len(dated)), None)
    result = [dict.fromkeys(("edges", "shared", "late", "known"), 0) for _ in range(max(relation) + 1)]
    for number, head, tail, time in zip(relation, heads, tails, times, strict=True):
        count = result[number]
        count["edges"] += 1
        count["shared"] += len(seen[head, tail]) > 1
        if start is not None and time > start:
            count["late"] += 1
            count["known"] += any(other <= start for _, other in seen[head, tail])  # or without a time
    return result


@pytest.mark.parametrize("seed", range(6))
def test_the_counts_are_those_of_a_loop_over_the_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    triples = np.unique(rng.integers([3, 40, 30], size=(2_000, 3)), axis=0)
    # Many of one moment, some without a time, and none with one.
    times = rng.integers(1_700_000_000_000_000, 1_700_000_000_000_000 + [10, 10**13][seed % 2], len(triples))
    times[rng.random(len(times)) < [0, 0.2, 1][seed % 3]] = NO_TIME
    edges = (*triples.T, times)
    assert pairs.of_edges(*edges) == plain(*edges)


def build(config: TwhinConfig, store: Store, snapshot: str = SNAPSHOT) -> dict[str, Any]:
    raw_edges.ingest(config, store, snapshot)
    made = vocabulary.build(config, store, snapshot)
    pass_checks(store, snapshot)
    counted = [manifest.details["pairs"] for manifest in made.values()]
    assert all(one == counted[0] for one in counted)
    return dict(counted[0])


COLUMNS = ("lhs", "rel", "rhs", "time")


def test_vocabularies_say_how_often_relations_share_a_pair_by_its_first_time(tmp_path: Path) -> None:
    edges = [(f"u{n}", "fav", f"i{n}", f"2024-11-{n + 1:02d}") for n in range(28)]
    # Of the latest edges one was a favourite before; the other's pair is new to both relations, and repeated.
    edges += [("u0", "reply", "i0", "2024-12-01"), ("u50", "reply", "i50", "2024-12-02")]
    edges += [("u50", "fav", "i50", "2024-12-02"), ("u50", "fav", "i50", "2024-12-03")]
    edges += [("u0", "follows", "u1", "2024-12-01")]
    path = write(tmp_path / "e.parquet", edges, COLUMNS)
    config = make_config(path, source={"columns": {"time": "time"}})
    store = store_at(tmp_path)
    counted = build(config, store)
    assert counted == {
        "fav": {"edges": 29, "shared": 2, "late": 1, "known": 0},
        "reply": {"edges": 2, "shared": 2, "late": 2, "known": 1},
    }
    read = recipes.Counts.read(config, store, SNAPSHOT)
    assert read is not None and read.pairs["reply"] == recipes.Pairs(2, 2, 2, 1)


def test_edges_without_times_have_no_late_ones(tmp_path: Path) -> None:
    edges = [("u0", "fav", "i0"), ("u0", "reply", "i0"), ("u1", "fav", "i1")]
    counted = build(make_config(write(tmp_path / "e.parquet", edges)), store_at(tmp_path))
    assert counted["fav"] == {"edges": 2, "shared": 1, "late": 0, "known": 0}


def test_nothing_is_counted_where_no_recipe_goes_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [("u0", "fav", "i0"), ("u0", "follows", "u1")]
    assert build(make_config(write(tmp_path / "a.parquet", alone)), Store(str(tmp_path / "a"))) == {}
    monkeypatch.setattr(recipes, "WORK", 64 * 30)
    large = make_config(write(tmp_path / "l.parquet", [*alone, ("u0", "reply", "i0")]))
    assert build(large, Store(str(tmp_path / "b"))) == {}
