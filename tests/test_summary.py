"""The summary tells what the tables' manifests hold, and asks for examples in one form only."""

from __future__ import annotations

import pyarrow as pa
import pytest

from twhin_pipeline import summary
from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

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


def test_of_many_relations_the_largest_have_a_line_and_the_others_are_counted():
    """A knowledge graph has hundreds; `all` and the largest are what a run's end has room for."""
    rows = [(f"r{i:03d}", i) for i in range(237)] + [("all", 5_000)]
    columns = {"relation": [name for name, _ in rows], "edges": [edges for _, edges in rows]}
    kept, more = summary.largest(pa.table({**columns, "metric": ["filtered_mrr"] * 238}))
    assert more == 237 - summary.MOST_RELATIONS
    assert set(kept["relation"].to_pylist()) == {"all", *(f"r{i}" for i in range(217, 237))}
    assert summary.largest(kept)[1] == 0
