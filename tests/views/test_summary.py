"""The summary tells what the tables' manifests hold, and asks for examples in one form only."""

from __future__ import annotations

import pyarrow as pa
import pytest

from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.views import summary
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
