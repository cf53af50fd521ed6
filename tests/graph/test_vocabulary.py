"""Vocabularies: rows are contiguous, ordered, and kept for ever."""

from __future__ import annotations

import pytest
from edge_files import SNAPSHOT, make_config, pass_checks, rows_of, store_at, write

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.store import Verdict

NAMED = [("a", "follows", "b"), ("c", "follows", "b"), ("a", "fav", "x"), ("a", "reply", "y"), ("c", "fav", "y")]


def build(config, store, snapshot=SNAPSHOT):
    raw_edges.ingest(config, store, snapshot)
    manifests = vocabulary.build(config, store, snapshot)
    pass_checks(store, snapshot)
    return manifests


def rows(store, entity, snapshot=SNAPSHOT):
    return [(r["id"], r["row"], r["degree"]) for r in rows_of(store, f"vocabulary/{entity}", snapshot)]


def test_ids_are_ordered_by_degree_then_id(tmp_path):
    store = store_at(tmp_path)
    manifests = build(make_config(write(tmp_path / "e.parquet", NAMED)), store)
    assert rows(store, "user") == [("a", 0, 3), ("b", 1, 2), ("c", 2, 2)]
    assert rows(store, "item") == [("y", 0, 2), ("x", 1, 1)]
    assert manifests["user"].parents == {"raw_edges": store.manifest("raw_edges", SNAPSHOT).version}


def test_a_known_id_keeps_its_row_and_one_that_is_gone_stays_with_degree_0(tmp_path):
    store = store_at(tmp_path)
    later = [("z", "follows", "c"), ("z", "follows", "d"), ("z", "fav", "y"), ("d", "fav", "y")]
    write(tmp_path / "2024-01-01.parquet", NAMED)
    write(tmp_path / "2024-02-01.parquet", later)
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", vocabulary={"min_count": 1})
    build(config, store, "2024-01-01")
    manifests = build(config, store, "2024-02-01")
    assert rows(store, "user", "2024-02-01") == [("a", 0, 0), ("b", 1, 0), ("c", 2, 1), ("z", 3, 3), ("d", 4, 2)]
    found = rows_of(store, "vocabulary/user", "2024-02-01")
    assert [r["first_snapshot"] for r in found] == ["2024-01-01"] * 3 + ["2024-02-01"] * 2
    assert manifests["user"].details["known"] == 3 and manifests["user"].details["new"] == 2
    assert "vocabulary/user@2024-01-01" in manifests["user"].parents
    # Made again, the older snapshot does not look at the newer one.
    before = rows(store, "user", "2024-01-01")
    vocabulary.build(config, store, "2024-01-01")
    assert rows(store, "user", "2024-01-01") == before


def test_ids_that_become_text_keep_their_rows(tmp_path):
    store = store_at(tmp_path)
    write(tmp_path / "2024-01-01.parquet", [(7, "fav", 9), (7, "fav", 8)])
    write(tmp_path / "2024-02-01.parquet", [("7", "fav", "9"), ("new", "fav", "9")])
    write(tmp_path / "2024-03-01.parquet", [(7, "fav", 9), (5, "fav", 9)])
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet")
    for snapshot in ("2024-01-01", "2024-02-01", "2024-03-01"):
        build(config, store, snapshot)
    assert rows(store, "user", "2024-03-01") == [("7", 0, 1), ("new", 1, 0), ("5", 2, 1)]
    assert rows(store, "item", "2024-03-01") == [("8", 0, 0), ("9", 1, 2)]


def test_rare_entities_get_no_row_unless_they_have_one(tmp_path):
    store = store_at(tmp_path)
    write(tmp_path / "2024-01-01.parquet", [*NAMED, ("c", "fav", "x")])
    write(tmp_path / "2024-02-01.parquet", [("a", "fav", "x"), ("b", "fav", "x"), ("b", "fav", "y"), ("e", "fav", "x")])
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", vocabulary={"min_count": 2})
    build(config, store, "2024-01-01")
    manifests = build(config, store, "2024-02-01")
    assert {id for id, *_ in rows(store, "user", "2024-02-01")} == {"a", "b", "c"}
    assert manifests["user"].details["below_min_count"] == 1


def test_a_vocabulary_grows_from_the_newest_earlier_one_that_passed_its_checks(tmp_path):
    store = store_at(tmp_path)
    for day, new in (("01", "a"), ("02", "held"), ("03", "b")):
        write(tmp_path / f"2024-01-{day}.parquet", [("z", "follows", "y"), (new, "follows", "y"), ("z", "fav", "i")])
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", vocabulary={"min_count": 1})
    build(config, store, "2024-01-01")
    build(config, store, "2024-01-02")
    held = store.manifest("vocabulary/user", "2024-01-02")
    store.judge(held, Verdict("failed", "now", [{"name": "x", "passed": False, "blocking": True}]))
    manifests = build(config, store, "2024-01-03")
    assert manifests["user"].details["earlier_snapshot"] == "2024-01-01"
    known = {id for id, *_ in rows(store, "user", "2024-01-03")}
    assert "a" in known and "b" in known and "held" not in known


def test_an_older_snapshot_made_later_is_refused_where_an_entity_would_have_two_rows(tmp_path):
    store = store_at(tmp_path)
    write(tmp_path / "2024-01-01.parquet", [("b", "follows", "b"), ("a", "follows", "b"), ("b", "fav", "i")])
    write(tmp_path / "2024-01-02.parquet", [("a", "follows", "a"), ("b", "follows", "a"), ("a", "fav", "i")])
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", vocabulary={"min_count": 1})
    build(config, store, "2024-01-02")
    with pytest.raises(UserError, match=r"vocabulary/user of snapshot 2024-01-01: 2 entities would get other rows"):
        build(config, store, "2024-01-01")
    assert not store.exists("vocabulary/user", "2024-01-01")


def test_indexed_ids_are_their_rows(tmp_path):
    path = write(tmp_path / "e.parquet", [(3, 1, 0), (0, 0, 3)])
    given, counted = store_at(tmp_path / "given"), store_at(tmp_path / "counted")
    build(make_config(path, {"user": 6, "item": 2}, source={"ids": "indexed"}), given)
    build(make_config(path, source={"ids": "indexed"}), counted)
    assert rows(given, "user") == [(0, 0, 1), (1, 1, 0), (2, 2, 0), (3, 3, 2), (4, 4, 0), (5, 5, 0)]
    assert rows(counted, "user") == rows(given, "user")[:4]
    assert rows(counted, "item") == [(0, 0, 1)]


def test_indexes_that_are_hardly_rows_are_one_clear_error(tmp_path):
    path = write(tmp_path / "e.parquet", [(10**15, 1, 0)])
    with pytest.raises(UserError, match=r"hardly rows; set source\.ids to named"):
        build(make_config(path, source={"ids": "indexed"}), store_at(tmp_path))


def test_a_vocabulary_file_gives_the_first_rows(tmp_path):
    vocab = write(tmp_path / "v.parquet", [("c", 1), ("q", 0)], ("id", "row"))
    config = make_config(write(tmp_path / "e.parquet", NAMED))
    data = config.model_dump(exclude_none=True)
    data["model"]["embeddings"]["tables"][0]["vocab"] = str(vocab)
    config = type(config).model_validate(data)
    store = store_at(tmp_path)
    build(config, store)
    assert rows(store, "user") == [("q", 0, 0), ("c", 1, 2), ("a", 2, 3), ("b", 3, 2)]
    write(tmp_path / "v.parquet", [("c", 1), ("q", 5)], ("id", "row"))
    with pytest.raises(UserError, match=r"tables\[0\]\.vocab: .*use the rows 0 to 1 once each"):
        build(config, store_at(tmp_path / "other"))
    write(tmp_path / "v.parquet", [("c", 1)], ("id", "place"))
    with pytest.raises(UserError, match=r"needs the columns id and row \(columns there: id, place\)"):
        build(config, store_at(tmp_path / "third"))


def test_a_vocabulary_that_outgrows_its_table_is_one_clear_error(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", NAMED), {"user": 2, "item": 5})
    with pytest.raises(UserError, match=r"tables\[0\]\.num_embeddings: user has 3 entities, more than 2"):
        build(config, store_at(tmp_path))


def test_an_empty_vocabulary_is_one_clear_error(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", NAMED[:2]))
    with pytest.raises(UserError, match="vocabulary/item: no entity of this type: no edge of its relations was kept"):
        build(config, store_at(tmp_path))
    config = make_config(write(tmp_path / "e.parquet", NAMED), vocabulary={"min_count": 9})
    with pytest.raises(UserError, match=r"all 3 have fewer edges than vocabulary\.min_count \(9\); lower it"):
        build(config, store_at(tmp_path))
