"""Edges come back sorted and merged as a plain loop does it, however they came and are kept."""

from __future__ import annotations

import numpy as np
import pytest

from twhin_pipeline import edge_sort
from twhin_pipeline.edge_sort import KINDS, EdgeSorter

RELATIONS = np.array([2, -1, 0, 1], np.int32)


def rows_of(count, seed, columns, ids=9):
    generator = np.random.default_rng(seed)
    found = {
        "rel": generator.choice([0, 2, 3], count),
        "lhs": generator.integers(ids, size=count),
        "rhs": generator.integers(ids, size=count),
        "time": generator.integers(-50, 50, size=count),
        "weight": generator.random(count),
        "split": generator.integers(1, 4, size=count),
    }
    return {
        name: values.astype(KINDS.get(name, np.int64))
        for name, values in found.items()
        if name in ("rel", "lhs", "rhs", *columns)
    }


def by_loop(rows, ranks, columns):
    found = {}
    for i in range(len(rows["rel"])):
        edge = int(RELATIONS[rows["rel"][i]]), int(ranks[rows["lhs"][i]]), int(ranks[rows["rhs"][i]])
        found.setdefault(edge, []).append({name: rows[name][i] for name in columns})
    merged = {"rel": [], "lhs": [], "rhs": [], **{name: [] for name in ("weight", *columns)}}
    for (rel, lhs, rhs), each in sorted(found.items()):
        for name, value in (("rel", rel), ("lhs", lhs), ("rhs", rhs)):
            merged[name].append(value)
        weights = sorted(one["weight"] for one in each) if "weight" in columns else [1.0] * len(each)
        merged["weight"].append(np.float32(sum(weights)))
        for name, chosen in (("time", max), ("split", min)):
            if name in columns:
                merged[name].append(chosen(one[name] for one in each))
    return merged


def by_sorter(folder, rows, ranks, columns, threads=2):
    folder.mkdir()
    with EdgeSorter(str(folder), columns) as sorter:
        for part in np.array_split(np.arange(len(rows["rel"])), 3):
            sorter.add({name: values[part] for name, values in rows.items()})
        pieces = [piece() for piece in sorter.pieces(RELATIONS, ranks, threads)]
    return pieces, {name: np.concatenate([piece[name] for piece in pieces]).tolist() for name in pieces[0]}


@pytest.mark.parametrize("columns", [(), ("weight",), ("time", "weight", "split")], ids=["plain", "weights", "all"])
@pytest.mark.parametrize(("bucket", "at_once"), [(7, 20), (50, 7), (10_000, 10_000)])
@pytest.mark.parametrize("count", [1, 40, 400])
def test_edges_are_sorted_and_merged_as_by_a_loop(tmp_path, monkeypatch, columns, bucket, at_once, count):
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", bucket)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", at_once)
    rows = rows_of(count, seed=count, columns=columns)
    ranks = np.random.default_rng(1).permutation(9).astype(np.uint32)
    pieces, found = by_sorter(tmp_path / "a", rows, ranks, columns)
    assert (len(pieces) > 1) == (count > bucket) and all(len(piece["rel"]) for piece in pieces)
    assert found == by_loop(rows, ranks, columns)


def test_nothing_depends_on_the_order_of_rows_or_on_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", 64)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", 50)
    columns = ("time", "weight", "split")
    rows = rows_of(900, seed=5, columns=columns, ids=4)
    ranks = np.arange(4, dtype=np.uint32)
    _, found = by_sorter(tmp_path / "a", rows, ranks, columns)
    order = np.random.default_rng(0).permutation(900)
    _, again = by_sorter(tmp_path / "b", {name: values[order] for name, values in rows.items()}, ranks, columns, 1)
    assert again == found


def test_ids_beyond_32_bits_of_a_pair_are_told_apart(tmp_path):
    ranks = np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint32)
    rows = rows_of(200, seed=3, columns=(), ids=4)
    _, found = by_sorter(tmp_path / "a", rows, ranks, ())
    assert found == by_loop(rows, ranks, ())
