"""Times: of every type and unit that files have them in; what is none, the message says how to read."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_files import SNAPSHOT, make_config, rows_of, store_at

from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run

MOMENT = datetime(2024, 12, 30, 5, 6, 7)
SECONDS = int(MOMENT.replace(tzinfo=UTC).timestamp())
PARTS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def times(tmp_path: Path, values: Any, **columns: str) -> list[datetime]:
    """Ingest one edge for each time, and return those that were read."""
    names = [f"x{n}" for n in range(len(values))]
    table = {"lhs": names, "rel": ["fav"] * len(names), "rhs": names, "t": values}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    store = store_at(tmp_path)
    config = make_config(tmp_path / "e.parquet", source={"columns": {"time": "t", **columns}})
    raw_edges.ingest(config, store, SNAPSHOT)
    return [row["time"] for row in rows_of(store, "raw_edges")]


@pytest.mark.parametrize("zone", [None, "UTC", "+02:00", "Europe/Berlin"])
@pytest.mark.parametrize("unit", PARTS)
def test_timestamps_of_every_unit_and_zone_are_the_same_instant(tmp_path, unit, zone):
    value = MOMENT if zone is None else MOMENT.replace(tzinfo=UTC)
    assert times(tmp_path, pa.array([value], pa.timestamp(unit, zone))) == [MOMENT]


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint64(), pa.float64(), pa.string()])
@pytest.mark.parametrize("unit", PARTS)
def test_numbers_are_read_in_the_unit_that_the_configuration_says(tmp_path, unit, kind):
    number = SECONDS * PARTS[unit]
    value = {pa.string(): str(number), pa.float64(): float(number)}.get(kind, number)
    assert times(tmp_path, pa.array([value], kind), time_unit=unit) == [MOMENT]


def test_integers_of_microseconds_and_less_stay_exact(tmp_path):
    micros = SECONDS * 10**6 + 123_457
    expected = MOMENT.replace(microsecond=123_457)
    assert times(tmp_path, pa.array([micros]), time_unit="us") == [expected]
    assert times(tmp_path, pa.array([micros * 1000 + 999]), time_unit="ns") == [expected]


def test_fractions_of_seconds_and_dates_are_times(tmp_path):
    assert times(tmp_path, pa.array([SECONDS + 0.5])) == [MOMENT.replace(microsecond=500_000)]
    assert times(tmp_path, pa.array([date(2024, 12, 30)])) == [datetime(2024, 12, 30)]


@pytest.mark.parametrize(("read", "unit"), [("s", "ms"), ("s", "us"), ("s", "ns"), ("us", "ns")])
def test_the_message_for_a_number_that_is_no_time_guesses_its_unit(tmp_path, read, unit):
    told = rf"bad time in column 't' 1.*in column 't' is a time in {unit}: set source\.columns\.time_unit: {unit}$"
    with pytest.raises(UserError, match=told):
        times(tmp_path, pa.array([SECONDS * PARTS[unit]]), time_unit=read)


def test_the_failed_check_on_rejected_rows_is_told_with_the_unit(tmp_path):
    """Half of the files are in milliseconds: the check fails, and the note says why."""
    table = {"lhs": ["a", "b"], "rel": ["fav"] * 2, "rhs": ["x"] * 2, "t": [SECONDS, SECONDS * 1000]}
    pq.write_table(pa.table(table), tmp_path / "e.parquet")
    config = make_config(tmp_path / "e.parquet", source={"columns": {"time": "t"}})
    said: list[str] = []
    with pytest.raises(UserError, match="edges_rejected_share"):
        chain.run_stage(Run(config, "c.yaml", [], store_at(tmp_path), SNAPSHOT), chain.STAGES["ingest"], said.append)
    note = f"  note: source: {SECONDS * 1000} in column 't' is a time in ms: set source.columns.time_unit: ms"
    assert note in said


@pytest.mark.parametrize("values", [[True], [[1]], [datetime(2024, 1, 1).time()]])
def test_a_column_of_another_type_is_one_clear_error(tmp_path, values):
    with pytest.raises(UserError, match=r"e\.parquet: column 't' is of type .*; times must be timestamps"):
        times(tmp_path, pa.array(values))


def test_a_unit_without_a_time_column_is_refused():
    data = make_config("e.csv").model_dump(exclude_none=True)
    data["source"]["columns"]["time_unit"] = "ms"
    with pytest.raises(UserError, match=r"columns\.time_unit needs columns\.time"):
        parse_config(data)
