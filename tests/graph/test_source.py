"""Where edges come from: listing snapshots, files and formats, without anything slow."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fsspec
import pytest
from edge_files import make_config, write

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import source

EDGE = [("a", "fav", "x")]


def test_snapshots_are_found_by_listing(tmp_path):
    for day in ("2024-02-01", "2023-12-31", "2024-13-01", "notes"):
        write(tmp_path / f"{day}.parquet", EDGE)
    assert source.find_snapshots(make_config(f"{tmp_path}/{{snapshot}}.parquet")) == ["2023-12-31", "2024-02-01"]


@pytest.mark.parametrize(
    "pattern",
    [
        "{snapshot}/*.parquet",
        "*/{snapshot}/part-?.parquet",
        "**/{snapshot}/*.parquet",
        "x/{snapshot}/{snapshot}*.parquet",
    ],
)
def test_snapshots_are_found_in_folders_and_globs(tmp_path, pattern):
    for day in ("2024-02-01", "2023-12-31"):
        write(tmp_path / "x" / day / "part-0.parquet", EDGE)
        write(tmp_path / "x" / day / f"{day}.parquet", EDGE)
        write(tmp_path / day / "part-0.parquet", EDGE)
    assert source.find_snapshots(make_config(f"{tmp_path}/{pattern}")) == ["2023-12-31", "2024-02-01"]


def test_snapshots_are_found_at_a_url():
    memory = fsspec.filesystem("memory")
    folder = uuid.uuid4().hex
    for day in ("2024-02-01", "2023-12-31"):
        memory.pipe_file(f"/{folder}/{day}/e.csv", b"lhs,rel,rhs\n")
    found = source.find_snapshots(make_config(f"memory://{folder}/{{snapshot}}/e.csv"))
    assert found == ["2023-12-31", "2024-02-01"]


def test_relative_paths_are_of_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "data" / "2024-02-01.parquet", EDGE)
    monkeypatch.chdir(tmp_path)
    for path in ("data/{snapshot}.parquet", "./data/{snapshot}.parquet"):
        assert source.find_snapshots(make_config(path)) == ["2024-02-01"]


def test_given_snapshots_are_taken_as_they_are(tmp_path):
    config = make_config(tmp_path / "e.parquet", source={"snapshots": ["2024-02-01", "2023-01-01"]})
    assert source.find_snapshots(config) == ["2023-01-01", "2024-02-01"]


def log_of(folder: Path, snapshots: dict[str, str], written: str = "2024-03-01T06:00") -> TwhinConfig:
    """An event log whose newest file was written then (UTC)."""
    seconds = datetime.fromisoformat(written).replace(tzinfo=UTC).timestamp()
    for name, age in (("a", 86_400), ("b", 0)):
        os.utime(write(folder / f"log-{name}.parquet", EDGE), (seconds - age, seconds - age))
    return make_config(f"{folder}/log-*.parquet", source={"columns": {"time": "at"}, "snapshots": snapshots})


def test_snapshots_of_a_log_are_its_days_up_to_the_last_that_was_over_when_it_was_written(tmp_path):
    days = ["2024-02-27", "2024-02-28", "2024-02-29"]
    assert source.find_snapshots(log_of(tmp_path, {"from": "2024-02-27"})) == days
    assert source.find_snapshots(log_of(tmp_path, {"from": "2024-02-27"}, "2024-02-29T23:59")) == days[:2]
    assert source.find_snapshots(log_of(tmp_path, {"from": "2024-02-27", "every": "2d"})) == days[::2]
    assert source.find_snapshots(log_of(tmp_path, {"from": "2024-02-27", "to": "2024-02-28"})) == days[:2]
    weekly = {"from": "2024-02-01", "every": "1w"}
    assert source.find_snapshots(log_of(tmp_path, weekly))[1:] == [
        "2024-02-08",
        "2024-02-15",
        "2024-02-22",
        "2024-02-29",
    ]


def test_a_day_that_is_not_over_is_no_snapshot_whatever_the_files_say(tmp_path):
    today = datetime.now(UTC).date()
    config = log_of(tmp_path, {"from": f"{today - timedelta(days=2)}"}, f"{today + timedelta(days=9)}T00:00")
    assert source.find_snapshots(config) == [f"{today - timedelta(days=2)}", f"{today - timedelta(days=1)}"]
    query = make_config(None, source={"sql": "SELECT 1", "snapshots": {"from": f"{today - timedelta(days=1)}"}})
    assert source.find_snapshots(query) == [f"{today - timedelta(days=1)}"]


def test_days_choose_among_dated_files(tmp_path):
    for day in ("2024-02-01", "2024-02-02", "2024-02-05", "2024-02-08"):
        write(tmp_path / f"{day}.parquet", EDGE)
    for days, expected in (
        ({"from": "2024-02-02"}, ["2024-02-02", "2024-02-05", "2024-02-08"]),
        ({"from": "2024-02-01", "every": "7d"}, ["2024-02-01", "2024-02-08"]),
    ):
        config = make_config(f"{tmp_path}/{{snapshot}}.parquet", source={"snapshots": days})
        assert source.find_snapshots(config) == expected


def test_days_of_which_none_is_over_yet_are_one_clear_error(tmp_path):
    for days in ({"from": "2024-03-01"}, {"from": "2999-01-01"}):
        config = log_of(tmp_path, days)
        assert source.find_snapshots(config) == []
        with pytest.raises(UserError, match=rf"source\.snapshots: no day from {days['from']} on is over"):
            source.newest_snapshot(config)
    (line,) = source.undated(log_of(tmp_path, {"from": "2024-02-01", "every": "7d"}), "2024-02-02")
    assert "does not list 2024-02-02 (it has every 7d from 2024-02-01 on)" in line


def test_the_fingerprint_changes_with_the_snapshots_own_files(tmp_path):
    for day in ("2024-02-01", "2024-02-02"):
        write(tmp_path / f"{day}.parquet", EDGE)
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet")
    before = source.fingerprint(config, "2024-02-01")
    write(tmp_path / "2024-02-02.parquet", [*EDGE, ("b", "fav", "y")])
    assert source.fingerprint(config, "2024-02-01") == before
    write(tmp_path / "2024-02-01.parquet", [*EDGE, ("b", "fav", "y")])
    assert source.fingerprint(config, "2024-02-01") != before


def test_without_dates_in_the_path_the_newest_files_day_is_the_snapshot(tmp_path):
    for number, seconds in enumerate((86400 * 365, 86400 * 366)):
        os.utime(write(tmp_path / f"e-{number}.parquet", EDGE), (seconds, seconds))
    sizes = {"user": 1, "item": 1}
    root = {"data_root": f"{tmp_path}/*.parquet"}
    for config in (make_config(f"{tmp_path}/*.parquet"), make_config(None, sizes, train_data=root)):
        assert source.find_snapshots(config) == ["1971-01-02"]
    assert source.find_snapshots(make_config(f"{tmp_path}/none-*.parquet")) == []


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("e.json", r"the ending tells no format \(known: \.parquet"),
        ("[ef].*", "has both Parquet and CSV files; narrow the pattern"),
        (".", r"is a folder; name its files, such as"),
        ("none.parquet", "no file for snapshot 2025-01-01"),
        ("nowhere://x/e.parquet", "cannot be read .Protocol not known: nowhere"),
    ],
)
def test_a_path_that_is_wrong_is_one_clear_error(tmp_path, path, told):
    write(tmp_path / "e.parquet", EDGE)
    (tmp_path / "f.csv").write_text("lhs,rel,rhs\n")
    (tmp_path / "e.json").write_text("{}")
    if path == "[ef].*":
        (tmp_path / "e.json").unlink()
    config = make_config(path if "://" in path else f"{tmp_path}/{path}")
    with pytest.raises(UserError, match=told):
        source.inputs(config, "2025-01-01")


@pytest.mark.parametrize("snapshot", ["2025-1-1", "2025-02-30", "latest"])
def test_a_snapshot_that_is_no_date_is_one_clear_error(tmp_path, snapshot):
    with pytest.raises(UserError, match="must be a date, YYYY-MM-DD"):
        source.inputs(make_config(write(tmp_path / "e.parquet", EDGE)), snapshot)


def test_listing_imports_nothing_slow():
    code = (
        "import sys; from twhin_pipeline.graph import source; "
        "print([m for m in ('torch', 'duckdb', 'pyarrow', 'pandas', 'mlflow', 'dagster') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tab_and_comma_separated_files_are_not_read_as_one(tmp_path):
    (tmp_path / "e.csv").write_text("lhs,rel,rhs\na,follows,b\n")
    (tmp_path / "e.tsv").write_text("lhs\trel\trhs\na\tfollows\tb\n")
    with pytest.raises(UserError, match="both TSV and CSV files; narrow the pattern"):
        source.inputs(make_config(tmp_path / "e.*"), "2025-01-01")


def test_the_delimiter_goes_by_the_ending_not_by_the_name(tmp_path):
    for name, delimiter in (("a.tsv-old.csv", ","), ("B.TSV", "\t")):
        (tmp_path / name).write_text("lhs")
        assert source.inputs(make_config(tmp_path / name), "2025-01-01")[0].delimiter == delimiter


def test_a_source_that_does_not_know_the_snapshots_date_says_so(tmp_path):
    write(tmp_path / "e.parquet", EDGE)
    write(tmp_path / "2024-02-01.parquet", EDGE)
    (line,) = source.undated(make_config(tmp_path / "e.parquet"), "2024-02-01")
    assert line.startswith("source.path has no {snapshot}, so it is read as it is now, last changed on ")
    assert "2024-02-01 is only the name" in line and "source.snapshots" in line
    (line,) = source.undated(make_config(tmp_path / "e.parquet", source={"snapshots": ["2023-01-01"]}), "2024-02-01")
    assert "source.snapshots does not list 2024-02-01 (it has 2023-01-01)" in line


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("{snapshot}.parquet", {}),
        ("e.parquet", {"snapshots": ["2024-02-01"]}),
        ("e.parquet", {"columns": {"time": "at"}}),  # later edges do not count
    ],
)
def test_a_source_that_knows_the_snapshots_date_says_nothing(tmp_path, path, more):
    assert source.undated(make_config(tmp_path / path, source=more), "2024-02-01") == []
