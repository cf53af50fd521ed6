"""A source that is a query: run by DuckDB, and what it gives kept as Parquet."""

from __future__ import annotations

import re

import duckdb

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, literal

_URL = re.compile(r"'([a-z][a-z0-9+.-]*://[^']*)'")


def stage(con: duckdb.DuckDBPyConnection, sql: str, folder: str | None, path: str, origin: str) -> None:
    """Write what the query `sql` gives to the Parquet file `path`, as a stream.

    Relative files in it are relative to `folder` (None: the working directory). `origin` is what messages call it.

    Raises:
        UserError: It is not one SELECT, or DuckDB cannot run it.
    """
    try:
        with explained(origin):
            _copy(con, sql, folder, path, origin)
    finally:
        con.execute("RESET file_search_path")


def _copy(con: duckdb.DuckDBPyConnection, sql: str, folder: str | None, path: str, origin: str) -> None:
    try:
        statements = con.extract_statements(sql)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError(f"{origin}: must be one SELECT; make it one (views and tables can be WITH clauses)")
        for url in _URL.findall(sql):
            database.register(con, url)
        if folder is not None:
            con.execute(f"SET file_search_path = {literal(folder)}")
        # A view and not a subquery, as the query may end in a semicolon and comments.
        con.execute(f"CREATE OR REPLACE TEMP VIEW source_query AS {sql}")
        con.execute(f"COPY (FROM source_query) TO {literal(path)} (FORMAT parquet, COMPRESSION snappy)")
    except duckdb.OutOfMemoryException:
        raise  # `explained` knows what helps
    except (duckdb.Error, ImportError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{origin}: DuckDB cannot run it: {reason}; correct the SQL") from error
