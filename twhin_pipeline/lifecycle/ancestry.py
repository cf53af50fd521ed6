"""What stays of a model's training edges when its training set goes: the table `seen_edges`.

A model that started from an earlier one has seen the earlier one's training edges, and those of all models before it. A
chain that starts each day from the day before would need the training sets of all days. So before one is removed, its
edges become numbers of 64 bits, together with those of all models before it. A chain has one such table, whose size is
that of the distinct edges of `retention.seen_edges_days` days.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, timedelta

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.evaluation import ancestors, seen_edges
from twhin_pipeline.evaluation.ancestors import Trained
from twhin_pipeline.store import Manifest, Store, database

BATCH_ROWS = 1 << 17


def write_seen_edges(con: duckdb.DuckDBPyConnection, home: Store, model: Manifest, days: int) -> Manifest:
    """Write the numbers of the edges that a model, and those before it, were trained on.

    Args:
        con: Reads the store's tables.
        home: The store, or its view, that has the model.
        model: The model's manifest.
        days: Edges that no model was trained on for so many days before this one's snapshot are forgotten.

    Raises:
        UserError: The model's training set cannot be read.
    """
    own = ancestors.of_model(home, model)
    unknown: list[str] = []
    earlier = list(ancestors.trained_on(home, ancestors.origins_of(model), unknown))
    for path in (file for one in (own, *earlier) for file in _files(one)):
        if "://" in path:
            database.register(con, path)
    parts = [query for one in (own, *earlier) for query in _numbers(one, own)]
    since = date.fromisoformat(model.snapshot) - timedelta(days=days)
    con.execute(
        "CREATE OR REPLACE TEMP TABLE numbered AS SELECT edge, max(trained) AS trained "
        f"FROM ({' UNION ALL '.join(parts)}) GROUP BY edge"
    )
    query = f"SELECT edge, trained FROM numbered WHERE trained >= {database.literal(str(since))}::DATE ORDER BY edge"
    base = home.seen_as(None)
    with base.replace(seen_edges.TABLE, model.snapshot, config_hash=model.config_hash) as draft:
        # Numbers in order differ little from one to the next.
        coding = {"column_encoding": {"edge": "DELTA_BINARY_PACKED"}, "use_dictionary": ["trained"]}
        with (
            draft.local_file("part-00000.parquet") as path,
            pq.ParquetWriter(path, seen_edges.SCHEMA, compression="zstd", **coding) as writer,
        ):
            kept = 0
            for batch in con.sql(query).to_arrow_reader(BATCH_ROWS):
                kept += len(batch)
                writer.write_table(pa.Table.from_batches([batch]).cast(seen_edges.SCHEMA))
        total = con.execute("SELECT count(*) FROM numbered").fetchall()[0][0]
        forgotten = sum("forgotten" in note for one in earlier for note in one.notes)
        draft.details = {
            "model": model.version,
            "ancestors": 1 + sum(one.ancestors for one in earlier),
            "edges": kept,
            "forgotten": total - kept + forgotten,
            "since": str(since),
            "unknown": unknown,
        }
    con.execute("DROP TABLE numbered")
    return base.manifest(seen_edges.TABLE, model.snapshot, draft.version)


def _files(trained: Trained) -> list[str]:
    return [*trained.files, *(file for files in (trained.vocabularies or {}).values() for file in files)]


def _numbers(trained: Trained, own: Trained) -> Iterator[str]:
    """Yield the SQL of the numbers of an ancestor's edges; of a checkpoint's, whose rows are the model's `own`."""
    if trained.numbers:
        yield f"SELECT edge, trained FROM {database.parquet(trained.files)}"
        return
    day = f"{database.literal(trained.snapshot)}::DATE"
    vocabularies = trained.vocabularies or own.vocabularies or {}
    for rel, relation in enumerate(trained.relations or own.relations):
        _, left, right = relation
        yield (
            f"SELECT {seen_edges.number(relation, 'l.id', 'r.id')} AS edge, {day} AS trained "
            f"FROM {database.parquet(trained.files)} e "
            f"JOIN {database.parquet(vocabularies[left])} l ON l.row = e.lhs "
            f"JOIN {database.parquet(vocabularies[right])} r ON r.row = e.rhs WHERE e.rel = {rel}"
        )
