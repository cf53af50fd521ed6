"""The same graph prepared by both engines, and what their tables have in common."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
from edge_files import make_config, store_at

from twhin_pipeline.checks import checks
from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.stages import engine
from twhin_pipeline.store import Store

ON_SPARK = {"name": "spark", "master": "local[2]"}
SMALL = {"global_negatives": 12, "in_batch_negatives": 6}
COLUMNS = ("lhs", "rel", "rhs", "w", "t", "s")
EMBEDDED = ("log_state", "log_rows")
"""Details of an event log that only the embedded engine keeps: they cost another pass over it."""
Row = tuple[Any, ...]


def rows(count: int, users: int = 60, items: int = 40, seed: int = 1, integers: bool = False) -> list[Row]:
    """Return rows of `COLUMNS`: some of them repeat an edge, popular heads have many."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        rel = rng.choice(["fav", "reply", "follows"])
        lhs = int(users * rng.random() ** 2)
        rhs = rng.randrange(users) if rel == "follows" else rng.randrange(items)
        ends = (lhs, rhs) if integers else (f"u{lhs}", f"u{rhs}" if rel == "follows" else f"ï{rhs}")
        split = rng.choice(["train", "train", "train", "test", "validation"])
        made.append((ends[0], rel, ends[1], rng.choice([0.5, 1.0, 2.5]), rng.randrange(10**6), split))
    return made


BAD: list[Row] = [
    (None, "fav", "ï1", 1.0, 5, "train"),
    ("", "fav", "ï2", 1.0, 5, "train"),
    ("u1", "likes", "ï3", 1.0, 5, "train"),
    ("u1", "fav", "ï4", -1.0, 5, "train"),
    ("u2", "fav", "ï5", 1.0, 3 * 10**9, "train"),
    ("u3", "fav", "ï6", 2.0, None, "train"),
]
"""No edges, but for the last one, whose time is unknown: no id, an empty one, no relation, a weight, after the day."""


class Both:
    """Two stores, each filled by its engine from the same files."""

    def __init__(self, folder: Path, path: Path | str | None, **sections: Any) -> None:
        sections = {"train_data": SMALL, "validation_data": SMALL, **sections}
        self.configs = [make_config(path, engine=one, **sections) for one in ({"name": "embedded"}, ON_SPARK)]
        self.stores = [store_at(folder / one) for one in ("embedded", "spark")]

    @property
    def each(self) -> list[tuple[TwhinConfig, Store]]:
        """The embedded engine's, then Spark's."""
        return list(zip(self.configs, self.stores, strict=True))

    def prepare(self, snapshot: str, stages: tuple[str, ...] = ("ingest", "vocabulary", "sample")) -> None:
        """Run stages of both engines, and each table's checks."""
        for config, store in self.each:
            for stage in stages:
                getattr(engine, stage)(config, store, snapshot)
                config = relations.resolve(config, store, snapshot)
            made = [table for table in store.assets() if store.exists(table, snapshot)]
            checks.run_blocking(config, store, snapshot, made)

    def assert_equal(self, tables: list[str], snapshot: str) -> None:
        """Assert that tables have the same rows in the same order, of the same types, and the same details."""
        for table in tables:
            one, other = (rows_in_order(store, table, snapshot) for store in self.stores)
            assert [(f.name, f.type) for f in one.schema] == [(f.name, f.type) for f in other.schema], table
            # Whether a column may be null is as each writer has it.
            assert one.cast(other.schema).equals(other), table
            first, second = (store.manifest(table, snapshot) for store in self.stores)
            assert first.settings == second.settings, table
            assert first.schema == second.schema, table
            expected = {key: value for key, value in first.details.items() if key not in EMBEDDED}
            assert {key: second.details[key] for key in expected} == expected, table
            assert first.parents.keys() == second.parents.keys(), table


def rows_in_order(store: Store, table: str, snapshot: str) -> pa.Table:
    """Return a table's rows; those of negatives by epoch and chunk, of which Spark has several files."""
    found = store.read(table, snapshot)
    if table.endswith("negatives"):
        found = found.sort_by([("epoch", "ascending"), ("chunk", "ascending"), ("side", "ascending")])
    return found.combine_chunks()
