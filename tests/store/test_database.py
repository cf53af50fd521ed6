"""DuckDB's errors become one message that names the remedy, wherever they are met."""

from __future__ import annotations

import duckdb
import pytest

from twhin_pipeline.errors import UserError
from twhin_pipeline.store.database import explained

LATE = "SELECT CAST(CASE WHEN a = 2_900_000 THEN 'x' ELSE '1' END AS INTEGER) AS b FROM range(3_000_000) t(a)"


def test_an_error_met_while_a_result_is_streamed_is_explained() -> None:
    reader = duckdb.connect().sql(LATE).to_arrow_reader(1000)
    message = r"^edges: cannot be read \(Conversion Error: Could not convert string 'x'.*write it anew, or correct.*$"
    with pytest.raises(UserError, match=message), explained("edges"):
        sum(len(batch) for batch in reader)


def test_an_error_of_a_query_is_explained() -> None:
    with pytest.raises(UserError, match=r"^edges: cannot be read \(Conversion Error"), explained("edges"):
        duckdb.connect().execute(LATE).fetchall()


def test_too_little_memory_names_the_remedies() -> None:
    con = duckdb.connect(config={"memory_limit": "30MB", "temp_directory": "", "threads": 1})
    message = r"^edges: out of memory \(.*raise launch.duckdb_memory_limit"
    with pytest.raises(UserError, match=message), explained("edges"):
        con.execute("SELECT a FROM range(3_000_000) t(a) ORDER BY hash(a)").fetchall()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), explained("edges"):
        raise FileNotFoundError("no.parquet")
    with pytest.raises(duckdb.CatalogException), explained("edges"):
        duckdb.connect().execute("SELECT * FROM nothing")
