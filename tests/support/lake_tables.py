"""Tables of Delta Lake and Iceberg, written by the libraries that own the formats."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pyarrow as pa

SCHEMA = pa.schema(
    [("who", pa.string()), ("rel", pa.string()), ("what", pa.string()), ("at", pa.timestamp("us")), ("n", pa.int64())]
)
DAY = datetime(2024, 12, 30)


def table(rows):
    names = SCHEMA.names
    return pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], schema=SCHEMA)


BATCHES = [
    table([("a", "fav", "x", DAY, 1), ("b", "fav", "x", None, 2)]),
    table([("a", "reply", "y", DAY, 3), (None, "fav", "x", DAY, 4)]),
]


def write_delta(path: Path) -> str:
    from deltalake import write_deltalake

    for batch in BATCHES:
        write_deltalake(str(path), batch, mode="append")
    return str(path)


def write_iceberg(path: Path) -> str:
    from pyiceberg.catalog.sql import SqlCatalog

    path.mkdir(parents=True)
    catalog = SqlCatalog("test", uri=f"sqlite:///{path}/catalog.db", warehouse=f"file://{path}")
    catalog.create_namespace("graph")
    made = catalog.create_table("graph.edges", SCHEMA, location=f"file://{path}/edges")
    for batch in BATCHES:
        made.append(batch)
    return str(path / "edges")


WRITERS = {"delta": write_delta, "iceberg": write_iceberg}
