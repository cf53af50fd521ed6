"""The rows of event logs that a snapshot is made of: has one of them changed, come late, or gone?

A log's files change every day, and a past day's rows in them hardly ever do. Where they do, that day's tables are made
anew, and a held day is tried again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from twhin_pipeline import scratch
from twhin_pipeline.graph import source
from twhin_pipeline.graph.scan import Scan, named, open_input, parquet, time_sql_of, window
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, name

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig


def digest(config: TwhinConfig, snapshot: str) -> str:
    """Return 12 hex digits that change when a row of an event log within the snapshot's window does.

    Empty where no source has files of a log. It reads the logs once, and text files twice.

    Raises:
        UserError: A file cannot be read, or lacks a column.
    """
    known = set(config.model.relation_names) if config.model.every_other is None else None
    with database.connect(config) as con, scratch.folder("log") as folder:
        scans = [
            scan
            for number, one in enumerate(source.inputs(config, snapshot))
            if _counts(one)
            for scan in open_input(con, one, number, f"{folder}/{number}", known)
        ]
        return of_scans(con, scans)


def of_scans(con: duckdb.DuckDBPyConnection, scans: Sequence[Scan]) -> str:
    """Return the digest of those of `scans` that are of event logs, whatever the order of their rows."""
    found = []
    for scan in scans:
        if not _counts(scan.input):
            continue
        columns = scan.input.columns
        assert columns.time is not None
        fields = {f"raw_{field}": name(column) for field, column in named(scan.input, scan.rel)}
        taken = ", ".join(f"{column} AS {field}" for field, column in fields.items())
        when = time_sql_of(scan.types[columns.time], columns.time_unit)
        start, end = window(scan.input)
        outside = f"time >= TIMESTAMP '{end}'" + (f" OR time < TIMESTAMP '{start}'" if start is not None else "")
        with explained(scan.input.field):
            rows = con.execute(
                f"SELECT count(*), sum(hash({', '.join(fields)})) FROM (SELECT *, {when} AS time "
                f"FROM (SELECT {taken} FROM {parquet(scan.files)})) WHERE NOT coalesce({outside}, false)"
            ).fetchall()
        found.append(f"{scan.source} {scan.relation or ''} {rows[0]}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:12] if found else ""


def _counts(one: source.Input) -> bool:
    return one.format != "sql" and source.is_log(one.source)
