"""Sorted edges become files: with the ids at their indices, in order, and counted."""

from __future__ import annotations

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twhin_pipeline.graph import edge_file
from twhin_pipeline.graph.edge_file import Ids, write

RELATIONS, SPLITS = ["follows", "fav"], ["train", "validation", "test"]


def sorted_pieces(size, seed, optional=("time", "split")):
    """Return sorted edges, and what gives them a few at a time."""
    generator = np.random.default_rng(seed)
    edges = sorted({tuple(int(generator.integers(bound)) for bound in (2, 4, 5)) for _ in range(size)})
    columns = {
        name: np.array(values, np.uint32)
        for name, values in zip(("rel", "lhs", "rhs"), zip(*edges, strict=True), strict=True)
    }
    columns["rel"] = columns["rel"].astype(np.int32)
    columns["weight"] = generator.random(len(edges)).astype(np.float32)
    if "time" in optional:
        columns["time"] = generator.integers(1000, size=len(edges))
    if "split" in optional:
        columns["split"] = generator.integers(1, 4, size=len(edges)).astype(np.int8)
    parts = [{name: values[i : i + 7] for name, values in columns.items()} for i in range(0, len(edges), 7)]
    return columns, [lambda part=part: part for part in parts]


@pytest.mark.parametrize("ids", [["", "a", "a b", "b" * 5000, "ü", "日本"], [-(2**63), 7, 2**63 - 1]])
def test_ids_are_those_at_their_indices(tmp_path, monkeypatch, ids):
    monkeypatch.setattr(edge_file, "IDS_AT_ONCE", 2)
    found = Ids(pa.array(ids, pa.large_string() if isinstance(ids[0], str) else pa.int64()))
    indices = np.random.default_rng(0).integers(len(ids), size=1000).astype(np.uint32)
    expected = [ids[index] for index in indices]
    assert found.each(indices).to_pylist() == expected
    assert found.once(indices).to_pylist() == expected
    assert len(found.once(indices).dictionary) == len(np.unique(indices))
    found.write(str(tmp_path / "ids.parquet"))
    assert pq.read_table(tmp_path / "ids.parquet").to_pydict() == {"id": ids}


@pytest.mark.parametrize("named", ["few", "many", False])
def test_the_file_holds_plain_ids_in_order_with_their_indices_beside_and_all_is_counted(tmp_path, monkeypatch, named):
    monkeypatch.setattr(edge_file, "MOST_IN_DICTIONARY", 5 if named == "few" else 4)
    columns, pieces = sorted_pieces(300, seed=1)
    columns["time"][3] = np.iinfo(np.int64).min
    given = ["ann", "bob", "cleo", "dora", "eve"] if named else [-5, 10, 20, 30, 40]
    ids = Ids(pa.array(given, pa.large_string() if named else pa.int64()))
    path, ends = str(tmp_path / "edges.parquet"), str(tmp_path / "ends.parquet")
    counts = write(path, ends, pieces, RELATIONS, ids, SPLITS, threads=2)
    schema = pq.ParquetFile(path).schema_arrow
    kind = "string" if named else "int64"
    kinds = [kind, "string", kind, "timestamp[us]", "float", "string"]
    assert schema.names == ["lhs", "rel", "rhs", "time", "weight", "split"]
    assert [str(field.type) for field in schema] == kinds
    found = pq.read_table(path)
    for side in ("lhs", "rhs"):
        assert found[side].to_pylist() == [given[number] for number in columns[side]]
    assert found["rel"].to_pylist() == [RELATIONS[rel] for rel in columns["rel"]]
    assert found["split"].to_pylist() == [SPLITS[split - 1] for split in columns["split"]]
    np.testing.assert_array_equal(found["weight"].to_numpy(), columns["weight"])
    times = found["time"].cast(pa.int64()).to_pylist()
    assert times == [None if i == 3 else time for i, time in enumerate(columns["time"].tolist())]
    loops = columns["rel"][columns["lhs"] == columns["rhs"]]
    assert counts.edges.tolist() == np.bincount(columns["rel"], minlength=2).tolist()
    assert counts.loops.tolist() == np.bincount(loops, minlength=2).tolist()
    indices = pq.read_table(ends)
    assert [str(field.type) for field in indices.schema] == ["uint32", "uint32"]
    assert all(np.array_equal(indices[side].to_numpy(), columns[side]) for side in ("lhs", "rhs"))
    groups = [
        [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        for file in (pq.ParquetFile(path), pq.ParquetFile(ends))
    ]
    assert groups[0] == groups[1] == [len(piece()["rel"]) for piece in pieces]


def test_a_piece_that_fails_leaves_no_thread_and_says_why(tmp_path):
    _, pieces = sorted_pieces(300, seed=0, optional=())

    def failing():
        raise ValueError("the disk is full")

    ids = Ids(pa.array(["ann", "bob", "cleo", "dora", "eve"], pa.large_string()))
    before = threading.active_count()
    with pytest.raises(ValueError, match="the disk is full"):
        write(
            str(tmp_path / "edges.parquet"),
            str(tmp_path / "ends.parquet"),
            [pieces[0], failing, *pieces],
            RELATIONS,
            ids,
            SPLITS,
            2,
        )
    assert threading.active_count() == before
