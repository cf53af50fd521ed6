"""Sorted rows become edges: as a plain loop merges them, wherever batches are cut, with the ids that they stand for."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twhin_pipeline import edge_file
from twhin_pipeline.edge_file import Ids, merged, write

RELATIONS, SPLITS = ["follows", "fav"], ["train", "validation", "test"]


def sorted_rows(size, seed, optional=("time", "weight", "split")):
    generator = np.random.default_rng(seed)
    rows = [
        (
            *(int(generator.integers(bound)) for bound in (2, 4, 5)),
            int(generator.integers(1000)),
            float(generator.random()),
            int(generator.integers(1, 4)),
        )
        for _ in range(size)
    ]
    # As the query sorts them: by the edge, then by weight.
    rows.sort(key=lambda row: (*row[:3], row[4]))
    columns = dict(
        zip(("rel", "lhs", "rhs", "time", "weight", "split"), map(list, zip(*rows, strict=True)), strict=True)
    )
    table = pa.table(
        {
            name: pa.array(values).cast(pa.timestamp("us") if name == "time" else pa.array(values).type)
            for name, values in columns.items()
            if name in ("rel", "lhs", "rhs", *optional)
        }
    )
    return rows, table


def by_loop(rows):
    found = {}
    for rel, lhs, rhs, time, weight, split in rows:
        before = found.get((rel, lhs, rhs), (-1, 0.0, 9, 0))
        found[rel, lhs, rhs] = (max(before[0], time), before[1] + weight, min(before[2], split), before[3] + 1)
    return found


@pytest.mark.parametrize("group", [1, 2, 3, 50, 10_000])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_rows_are_merged_as_by_a_loop_wherever_they_are_cut(monkeypatch, group, batch):
    monkeypatch.setattr(edge_file, "ROWS_PER_GROUP", group)
    rows, table = sorted_rows(200, seed=group)
    parts = list(merged(table.to_batches(batch)))
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    expected = by_loop(rows)
    assert list(zip(*(found[name].tolist() for name in ("rel", "lhs", "rhs")), strict=True)) == list(expected)
    times, weights, splits, _ = zip(*expected.values(), strict=True)
    assert found["time"].astype("datetime64[us]").astype(np.int64).tolist() == list(times)
    np.testing.assert_array_equal(found["weight"], np.array(weights).astype(np.float32))
    assert found["split"].tolist() == list(splits)


def test_without_weights_an_edge_counts_its_rows():
    rows, table = sorted_rows(200, seed=0, optional=())
    (found,) = merged(table.to_batches())
    assert set(found) == {"rel", "lhs", "rhs", "weight"}
    assert found["weight"].tolist() == [count for *_, count in by_loop(rows).values()]


def test_one_edge_of_more_rows_than_a_group_is_one_edge(monkeypatch):
    monkeypatch.setattr(edge_file, "ROWS_PER_GROUP", 4)
    table = pa.table({"rel": [0] * 30, "lhs": [1] * 30, "rhs": [2] * 29 + [3]})
    parts = list(merged(table.to_batches(5)))
    assert np.concatenate([part["weight"] for part in parts]).tolist() == [29.0, 1.0]


def ids_of(tmp_path, ids):
    with duckdb.connect() as con:
        con.register("given", pa.table({"number": range(len(ids)), "id": ids}))
        return Ids(con, "SELECT id FROM given ORDER BY number", str(tmp_path))


@pytest.mark.parametrize("ids", [["a", "b" * 5000, "ü", "", "日本", "a b"] * 50_000, [-(2**63), 7, 2**63 - 1]])
def test_ids_are_those_of_their_numbers(tmp_path, ids):
    found = ids_of(tmp_path, ids)
    assert len(found.array) == len(ids)
    numbers = np.random.default_rng(0).integers(len(ids), size=1000)
    expected = [ids[number] for number in numbers]
    assert found.each(numbers).to_pylist() == expected
    assert found.once(numbers).to_pylist() == expected
    assert len(found.once(numbers).dictionary) == len(np.unique(numbers))
    found.write(str(tmp_path / "ids.parquet"))
    assert pq.read_table(tmp_path / "ids.parquet").to_pydict() == {"id": ids}


@pytest.mark.parametrize("named", ["few", "many", False])
def test_the_file_holds_plain_ids_in_order_with_their_numbers_beside_and_all_is_counted(tmp_path, monkeypatch, named):
    monkeypatch.setattr(edge_file, "ROWS_PER_GROUP", 16)
    monkeypatch.setattr(edge_file, "MOST_IN_DICTIONARY", 5 if named == "few" else 4)
    rows, table = sorted_rows(300, seed=1)
    ids = ids_of(tmp_path, ["ann", "bob", "cleo", "dora", "eve"] if named else [-5, 10, 20, 30, 40])
    path, ends = str(tmp_path / "edges.parquet"), str(tmp_path / "ends.parquet")
    counts = write(path, ends, table.to_batches(10), RELATIONS, ids, SPLITS)
    schema = pq.ParquetFile(path).schema_arrow
    kind = "string" if named else "int64"
    kinds = [kind, "string", kind, "timestamp[us]", "float", "string"]
    assert schema.names == ["lhs", "rel", "rhs", "time", "weight", "split"]
    assert [str(field.type) for field in schema] == kinds
    found = pq.read_table(path)
    expected = by_loop(rows)
    assert found["lhs"].to_pylist() == [ids.array[lhs].as_py() for _, lhs, _ in expected]
    assert found["rhs"].to_pylist() == [ids.array[rhs].as_py() for _, _, rhs in expected]
    assert found["rel"].to_pylist() == [RELATIONS[rel] for rel, _, _ in expected]
    assert found["split"].to_pylist() == [SPLITS[split - 1] for _, _, split, _ in expected.values()]
    assert counts.edges.tolist() == [sum(rel == number for rel, _, _ in expected) for number in (0, 1)]
    assert counts.loops.tolist() == [sum(rel == number and a == b for rel, a, b in expected) for number in (0, 1)]
    numbers = pq.read_table(ends)
    assert [str(field.type) for field in numbers.schema] == ["uint32", "uint32"]
    assert list(zip(*numbers.to_pydict().values(), strict=True)) == [(lhs, rhs) for _, lhs, rhs in expected]
    groups = [
        [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        for file in (pq.ParquetFile(path), pq.ParquetFile(ends))
    ]
    assert groups[0] == groups[1] and len(groups[0]) > 1


def test_a_reader_that_fails_leaves_no_thread_and_says_why(tmp_path):
    def batches():
        yield from pa.table({"rel": [0], "lhs": [0], "rhs": [0]}).to_batches()
        raise ValueError("the disk is full")

    ids = ids_of(tmp_path, ["ann"])
    with pytest.raises(ValueError, match="the disk is full"):
        write(str(tmp_path / "edges.parquet"), str(tmp_path / "ends.parquet"), batches(), RELATIONS, ids, SPLITS)
