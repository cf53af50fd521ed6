"""`twhin backfill`: every snapshot that was not published, the oldest first."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
from edge_files import make_config, write

from twhin_pipeline import pipeline
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.lifecycle import nights
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, locks
from twhin_pipeline.words import PROMOTION

DAYS = ["2025-01-01", "2025-01-02", "2025-01-03"]
DECISIONS = (
    {"decision": "promoted", "reason": "passed 9 gates", "headline": "filtered MRR 0.5000"},
    {"decision": "held", "reason": "item: 60.0% of its ids are new, limit 0.5"},
)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three dated files, the second of which has more rows without an id than its check accepts; and a chain that ends
    after the first stage and its checks, with a decision: the last one's release is held."""
    rows = [("a", "fav", "x"), ("b", "reply", "y"), ("a", "follows", "b")]
    for day in DAYS:
        write(tmp_path / f"{day}.parquet", [*rows, *[("a", "fav", None)] * (day == DAYS[1])])
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet")
    (tmp_path / "c.yaml").write_text(config.to_yaml())

    def run(*given: object, skip_unchanged: bool = False) -> None:
        *_, store, snapshot, say = given
        pipeline.run_stage(Run(*given[:-1]), pipeline.STAGES["ingest"], say)  # type: ignore[arg-type]
        with store.replace(PROMOTION, snapshot, config_hash="c") as draft:  # type: ignore[attr-defined]
            draft.details = DECISIONS[snapshot == DAYS[2]]

    monkeypatch.setattr(pipeline, "run", run)
    return ["-c", str(tmp_path / "c.yaml"), "--home", str(tmp_path / "home")]


def results(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int) -> dict[str, str]:
    assert run_arguments(["backfill", *arguments, "--json"]) == code
    return {one["snapshot"]: one["status"] for one in json.loads(capsys.readouterr().out)}


def test_a_backfill_goes_on_after_a_held_snapshot_and_says_why(arguments, capsys, tmp_path):
    assert run_arguments(["backfill", *arguments]) == 1
    shown = capsys.readouterr()
    assert "3 snapshots from 2025-01-01 to 2025-01-03" in shown.out and "edges_rejected_share" in shown.err
    # A refused table's message has tables of rows: all of it when the snapshot ends, its first line in the table.
    assert "| --- |" in shown.err and "| --- |" not in shown.out and "edges_rejected_share" in shown.out
    store = Store(str(tmp_path / "home"))
    assert store.snapshots(PROMOTION) == [DAYS[0], DAYS[2]]
    assert [one.outcome for one in nights.read(store).attempts[DAYS[1]]] == ["held"]
    made = store.manifest("raw_edges", DAYS[0]).version
    # What was held is tried again, as someone asks for it; what was published is left as it is.
    write(tmp_path / f"{DAYS[1]}.parquet", [("a", "fav", "x"), ("b", "reply", "y"), ("a", "follows", "b")])
    assert results(arguments, capsys, 0) == dict.fromkeys(DAYS, "published")
    assert store.manifest("raw_edges", DAYS[0]).version == made
    assert results([*arguments, "--to", DAYS[0], "--again"], capsys, 0) == {DAYS[0]: "published"}
    assert store.manifest("raw_edges", DAYS[0]).version != made


def test_the_table_says_what_was_decided_about_each_release(arguments, capsys):
    assert run_arguments(["backfill", *arguments]) == 1
    shown = capsys.readouterr().out
    assert "promoted: filtered MRR 0.5000" in shown
    assert "held by a gate: item: 60.0% of its ids are new, limit 0.5" in shown
    assert run_arguments(["backfill", *arguments, "--json", "--skip-held"]) == 1
    first, _, last = json.loads(capsys.readouterr().out)
    assert (first["status"], first["reason"]) == ("published", "promoted: filtered MRR 0.5000 (ran before)")
    assert last["status"] == "published" and last["reason"].startswith("held by a gate: item")


def test_a_backfill_stops_at_a_held_snapshot_where_it_is_told_to(arguments, capsys):
    found = results([*arguments, "--from", DAYS[1], "--stop-when-held"], capsys, 1)
    assert found == {DAYS[1]: "held", DAYS[2]: "not run"}


def test_dates_without_a_snapshot_are_a_mistake_that_names_those_there_are(arguments, capsys):
    assert run_arguments(["backfill", *arguments, "--from", "2026-01-01"]) == 2
    assert "no snapshot from 2026-01-01 to 2025-01-03; there are 2025-01-01, " in capsys.readouterr().err
    assert run_arguments(["backfill", *arguments, "--to", "tomorrow"]) == 2
    assert "'tomorrow' must be a date" in capsys.readouterr().err


def test_a_second_backfill_of_a_store_is_refused_at_once_and_names_the_first(arguments, capsys, tmp_path):
    folder = tmp_path / "home" / "nights" / "backfill"
    folder.mkdir(parents=True)
    (folder / locks.WRITER).write_text(json.dumps({"process": 4321, "host": "elsewhere", "since": "today"}))
    with open(folder / locks.LOCK, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_arguments(["backfill", *arguments]) == 2
        assert "process 4321 on elsewhere" in capsys.readouterr().err
    assert not nights.read(Store(str(tmp_path / "home"))).published
    assert run_arguments(["backfill", *arguments]) == 1  # its second day is held
