"""Tables of Delta Lake and Iceberg as sources, written by the libraries that own the formats."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from edge_files import SNAPSHOT, make_config, rows_of, store_at, triples
from lake_tables import WRITERS, write_iceberg

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import lake, raw_edges, source

COLUMNS = {"lhs": "who", "rhs": "what", "time": "at"}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_is_read_in_its_newest_version(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "table")
    config = make_config(path, source={"format": kind, "columns": COLUMNS})
    store = store_at(tmp_path)
    details = raw_edges.ingest(config, store, SNAPSHOT).details
    assert triples(store) == {("a", "fav", "x"), ("b", "fav", "x"), ("a", "reply", "y")}
    assert details["undated"] == 1 and details["files"] == [path]
    (rejected,) = rows_of(store, "raw_edges_rejected")
    assert (rejected["reason"], rejected["column"], rejected["file"]) == ("null", "who", path)
    assert source.find_snapshots(config) == [f"{datetime.now(UTC):%Y-%m-%d}"]


def test_metadata_of_iceberg_may_be_named_and_a_version_hint_is_followed(tmp_path):
    path = Path(write_iceberg(tmp_path / "table"))
    files = sorted((path / "metadata").glob("*.metadata.json"))
    assert len(files) == 3
    counts = []
    for given in (files[1], files[2], path):
        store = store_at(tmp_path / f"{len(counts)}")
        raw_edges.ingest(make_config(given, source={"format": "iceberg", "columns": COLUMNS}), store, SNAPSHOT)
        counts.append(len(triples(store)))
    assert counts == [2, 3, 3]
    (path / "metadata" / "version-hint.text").write_text(files[1].name.removesuffix(".metadata.json"))
    store = store_at(tmp_path / "hint")
    raw_edges.ingest(make_config(path, source={"format": "iceberg", "columns": COLUMNS}), store, SNAPSHOT)
    assert len(triples(store)) == 2


def test_the_folder_of_a_table_names_its_relation_and_dates_it(tmp_path):
    from deltalake import write_deltalake

    for day in (SNAPSHOT, "2024-12-31"):
        write_deltalake(str(tmp_path / day / "follows"), pa.table({"lhs": [1, 2], "rhs": [2, 3]}))
    config = make_config(f"{tmp_path}/{{snapshot}}/follows", source={"format": "delta"})
    assert source.find_snapshots(config) == ["2024-12-31", SNAPSHOT]
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, SNAPSHOT)
    assert triples(store) == {(1, "follows", 2), (2, "follows", 3)}


@pytest.mark.parametrize("kind", WRITERS)
def test_only_the_columns_that_are_needed_are_kept_a_batch_at_a_time(tmp_path, monkeypatch, kind):
    import pyarrow.parquet as pq

    monkeypatch.setattr(lake, "ROWS_AT_ONCE", 1)
    path = WRITERS[kind](tmp_path / "table")
    lake.stage(path, kind, str(tmp_path / "staged.parquet"), ["what", "who", "what"])
    found = pq.read_table(tmp_path / "staged.parquet")
    assert sorted(found.column_names) == ["what", "who"]
    pairs = zip(found["who"].to_pylist(), found["what"].to_pylist(), strict=True)
    assert set(pairs) == {("a", "x"), ("b", "x"), ("a", "y"), (None, "x")}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_no_table_is_one_clear_error(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    config = make_config(tmp_path / "empty", source={"format": kind})
    with pytest.raises(
        UserError, match=r"empty: (cannot be read as a table of format delta|has no metadata)"
    ) as caught:
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"no file for snapshot .*there is no .*none"):
        raw_edges.ingest(make_config(tmp_path / "none", source={"format": kind}), store_at(tmp_path), SNAPSHOT)


@pytest.mark.parametrize(("kind", "package"), [("delta", "deltalake"), ("iceberg", "pyiceberg")])
def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, kind, package):
    path = WRITERS[kind](tmp_path / "table")
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"format {kind} needs the package {package}; install it with `pip install"):
        raw_edges.ingest(make_config(path, source={"format": kind, "columns": COLUMNS}), store_at(tmp_path), SNAPSHOT)
