"""A query as the source: what it gives is read like a file's rows, and what is wrong with it is one clear message."""

from __future__ import annotations

import uuid

import fsspec
import pytest
import yaml
from edge_files import SNAPSHOT, make_config, rows_of, store_at, triples, write

from twhin_pipeline.config import load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, source

SELECT = """
SELECT user_id AS lhs, kind AS rel, item AS rhs, happened -- joined
FROM read_csv('events.csv') e JOIN 'items.parquet' i USING (item_id)
WHERE i.on_sale;  -- {snapshot}
"""


def events(folder):
    """Write two files to join; three of the events are of items on sale, one of these without a user."""
    lines = [
        "user_id,kind,item_id,happened",
        "a,fav,1,2024-12-30",
        "b,reply,2,2024-12-31",
        "b,fav,3,2024-12-31",
        ",fav,1,",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    write(folder / "items.parquet", [(1, "x", True), (2, "y", True), (3, "z", False)], ("item_id", "item", "on_sale"))


def config_at(folder, **entry):
    data = make_config("unused").model_dump(mode="json", exclude_none=True)
    data["source"] = {"columns": {"time": "happened"}, **entry}
    (folder / "c.yaml").write_text(yaml.safe_dump(data))
    return load_config(str(folder / "c.yaml"))


@pytest.mark.parametrize("as_file", [False, True], ids=["sql", "file"])
def test_a_query_over_files_beside_the_configuration_is_the_source(tmp_path, monkeypatch, as_file):
    events(tmp_path / "conf")
    (tmp_path / "conf" / "edges.sql").write_text(SELECT)
    config = config_at(tmp_path / "conf", **({"path": "edges.sql"} if as_file else {"sql": SELECT}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store = store_at(tmp_path)
    details = raw_edges.ingest(config, store, SNAPSHOT).details
    assert triples(store) == {("a", "fav", "x"), ("b", "reply", "y")}
    (rejected,) = rows_of(store, "raw_edges_rejected")
    origin = str(tmp_path / "conf" / "edges.sql") if as_file else "source.sql"
    assert (rejected["reason"], rejected["column"], rejected["file"]) == ("null", "lhs", origin)
    assert details["files"] == [origin] and details["sources"][0]["time_range"][1] == "2024-12-31T00:00:00"


def test_the_snapshot_stands_in_a_query(tmp_path):
    for day in (SNAPSHOT, "2024-12-31"):
        write(tmp_path / f"{day}.parquet", [("a", "fav", day)])
    sql = f"SELECT *, '{{snapshot}}' AS at FROM '{tmp_path}/{{snapshot}}.parquet'"
    config = make_config(None, source={"sql": sql, "columns": {"time": "at"}, "snapshots": [SNAPSHOT]})
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, SNAPSHOT)
    assert triples(store) == {("a", "fav", SNAPSHOT)}
    assert source.find_snapshots(config) == [SNAPSHOT]


def test_a_query_reads_urls_that_fsspec_knows(tmp_path):
    path = write(tmp_path / "e.parquet", [("a", "fav", "x")])
    url = f"memory://{uuid.uuid4().hex}/e.parquet"
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), path.read_bytes())
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(None, source={"sql": f"FROM '{url}'"}), store, SNAPSHOT)
    assert triples(store) == {("a", "fav", "x")}


def test_a_query_stands_beside_files(tmp_path):
    path = write(tmp_path / "e.parquet", [("a", "fav", "x")])
    sources = [{"sql": "SELECT 1 AS lhs, 2 AS rhs", "relation": "follows"}, {"path": str(path)}]
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(None, sources=sources), store, SNAPSHOT)
    assert triples(store) == {("1", "follows", "2"), ("a", "fav", "x")}


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("SELEC 1", r"source\.sql: DuckDB cannot run it: Parser Error: syntax error at or near"),
        ("SELECT 1; SELECT 2", r"source\.sql: must be one SELECT"),
        ("", r"source\.sql: must be one SELECT"),
        ("CREATE TABLE t(i INT)", r"source\.sql: must be one SELECT"),
        ("SELECT a FROM nowhere", r"source\.sql: DuckDB cannot run it: Catalog Error: .*nowhere"),
        ("SELECT * FROM 'nowhere.csv'", r"source\.sql: DuckDB cannot run it: IO Error"),
        ("SELECT CAST('a' AS INT) AS lhs", r"source\.sql: DuckDB cannot run it: Conversion Error"),
        ("SELECT * FROM 'nowhere://a/b.csv'", r"source\.sql: DuckDB cannot run it: .*nowhere"),
        ("SELECT 1 AS lhs, 2 AS rel", r"source\.sql: has no column 'rhs' .*set source\.columns\.rhs"),
        ("SELECT 1 AS lhs, 2 AS rhs", r"source\.sql: has no column 'rel' .*set source\.relation, or"),
        ("SELECT 1 AS lhs, 2 AS rhs, [3] AS rel", r"source\.sql: column 'rel' is of type INTEGER\[\]"),
    ],
)
def test_a_query_that_is_wrong_is_one_clear_error(tmp_path, sql, told):
    with pytest.raises(UserError, match=told) as caught:
        raw_edges.ingest(make_config(None, source={"sql": sql}), store_at(tmp_path), SNAPSHOT)
    assert len(str(caught.value).splitlines()) == 1


def test_a_query_tells_no_snapshots_and_says_what_to_give(tmp_path):
    (tmp_path / "e.sql").write_text("FROM x")
    for entry in ({"sql": "FROM x"}, {"path": str(tmp_path / "e.sql")}):
        config = make_config(None, source=entry)
        assert source.find_snapshots(config) == []
        with pytest.raises(UserError, match=r"set source\.snapshots, or pass --snapshot YYYY-MM-DD"):
            source.newest_snapshot(config)


def test_a_file_of_sql_that_is_no_text_or_not_one_is_an_error(tmp_path):
    (tmp_path / "a.sql").write_bytes(b"\xff\xfe")
    (tmp_path / "b.sql").write_text("FROM x")
    with pytest.raises(UserError, match=r"source\.path: .*a\.sql: cannot be read .*UTF-8"):
        raw_edges.ingest(make_config(tmp_path / "a.sql"), store_at(tmp_path), SNAPSHOT)
    with pytest.raises(UserError, match=r"has 2 files of SQL; name one"):
        raw_edges.ingest(make_config(tmp_path / "*.sql"), store_at(tmp_path), SNAPSHOT)
