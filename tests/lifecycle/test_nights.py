"""Which snapshot runs next: every one that has not run, the oldest first, failed ones again, held ones not."""

from __future__ import annotations

import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from edge_files import make_config, store_at, write

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.lifecycle import nights
from twhin_pipeline.lifecycle.nights import PAUSE, TRIES, Attempt, Night
from twhin_pipeline.store import Store, releases
from twhin_pipeline.training.launch import TrainingCancelled, TrainingFailed
from twhin_pipeline.words import PROMOTION, PUBLISHED

DAYS = ["2025-01-01", "2025-01-02", "2025-01-03"]
A, B, C = DAYS
NOW = datetime(2025, 2, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> TwhinConfig:
    for day in DAYS:
        write(tmp_path / f"{day}.parquet", [("a", "fav", "x")])
    return make_config(f"{tmp_path}/{{snapshot}}.parquet")


def publish(store: Store, snapshot: str, decision: str = "promoted", reason: str = "better") -> None:
    """What the stage `decide` leaves."""
    with store.replace(PROMOTION, snapshot, config_hash="c") as draft:
        draft.details = {"release": f"{snapshot}-1", "decision": decision, "reason": reason}


def release(store: Store, snapshot: str) -> str:
    """What the stage `publish` leaves; return the release's name."""
    with store.replace(PUBLISHED, snapshot, config_hash="c") as draft:
        draft.write(pa.table({"entity": ["user"]}))
    version = store.manifest(PUBLISHED, snapshot).version
    return releases.make(store, snapshot, {PUBLISHED: version}, {}, None).name


def end(store: Store, config: TwhinConfig, snapshot: str, error: Exception) -> None:
    """A run of the chain that ends by an error."""
    with pytest.raises(type(error)), nights.noted(config, store, snapshot):
        raise error


def statuses(config: TwhinConfig, store: Store) -> list[str]:
    return [night.status for night in nights.look(config, store, DAYS)]


def following(config: TwhinConfig, store: Store) -> Night | None:
    return nights.next_night(nights.look(config, store, DAYS))


def test_the_oldest_that_has_not_run_is_next_also_where_a_newer_one_has(store, config):
    publish(store, B)
    assert statuses(config, store) == ["not run", "published", "not run"]
    for expected in (A, C):
        night = following(config, store)
        assert night is not None and night.snapshot == expected and night.is_due(NOW)
        publish(store, expected)
    assert following(config, store) is None


def test_a_mistake_holds_a_snapshot_with_its_reason_and_stops_nobody(store, config):
    end(store, config, A, UserError("raw_edges: the check edges_rejected_share failed"))
    first, *_ = nights.look(config, store, DAYS)
    assert (first.status, first.reason) == ("held", "raw_edges: the check edges_rejected_share failed")
    night = following(config, store)
    assert night is not None and night.snapshot == B


@pytest.mark.parametrize("change", ["source", "configuration"])
def test_a_held_snapshot_runs_again_once_its_source_or_the_configuration_has_changed(store, config, tmp_path, change):
    end(store, config, A, UserError("no"))
    write(tmp_path / f"{B}.parquet", [("a", "fav", "x"), ("b", "fav", "y")])  # another snapshot's file
    assert statuses(config, store)[0] == "held"
    if change == "source":
        write(tmp_path / f"{A}.parquet", [("a", "fav", "x"), ("b", "fav", "y")])
    else:
        config = make_config(f"{tmp_path}/{{snapshot}}.parquet", training={"num_epochs": 3})
    night = following(config, store)
    assert night is not None and night.snapshot == A and "changed since it was held: no" in night.reason


def test_a_new_entry_in_the_list_of_snapshots_frees_no_held_one(store, config, tmp_path):
    listed = make_config(f"{tmp_path}/{{snapshot}}.parquet", source={"snapshots": [A]})
    end(store, listed, A, UserError("no"))
    longer = make_config(f"{tmp_path}/{{snapshot}}.parquet", source={"snapshots": [A, B]})
    assert statuses(longer, store)[0] == "held"


LOG = ("lhs", "rel", "rhs", "at")
FIRST, LATE = ("a", "fav", "x", "2025-01-01"), ("b", "fav", "y", "2025-01-09")


def log_of(folder: Path, rows: list[tuple[str, ...]], kind: str = "parquet") -> TwhinConfig:
    """Write an event log, and return its configuration."""
    path = folder / f"log.{kind}"
    if kind == "csv":
        path.write_text("".join(f"{','.join(row)}\n" for row in [LOG, *rows]))
    else:
        write(path, rows, LOG)
    return make_config(path, source={"columns": {"time": "at"}, "snapshots": {"from": A}, "window": "2d"})


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_log_that_grows_frees_no_held_day_of_it(store, tmp_path, kind):
    config = log_of(tmp_path, [FIRST], kind)
    end(store, config, A, UserError("no"))
    log_of(tmp_path, [LATE, FIRST], kind)
    assert statuses(config, store)[0] == "held"


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize(
    "rows",
    [
        [("a", "fav", "z", "2025-01-01"), LATE],
        [FIRST, ("c", "fav", "x", "2025-01-01"), LATE],
        [FIRST, FIRST, LATE],
        [LATE],
        [FIRST, ("a", "fav", "y", "")],
    ],
    ids=["mended", "late", "twice", "removed", "undated"],
)
def test_a_row_of_a_held_days_window_frees_it_where_it_changes(store, tmp_path, rows, kind):
    config = log_of(tmp_path, [FIRST, LATE], kind)
    end(store, config, A, UserError("no"))
    log_of(tmp_path, rows, kind)
    night = following(config, store)
    assert night is not None and night.snapshot == A and "changed since it was held: no" in night.reason


def test_a_log_that_changed_while_its_day_ran_frees_the_day(store, tmp_path):
    config = log_of(tmp_path, [FIRST])
    with suppress(UserError), nights.noted(config, store, A):
        log_of(tmp_path, [FIRST, LATE])
        raise UserError("no")
    assert statuses(config, store)[0] == "not run"


@pytest.mark.parametrize(("row", "status"), [(LATE, "held"), (("b", "fav", "y", "2025-01-01"), "not run")])
def test_of_a_log_that_changed_while_its_day_ran_the_rows_count_that_the_run_has_read(store, tmp_path, row, status):
    """A log that is always being written would else have each held day run again and again."""
    config = log_of(tmp_path, [FIRST])
    with suppress(UserError), nights.noted(config, store, A):
        raw_edges.ingest(config, store, A)
        log_of(tmp_path, [FIRST, row])
        raise UserError("no")
    assert statuses(config, store)[0] == status


def test_a_log_that_could_not_be_read_frees_its_day_once_it_can(store, tmp_path):
    config = log_of(tmp_path, [FIRST])
    (tmp_path / "log.parquet").write_bytes(b"PAR1, cut short")
    end(store, config, A, UserError("no"))
    assert statuses(config, store)[0] == "held"
    (tmp_path / "log.parquet").write_bytes(b"PAR1, cut short again")
    assert statuses(config, store)[0] == "held"
    log_of(tmp_path, [FIRST])
    assert statuses(config, store)[0] == "not run"


def test_a_log_is_read_once_for_each_change(store, tmp_path, monkeypatch):
    config = log_of(tmp_path, [FIRST])
    end(store, config, A, UserError("no"))
    log_of(tmp_path, [FIRST, LATE])
    assert statuses(config, store)[0] == "held"
    monkeypatch.setattr("twhin_pipeline.graph.log_rows.digest", lambda *_: pytest.fail("it was read again"))
    assert statuses(config, store)[0] == "held"


@pytest.mark.parametrize(
    "error", [UnavailableError("s3: no answer for 30 s"), TrainingFailed("rank 1"), OSError(28, "disk"), MemoryError()]
)
def test_what_may_pass_by_itself_is_tried_again_before_the_next_snapshot(store, config, error):
    end(store, config, A, error)
    night = following(config, store)
    assert night is not None and (night.snapshot, night.status) == (A, "failed")
    assert (
        night.again is not None and not night.is_due(night.again - timedelta(seconds=1)) and night.is_due(night.again)
    )


def test_the_pause_grows_and_the_last_failure_holds_the_snapshot(store, config):
    pauses = []
    for number in range(TRIES):
        at = NOW + timedelta(hours=number)
        nights.note(store, A, Attempt(at.isoformat(), "failed", "no power", nights.inputs(config, A)))
        night = nights.look(config, store, [A])[0]
        if night.again is not None:
            pauses.append(night.again - at)
    assert pauses == [PAUSE, 2 * PAUSE, 4 * PAUSE]
    assert night.status == "held" and night.reason == f"failed {TRIES} times; the last: no power"
    following_one = following(config, store)
    assert following_one is not None and following_one.snapshot == B


@pytest.mark.parametrize("error", [TrainingCancelled("told to stop"), KeyboardInterrupt()])
def test_a_run_that_someone_stopped_is_no_failure(store, config, error):
    with pytest.raises(type(error)), nights.noted(config, store, A):
        raise error
    assert statuses(config, store)[0] == "not run"


def test_a_run_that_died_before_it_decided_has_not_run(store, config):
    release(store, A)
    assert statuses(config, store)[0] == "not run"
    end(store, config, A, TrainingFailed("rank 0"))
    assert statuses(config, store)[0] == "failed"
    publish(store, A)
    assert statuses(config, store)[0] == "published"


def test_a_release_that_was_ever_current_has_run_though_no_gate_was_asked(store, config):
    """In stores of earlier versions each release became current, and nothing was decided."""
    for day in (A, B):
        releases.promote(store, release(store, day), "me", "its checks passed")
    first, second, third = nights.look(config, store, DAYS)
    assert (first.status, first.reason) == ("published", "promoted: its checks passed")
    assert (second.status, third.status) == ("published", "not run")


def test_a_release_that_a_gate_held_has_run_and_the_night_says_which(store, config):
    publish(store, A)
    publish(store, B, "held", "item: 60.0% of its ids are new, limit 0.5")
    first, second, _ = nights.look(config, store, DAYS)
    assert (first.status, first.reason) == ("published", "promoted: better")
    assert (second.status, second.reason) == ("published", "held by a gate: item: 60.0% of its ids are new, limit 0.5")


def test_what_was_decided_last_is_kept(store, config):
    publish(store, A, "held", "worse")
    nights.look(config, store, DAYS)
    publish(store, A)
    nights.note_decided(store, [A])
    assert nights.look(config, store, [A])[0].reason == "promoted: better"


def test_a_snapshot_whose_tables_retention_removed_has_run_all_the_same(store, config):
    publish(store, A)
    known = nights.look(config, store, DAYS)
    assert known[0].status == "published"
    store.fs.rm(store.path(PROMOTION), recursive=True)
    assert nights.look(config, store, DAYS) == known


def test_a_record_of_an_earlier_version_is_read(store, config):
    store.write_text([nights.FOLDER, nights.FILE], json.dumps({"published": [A], "attempts": {}}))
    publish(store, B)
    assert statuses(config, store) == ["published", "published", "not run"]
    assert nights.read(store).published == {A: "", B: "promoted: better"}


def test_a_run_of_dagsters_is_noted_once(store, config):
    for _ in range(3):
        nights.note(store, A, Attempt(NOW.isoformat(), "failed", "no", nights.inputs(config, A), run="r1"))
    assert len(nights.read(store).attempts[A]) == 1


def told(
    store: Store, config: TwhinConfig, errors: dict[str, Exception], **options: bool
) -> tuple[list[str], list[str]]:
    """Backfill with snapshots that end by errors; return what ran, and how each ended."""
    ran = []

    def run(snapshot: str) -> str:
        ran.append(snapshot)
        if snapshot in errors:
            raise errors[snapshot]
        return "promoted"

    results = list(nights.backfill(nights.look(config, store, DAYS), run, **options))
    assert [one.snapshot for one in results] == DAYS
    return ran, [one.status for one in results]


def test_a_backfill_runs_what_was_not_published_and_goes_on_after_a_held_one(store, config):
    publish(store, A)
    assert told(store, config, {B: UserError("no")}) == ([B, C], ["published", "held", "published"])
    assert told(store, config, {B: UserError("no")}, stop_when_held=True) == ([B], ["published", "held", "not run"])
    assert told(store, config, {}, again=True) == (DAYS, ["published"] * 3)
    end(store, config, B, UserError("no"))
    assert told(store, config, {}, skip_held=True) == ([C], ["published", "held", "published"])


def test_a_backfill_stops_at_a_failure_since_what_follows_grows_from_it(store, config):
    assert told(store, config, {B: TrainingFailed("rank 0")}) == ([A, B], ["published", "failed", "not run"])
    with pytest.raises(TrainingCancelled):
        told(store, config, {A: TrainingCancelled("told to stop")})


def test_a_backfill_says_what_was_decided_about_each_release_also_of_those_that_ran_before(store, config):
    publish(store, A, "held", "worse")
    told = {
        one.snapshot: one.reason for one in nights.backfill(nights.look(config, store, DAYS), lambda day: f"ran {day}")
    }
    assert told == {A: "held by a gate: worse (ran before)", B: f"ran {B}", C: f"ran {C}"}
