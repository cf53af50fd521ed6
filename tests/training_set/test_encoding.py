"""Edges are encoded as by a plain loop, and their hashes are those that releases before gave them."""

from __future__ import annotations

import hashlib

import duckdb
import numpy as np
import pytest
from edge_files import SNAPSHOT, make_config, rows_of, store_at, write
from random_edges import RELATION_SIDES, random_edges

from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.graph.edge_file import IndexedEdges
from twhin_pipeline.store import Store
from twhin_pipeline.training_set.encoding import Encoder
from twhin_pipeline.training_set.held_edges import HELD, HeldEdges
from twhin_pipeline.training_set.leakage import Leakage
from twhin_pipeline.training_set.split import Ends

BITS = 2**32 - 1


def text_hash(text):
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")


def hash_of(lhs, rel, rhs, seed=0):
    turned = text_hash(rhs)
    turned = (turned >> 29) | ((turned & (2**29 - 1)) << 35)
    joined = text_hash(lhs) ^ text_hash(f"{seed}/{rel}") ^ turned
    a, b = joined >> 32, joined & BITS
    for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE35):
        product = b * factor + factor
        a, b = b, a ^ (product >> 32) ^ (product & BITS)
    return (a << 32) | b


@pytest.mark.parametrize("seed", [0, 3])
def test_edges_are_encoded_as_by_a_loop(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("twhin_pipeline.graph.edge_sort.EDGES_PER_BUCKET", 64)
    config = make_config(
        write(tmp_path / "e.parquet", random_edges(500)), split={"seed": seed}, vocabulary={"min_count": 11}
    )
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, SNAPSHOT)
    vocabulary.build(config, store, SNAPSHOT)
    rows = {e: {r["id"]: r["row"] for r in rows_of(store, f"vocabulary/{e}")} for e in ("user", "item")}
    encoder = Encoder(config, store, SNAPSHOT, SNAPSHOT, str(tmp_path))
    found, lost = [], 0
    for piece in encoder.pieces():
        lost += piece.lost
        found += zip([piece.rel] * len(piece.h), piece.lhs.tolist(), piece.rhs.tolist(), piece.h.tolist(), strict=True)
    expected = []
    for raw in rows_of(store, "raw_edges"):
        rel = config.model.relation_names.index(raw["rel"])
        ends = [rows[kind].get(raw[side], -1) for kind, side in zip(RELATION_SIDES[rel], ("lhs", "rhs"), strict=True)]
        expected.append((rel, *ends, hash_of(raw["lhs"], raw["rel"], raw["rhs"], seed)))
    assert found == expected
    assert lost == sum(-1 in edge[1:3] for edge in expected) > 0
    assert encoder.counts.tolist() == [sum(edge[0] == rel for edge in expected) for rel in range(3)]


@pytest.mark.parametrize("sizes", [[6, 5], [300, 200]])
def test_leakage_is_counted_as_by_a_loop(tmp_path, sizes):
    config = make_config(write(tmp_path / "e.parquet", random_edges(10)))
    ends = Ends.of(config, sizes)
    generator = np.random.default_rng(0)

    def drawn(count):
        rel = generator.integers(3, size=count)
        sides = [generator.integers(np.array(sizes)[types[rel]]) for types in ends.types]
        return list(dict.fromkeys(zip(rel.tolist(), *(side.tolist() for side in sides), strict=True)))

    every = drawn(600)
    training, others = set(every[::2]), every[1::2]
    held = np.zeros(len(others), HELD)
    for name, values in zip(("rel", "lhs", "rhs"), zip(*others, strict=True), strict=True):
        held[name] = values
    held["part"] = 1 + np.arange(len(others)) % 2
    leakage = Leakage(HeldEdges(f"{tmp_path}/held", [held[:100], held[100:]]), ends, str(tmp_path))
    for rel, lhs, rhs in training:
        leakage.add(rel, np.array([lhs]), np.array([rhs]))
    kinds = [tuple(int(types[rel]) for types in ends.types) for rel in range(3)]
    pairs = {(kinds[rel], lhs, rhs) for rel, lhs, rhs in training}
    names = config.model.relation_names
    some = 0
    for part in (1, 2):
        expected = {name: {"reverse": 0, "same_pair": 0} for name in names}
        for rel, lhs, rhs in others[part - 1 :: 2]:
            loop = lhs == rhs and kinds[rel][0] == kinds[rel][1]
            expected[names[rel]]["same_pair"] += (kinds[rel], lhs, rhs) in pairs
            expected[names[rel]]["reverse"] += not loop and (kinds[rel][::-1], rhs, lhs) in pairs
        assert leakage.counts(part, names) == expected
        some += sum(sum(each.values()) for each in expected.values())
    assert some > 0 or sizes[0] > 6


def test_raw_edges_without_indices_get_them_once_in_the_tables_order(tmp_path, monkeypatch):
    """As of Spark, which writes several files and no indices of ids."""
    monkeypatch.setattr("twhin_pipeline.graph.edge_sort.EDGES_PER_BUCKET", 64)
    config = make_config(write(tmp_path / "e.parquet", random_edges(500)))
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, SNAPSHOT)
    edges = store.read("raw_edges", SNAPSHOT)
    other = Store(str(tmp_path / "other"))
    with other.replace("raw_edges", SNAPSHOT, config_hash="other") as draft:
        for number, (start, stop) in enumerate([(0, 130), (130, 131), (131, len(edges))]):
            with draft.writer(f"part-{number:05d}.parquet", edges.schema) as writer:
                writer.write_table(edges.slice(start, stop - start), row_group_size=50)
        draft.details = store.manifest("raw_edges", SNAPSHOT).details

    def all_of(store):
        indexed = IndexedEdges(store, SNAPSHOT)
        pieces = list(indexed.pieces(["weight"]))
        ids = duckdb.sql(f"SELECT id FROM {indexed.ids} ORDER BY file_row_number").fetchall()
        ends = [np.concatenate([getattr(piece, side) for piece in pieces]).tolist() for side in ("lhs", "rhs")]
        relations = [piece.relation for piece in pieces for _ in piece.lhs]
        return indexed.size, ids, relations, *ends, [w for piece in pieces for w in piece.columns["weight"].tolist()]

    assert all_of(other) == all_of(store)
    vocabulary.build(config, store, SNAPSHOT)
    vocabulary.build(config, other, SNAPSHOT)
    made = sorted(path.name for path in tmp_path.glob("other/raw_edges/*/*/_indexed/_numbers/*"))
    assert made == ["ends.parquet", "ids.parquet"]
    for table in (f"vocabulary/{name}" for name in config.model.table_names):
        assert other.read(table, SNAPSHOT).equals(store.read(table, SNAPSHOT))
