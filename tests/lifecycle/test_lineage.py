"""The chain behind a vector is complete, counts the entity's edges rightly, and says what has gone."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import days
import fsspec
import numpy as np
import pytest
import small_store
from edge_files import make_config, write
from small_store import NUM, RELATIONS

from twhin_pipeline import load_model
from twhin_pipeline.config.retention import RetentionConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import file_facts
from twhin_pipeline.graph.raw_edges import ingest
from twhin_pipeline.lifecycle import removal, retention
from twhin_pipeline.lifecycle.lineage import Lineage, trace
from twhin_pipeline.store import Store, database, releases


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "home"))
    for day in range(3):
        days.make(store, day)
    return store


def traced(store: Store, entity: str, id: str, release: str | None = None) -> Lineage:
    with database.connect(store=store) as con:
        return trace(con, store, entity, id, release)


@pytest.mark.parametrize("entity", list(NUM))
def test_every_table_from_the_vectors_to_the_edges_is_that_of_the_release(store: Store, entity: str) -> None:
    names = releases.names(store)
    for name in (None, names[0]):
        release = releases.read(store, name or names[-1])
        found = traced(store, entity, str(small_store.ids(entity)[3]), name)
        assert found.release is not None and found.release["current"] is (name is None)
        assert [one.table for one in found.tables] == [
            f"embeddings/{entity}", "twhin_model", f"vocabulary/{entity}", "training_set/positives", "held_out/test",
            "raw_edges",
        ]  # fmt: skip
        assert all(release.tables[one.table] == one.version for one in found.tables)
        assert (found.row, found.first_snapshot, found.degree) == (3, days.name(0), 1)


def test_edges_are_counted_by_relation_and_side_in_each_table(store: Store) -> None:
    drawn = days.drawn(2, 300)
    counts: Counter[tuple[str, str]] = Counter()
    for lhs, rel, rhs in drawn.tolist():
        name = list(RELATIONS)[rel]
        for side, row, kind in (("lhs", lhs, RELATIONS[name][0]), ("rhs", rhs, RELATIONS[name][1])):
            if kind == "user" and row == 5:
                counts[name, side] += 1
    found = traced(store, "user", small_store.ids("user")[5])
    assert {(one.relation, one.side): one.raw for one in found.edges if one.raw} == dict(counts)
    for one in found.edges:
        assert one.tested is not None and one.raw == one.trained + one.tested
    vector = load_model(store.root).get_embedding("user", small_store.ids("user")[5])
    assert found.length == pytest.approx(float(np.linalg.norm(vector)))
    assert found.trained_edges == sum(one.trained for one in found.edges)


def test_ancestors_are_named_with_what_is_left_of_them(store: Store) -> None:
    assert [(one.snapshot, one.state) for one in traced(store, "user", "u00").ancestors] == [
        (days.name(1), "there"), (days.name(0), "there")
    ]  # fmt: skip
    for day in range(3, 5):
        days.make(store, day)
    policy = RetentionConfig(releases=1, snapshots=1)
    removal.carry_out(store, retention.plan(store, policy, now=days.NOW), "me")
    assert [(one.snapshot, one.state.partition(";")[0]) for one in traced(store, "user", "u00").ancestors] == [
        (days.name(3), "there"), (days.name(2), "removed")
    ]  # fmt: skip
    assert "known by number" in traced(store, "user", "u00").ancestors[1].state


def test_an_unknown_release_type_or_id_is_one_line_with_what_is_known(store: Store) -> None:
    with pytest.raises(UserError, match="unknown release"):
        traced(store, "user", "u00", "2025")
    with pytest.raises(UserError, match=r"unknown entity type 'users'.*user"):
        traced(store, "users", "u00")
    with pytest.raises(UserError, match=r"has no id 'nobody'; `twhin sql`"):
        traced(store, "user", "nobody")
    with pytest.raises(UserError, match="no vectors of 'user'"):
        traced(Store(f"{store.root}/empty"), "user", "u00")


def test_a_source_file_is_recorded_with_its_size_and_time_when_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "edges.parquet", [("a", "fav", "x")])
    os.utime(path, (1_700_000_000, 1_700_000_000.25))
    store = Store(str(tmp_path / "home"))
    details = ingest(make_config(path), store, "2025-01-01").details
    assert details["source_files"] == [
        {"path": str(path), "bytes": os.path.getsize(path), "modified": "2023-11-14T22:13:20.250+00:00"}
    ]


def test_of_a_remote_file_its_size_is_known_and_of_what_is_no_file_only_its_name() -> None:
    fsspec.filesystem("memory").pipe_file("/facts/a.csv", b"12345")
    remote, nothing, query = file_facts.facts(["memory://facts/a.csv", "memory://facts/none", "source.sql"])
    assert remote["bytes"] == 5 and remote["modified"].startswith("20")
    assert (nothing, query) == ({"path": "memory://facts/none"}, {"path": "source.sql"})
