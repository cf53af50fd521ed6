"""Small edge files and configurations for the tests of the data stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.store import Store, Verdict

SNAPSHOT = "2025-01-01"
RELATIONS = [
    {"name": "follows", "lhs": "user", "rhs": "user"},
    {"name": "fav", "lhs": "user", "rhs": "item"},
    {"name": "reply", "lhs": "user", "rhs": "item"},
]


def make_config(path: Path | str | None, sizes: dict[str, int] | None = None, **sections: Any) -> TwhinConfig:
    """Return a configuration of users and items that reads `path`; `split={...}` and so on set other sections."""
    tables = [{"name": name, "embedding_dim": 4} for name in ("user", "item")]
    for table in tables:
        if sizes is not None:
            table["num_embeddings"] = sizes[str(table["name"])]
    data: dict[str, Any] = {
        "model": {"embeddings": {"tables": tables}, "relations": RELATIONS},
        "launch": {"data_threads": 2, "duckdb_memory_limit": "1GB"},
    }
    if path is not None:
        data["source"] = {"path": str(path)}
    for name, fields in sections.items():
        data[name] = fields if not isinstance(fields, dict) else {**data.get(name, {}), **fields}
    return parse_config(data)


def write(path: Path, rows: list[tuple[Any, ...]], names: tuple[str, ...] = ("lhs", "rel", "rhs")) -> Path:
    """Write rows as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in names]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
    return path


def store_at(folder: Path) -> Store:
    """Return an empty store."""
    return Store(str(folder / "home"))


def pass_checks(store: Store, snapshot: str = SNAPSHOT) -> None:
    """Store the verdict that every table of a snapshot has passed its checks."""
    for asset in store.assets():
        if store.exists(asset, snapshot):
            store.judge(store.manifest(asset, snapshot), Verdict("passed", "2025-01-01T00:00:00+00:00"))


def rows_of(store: Store, asset: str, snapshot: str = SNAPSHOT) -> list[dict[str, Any]]:
    """Return a table's rows."""
    return store.read(asset, snapshot).to_pylist()


def triples(store: Store, asset: str = "raw_edges", snapshot: str = SNAPSHOT) -> set[tuple[Any, Any, Any]]:
    """Return a table's edges."""
    return {(row["lhs"], row["rel"], row["rhs"]) for row in rows_of(store, asset, snapshot)}
