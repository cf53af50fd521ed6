"""Known edges are looked up as in a plain set of edges, however they were indexed."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from twhin_pipeline.training_set import known_edges
from twhin_pipeline.training_set.known_edges import ChunkedEdges, KnownEdges, index_edges

SIZES = [(9, 14), (14, 9), (9, 9)]
"""Entities on the two sides of each relation."""


def test_neighbors_are_found_by_entity_and_edges_by_pair():
    known = KnownEdges.from_pairs(np.array([4, 2, 4, 4]), np.array([7, 1, 3, 7]))
    assert len(known) == 3
    neighbors, counts = known.of(np.array([4, 9, 2, 0, 4]))
    assert neighbors.tolist() == [3, 7, 1, 3, 7] and counts.tolist() == [2, 0, 1, 0, 2]
    assert known.degrees(np.array([4, 9, 2, 0, 4])).tolist() == [2, 0, 1, 0, 2]
    assert known.contains(np.array([4, 4, 2, 9]), np.array([7, 1, 1, 9])).tolist() == [True, False, True, False]


def test_of_no_edge_nothing_is_known():
    none = KnownEdges.from_pairs(np.empty(0, np.int64), np.empty(0, np.int64))
    assert len(none) == 0
    assert none.degrees(np.array([0, 3])).tolist() == [0, 0]
    assert none.contains(np.array([0, 3]), np.array([0, 1])).tolist() == [False, False]
    assert len(none.of(np.array([0, 3]))[0]) == 0


def chunked(edges: list[tuple[int, int, int]], chunk_size: int, dtype: type) -> ChunkedEdges:
    """Cut edges (rel, lhs, rhs), which come by relation, into chunks of one relation each."""
    rel, lhs, rhs = np.array(edges).reshape(-1, 3).T
    start = [
        i for i in range(len(rel)) if i == 0 or rel[i] != rel[i - 1] or (i - np.argmax(rel == rel[i])) % chunk_size == 0
    ]
    return ChunkedEdges(lhs.astype(dtype), rhs.astype(dtype), np.append(start, len(rel)).astype(np.int64), rel[start])


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("mapped", [True, False])
def test_edges_of_several_tables_are_indexed_by_both_ends(tmp_path, dtype, mapped):
    rng = np.random.default_rng(0)
    # Relation 1 has no edge in either table.
    every = [(rel, a, b) for rel in (0, 2) for a in range(SIZES[rel][0]) for b in range(SIZES[rel][1])]
    chosen = np.flatnonzero(rng.random(len(every)) < 0.3)
    first, second = (sorted(rng.permutation(chosen)[::2], key=lambda i: every[i][0]) for _ in range(2))
    second = [i for i in second if i not in set(first)]
    tables = [chunked([every[i] for i in table], 7, dtype) for table in (first, second)]
    true = {every[i] for i in [*first, *second]}
    known = index_edges(tables, SIZES, 2, f"{tmp_path}/edges" if mapped else None)
    for rel, sizes in enumerate(SIZES):
        for side in (0, 1):
            for entity in range(sizes[side]):
                expected = sorted(edge[2 - side] for edge in true if edge[0] == rel and edge[1 + side] == entity)
                assert known[rel, side].of(np.array([entity]))[0].tolist() == expected
    assert len(known[1, 0]) == 0


def test_joined_relations_keep_their_entities_apart(tmp_path):
    rng = np.random.default_rng(1)
    parts = [KnownEdges.from_pairs(rng.integers(0, size, 12), rng.integers(0, 30, 12)) for size in (5, 8, 3)]
    first = np.array([0, 5, 13])
    KnownEdges.save_joined(tmp_path / "joined", parts, first, np.int32)
    joined = KnownEdges.mapped(tmp_path / "joined")
    assert joined.neighbors.dtype == np.int32 and len(joined) == sum(len(part) for part in parts)
    for part, size, offset in zip(parts, (5, 8, 3), first, strict=True):
        neighbors, counts = joined.of(offset + np.arange(size))
        expected, expected_counts = part.of(np.arange(size))
        assert neighbors.tolist() == expected.tolist() and counts.tolist() == expected_counts.tolist()


def test_relations_without_an_edge_are_joined_too(tmp_path):
    none = KnownEdges.from_pairs(np.zeros(0, int), np.zeros(0, int))
    KnownEdges.save_joined(tmp_path / "joined", [none], np.array([0]), np.int32)
    neighbors, counts = KnownEdges.mapped(tmp_path / "joined").of(np.array([0, 3]))
    assert neighbors.tolist() == [] and counts.tolist() == [0, 0]


def test_indexing_a_relation_in_files_takes_memory_for_its_entities_and_not_for_its_edges(tmp_path, monkeypatch):
    monkeypatch.setattr(known_edges, "SORTED_AT_ONCE", 1000)
    edges, entities = 400_000, 500
    lhs, rhs = np.random.default_rng(0).integers(entities, size=(2, edges))
    part = ChunkedEdges(lhs, rhs, np.array([0, edges]), np.array([0]))
    small = ChunkedEdges(lhs[:9], rhs[:9], np.array([0, 9]), np.array([0]))
    index_edges([small], [(entities, entities)], 1)  # compiles
    tracemalloc.start()
    found = index_edges([part], [(entities, entities)], 1, str(tmp_path / "known"))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < edges, "not a byte an edge, where its key takes eight"
    assert found[0, 0].of(np.array([7]))[0].tolist() == sorted(rhs[lhs == 7].tolist())
