"""Several sources of one graph, each with files, columns, relations, times and weights of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from edge_files import RELATIONS, SNAPSHOT, make_config, pass_checks, rows_of, store_at, triples, write

from twhin_pipeline import pipeline
from twhin_pipeline.checks import checks
from twhin_pipeline.config import TwhinConfig, load_config, parse_config, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, source
from twhin_pipeline.store import Manifest, Store

DAY = 86_400
END = 1_735_776_000  # of the snapshot's day


def config_of(*sources: dict[str, Any], listed: list[dict[str, Any]] | None = None, **sections: Any) -> TwhinConfig:
    """Return a configuration of users and items with these sources."""
    return make_config(None, sources=list(sources), model={"relations": listed or RELATIONS}, **sections)


def csv(path: Path, *lines: str) -> str:
    """Write lines of text, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def ingest(tmp_path: Path, config: TwhinConfig, name: str = "") -> tuple[Store, Manifest]:
    """Ingest into a new store."""
    store = store_at(tmp_path / f"store{name}")
    return store, raw_edges.ingest(config, store, SNAPSHOT)


def weights_of(store: Store) -> dict[tuple[str, str], float]:
    """Return the weight of each edge, by relation and right end."""
    return {(row["rel"], row["rhs"]): row["weight"] for row in rows_of(store, "raw_edges")}


# Which sources


def test_sources_of_other_columns_and_formats_are_one_graph(tmp_path):
    events = {"lhs": "user_id", "rel": "event", "rhs": "product", "time": "at"}
    config = config_of(
        {"path": csv(tmp_path / "events.csv", "event,at,user_id,product", "fav,2024-12-30,a,x"), "columns": events},
        {"path": csv(tmp_path / "f.tsv", "who\twhom", "a\tb", "b\ta"), "relation": "follows",
         "columns": {"lhs": "who", "rhs": "whom"}},
        {"path": str(write(tmp_path / "e.parquet", [("a", "fav", "x"), ("b", "reply", "x")]))},
    )  # fmt: skip
    store, manifest = ingest(tmp_path, config)
    assert triples(store) == {("a", "fav", "x"), ("a", "follows", "b"), ("b", "follows", "a"), ("b", "reply", "x")}
    assert manifest.details["read"] == 5 and manifest.details["duplicates_merged"] == 1
    found = manifest.details["sources"]
    assert [one["source"] for one in found] == ["sources[0]", "sources[1]", "sources[2]"]
    assert [one["edges_per_relation"] for one in found] == [{"fav": 1}, {"follows": 2}, {"fav": 1, "reply": 1}]
    assert [one["files"] for one in found] == [[str(tmp_path / n)] for n in ("events.csv", "f.tsv", "e.parquet")]


def test_a_list_of_one_source_is_that_source(tmp_path):
    path = write(tmp_path / "e.parquet", [("a", "fav", "x"), ("a", "nope", "x"), ("b", "reply", "x")])
    one, _ = ingest(tmp_path, make_config(path), "a")
    other, _ = ingest(tmp_path, config_of({"path": str(path)}), "b")
    assert one.read("raw_edges", SNAPSHOT).equals(other.read("raw_edges", SNAPSHOT))
    rejected = [store.read("raw_edges_rejected", SNAPSHOT).drop_columns("source") for store in (one, other)]
    assert rejected[0].num_rows == 1 and rejected[0].equals(rejected[1])


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"source": {"path": "e.csv"}, "sources": [{"path": "f.csv"}]}, "source and sources are both given"),
        ({"sources": []}, "at least 1"),
        ({"sources": [{"path": "e.csv", "sql": "FROM x"}]}, r"sources\[0\]: give exactly one of path and sql"),
        ({"sources": [{"format": "csv"}]}, "give exactly one of path and sql"),
        ({"sources": [{"sql": "FROM x", "format": "csv"}]}, "format: csv is of a file, and sql is given"),
        ({"sources": [{"path": "e"}, {"path": "f", "ids": "indexed"}]}, "ids are indexed in some and named in others"),
        ({"sources": [{"path": "e", "relation": "fav", "columns": {"rel": "r"}}]}, "both given; leave one of them out"),
        ({"sources": [{"path": "e", "relation": "all"}]}, "cannot be the name of a relation"),
        ({"sources": [{"path": "e", "half_life": "30d"}]}, r"half_life needs columns\.time"),
        ({"sources": [{"path": "e", "half_life": "30 days", "columns": {"time": "t"}}]}, "such as 90d"),
        ({"sources": [{"path": "e", "weights": {"fav": -1}}]}, "fav: -1.0 must be a number, 0 or more"),
        ({"sources": [{"path": "e", "repeat_weight": 0.5}]}, "must be largest, sum, or a number of 1 or more"),
        ({"sources": [{"path": "e", "repeat_weight": "cap"}]}, "must be largest, sum, or a number of 1 or more"),
        ({"sources": [{"path": "e", "colums": {}}]}, r"sources\[0\]\.colums: unknown key 'colums'; did you mean"),
        ({"sources": [{"path": "e"}], "split": {"strategy": "temporal"}}, r"needs source\.columns\.time"),
        ({"sources": [{"path": "e"}], "split": {"repeats": True}}, "repeats is for strategy: temporal"),
        (
            {
                "sources": [{"path": "e", "columns": {"time": "t"}}],
                "split": {"strategy": "temporal", "repeats": True},
                "train_data": {"limit": 9},
            },
            r"split\.repeats needs all training edges; leave train_data\.limit",
        ),
    ],
)
def test_sources_that_contradict_themselves_are_one_clear_error(sections, what):
    data = make_config("e.csv").model_dump(exclude_none=True)
    del data["source"]
    with pytest.raises(UserError, match=what) as caught:
        parse_config({**data, **sections})
    assert len(str(caught.value).splitlines()) == 1


def test_a_relation_that_a_source_names_must_be_one_of_the_model(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rhs", "a,b")
    with pytest.raises(UserError, match=r"sources\[0\]\.relation: unknown relation 'follow'; did you mean 'follows'"):
        ingest(tmp_path, config_of({"path": path, "relation": "follow"}))


def test_ids_are_text_for_all_where_one_source_has_text(tmp_path):
    numbers = write(tmp_path / "n.parquet", [(1, "fav", 7)])
    texts = write(tmp_path / "t.parquet", [("1", "reply", "x")])
    store, _ = ingest(tmp_path, config_of({"path": str(numbers)}, {"path": str(texts)}))
    assert triples(store) == {("1", "fav", "7"), ("1", "reply", "x")}


def test_files_of_a_source_may_have_columns_in_another_order_and_more_of_them(tmp_path):
    csv(tmp_path / "e-1.csv", "lhs,rel,rhs", "a,fav,x")
    csv(tmp_path / "e-2.csv", "rhs,note,lhs,rel", "y,n,a,fav")
    store, _ = ingest(tmp_path, config_of({"path": f"{tmp_path}/e-*.csv"}))
    assert triples(store) == {("a", "fav", "x"), ("a", "fav", "y")}
    csv(tmp_path / "e-3.csv", "rhs,note,rel", "y,n,fav")
    with pytest.raises(UserError, match=r"e-3\.csv: has no column 'lhs'.*set sources\[0\]\.columns\.lhs"):
        ingest(tmp_path, config_of({"path": f"{tmp_path}/e-*.csv"}))


# Snapshots


def test_a_snapshot_is_one_that_every_dated_source_has(tmp_path):
    for name, days in (("e", ("2024-01-01", "2024-01-02", "2024-01-03")), ("f", ("2024-01-02", "2024-01-03"))):
        for day in days:
            csv(tmp_path / f"{name}-{day}.csv", "lhs,rel,rhs")
    still = {"path": csv(tmp_path / "still.csv", "lhs,rel,rhs")}
    dated = [{"path": f"{tmp_path}/{name}-{{snapshot}}.csv"} for name in "ef"]
    assert source.find_snapshots(config_of(*dated, still)) == ["2024-01-02", "2024-01-03"]
    given = {**still, "snapshots": ["2024-01-03", "2030-01-01"]}
    assert source.find_snapshots(config_of(*dated, given)) == ["2024-01-03"]
    assert source.find_snapshots(config_of(still)) == source.find_snapshots(config_of(still, still)) != []


def test_every_source_is_read_for_its_own_files_of_the_snapshot(tmp_path):
    for name, day in (("e", SNAPSHOT), ("e", "2024-12-31"), ("f", SNAPSHOT)):
        csv(tmp_path / f"{name}-{day}.csv", "lhs,rel,rhs", f"a,fav,{name}{day}")
    config = config_of(*({"path": f"{tmp_path}/{name}-{{snapshot}}.csv"} for name in "ef"))
    store, _ = ingest(tmp_path, config)
    assert {rhs for _, _, rhs in triples(store)} == {f"e{SNAPSHOT}", f"f{SNAPSHOT}"}
    (tmp_path / f"f-{SNAPSHOT}.csv").unlink()
    with pytest.raises(UserError, match=rf"sources\[1\]\.path: .*there is no {tmp_path}/f-{SNAPSHOT}\.csv"):
        ingest(tmp_path, config)


# Relations by file name


@pytest.mark.parametrize(
    ("file", "path"),
    [
        ("follows.csv", "follows.csv"),
        ("follows.csv", "*.csv"),
        (f"follows-{SNAPSHOT}.csv", "follows-{snapshot}.csv"),
        (f"{SNAPSHOT}_follows.csv", "{snapshot}_*.csv"),
        (f"{SNAPSHOT}/follows.csv", "{snapshot}/*.csv"),
    ],
)
def test_without_a_relation_column_the_files_name_is_the_relation(tmp_path, file, path):
    csv(tmp_path / file, "lhs,rhs", "a,b")
    store, manifest = ingest(tmp_path, config_of({"path": f"{tmp_path}/{path}"}))
    assert triples(store) == {("a", "follows", "b")}
    (note,) = manifest.details["notes"]
    assert note.endswith("no relation column, so all rows are of relation 'follows', the file's name") and file in note


def test_what_a_user_should_know_is_printed_after_ingest(tmp_path):
    csv(tmp_path / "follows.csv", "lhs,rhs", "a,b")
    run = pipeline.Run(config_of({"path": f"{tmp_path}/*.csv"}), "unused", [], store_at(tmp_path), SNAPSHOT)
    said: list[str] = []
    pipeline.run_stage(run, pipeline.STAGES["ingest"], said.append)
    assert said[-1].startswith(f"  note: {tmp_path}/follows.csv: no relation column")


def test_each_file_goes_by_its_own_column_or_name(tmp_path):
    csv(tmp_path / "follows.csv", "lhs,rhs", "a,b", "a,", "a,b,c")
    csv(tmp_path / "reply.csv", "rhs,lhs", "x,a")
    csv(tmp_path / "rest.csv", "lhs,rel,rhs", "a,fav,x")
    other = {"name": "*", "lhs": "user", "rhs": "item"}
    for name, listed in (("listed", RELATIONS), ("star", [RELATIONS[0], other])):
        store, manifest = ingest(tmp_path, config_of({"path": f"{tmp_path}/*.csv"}, listed=listed), name)
        assert triples(store) == {("a", "follows", "b"), ("a", "reply", "x"), ("a", "fav", "x")}
        assert len(manifest.details["notes"]) == 2
        rejected = [(row["reason"], row["row"], Path(row["file"]).name) for row in rows_of(store, "raw_edges_rejected")]
        assert rejected == [("empty id", 3, "follows.csv"), ("malformed line", 4, "follows.csv")]


def test_a_name_that_is_no_relation_is_an_error_that_says_what_to_set(tmp_path):
    csv(tmp_path / "edges.csv", "lhs,rhs,relation", "a,b,follows")
    told = (
        r"no column 'rel' .*did you mean 'relation'\?, and its name, 'edges', is none of .*sources\[0\]\.columns\.rel"
    )
    with pytest.raises(UserError, match=told):
        ingest(tmp_path, config_of({"path": f"{tmp_path}/edges.csv"}))
    csv(tmp_path / f"{SNAPSHOT}.csv", "lhs,rhs", "a,b")
    star = [{"name": "*", "lhs": "user", "rhs": "item"}, RELATIONS[0]]
    with pytest.raises(UserError, match="its name, '', is none of"):
        ingest(tmp_path, config_of({"path": f"{tmp_path}/{{snapshot}}.csv"}, listed=star))


def test_the_relation_of_an_indexed_source_may_be_given_by_name(tmp_path):
    path = write(tmp_path / "e.parquet", [(0, 4), (10, 1)], ("lhs", "rhs"))
    config = make_config(path, {"user": 10, "item": 5}, source={"ids": "indexed", "relation": "fav"})
    store, manifest = ingest(tmp_path, config)
    assert triples(store) == {(0, "fav", 4)} and manifest.details["rejected_by_reason"] == {"index out of range": 1}


# Times


def test_edges_without_a_time_stand_beside_dated_ones_and_are_in_every_window(tmp_path):
    dated = csv(tmp_path / "fav.csv", "lhs,rhs,t", "a,x,2024-12-31", "a,y,", "a,z,   ", "a,old,2020-01-01", "a,w,soon")
    undated = csv(tmp_path / "follows.csv", "lhs,rhs", "a,b")
    config = config_of(
        {"path": dated, "relation": "fav", "columns": {"time": "t"}, "window": "7d"},
        {"path": undated, "relation": "follows"},
    )
    store, manifest = ingest(tmp_path, config)
    times = {row["rhs"]: (row["time"], row["first_time"]) for row in rows_of(store, "raw_edges")}
    day = datetime(2024, 12, 31)
    assert times == {"x": (day, day), "y": (None, None), "z": (None, None), "b": (None, None)}
    details = manifest.details
    assert details["undated"] == 3 and details["outside_window"] == 1
    assert details["rejected_by_reason"] == {"bad time": 1}
    assert [one["undated"] for one in details["sources"]] == [2, 1]
    assert [one["time_range"] for one in details["sources"]] == [["2024-12-31T00:00:00"] * 2, None]


def test_the_manifest_has_the_resolved_files_and_the_first_and_last_time(tmp_path, monkeypatch):
    csv(tmp_path / "e.csv", "lhs,rel,rhs,t", "a,fav,x,2024-12-31T10:00:00", "a,fav,y,2020-02-03", "a,fav,z,2025-01-01")
    monkeypatch.chdir(tmp_path)
    _, manifest = ingest(tmp_path, make_config("e.csv", source={"columns": {"time": "t"}}))
    (found,) = manifest.details["sources"]
    assert found["files"] == manifest.details["files"] == [f"{tmp_path}/e.csv"]
    assert found["time_range"] == ["2020-02-03T00:00:00", "2025-01-01T00:00:00"]


def test_a_null_time_in_parquet_is_an_edge_without_a_time(tmp_path):
    rows = [("a", "fav", "x", None), ("a", "fav", "y", datetime(2024, 5, 1))]
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "t"))
    store, manifest = ingest(tmp_path, make_config(path, source={"columns": {"time": "t"}}))
    assert len(triples(store)) == 2 and manifest.details["undated"] == 1 and manifest.details["rejected"] == 0


def test_an_edge_with_an_undated_row_has_no_first_time(tmp_path):
    dated = csv(tmp_path / "a.csv", "lhs,rel,rhs,t", "a,fav,x,2024-12-30", "a,fav,x,2024-12-31", "a,fav,y,2024-12-31")
    undated = csv(tmp_path / "b.csv", "lhs,rel,rhs", "a,fav,x")
    store, _ = ingest(tmp_path, config_of({"path": dated, "columns": {"time": "t"}}, {"path": undated}))
    found = {row["rhs"]: (row["time"], row["first_time"]) for row in rows_of(store, "raw_edges")}
    day = datetime(2024, 12, 31)
    assert found == {"x": (day, None), "y": (day, day)}


# What is rejected


def test_a_small_source_that_is_rejected_cannot_hide_behind_a_large_one(tmp_path):
    large = write(tmp_path / "l.parquet", [(f"u{i}", "fav", "x") for i in range(5000)])
    small = csv(tmp_path / "s.csv", "lhs,rel,rhs,w", *(f"a,reply,{i},much" for i in range(6)), "a,nope,x,1")
    bad = {"path": small, "columns": {"weight": "w"}}
    store, manifest = ingest(tmp_path, config_of({"path": str(large)}, bad))
    assert manifest.details["rejected_share"] < 0.01
    config = config_of({"path": str(large)}, bad)
    result = checks.run("edges_rejected_share", config, store, SNAPSHOT)
    assert not result.passed and result.offending is not None
    rows = result.offending.to_pylist()
    assert len(rows) == 7
    # Rows of the most frequent reason come first, and say which column is to blame.
    assert [(row["reason"], row["column"], row["value"]) for row in rows[:6]] == [("bad weight", "w", "much")] * 6
    assert rows[6]["reason"] == "unknown relation" and rows[6]["column"] == "rel" and rows[6]["value"] == "nope"
    assert {row["source"] for row in rows} == {"sources[1]"}
    assert manifest.details["notes"] == ["sources[1]: none of its rows is an edge"]
    accepted = config_of({"path": str(large)}, {**bad, "max_rejected_share": 1.0})
    assert checks.run("edges_rejected_share", accepted, store, SNAPSHOT).passed


def test_a_file_of_two_sources_is_rejected_once_for_each(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs,w", "a,fav,x,1,2", "a,fav,,1", "a,fav,x,-1")
    config = config_of({"path": path}, {"path": path, "columns": {"weight": "w"}})
    store, manifest = ingest(tmp_path, config)
    found = [(row["source"], row["reason"], row["row"]) for row in rows_of(store, "raw_edges_rejected")]
    common = [("malformed line", 2), ("empty id", 3)]
    assert found == [
        *(("sources[0]", *one) for one in common),
        *(("sources[1]", *one) for one in (*common, ("bad weight", 4))),
    ]
    assert [one["rejected"] for one in manifest.details["sources"]] == [2, 3]


def test_the_share_of_edges_that_must_be_kept_is_that_of_the_relations_source(tmp_path):
    def written(snapshot: str, favs: int, follows: int) -> None:
        csv(tmp_path / f"fav-{snapshot}.csv", "lhs,rhs", *(f"u{i},x" for i in range(favs)))
        csv(tmp_path / f"follows-{snapshot}.csv", "lhs,rhs", *(f"u{i},v" for i in range(follows)))

    written("2024-12-31", 200, 200)
    written(SNAPSHOT, 90, 90)
    paths = [{"path": f"{tmp_path}/{name}-{{snapshot}}.csv"} for name in ("fav", "follows")]
    config = config_of(paths[0], {**paths[1], "min_kept_share": 0.1})
    store = store_at(tmp_path)
    raw_edges.ingest(config, store, "2024-12-31")
    pass_checks(store, "2024-12-31")
    raw_edges.ingest(config, store, SNAPSHOT)
    result = checks.run("edges_relations_kept", config, store, SNAPSHOT)
    assert result.offending is not None and [row["relation"] for row in result.offending.to_pylist()] == ["fav"]
    # A source that brings nothing any more is judged as before.
    written(SNAPSHOT, 200, 0)
    raw_edges.ingest(config_of(paths[0], {**paths[1], "min_kept_share": 0.1}), store, SNAPSHOT)
    result = checks.run("edges_relations_kept", config, store, SNAPSHOT)
    assert result.offending is not None and [row["relation"] for row in result.offending.to_pylist()] == ["follows"]
    lenient = config_of(paths[0], {**paths[1], "min_kept_share": 0})
    assert checks.run("edges_relations_kept", lenient, store, SNAPSHOT).passed


def test_the_message_for_a_source_without_any_edge_names_the_columns_to_blame(tmp_path):
    lines = ["a,fav,x,late", "a,fav,y,later", ",fav,y,2024-01-01"]
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs,t", *lines)
    told = (
        r"bad time in column 't' 2, empty id in column 'lhs' 1, the first is row 2 of .*correct sources\[0\]\.columns"
    )
    with pytest.raises(UserError, match=told):
        ingest(tmp_path, config_of({"path": path, "columns": {"time": "t"}}))


# Weights


def test_event_types_weigh_what_the_source_says_times_their_column(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs,w", "a,fav,x,2", "a,reply,x,2", "a,follows,b,2")
    store, _ = ingest(tmp_path, config_of({"path": path, "weights": {"fav": 3, "reply": 0}}), "a")
    assert weights_of(store) == {("fav", "x"): 3.0, ("reply", "x"): 0.0, ("follows", "b"): 1.0}
    both = {"path": path, "columns": {"weight": "w"}, "weights": {"fav": 3}}
    store, _ = ingest(tmp_path, config_of(both), "b")
    assert weights_of(store) == {("fav", "x"): 6.0, ("reply", "x"): 2.0, ("follows", "b"): 2.0}


def test_weights_of_an_unknown_relation_are_an_error_that_names_the_nearest(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs", "a,fav,x", "a,view,x")
    told = r"sources\[0\]\.weights: unknown relation 'reples'; did you mean 'reply'"
    with pytest.raises(UserError, match=told):
        ingest(tmp_path, config_of({"path": path, "weights": {"reples": 3}}))
    star = [RELATIONS[0], {"name": "*", "lhs": "user", "rhs": "item"}]
    with pytest.raises(UserError, match="unknown relation 'veiw'; did you mean 'view'"):
        ingest(tmp_path, config_of({"path": path, "weights": {"veiw": 3}}, listed=star))
    store, _ = ingest(tmp_path, config_of({"path": path, "weights": {"view": 3}}, listed=star))
    assert weights_of(store) == {("fav", "x"): 1.0, ("view", "x"): 3.0}


def test_a_weight_that_is_too_large_once_multiplied_is_rejected(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs,w", "a,fav,x,1e38", "a,reply,x,1e38")
    config = config_of({"path": path, "columns": {"weight": "w"}, "weights": {"fav": 100}})
    _, manifest = ingest(tmp_path, config)
    assert manifest.details["rejected_by_reason"] == {"bad weight": 1}


def test_weights_halve_with_age_and_undated_edges_keep_theirs(tmp_path):
    ages = {"x": 0.5, "y": 10, "z": 25}
    lines = [f"a,fav,{rhs},{END - age * DAY},4" for rhs, age in ages.items()]
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs,t,w", *lines, "a,fav,w,,4")
    columns = {"time": "t", "weight": "w"}
    store, _ = ingest(tmp_path, config_of({"path": path, "columns": columns, "half_life": "10d"}))
    found = weights_of(store)
    assert found.pop(("fav", "w")) == 4.0
    assert found == {("fav", rhs): pytest.approx(4 * 2 ** (-age / 10), rel=1e-6) for rhs, age in ages.items()}


def test_rows_of_an_edge_weigh_as_its_source_says_whatever_their_order(tmp_path):
    lines = [f"a,fav,x,{weight}" for weight in (0.1, 0.7, 0.2, 0.4)] + ["a,fav,y,3"]
    for name, repeat_weight, expected in (("l", "largest", 0.7), ("s", "sum", 1.4), ("c", 1.5, 1.05), ("d", 5, 1.4)):
        tables = []
        for number, some in enumerate((lines, lines[::-1])):
            path = csv(tmp_path / f"{number}.csv", "lhs,rel,rhs,w", *some)
            entry = {"path": path, "columns": {"weight": "w"}, "repeat_weight": repeat_weight}
            store, manifest = ingest(tmp_path, config_of(entry), f"{name}{number}")
            tables.append(store.read("raw_edges", SNAPSHOT))
            assert manifest.details["duplicates_merged"] == 3
        assert tables[0].equals(tables[1])
        assert weights_of(store) == {("fav", "x"): pytest.approx(expected, rel=1e-6), ("fav", "y"): 3.0}


def test_without_a_weight_column_repeats_count_once_or_as_often_as_asked(tmp_path):
    path = csv(tmp_path / "e.csv", "lhs,rel,rhs", *["a,fav,x"] * 4, "a,fav,y")
    for repeat_weight, expected in (("largest", 1.0), ("sum", 4.0), (3, 3.0)):
        store, _ = ingest(tmp_path, config_of({"path": path, "repeat_weight": repeat_weight}), str(repeat_weight))
        assert weights_of(store) == {("fav", "x"): expected, ("fav", "y"): 1.0}


def test_sources_of_one_relation_must_merge_alike_and_of_others_need_not(tmp_path):
    favs = csv(tmp_path / "fav.csv", "lhs,rhs", "a,x", "a,x")
    replies = csv(tmp_path / "reply.csv", "lhs,rhs", "a,x", "a,x")
    summed = {"path": replies, "repeat_weight": "sum"}
    store, _ = ingest(tmp_path, config_of({"path": favs}, summed))
    assert weights_of(store) == {("fav", "x"): 1.0, ("reply", "x"): 2.0}
    with pytest.raises(UserError, match=r"sources\[0\]\.repeat_weight and sources\[1\]\.repeat_weight differ.*'reply'"):
        ingest(tmp_path, config_of({"path": favs, "relation": "reply"}, summed))


# Where paths begin


def write_yaml(path: Path, **sections: Any) -> str:
    data = make_config("unused").model_dump(mode="json", exclude_none=True)
    del data["source"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**data, **sections}))
    return str(path)


@pytest.mark.parametrize("several", [False, True])
def test_a_path_in_the_file_is_relative_to_it_and_one_of_an_override_to_the_working_directory(
    tmp_path, monkeypatch, several
):
    entry = {"path": "../data/e.csv"}
    section = {"sources": [entry]} if several else {"source": entry}
    file = write_yaml(tmp_path / "there" / "configs" / "c.yaml", **section)
    csv(tmp_path / "there" / "data" / "e.csv", "lhs,rel,rhs", "a,fav,file")
    csv(tmp_path / "here" / "e.csv", "lhs,rel,rhs", "a,fav,override")
    (tmp_path / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    name = "sources.0" if several else "source"
    whole = "sources=[{path: e.csv}]" if several else "source={path: e.csv}"
    for number, (overrides, expected) in enumerate((
        ([], "file"),
        ([f"{name}.columns.lhs=lhs"], "file"),
        ([f"{name}.path=e.csv"], "override"),
        ([whole], "override"),
        ([f"{name}={{path: e.csv}}"], "override"),
    )):  # fmt: skip
        store, manifest = ingest(tmp_path, load_config(file, overrides), str(number))
        assert {rhs for *_, rhs in triples(store)} == {expected}, overrides
    relative = load_config("../there/configs/c.yaml")
    monkeypatch.chdir(tmp_path)
    _, manifest = ingest(tmp_path, relative, "relative")
    assert manifest.details["files"] == [f"{tmp_path}/there/data/e.csv"]


def test_the_folder_is_known_where_relations_are_found_and_dates_are_listed(tmp_path, monkeypatch):
    star = [RELATIONS[0], {"name": "*", "lhs": "user", "rhs": "item"}]
    model = make_config("unused", model={"relations": star}).model.model_dump(mode="json", exclude_none=True)
    file = write_yaml(tmp_path / "c.yaml", source={"path": "{snapshot}.csv"}, model=model)
    csv(tmp_path / f"{SNAPSHOT}.csv", "lhs,rel,rhs", "a,fav,x")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    config = load_config(file)
    resolved = relations.with_found(config, ["fav"])
    assert source.find_snapshots(config) == source.find_snapshots(resolved) == [SNAPSHOT]
    store, _ = ingest(tmp_path, config)
    assert relations.resolve(config, store, SNAPSHOT).source.folder == str(tmp_path)


def test_neither_the_hash_nor_what_is_printed_depends_on_where_the_file_is(tmp_path, monkeypatch):
    files = [write_yaml(tmp_path / folder / "c.yaml", source={"path": "e.csv"}) for folder in "ab"]
    first, second = (load_config(file) for file in files)
    monkeypatch.chdir(tmp_path / "a")
    third = load_config("c.yaml")
    assert first.hash() == second.hash() == third.hash() == parse_config(yaml.safe_load(first.to_yaml())).hash()
    assert first.to_yaml() == second.to_yaml() == third.to_yaml() and str(tmp_path) not in first.to_yaml()


def test_a_file_in_a_folder_with_signs_of_a_pattern_is_found(tmp_path):
    file = write_yaml(tmp_path / "a[b]c" / "c.yaml", source={"path": "e.csv"})
    csv(tmp_path / "a[b]c" / "e.csv", "lhs,rel,rhs", "a,fav,x")
    store, _ = ingest(tmp_path, load_config(file))
    assert triples(store) == {("a", "fav", "x")}


def test_the_message_for_a_missing_file_names_where_it_was_looked_for(tmp_path, monkeypatch):
    file = write_yaml(tmp_path / "configs" / "c.yaml", source={"path": "../e.csv"})
    with pytest.raises(UserError, match=rf"source\.path: \.\./e\.csv: .*there is no {tmp_path}/e\.csv"):
        ingest(tmp_path, load_config(file))
    with pytest.raises(UserError, match=rf"no snapshot was found at {tmp_path}/e\.csv; correct the path"):
        source.newest_snapshot(load_config(file))


def test_the_bundled_example_is_found_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from twhin_pipeline import config\nfrom twhin_pipeline.graph import source\n"
         "print(source.newest_snapshot(config.load_config(config.default_config_path())))"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "2025-08-09"


def test_the_example_of_the_documentation_is_read_as_it_is(tmp_path):
    """The YAML of docs/how-to/bring-data.md, beside files of the columns that it names."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "bring-data.md").read_text()
    (example,) = (one for one in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if one.startswith("sources:"))
    listed = [{"name": name, "lhs": "user", "rhs": "item"} for name in ("view", "cart", "buy", "rated")]
    model = make_config("unused", model={"relations": [*listed, RELATIONS[0]]}).model.model_dump(mode="json")
    file = write_yaml(tmp_path / "c.yaml", **yaml.safe_load(example), model=model)
    events = ["u1,view,p1,2024-12-31", "u1,buy,p1,2025-01-01", "u2,cart,p2,2000-01-01"]
    csv(tmp_path / "events.csv", "user_id,event_type,product_id,event_time", *events)
    csv(tmp_path / "follows.csv", "follower,followee", "u1,u2")
    csv(tmp_path / "ratings.csv", "user_id,film_id,stars", "u1,7,5", "u2,7,2", "u2,8,5")
    write(tmp_path / "films.parquet", [(7,)], ("film_id",))
    store, manifest = ingest(tmp_path, load_config(file))
    assert triples(store) == {("u1", "view", "p1"), ("u1", "buy", "p1"), ("u1", "follows", "u2"), ("u1", "rated", "7")}
    found = weights_of(store)
    assert found["rated", "7"] == 5 and found["buy", "p1"] > 4.8 and 0.9 < found["view", "p1"] < 1
    assert manifest.details["rejected"] == 0 and manifest.details["outside_window"] == 1
