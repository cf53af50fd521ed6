"""The summary tells what the tables' manifests hold, and asks for examples in one form only."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.views import release_tables, summary
from twhin_pipeline.views.console import comparison_table

SNAPSHOT = "2025-01-01"
CONFIG = parse_config(
    {
        "source": {"path": "edges.parquet"},
        "model": {
            "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
            "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
        },
    }
)
MODEL = {
    "edges": 12_000,
    "seconds": 3.0,
    "edges_per_second": 4_000.0,
    "world_size": 2,
    "first_loss": 4.5,
    "final_loss": 2.25,
}


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with the tables that the summary reads, small."""
    store = Store(str(tmp_path))
    degrees = {"user": [3, 9, 9, 1, 2, 5, 4], "item": [1]}
    tables = {
        "raw_edges": (pa.table({"lhs": ["a"] * 33}), {"duplicates_merged": 1_234}),
        "raw_edges_rejected": (pa.table({"lhs": ["a", "b"]}), {}),
        "twhin_model": (pa.table({"x": [1]}), MODEL),
    }
    for entity, of in degrees.items():
        ids = [f"{entity}{i}" for i in range(len(of))]
        tables[f"vocabulary/{entity}"] = (pa.table({"id": ids, "row": range(len(of)), "degree": of}), {})
    for asset, (table, details) in tables.items():
        with store.replace(asset, SNAPSHOT, config_hash="0") as draft:
            draft.write(table)
            draft.details = details
    return store


def test_sizes_and_speed_are_those_of_the_manifests(store):
    told = dict(summary.facts(CONFIG, store, SNAPSHOT))
    assert told["edges"] == "33 of 1 relations (2 rejected, 1,234 duplicates merged)"
    assert told["entities"] == "8 (user 7, item 1)"
    assert told["training"] == "12,000 edges in 3.0 s, 4,000 edges/s, by 2 process(es); loss 4.500 to 2.250"


def test_departed_ids_are_none_of_the_entities_and_are_counted_apart(store):
    table = store.read("vocabulary/user", SNAPSHOT)
    with store.replace("vocabulary/user", SNAPSHOT, config_hash="0") as draft:
        draft.write(table.set_column(2, "degree", pa.array([3, 9, 9, 1, 2, 0, 0])))
        draft.details = {"departed": 2, "evicted": 1}
    text = dict(summary.facts(CONFIG, store, SNAPSHOT))["entities"]
    assert text == "6 (user 5, item 1); without an edge in this snapshot: 2 (user 2)"
    assert summary.entities(CONFIG, store, SNAPSHOT) == ({"user": 5, "item": 1}, {"user": 2, "item": 0})


def test_examples_are_the_best_connected_where_none_are_named(store):
    assert summary.chosen(CONFIG, store, SNAPSHOT, None) == ("user", ["user1", "user2", "user5", "user6", "user0"])


def test_examples_are_those_that_are_named(store):
    assert summary.chosen(CONFIG, store, SNAPSHOT, "item:x, y") == ("item", ["x", "y"])


@pytest.mark.parametrize("examples", ["item", "item:", "x,y"])
def test_examples_of_another_form_are_refused(store, examples):
    with pytest.raises(UserError, match="must look like package:vim,nginx"):
        summary.chosen(CONFIG, store, SNAPSHOT, examples)


def test_a_missing_table_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="make it with `twhin ingest --snapshot 2025-01-01`"):
        summary.facts(CONFIG, Store(str(tmp_path)), SNAPSHOT)


def evaluated(store: Store, **details) -> None:
    """Write an evaluation of 237 relations; a larger number has more edges."""
    rows = [(f"r{i:03d}", i) for i in range(237)] + [("all", 5_000)]
    table = pa.Table.from_pylist(
        [
            {"relation": name, "side": "both", "metric": "filtered_mrr", "value": 0.5, "baseline": 0.25, "edges": edges}
            for name, edges in rows
        ]
    )
    with store.replace("evaluation", SNAPSHOT, config_hash=details.pop("config_hash", "0")) as draft:
        draft.write(table)
        draft.details = {
            "metrics": {"filtered_mrr": 0.5},
            "baseline": {"filtered_mrr": 0.25},
            "edges": 5_000,
            **details,
        }


def test_of_many_relations_the_largest_have_a_line_and_the_others_are_counted(store):
    """A knowledge graph has hundreds; `all` and the largest are what a run's end has room for."""
    evaluated(store)
    table, details = store.read("evaluation", SNAPSHOT), store.manifest("evaluation", SNAPSHOT).details
    shown, more = comparison_table(table, details, summary.MOST_RELATIONS)
    assert more == 237 - summary.MOST_RELATIONS
    assert list(shown.columns[0].cells) == [*(f"r{i:03d}" for i in range(236, 216, -1)), "all"]
    assert comparison_table(table, details)[1] == 0


def test_the_head_says_which_store_configuration_files_and_times_it_is_about(store):
    evaluated(store, config_hash=CONFIG.hash())
    told = dict(summary.about(CONFIG, store, SNAPSHOT, "mine.yaml"))
    assert told == {"store": store.root, "config": "mine.yaml", "source": "unknown files"}
    assert "config" not in dict(summary.about(CONFIG, store, SNAPSHOT, None))


def test_a_configuration_that_the_run_did_not_have_is_told(store):
    evaluated(store, config_hash="of another one")
    assert dict(summary.about(CONFIG, store, SNAPSHOT, "mine.yaml"))["config"] == (
        "mine.yaml, but the run had other values than it has now"
    )


def test_the_source_is_its_files_and_the_range_of_their_times():
    days = [{"time_range": ["2026-10-02T08:00:00", "2026-10-30T23:59:54"]}, {"time_range": None},
            {"time_range": ["2026-10-01T00:00:02", "2026-10-03T00:00:00"]}, {}]  # fmt: skip
    assert summary.source_text({"files": ["a.csv"], "sources": days}) == (
        "a.csv; times 2026-10-01T00:00:02 to 2026-10-30T23:59:54"
    )
    assert summary.source_text({"files": ["a.csv", "b.csv", "c.csv"]}) == "3 files, a.csv to c.csv"
    assert summary.source_text({}) == "unknown files"


def released(store: Store, decision: str | None = None, reason: str = "") -> Release:
    """Publish what there is, and decide."""
    tables = {"evaluation": store.manifest("evaluation", SNAPSHOT).version}
    release = releases.make(store, SNAPSHOT, tables, {}, None)
    if decision is not None:
        with store.replace("promotion", SNAPSHOT, config_hash="0") as draft:
            draft.details = {"release": release.name, "decision": decision, "reason": reason}
    if decision == "promoted":
        releases.promote(store, release.name, "me", reason)
    return release


def told(store: Store) -> tuple[str, tuple[Any, ...]]:
    """Return what people read about the release, and what programs do."""
    return release_tables.state_in_words(store, SNAPSHOT), tuple(summary._release(store, SNAPSHOT).values())


def test_the_summary_says_whether_the_release_is_current_or_held_and_why(store):
    evaluated(store)
    assert told(store) == (f"none yet; `twhin publish --snapshot {SNAPSHOT}` makes one", (None, False, None, None))
    waiting = released(store).name
    words = f"{waiting} is not decided about yet; `twhin decide --snapshot {SNAPSHOT}` does so"
    assert told(store) == (words, (waiting, False, None, None))
    first = released(store, "promoted", "passed 9 gates").name
    assert told(store) == (f"{first} is current: passed 9 gates", (first, True, "promoted", "passed 9 gates"))
    held = released(store, "held", "new: 60%, limit 0.5").name
    words = f"{held} is held by a gate: new: 60%, limit 0.5"
    assert told(store) == (words, (held, False, "held", "new: 60%, limit 0.5"))
    releases.promote(store, held, "me", "looked at by hand")
    assert told(store) == (f"{held} is current: looked at by hand", (held, True, "promoted", "looked at by hand"))
    releases.promote(store, first, "me", "rollback: clicks fell")
    words = f"{held} was current; {first} is now: rollback: clicks fell"
    assert told(store) == (words, (held, False, "promoted", "looked at by hand"))


def test_a_release_of_another_snapshot_is_not_this_ones(store):
    evaluated(store)
    releases.make(store, f"{SNAPSHOT}1", {}, {}, None)
    assert told(store)[0].startswith("none yet")


def test_a_release_of_earlier_tables_than_those_shown_is_told(store):
    evaluated(store)
    release = released(store, "promoted", "passed 9 gates")
    evaluated(store)
    assert told(store)[0] == f"{release.name} is current, and of earlier tables than these: passed 9 gates"


@pytest.mark.parametrize("after_run", [False, True])
def test_the_release_is_the_first_line_or_after_a_run_the_last(store, capsys, monkeypatch, after_run):
    evaluated(store)
    release = released(store, "held", "worse").name
    monkeypatch.setattr(summary, "neighbors", lambda *_: [])
    with store.replace("raw_edges", SNAPSHOT, config_hash="0") as draft:
        draft.details = {"files": ["shop.csv"], "edges_per_relation": {"likes": 1}}
    with store.replace("embeddings/user", SNAPSHOT, config_hash="0") as draft:
        draft.write(pa.table({"id": ["a"]}))
    summary.show(CONFIG, store, SNAPSHOT, after_run=after_run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    line = f"release   {release} is held by a gate: worse"
    assert lines.count(line) == 1 and lines.index(line) == (len(lines) - 1 if after_run else 1)


def test_the_summary_shows_the_head_the_comparison_and_the_warnings(store, capsys, monkeypatch):
    evaluated(store, warnings=["r236: the model's filtered MRR of 0.500 is below ALS's 0.700", "Try: patience."])
    monkeypatch.setattr(summary, "neighbors", lambda *_: [])
    monkeypatch.setattr(summary, "_where", lambda *_: None)
    with store.replace("raw_edges", SNAPSHOT, config_hash="0") as draft:
        draft.write(pa.table({"lhs": ["a"]}))
        draft.details = {"files": ["shop.csv"], "edges_per_relation": {"likes": 1}}
    summary.show(CONFIG, store, SNAPSHOT, config_path="mine.yaml")
    shown = capsys.readouterr().out
    for text in (f"Snapshot {SNAPSHOT}", store.root, "mine.yaml", "shop.csv", "*0.500", "and 217 relations"):
        assert text in shown
    assert "warning: r236: the model's filtered MRR of 0.500 is below ALS's 0.700\nwarning: Try: patience." in shown
