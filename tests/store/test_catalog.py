"""The catalog: every table is a view, of one snapshot or of all."""

from __future__ import annotations

import os
import uuid

import duckdb
import pyarrow as pa
import pytest
from edge_files import store_at

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.store import Store, catalog, database


def fill(store):
    tables = {
        ("raw_edges", "2024-01-01"): pa.table({"lhs": ["a"], "rel": ["fav"]}),
        ("raw_edges", "2024-02-01"): pa.table({"lhs": ["b", "c"], "rel": ["fav", "fav"], "weight": [1.0, 2.0]}),
        ("vocabulary/user", "2024-02-01"): pa.table({"id": ["b"], "row": [0]}),
    }
    for (asset, snapshot), table in tables.items():
        with store.replace(asset, snapshot, config_hash="c") as draft:
            draft.write(table)
    with store.replace("twhin_model", "2024-02-01", config_hash="c") as draft:
        draft.write(pa.table({"row": [0, 1]}), "tables/user/part-00000.parquet")
        draft.write(pa.table({"row": [2]}), "tables/user/part-00001.parquet")
        draft.write(pa.table({"step": [1]}), "losses.parquet")


@pytest.mark.parametrize("remote", [False, True])
def test_views_show_one_snapshot_or_all(tmp_path, remote):
    store = Store(f"memory://{uuid.uuid4().hex}") if remote else store_at(tmp_path)
    fill(store)
    con = database.connect(store=store)
    names = catalog.views(con, store)
    assert names == ["raw_edges", "tables", "twhin_model_losses", "twhin_model_tables_user", "vocabulary_user"]
    rows = con.execute("SELECT snapshot, lhs, weight FROM raw_edges ORDER BY lhs").fetchall()
    assert rows == [("2024-01-01", "a", None), ("2024-02-01", "b", 1.0), ("2024-02-01", "c", 2.0)]
    assert con.execute("SELECT row FROM twhin_model_tables_user ORDER BY row").fetchall() == [(0,), (1,), (2,)]
    catalog.views(con, store, "2024-02-01")
    assert con.execute("SELECT * FROM raw_edges ORDER BY lhs").fetchall() == [("b", "fav", 1.0), ("c", "fav", 2.0)]
    listed = con.execute("SELECT asset, snapshot, rows FROM tables ORDER BY asset").fetchall()
    assert listed == [
        ("raw_edges", "2024-02-01", 2),
        ("twhin_model", "2024-02-01", 3),
        ("vocabulary/user", "2024-02-01", 1),
    ]


def test_the_catalog_file_is_renewed_while_a_reader_has_it_open(tmp_path):
    store = store_at(tmp_path)
    fill(store)
    path = catalog.refresh(store)
    with duckdb.connect(path, read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM raw_edges").fetchall() == [(3,)]
        with store.replace("evaluation", "2024-02-01", config_hash="c") as draft:
            draft.write(pa.table({"value": [0.5]}))
        assert catalog.refresh(store) == path
        assert reader.execute("SELECT count(*) FROM raw_edges").fetchall() == [(3,)]
    with duckdb.connect(path, read_only=True) as reader:
        assert reader.execute("SELECT value FROM evaluation").fetchall() == [(0.5,)]
    assert not [p for p in (tmp_path / "home").iterdir() if p.name.startswith("twhin-catalog-")]


def test_an_empty_store_has_an_empty_catalog(tmp_path):
    with duckdb.connect(catalog.refresh(store_at(tmp_path)), read_only=True) as reader:
        assert reader.execute("SELECT * FROM tables").fetchall() == []


@pytest.mark.parametrize("name", ["a%20b", "q?x", "[v1]", "h#x", "it's"])
def test_a_catalog_is_written_and_read_whatever_the_stores_path_is(tmp_path, name):
    store = Store(str(tmp_path / name))
    fill(store)
    with duckdb.connect(catalog.refresh(store), read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM raw_edges").fetchall() == [(3,)]
    assert [path.name for path in (tmp_path / name).glob("catalog*")] == ["catalog.duckdb"]


def test_the_catalog_of_a_store_that_was_moved_is_written_anew_by_the_next_query(tmp_path, capsys):
    store = store_at(tmp_path / "before")
    fill(store)
    catalog.refresh(store)
    assert not catalog.follow(store)
    moved = Store(str(tmp_path / "after"))
    os.rename(store.root, moved.root)
    query = ["sql", "select count(*) as n from raw_edges", "--home", moved.root, "--csv"]
    assert run_arguments(query) == 0
    told = capsys.readouterr()
    assert told.out.split()[1:] == ["3"] and "has been moved" in told.err
    with duckdb.connect(moved.path("catalog.duckdb"), read_only=True) as reader:
        assert reader.execute("SELECT count(*) FROM raw_edges").fetchall() == [(3,)]
    assert run_arguments(query) == 0 and not capsys.readouterr().err
