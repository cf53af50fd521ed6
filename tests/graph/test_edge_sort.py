"""Edges come back sorted and merged as a plain loop does it, however they came and are kept."""

from __future__ import annotations

import numpy as np
import pytest
from counted_reads import counted_reads

from twhin_pipeline.graph import edge_sort
from twhin_pipeline.graph.edge_sort import KINDS, EdgeSorter

RELATIONS = np.array([2, -1, 0, 1], np.int32)
# By relation, after `RELATIONS`: rows of an edge weigh as their largest, as their sum, or as twice the largest at most.
MOST = np.array([1.0, np.inf, 2.0])


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


def weighed(weights, most):
    """What rows of an edge weigh together."""
    return np.float32(min(sum(sorted(weights)), most * max(weights) if max(weights) else 0.0))


def by_loop(rows, ranks, columns, most=MOST):
    found = {}
    for i in range(len(rows["rel"])):
        edge = int(RELATIONS[rows["rel"][i]]), int(ranks[rows["lhs"][i]]), int(ranks[rows["rhs"][i]])
        found.setdefault(edge, []).append({name: rows[name][i] for name in columns})
    merged = {"rel": [], "lhs": [], "rhs": [], "weight": [], **{name: [] for name in columns}}
    if "time" in columns:
        merged |= {"first_time": [], "steps": []}
    for (rel, lhs, rhs), each in sorted(found.items()):
        for name, value in (("rel", rel), ("lhs", lhs), ("rhs", rhs)):
            merged[name].append(value)
        merged["weight"].append(weighed([one.get("weight", 1.0) for one in each], most[rel]))
        for name, chosen in (("time", max), ("split", min)):
            if name in columns:
                merged[name].append(chosen(one[name] for one in each))
        if "time" in columns:
            merged["first_time"].append(min(one["time"] for one in each))
            steps = []
            for time in sorted({one["time"] for one in each}):
                weight = weighed([one.get("weight", 1.0) for one in each if one["time"] <= time], most[rel])
                if not steps or abs(steps[-1][1] - weight) > 1e-6:
                    steps.append((time, weight))
            merged["steps"].append(steps if len(steps) > 1 else [])
    return merged


def by_sorter(folder, rows, ranks, columns, threads=2, most=MOST):
    folder.mkdir()
    with EdgeSorter(str(folder), columns) as sorter:
        for part in np.array_split(np.arange(len(rows["rel"])), 3):
            sorter.add({name: values[part] for name, values in rows.items()})
        pieces = [piece() for piece in sorter.pieces(RELATIONS, ranks, most, threads)]
    found = {name: np.concatenate([piece[name] for piece in pieces]).tolist() for name in pieces[0]}
    if "steps" in found:
        steps = list(zip(found.pop("step_time"), found.pop("step_weight"), strict=True))
        ends = np.cumsum(found["steps"]).tolist()
        found["steps"] = [steps[end - size : end] for end, size in zip(ends, found["steps"], strict=True)]
    return pieces, found


def assert_same(found, expected):
    """Compare; sums in order of time may differ from sums by size in the last bit."""
    assert set(found) == set(expected)
    for name in set(found) - {"weight", "steps"}:
        assert found[name] == expected[name], name
    assert found["weight"] == pytest.approx(expected["weight"], rel=2e-7)
    for ours, theirs in zip(found.get("steps", []), expected.get("steps", []), strict=True):
        assert [time for time, _ in ours] == [time for time, _ in theirs]
        assert [weight for _, weight in ours] == pytest.approx([weight for _, weight in theirs], rel=2e-7)


@pytest.mark.parametrize(
    "columns",
    [(), ("weight",), ("time",), ("time", "weight", "split")],
    ids=["plain", "weights", "times", "all"],
)
@pytest.mark.parametrize(("bucket", "at_once"), [(7, 20), (50, 7), (10_000, 10_000)])
@pytest.mark.parametrize("count", [1, 40, 400])
def test_edges_are_sorted_and_merged_as_by_a_loop(tmp_path, monkeypatch, columns, bucket, at_once, count):
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", bucket)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", at_once)
    rows = rows_of(count, seed=count, columns=columns)
    ranks = np.random.default_rng(1).permutation(9).astype(np.uint32)
    pieces, found = by_sorter(tmp_path / "a", rows, ranks, columns)
    assert (len(pieces) > 1) == (count > bucket) and all(len(piece["rel"]) for piece in pieces)
    assert_same(found, by_loop(rows, ranks, columns))


def test_edges_of_few_and_of_many_rows_grow_as_by_a_loop(tmp_path):
    columns = ("time", "weight")
    rows = rows_of(2000, seed=6, columns=columns, ids=5)
    # One of the edges has far more rows than the others.
    often = np.arange(2000) % 3 == 0
    for name in ("rel", "lhs", "rhs"):
        rows[name][often] = rows[name][0]
    ranks = np.arange(5, dtype=np.uint32)
    _, found = by_sorter(tmp_path / "a", rows, ranks, columns)
    assert max(len(steps) for steps in found["steps"]) > edge_sort._FEW_ROWS
    assert_same(found, by_loop(rows, ranks, columns))


def test_only_the_largest_rows_count_by_default_and_times_alone_make_no_steps(tmp_path):
    ranks = np.arange(9, dtype=np.uint32)
    for number, columns in enumerate([("time",), ("time", "weight")]):
        rows = rows_of(300, seed=2, columns=columns)
        _, found = by_sorter(tmp_path / str(number), rows, ranks, columns, most=np.ones(3))
        expected = by_loop(rows, ranks, columns, most=np.ones(3))
        assert ("steps" in found) == ("weight" in columns)
        if "steps" not in found:
            assert not any(expected.pop("steps"))
        assert_same(found, expected)
    assert any(expected["steps"])


def test_rows_without_weight_neither_add_up_nor_break_a_limit_of_their_sum(tmp_path):
    rows = {name: np.zeros(4, np.int64) for name in ("rel", "lhs", "rhs")} | {"weight": np.array([0.0, 0.0, 0.0, 0.0])}
    for number, most in enumerate((1.0, 3.0, np.inf)):
        with EdgeSorter(str(tmp_path), ["weight"]) as sorter:
            sorter.add(rows)
            (piece,) = (
                one() for one in sorter.pieces(np.zeros(1, np.int32), np.zeros(1, np.uint32), np.array([most]), 1)
            )
            assert piece["weight"].tolist() == [0.0], number


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
    assert_same(found, by_loop(rows, ranks, ()))


@pytest.mark.parametrize(
    "columns",
    [(), ("weight",), ("time",), ("split",), ("time", "weight", "split")],
    ids=["plain", "weights", "times", "splits", "all"],
)
@pytest.mark.parametrize("most", [np.ones(3), MOST], ids=["largest", "sums"])
def test_an_edge_that_is_repeated_very_often_is_never_in_memory_with_all_of_its_rows(
    tmp_path, monkeypatch, columns, most
):
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", 100)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", 500)
    often, others = 20_000, 600
    rows = rows_of(often + others, seed=8, columns=columns)
    hub = np.random.default_rng(0).permutation(often + others) < often
    for name in ("rel", "lhs", "rhs"):
        rows[name][hub] = 2 if name == "rel" else 1
    # Of few times and weights, as days and kinds of events are: what differs has to be kept where sums depend on it.
    if "time" in columns:
        rows["time"] %= 3
    if "weight" in columns:
        rows["weight"] = np.round(rows["weight"] * 2) / 2
    sizes = []
    plain = edge_sort.merged
    monkeypatch.setattr(
        edge_sort, "merged", lambda records, most: (sizes.append(len(records)), plain(records, most))[1]
    )
    ranks = np.arange(9, dtype=np.uint32)
    _, found = by_sorter(tmp_path / "a", rows, ranks, columns, most=most)
    assert max(sizes) < 1000
    expected = by_loop(rows, ranks, columns, most=most)
    if "steps" not in found and "time" in columns:
        expected.pop("steps")
    assert_same(found, expected)


def test_sums_of_an_edge_that_is_repeated_very_often_are_those_of_its_rows_one_by_one(tmp_path, monkeypatch):
    columns = ("time", "weight")
    rows = rows_of(3000, seed=8, columns=columns, ids=4)
    hub = np.arange(3000) % 5 > 0
    for name in ("rel", "lhs", "rhs"):
        rows[name][hub] = 2
    rows["time"] %= 4
    rows["weight"] = np.round(rows["weight"], 1)
    ranks = np.arange(4, dtype=np.uint32)
    _, alone = by_sorter(tmp_path / "a", rows, ranks, columns)
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", 64)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", 100)
    _, merged_before = by_sorter(tmp_path / "b", rows, ranks, columns)
    assert merged_before == alone, "to the last bit"


def test_reads_of_the_sort_grow_in_proportion_to_the_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(edge_sort, "EDGES_PER_BUCKET", 16)
    monkeypatch.setattr(edge_sort, "EDGES_AT_ONCE", 50)
    monkeypatch.setattr(edge_sort, "MOST_BUCKETS", 8)
    reads = counted_reads(monkeypatch, 4000)
    ranks = np.random.default_rng(1).permutation(60).astype(np.uint32)
    counts = {}
    for size in (1000, 4000):
        reads.clear()
        rows = rows_of(size, seed=1, columns=("weight",), ids=60)
        pieces, found = by_sorter(tmp_path / str(size), rows, ranks, ("weight",))
        counts[size] = len(reads)
        assert_same(found, by_loop(rows, ranks, ("weight",)))
        assert len(pieces) > size / 16 / 2, "and parts stay small"
    assert counts[4000] <= 4.5 * counts[1000]
