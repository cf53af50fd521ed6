"""What is left of training edges once their training set is removed: enough to tell that a model has seen an edge.

The table `seen_edges` stands for a model whose training set has gone, and for all models before it. It has a number of
64 bits for each edge that any of them was trained on, from the edge's relation and ids, and the last snapshot at which
one was. Of a billion edges, with a million held-out ones, one in 18,000 tables would leave out an edge by mistake.
"""

from __future__ import annotations

import pyarrow as pa

from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.store.database import literal

TABLE = "seen_edges"
SCHEMA = pa.schema([pa.field("edge", pa.uint64(), nullable=False), pa.field("trained", pa.date32(), nullable=False)])


def number(relation: tuple[str, str, str], lhs: str, rhs: str) -> str:
    """Return the SQL of an edge's number, a UBIGINT; it is the same on every machine and in every version.

    Args:
        relation: Its name and the entity types of its sides.
        lhs: The SQL of the head's id.
        rhs: The SQL of the tail's id.
    """
    parts = [*map(literal, relation), f"CAST({lhs} AS VARCHAR)", f"CAST({rhs} AS VARCHAR)"]
    return f"md5_number_lower(concat_ws(chr(31), {', '.join(parts)}))"


def of_model(store: Store, snapshot: str, version: str) -> Manifest | None:
    """Return the table that stands for a model of a snapshot, by the model's version; None where there is none."""
    base = store.seen_as(None)
    for made in reversed(base.versions_of(TABLE, snapshot)):
        manifest = base.manifest(TABLE, snapshot, made)
        if manifest.details["model"] == version:
            return manifest
    return None
