"""Shuffled edges come back by relation and in their random order, all of them and each once."""

from __future__ import annotations

import hashlib
import tracemalloc

import numpy as np
import pytest
from counted_reads import counted_reads

from twhin_pipeline.graph import bucket_file
from twhin_pipeline.training_set import shuffle
from twhin_pipeline.training_set.shuffle import Edges, Order, ShuffledEdges

BITS = 2**32 - 1


def position(low, seed, purpose):
    """Return an edge's position in an order, in Python's integers."""
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    mask, factor = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little") | 1
    once = ((low ^ mask) * factor) & BITS
    turned = (once >> 16) | ((once & 0xFFFF) << 16)
    return ((turned ^ mask ^ 0x9E3779B9) * (factor ^ 0x5BD1E994)) & BITS


def some_edges(rel, count, seed, numbers=2**64 - 1):
    generator = np.random.default_rng(seed)
    return Edges(
        rel,
        *generator.integers(1000, size=(2, count)).astype(np.int32),
        generator.random(count, np.float32),
        generator.integers(numbers, size=count, dtype=np.uint64),
    )


def listed(edges):
    return list(zip(edges.lhs.tolist(), edges.rhs.tolist(), edges.weight.tolist(), strict=True))


def test_positions_are_those_of_the_formula_and_no_two_edges_share_one():
    low = np.random.default_rng(0).integers(2**32, size=1000, dtype=np.uint64).astype(np.uint32)
    for seed in (0, 7):
        found = Order.of(seed, "chunks").positions(low)
        assert found.tolist() == [position(int(one), seed, "chunks") for one in low]
        assert len(set(found.tolist())) == len(set(low.tolist()))
    assert (Order.of(0, "chunks").positions(low) != Order.of(0, "limit").positions(low)).mean() > 0.99


@pytest.mark.parametrize("per_bucket", [1, 16, 10_000])
@pytest.mark.parametrize("numbers", [2**64 - 1, 20], ids=["own", "shared"])
def test_edges_come_back_by_relation_and_position_and_as_they_came_where_positions_are_equal(
    tmp_path, monkeypatch, per_bucket, numbers
):
    monkeypatch.setattr(shuffle, "EDGES_PER_BUCKET", per_bucket)
    given = [
        some_edges(rel, count, seed, numbers) for seed, (rel, count) in enumerate([(2, 90), (0, 50), (2, 60), (2, 0)])
    ]
    with ShuffledEdges(str(tmp_path / "b"), np.array([50, 0, 150]), np.int32, Order.of(3, "chunks")) as kept:
        for edges in given:
            kept.add(edges)
        assert kept.counts.tolist() == [50, 0, 150]
        np.testing.assert_allclose(kept.weights[2], float(given[0].weight.sum() + given[2].weight.sum()), rtol=1e-6)
        found = list(kept.in_order())
    assert [edges.rel for edges in found] == sorted(edges.rel for edges in found)
    for rel in (0, 2):
        all_of = [
            (position(int(h) & BITS, 3, "chunks"), one)
            for e in given
            if e.rel == rel
            for h, one in zip(e.h, listed(e), strict=True)
        ]
        all_of.sort(key=lambda pair: pair[0])
        assert [one for edges in found if edges.rel == rel for one in listed(edges)] == [one for _, one in all_of]


@pytest.mark.parametrize("numbers", [2**64 - 1, 5], ids=["own", "shared"])
def test_parts_of_another_order_hold_as_many_as_asked_for_and_each_edge_once(tmp_path, monkeypatch, numbers):
    monkeypatch.setattr(shuffle, "EDGES_PER_BUCKET", 32)
    given = some_edges(0, 300, 0, numbers)
    order = Order.of(0, "limit")
    with ShuffledEdges(str(tmp_path / "b"), np.array([300]), np.int32, Order.of(0, "chunks")) as kept:
        kept.add(given)
        seen, first_positions = [], sorted(position(int(h) & BITS, 0, "limit") for h in given.h)[:7]
        for number, (first, last) in enumerate([(0, 0), (0, 7), (7, 120), (120, 1 << 62), (300, 400)]):
            with kept.part(str(tmp_path / str(number)), first, last, order) as part:
                assert part.counts.tolist() == [max(min(last, 300) - first, 0)]
                found = list(part.as_added())
            seen += [one for edges in found for one in listed(edges)]
            if number == 1:
                assert sorted(int(one) for edges in found for one in order.positions(edges.h)) == first_positions
    assert sorted(seen) == sorted(listed(given))


def test_reads_grow_in_proportion_to_the_edges_and_their_order_does_not_depend_on_buckets(tmp_path, monkeypatch):
    """With as many buckets as pieces and a read for each pair of them, four times the edges took 16 times the reads."""
    monkeypatch.setattr(shuffle, "EDGES_PER_BUCKET", 16)
    monkeypatch.setattr(shuffle, "MOST_BUCKETS", 8)
    reads = counted_reads(monkeypatch, 4000)
    counts = {}
    for size in (1000, 4000):
        given = some_edges(0, size, 0)
        reads.clear()
        with ShuffledEdges(str(tmp_path / str(size)), np.array([size]), np.int32, Order.of(3, "chunks")) as kept:
            for start in range(0, size, 50):
                kept.add(given.where(slice(start, start + 50)))
            found = [one for edges in kept.in_order() for one in listed(edges)]
        counts[size] = len(reads)
        places = [position(int(h) & BITS, 3, "chunks") for h in given.h]
        assert found == [one for _, one in sorted(zip(places, listed(given), strict=True), key=lambda pair: pair[0])]
    assert counts[4000] <= 4.5 * counts[1000]


def test_a_file_that_ended_early_says_so(tmp_path):
    with ShuffledEdges(str(tmp_path / "b"), np.array([10]), np.int32, Order.of(0, "chunks")) as kept:
        kept.add(some_edges(0, 10, 0))
        assert len(list(kept.in_order())) == 1
        (tmp_path / "b").write_bytes(b"")
        with pytest.raises(OSError, match="ended early"):
            list(kept.in_order())


def test_a_limit_does_not_hold_a_number_for_each_edge(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_file, "BYTES_AT_ONCE", 1 << 16)
    order = Order.of(0, "limit")
    held = []
    for edges in (100_000, 400_000):
        monkeypatch.setattr(shuffle, "EDGES_PER_BUCKET", edges // 100)
        with ShuffledEdges(str(tmp_path / str(edges)), np.array([edges]), np.int32, Order.of(0, "chunks")) as kept:
            kept.add(some_edges(0, edges, 0))
            len(kept.file.read(0, 0))  # writes what is waiting
            tracemalloc.start()
            bounds, before = kept._bounds([0, edges // 2], order)
            held.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert sorted(before.values()) == [0, edges // 2, edges] and len(bounds) == 2
    assert held[1] - held[0] < 300_000, "a position of 4 bytes for each of 300,000 edges"
