"""Raw edges: what is kept, what is rejected and why, and one clear error for each wrong input."""

from __future__ import annotations

import functools
import gzip
import http.server
import math
import threading
import uuid
from datetime import datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_files import SNAPSHOT, make_config, rows_of, store_at, triples, write

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.store import Store

NAMED = [("a", "follows", "b"), ("b", "follows", "a"), ("a", "fav", "x"), ("b", "reply", "x")]


def reasons(store: Store) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in rows_of(store, "raw_edges_rejected"):
        found.setdefault(row["reason"], []).append(row["row"])
    return found


def test_edges_are_sorted_by_relation_and_ids_and_weigh_one(tmp_path):
    store = store_at(tmp_path)
    manifest = raw_edges.ingest(make_config(write(tmp_path / "e.parquet", NAMED)), store, SNAPSHOT)
    assert [(r["rel"], r["lhs"], r["rhs"], r["weight"]) for r in rows_of(store, "raw_edges")] == [
        ("follows", "a", "b", 1.0),
        ("follows", "b", "a", 1.0),
        ("fav", "a", "x", 1.0),
        ("reply", "b", "x", 1.0),
    ]
    assert manifest.details["edges_per_relation"] == {"follows": 2, "fav": 1, "reply": 1}
    assert manifest.details["rejected"] == 0 and rows_of(store, "raw_edges_rejected") == []


@pytest.mark.parametrize("ending", ["csv", "tsv", "csv.gz", "tsv.zst"])
def test_delimited_files_give_the_same_edges_as_parquet(tmp_path, ending):
    mark = "," if "csv" in ending else "\t"
    text = "\n".join(mark.join(row) for row in [("lhs", "rel", "rhs"), *NAMED]) + "\n"
    path = tmp_path / f"e.{ending}"
    if ending.endswith("gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif ending.endswith("zst"):
        path.write_bytes(pa.Codec("zstd").compress(text.encode(), asbytes=True))
    else:
        path.write_text(text)
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(path), store, SNAPSHOT)
    assert triples(store) == set(NAMED)


def test_quotes_belong_to_csv_and_are_plain_text_in_tsv(tmp_path):
    (tmp_path / "e.csv").write_text('lhs,rel,rhs\n"a,1",follows,"say ""b"""\n')
    (tmp_path / "e.tsv").write_text('lhs\trel\trhs\n"a\tfollows\tb"c\n')
    for ending, expected in (("csv", ("a,1", "follows", 'say "b"')), ("tsv", ('"a', "follows", 'b"c'))):
        store = store_at(tmp_path / ending)
        raw_edges.ingest(make_config(tmp_path / f"e.{ending}"), store, SNAPSHOT)
        assert triples(store) == {expected}


def test_a_glob_reads_every_file(tmp_path):
    for number, row in enumerate(NAMED):
        write(tmp_path / f"e-{number}.parquet", [row])
    store = store_at(tmp_path)
    manifest = raw_edges.ingest(make_config(tmp_path / "e-*.parquet"), store, SNAPSHOT)
    assert triples(store) == set(NAMED) and len(manifest.details["files"]) == 4


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_edges_are_read_from_a_url(tmp_path, ending):
    pq_path = write(tmp_path / "served" / "e.parquet", NAMED)
    (tmp_path / "served" / "e.csv").write_text("lhs,rel,rhs\n" + "".join(",".join(r) + "\n" for r in NAMED))
    memory = fsspec.filesystem("memory")
    folder = f"/{uuid.uuid4().hex}"
    memory.pipe_file(f"{folder}/e.{ending}", (pq_path.parent / f"e.{ending}").read_bytes())

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=pq_path.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        for number, url in enumerate(
            (
                f"memory://{folder}/e.{ending}",
                f"memory://{folder}/*.{ending}",
                f"http://127.0.0.1:{server.server_port}/e.{ending}",
            )
        ):
            store = store_at(tmp_path / str(number))
            raw_edges.ingest(make_config(url), store, SNAPSHOT)
            assert triples(store) == set(NAMED), url
    finally:
        server.shutdown()
        server.server_close()


def test_a_remote_store_takes_the_tables(tmp_path):
    store = Store(f"memory://{uuid.uuid4().hex}")
    raw_edges.ingest(make_config(write(tmp_path / "e.parquet", NAMED)), store, SNAPSHOT)
    assert triples(store) == set(NAMED)


@pytest.mark.parametrize(("repeat_weight", "expected"), [(None, 2.0), ("largest", 2.0), ("sum", 2.5), (1.125, 2.25)])
def test_duplicates_become_one_edge_and_weigh_what_is_chosen(tmp_path, repeat_weight, expected):
    names = ("lhs", "rel", "rhs", "w", "t", "s")
    rows = [
        ("a", "fav", "x", 0.5, 1000, "validation"),
        ("a", "fav", "x", 2.0, 3000, "train"),
        ("a", "fav", "y", 1.0, 2000, "test"),
    ]
    path = write(tmp_path / "e.parquet", rows, names)
    columns = {"weight": "w", "time": "t", "split": "s"}
    store = store_at(tmp_path)
    chosen = {} if repeat_weight is None else {"repeat_weight": repeat_weight}
    manifest = raw_edges.ingest(make_config(path, source={"columns": columns, **chosen}), store, SNAPSHOT)
    assert manifest.details["duplicates_merged"] == 1
    merged, single = rows_of(store, "raw_edges")
    assert merged["weight"] == expected and merged["split"] == "train"
    assert merged["time"] == datetime(1970, 1, 1, 0, 50)
    assert merged["first_time"] == datetime(1970, 1, 1, 0, 16, 40)
    assert single["weight"] == 1.0 and single["split"] == "test"


def test_each_row_that_is_no_edge_is_rejected_with_its_reason_file_and_row(tmp_path):
    names = ("lhs", "rel", "rhs", "w", "t", "s")
    good = ("a", "fav", "x", 1.0, "2024-12-30", "train")
    rows = [
        good,
        (None, *good[1:]),
        ("", *good[1:]),
        ("a", "likes", *good[2:]),
        (*good[:3], -1.0, *good[4:]),
        (*good[:3], math.nan, *good[4:]),
        (*good[:3], math.inf, *good[4:]),
        (*good[:4], "soon", "train"),
        (*good[:5], "dev"),
        (*good[:2], "  ", *good[3:]),
        (*good[:3], None, *good[4:]),
    ]
    path = write(tmp_path / "e.parquet", rows, names)
    store = store_at(tmp_path)
    config = make_config(path, source={"columns": {"weight": "w", "time": "t", "split": "s"}})
    details = raw_edges.ingest(config, store, SNAPSHOT).details
    expected = {
        "null": [2, 11],
        "empty id": [3, 10],
        "unknown relation": [4],
        "bad weight": [5, 6, 7],
        "bad time": [8],
        "bad split": [9],
    }
    assert reasons(store) == expected
    assert details["rejected_by_reason"] == {reason: len(found) for reason, found in expected.items()}
    assert details["kept"] == 1 and details["rejected_share"] == 10 / 11
    rejected = rows_of(store, "raw_edges_rejected")
    assert {row["file"] for row in rejected} == {str(path)} and {row["source"] for row in rejected} == {"source"}
    assert [row["column"] for row in rejected] == ["lhs", "lhs", "rel", "w", "w", "w", "t", "s", "rhs", "w"]
    assert [row["value"] for row in rejected] == [None, "", "likes", "-1.0", "nan", "inf", "soon", "dev", "  ", None]
    assert details["sources"][0]["rejected_by"][0] == {"reason": "bad weight", "column": "w", "rows": 3}


def test_indexed_rows_out_of_their_table_are_rejected(tmp_path):
    rows = [(0, 1, 2), (-1, 1, 2), (0, 3, 2), (10, 1, 0), (9, 1, 4), (0, 1, 5), (0, 0, 9), (0, -1, 0)]
    path = write(tmp_path / "e.parquet", rows)
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(path, {"user": 10, "item": 5}, source={"ids": "indexed"}), store, SNAPSHOT)
    assert triples(store) == {(0, "fav", 2), (9, "fav", 4), (0, "follows", 9)}
    assert reasons(store) == {"negative index": [2], "unknown relation": [3, 8], "index out of range": [4, 6]}


def test_indexed_text_that_is_no_integer_is_rejected(tmp_path):
    (tmp_path / "e.csv").write_text("lhs,rel,rhs\n0,1,2\nzero,1,2\n1.5,1,2\n")
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(tmp_path / "e.csv", source={"ids": "indexed"}), store, SNAPSHOT)
    assert triples(store) == {(0, "fav", 2)} and reasons(store) == {"not an index": [3, 4]}


def test_lines_of_another_width_are_rejected_by_line_and_others_keep_their_line(tmp_path):
    lines = ["lhs,rel,rhs", "a,fav,x", "a,fav", "a,fav,x,y", "a,likes,x", "\\N,fav,x", ",fav,x"]
    (tmp_path / "e.csv").write_text("\n".join(lines) + "\n")
    store = store_at(tmp_path)
    details = raw_edges.ingest(make_config(tmp_path / "e.csv"), store, SNAPSHOT).details
    assert reasons(store) == {"malformed line": [3, 4], "unknown relation": [5], "null": [6], "empty id": [7]}
    assert details["read"] == 6 and details["kept"] == 1


def test_ids_are_integers_where_the_source_has_integers(tmp_path):
    big = 2**62 + 1
    write(tmp_path / "e.parquet", [(big, "fav", 7)])
    (tmp_path / "e.csv").write_text(f"lhs,rel,rhs\n{big},fav,7\n")
    (tmp_path / "f.csv").write_text(f"lhs,rel,rhs\n{big},fav,7\n007,fav,8\n")
    for name, kind in (("e.parquet", "int64"), ("e.csv", "int64"), ("f.csv", "string")):
        store = store_at(tmp_path / name.replace(".", "-"))
        manifest = raw_edges.ingest(make_config(tmp_path / name), store, SNAPSHOT)
        assert manifest.schema["lhs"] == manifest.schema["rhs"] == kind
        assert str(big) in {str(row["lhs"]) for row in rows_of(store, "raw_edges")}


def test_only_edges_in_the_window_count(tmp_path):
    rows = [
        ("a", "fav", "old", "2024-12-29 23:59:59"),
        ("a", "fav", "first", "2024-12-30"),
        ("a", "fav", "last", "2025-01-01T23:59:59Z"),
        ("a", "fav", "zone", "2025-01-02T00:30:00+01:00"),
        ("a", "fav", "future", "2025-01-02"),
    ]
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "at"))
    for window, kept in (("3d", {"first", "last", "zone"}), (None, {"old", "first", "last", "zone"})):
        store = store_at(tmp_path / str(window))
        config = make_config(path, source={"columns": {"time": "at"}, "window": window})
        details = raw_edges.ingest(config, store, SNAPSHOT).details
        assert {row["rhs"] for row in rows_of(store, "raw_edges")} == kept
        assert details["outside_window"] == len(rows) - len(kept) and details["rejected"] == 0


def test_self_loops_are_counted_within_one_entity_type_only(tmp_path):
    path = write(tmp_path / "e.parquet", [("a", "follows", "a"), ("a", "fav", "a"), ("a", "follows", "b")])
    store = store_at(tmp_path)
    assert raw_edges.ingest(make_config(path), store, SNAPSHOT).details["self_loops"] == 1


def test_published_data_roots_take_rows_in_file_order(tmp_path):
    write(tmp_path / "d" / "1.parquet", [(i, 1, 0) for i in range(6)])
    write(tmp_path / "d" / "2.parquet", [(i, 1, 0) for i in range(6, 12)])
    root = f"{tmp_path}/d/*.parquet"
    config = make_config(
        None,
        {"user": 12, "item": 1},
        train_data={"data_root": root, "offset": 2, "limit": 7},
        validation_data={"data_root": root, "offset": 9, "limit": 2},
    )
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, SNAPSHOT)
    found = {row["lhs"]: row["split"] for row in rows_of(store, "raw_edges")}
    assert found == {**dict.fromkeys(range(2, 9), "train"), 9: "validation", 10: "validation"}


def test_a_missing_column_is_named_with_those_there_and_the_nearest(tmp_path):
    path = write(tmp_path / "e.parquet", NAMED, ("head", "rel", "rhs_"))
    with pytest.raises(UserError, match=r"e\.parquet: has no column 'lhs' \(columns there: head, rel, rhs_"):
        raw_edges.ingest(make_config(path), store_at(tmp_path), SNAPSHOT)
    config = make_config(path, source={"columns": {"lhs": "head"}})
    with pytest.raises(UserError, match=r"no column 'rhs'.*did you mean 'rhs_'\?; set source\.columns\.rhs"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)


def test_the_one_file_that_lacks_a_column_is_named(tmp_path):
    write(tmp_path / "e-1.parquet", NAMED)
    write(tmp_path / "e-2.parquet", NAMED, ("lhs", "relation", "rhs"))
    with pytest.raises(
        UserError, match=r"e-2\.parquet: has no column 'rel'.*its name, 'e-2', is none of.*columns\.rel"
    ):
        raw_edges.ingest(make_config(tmp_path / "e-*.parquet"), store_at(tmp_path), SNAPSHOT)


def test_a_missing_file_is_named_with_the_snapshots_there(tmp_path):
    write(tmp_path / "2024-01-01.parquet", NAMED)
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet")
    with pytest.raises(UserError, match=r"no file for snapshot 2025-01-01: .*\(snapshots there: 2024-01-01"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: p.write_bytes(b"not parquet at all"), "cannot be read"),
        (lambda p: pq.write_table(pa.table({"lhs": [1.5], "rel": ["fav"], "rhs": [2.0]}), p), "of type DOUBLE"),
    ],
)
def test_a_file_that_holds_no_edges_is_one_clear_error(tmp_path, make, told):
    path = tmp_path / "e.parquet"
    make(path)
    with pytest.raises(UserError, match=rf"e\.parquet: .*{told}"):
        raw_edges.ingest(make_config(path), store_at(tmp_path), SNAPSHOT)


def test_an_empty_csv_is_one_clear_error(tmp_path):
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(UserError, match=r"e\.csv: is empty.*; its first line must name the columns"):
        raw_edges.ingest(make_config(tmp_path / "e.csv"), store_at(tmp_path), SNAPSHOT)


def test_a_memory_limit_that_is_none_is_one_clear_error(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", NAMED), launch={"duckdb_memory_limit": "much"})
    with pytest.raises(UserError, match=r"launch\.duckdb_memory_limit: 'much' is not a size"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)


def test_a_failed_ingestion_leaves_no_table(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    config = make_config(write(tmp_path / "e.parquet", NAMED))
    monkeypatch.setattr(raw_edges, "_write_rejected", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
    with pytest.raises(RuntimeError, match="disk full"):
        raw_edges.ingest(config, store, SNAPSHOT)
    assert store.assets() == []
    files = (file for file in Path(store.root).rglob("*") if file.is_file())
    assert not [file for file in files if file.name != ".lock"], "a lock stays, and holds nobody back"


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_columns_of_the_file_may_have_any_name(tmp_path, ending):
    names = ("lhs", "rel", "rhs", "filename", "row", "file", "fate", "raw_lhs")
    rows = [(*edge, "f", "r", "i", "t", "l") for edge in NAMED]
    path = tmp_path / f"e.{ending}"
    if ending == "csv":
        # Also names that differ in case alone, or are none.
        lines = [(*names, "extra", "EXTRA", "", ""), *((*row, "1", "2", "3", "4") for row in rows)]
        path.write_text("\n".join(",".join(line) for line in lines) + "\n")
    else:
        write(path, rows, names)
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(path), store, SNAPSHOT)
    assert triples(store) == set(NAMED)


def test_a_column_that_cannot_be_told_apart_from_row_numbers_is_an_error(tmp_path):
    write(tmp_path / "e.parquet", [(*edge, 1) for edge in NAMED], ("lhs", "rel", "rhs", "file_row_number"))
    with pytest.raises(UserError, match=r"e\.parquet: a column is named 'file_row_number'.*rename it"):
        raw_edges.ingest(make_config(tmp_path / "e.parquet"), store_at(tmp_path), SNAPSHOT)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lhs,LHS,rel,rhs\na,z,follows,b\n", "columns 'lhs' and 'LHS' have one name.*rename one"),
        ("LHS,rel,rhs\na,follows,b\n", "no column 'lhs'.*did you mean 'LHS'.*source.columns.lhs"),
        ("lhs;rel;rhs\na;follows;b\n", "no column 'lhs'.*set source.delimiter"),
        ("lhs,rel,rhs\ra,follows,b\r", "carriage return.*newline"),
        ("\nlhs,rel,rhs\na,follows,b\n", "begins with an empty line"),
    ],
)
def test_a_first_line_that_names_no_columns_is_told_with_its_remedy(tmp_path, text, told):
    (tmp_path / "e.csv").write_bytes(text.encode())
    with pytest.raises(UserError, match=told):
        raw_edges.ingest(make_config(tmp_path / "e.csv"), store_at(tmp_path), SNAPSHOT)


@pytest.mark.parametrize(
    ("text", "snapshot", "told"),
    [
        ("lhs,rel,rhs,t\n", SNAPSHOT, "the files have no rows"),
        ("lhs,rel,rhs,t\na,follows,b,2025-01-01\n", "2024-01-01", "outside window .before 2024-01-02. 1; choose"),
        ("lhs,rel,rhs,t\na,follows,b,2025-01-01\n", "2025-03-01", "from 2025-02-28 00:00 before 2025-03-02"),
        (
            "lhs,rel,rhs,t\na,likes,b,2025-01-01\n",
            SNAPSHOT,
            "unknown relation in column 'rel' 1, the first is row 2 of .*csv, unknown",
        ),
        ('lhs,rel,rhs,t\na,follows,"b,2025-01-01\n', SNAPSHOT, "malformed line 1, the first is row 2 of .*csv"),
    ],
)
def test_a_source_without_any_edge_says_why_and_leaves_the_old_table(tmp_path, text, snapshot, told):
    path = tmp_path / "e.csv"
    store = store_at(tmp_path)
    config = make_config(path, source={"path": str(path), "columns": {"time": "t"}, "window": "2d"})
    if "before 2024" in told:
        config = make_config(path, source={"path": str(path), "columns": {"time": "t"}})
    path.write_text(f"lhs,rel,rhs,t\na,follows,b,{snapshot}\n")
    raw_edges.ingest(config, store, snapshot)
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        raw_edges.ingest(config, store, snapshot)
    assert triples(store, snapshot=snapshot) == {("a", "follows", "b")}


def test_a_malformed_line_keeps_no_more_text_than_is_of_use(tmp_path):
    long = "a" * 5000
    (tmp_path / "e.csv").write_text(f'lhs,rel,rhs\na,follows,b\n{long},follows,b,c\n"{long},follows,b\n')
    store = store_at(tmp_path)
    raw_edges.ingest(make_config(tmp_path / "e.csv"), store, SNAPSHOT)
    assert [(row["row"], len(row["rhs"])) for row in rows_of(store, "raw_edges_rejected")] == [(3, 1000), (4, 1000)]
