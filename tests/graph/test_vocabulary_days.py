"""Vocabularies day after day: whatever the days bring, a row never changes its owner."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from edge_files import make_config, pass_checks, rows_of, store_at, write
from hypothesis import given, settings
from hypothesis import strategies as st

from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.store import Store

USERS = "abcdefgh"
Day = list[tuple[str, str, str]]
COLUMNS = ("id", "row", "degree", "first_snapshot", "last_snapshot", "evicted")


def date(number: int) -> str:
    return f"2025-01-{number + 1:02d}"


def make_day(folder: Path, store: Store, keep: int | None, number: int, edges: Day, *, compact: bool = False) -> None:
    """Ingest a day's edges, make its vocabularies, and run their checks."""
    config = config_of(folder, keep)
    write(folder / f"{date(number)}.parquet", edges)
    raw_edges.ingest(config, store, date(number))
    vocabulary.build(config, store, date(number), compact=compact)
    checks.run_blocking(config, store, date(number), ["vocabulary/user", "vocabulary/item"])
    pass_checks(store, date(number))


def config_of(folder: Path, keep: int | None) -> Any:
    return make_config(f"{folder}/{{snapshot}}.parquet", vocabulary={"keep_departed": keep})


def table(store: Store, number: int, entity: str = "user") -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in COLUMNS) for row in rows_of(store, f"vocabulary/{entity}", date(number))]


@dataclass(frozen=True)
class Entry:
    """What a plain account of the days knows of an id."""

    row: int
    degree: int
    first: str
    last: str
    evicted: bool = False


def plain(days: list[Day], keep: int | None) -> list[dict[str, Entry]]:
    """Return the users' vocabulary after each day, by a loop over ids."""
    known: dict[str, Entry] = {}
    after = []
    for number, edges in enumerate(days):
        degree: dict[str, int] = {}
        for lhs, relation, rhs in set(edges):
            for one in (lhs, rhs) if relation == "follows" else (lhs,):
                degree[one] = degree.get(one, 0) + 1
        for id, entry in known.items():
            if id in degree:
                known[id] = replace(entry, degree=degree[id], last=date(number), evicted=False)
            else:
                missed = sum(date(day) > entry.last for day in range(number + 1))
                gone = entry.evicted or (keep is not None and missed > keep)
                known[id] = replace(entry, degree=0, evicted=gone)
        new = sorted(set(degree) - set(known), key=lambda id: (-degree[id], id))
        for row, id in enumerate(new, start=len(known)):
            known[id] = Entry(row, degree[id], date(number), date(number))
        after.append(dict(known))
    return after


some_edges = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from(["follows", "fav"]), st.sampled_from(USERS)), max_size=5
)
# One user and one item have an edge each day: a day without any is refused by the source's checks.
always = [("z", "fav", "i")]


@settings(max_examples=12, deadline=None)
@given(days=st.lists(some_edges, min_size=2, max_size=6), keep=st.sampled_from([0, 1, 2, 30, None]))
def test_rows_never_change_owner_and_the_rest_is_as_a_plain_account_has_it(days: list[Day], keep: int | None) -> None:
    days = [[*day, *always] for day in days]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = store_at(folder)
        owners: dict[int, str] = {}
        for number, (edges, expected) in enumerate(zip(days, plain(days, keep), strict=True)):
            make_day(folder, store, keep, number, edges)
            found = table(store, number)
            assert [row for _, row, *_ in found] == list(range(len(found)))
            for id, row, *_ in found:
                assert owners.setdefault(row, id) == id
            assert len(found) == len(owners), "no id is lost"
            assert found == sorted(
                ((id, e.row, e.degree, e.first, e.last, e.evicted) for id, e in expected.items()),
                key=lambda one: one[1],
            )


@settings(max_examples=5, deadline=None)
@given(days=st.lists(some_edges, min_size=3, max_size=4), keep=st.sampled_from([0, 1, None]))
def test_a_day_made_again_gives_the_same_rows(days: list[Day], keep: int | None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = store_at(folder)
        for number, edges in enumerate(days):
            make_day(folder, store, keep, number, [*edges, *always])
        before = [table(store, number) for number in range(len(days))]
        for number in (1, 0):
            make_day(folder, store, keep, number, [*days[number], *always])
        assert [table(store, number) for number in range(len(days))] == before


def test_an_evicted_id_finds_its_row_again_and_no_other_id_gets_it(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    days = [[("a", "fav", "i")], [], [], [("c", "fav", "i")], [("a", "fav", "i")]]
    evicted, rows = [], []
    for number, edges in enumerate(days):
        make_day(tmp_path, store, 1, number, [*edges, *always])
        (entry,) = [one for one in table(store, number) if one[0] == "a"]
        evicted.append(entry[-1])
        rows.append(entry[1])
    assert evicted == [False, False, True, True, False]
    assert rows == [0] * 5
    assert store.manifest("vocabulary/user", date(3)).details["evicted"] == 1
    assert [one[:2] for one in table(store, 4)] == [("a", 0), ("z", 1), ("c", 2)]


def test_days_out_of_order_are_refused(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 1, 3, [("b", "follows", "b"), ("b", "fav", "i")])
    with pytest.raises(UserError, match="would get other rows than in snapshot 2025-01-04"):
        make_day(tmp_path, store, 1, 1, [("a", "follows", "a"), ("a", "follows", "b"), ("a", "fav", "i")])
    assert not store.exists("vocabulary/user", date(1))


def test_an_entity_type_without_an_edge_keeps_its_ids_and_all_of_them_are_alike(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 5, 0, [("a", "follows", "b"), ("a", "fav", "i"), ("a", "fav", "j")])
    make_day(tmp_path, store, 5, 1, [("a", "follows", "c")])
    assert [(one[0], one[2]) for one in table(store, 1, "item")] == [("i", 0), ("j", 0)]
    assert present_rows(store, date(1), "item") is None
    rows = present_rows(store, date(1), "user")
    assert rows is not None and rows.tolist() == [0, 2]
    assert present_rows(store, date(0), "user") is None, "every id has an edge"


def test_a_day_of_new_ids_only_leaves_the_others_where_they_were(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 0, 0, [("a", "fav", "i"), ("b", "fav", "i")])
    make_day(tmp_path, store, 0, 1, [("c", "fav", "k"), ("d", "fav", "k"), ("d", "follows", "c")])
    assert [(one[0], one[1], one[-1]) for one in table(store, 1)] == [
        ("a", 0, True), ("b", 1, True), ("c", 2, False), ("d", 3, False),
    ]  # fmt: skip


def test_a_snapshot_without_any_edge_is_refused_before_ids_are_looked_at(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 0, 0, [("a", "fav", "i")])
    before = table(store, 0)
    config = config_of(tmp_path, 0)
    nothing = pa.schema([(name, pa.string()) for name in ("lhs", "rel", "rhs")]).empty_table()
    pq.write_table(nothing, tmp_path / f"{date(1)}.parquet")
    with pytest.raises(UserError, match="no edge for snapshot 2025-01-02"):
        raw_edges.ingest(config, store, date(1))
    assert table(store, 0) == before


def test_a_vocabulary_of_an_earlier_version_is_read_without_the_new_columns(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 1, 0, [("a", "fav", "i"), *always])
    for entity in ("user", "item"):
        old = store.read(f"vocabulary/{entity}", date(0)).drop_columns(["last_snapshot", "evicted"])
        with store.replace(f"vocabulary/{entity}", date(0), config_hash="test") as draft:
            draft.write(old)
    pass_checks(store, date(0))
    make_day(tmp_path, store, 1, 1, always)
    make_day(tmp_path, store, 1, 2, always)
    assert [one[-2:] for one in table(store, 1) if one[0] == "a"] == [(date(0), False)]
    assert [one[-2:] for one in table(store, 2) if one[0] == "a"] == [(date(0), True)]


def test_compaction_leaves_out_evicted_ids_and_says_which_row_each_other_one_had(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 0, 0, [("a", "fav", "i"), ("b", "fav", "i"), ("c", "fav", "i"), *always])
    make_day(tmp_path, store, 0, 1, [("b", "fav", "i"), *always])
    make_day(tmp_path, store, 0, 2, [("b", "fav", "i"), ("c", "fav", "i"), ("new", "fav", "i")], compact=True)
    found = store.read("vocabulary/user", date(2))
    assert list(zip(*(found[name].to_pylist() for name in ("id", "row", "row_before")), strict=True)) == [
        ("b", 0, 1), ("c", 1, 2), ("z", 2, 3), ("new", 3, None),
    ]  # fmt: skip
    assert pc.any(found["evicted"]).as_py() and not found["evicted"].to_pylist()[0]
    details = store.manifest("vocabulary/user", date(2)).details
    assert details["compacted"] == date(2) and details["left_out"] == 1
    # The days after grow from it; made again, by hand or by a run, it has the same rows; earlier days keep theirs.
    make_day(tmp_path, store, 0, 3, [("a", "fav", "i"), *always])
    assert [one[:2] for one in table(store, 3)] == [("b", 0), ("c", 1), ("z", 2), ("new", 3), ("a", 4)]
    assert store.manifest("vocabulary/user", date(3)).details["compacted"] == date(2)
    make_day(tmp_path, store, 0, 2, [("b", "fav", "i"), ("c", "fav", "i"), ("new", "fav", "i")])
    assert store.read("vocabulary/user", date(2)).equals(found)
    before = table(store, 0)
    make_day(tmp_path, store, 0, 0, [("a", "fav", "i"), ("b", "fav", "i"), ("c", "fav", "i"), *always])
    assert table(store, 0) == before


def test_a_row_that_changed_without_a_compaction_fails_the_check(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    make_day(tmp_path, store, 0, 0, [("a", "fav", "i"), ("b", "fav", "i")])
    make_day(tmp_path, store, 0, 1, [("a", "fav", "i"), ("b", "fav", "i")])
    made = store.manifest("vocabulary/user", date(1))
    rows = store.read("vocabulary/user", date(1))
    swapped = rows.set_column(0, "id", rows["id"].take(np.array([1, 0])))
    with store.replace("vocabulary/user", date(1), config_hash="test", parents=made.parents) as draft:
        draft.write(swapped)
    with pytest.raises(UserError, match="rows_kept"):
        checks.run_blocking(config_of(tmp_path, 0), store, date(1), ["vocabulary/user"])


def test_compaction_needs_an_earlier_vocabulary_and_named_ids(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    with pytest.raises(UserError, match="no snapshot before 2025-01-01"):
        make_day(tmp_path, store, 0, 0, [("a", "fav", "i")], compact=True)
    path = write(tmp_path / "indexed.parquet", [(0, 0, 0)])
    with pytest.raises(UserError, match="rows themselves"):
        vocabulary.build(make_config(path, source={"ids": "indexed"}), store, date(0), compact=True)
