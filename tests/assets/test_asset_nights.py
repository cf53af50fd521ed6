"""The sensor and the schedule run every snapshot that has not run, the oldest first, one at a time."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from edge_files import make_config, write

from twhin_pipeline._dagster.assets import execution, jobs, nights, partitions, schedules, sensors
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.lifecycle import nights as engine
from twhin_pipeline.store import Store
from twhin_pipeline.words import PROMOTION

A, B, C = "2025-01-01", "2025-01-02", "2025-01-03"


class Chain:
    """A chain of one table over dated files, whose runs end as a test says."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.folder, self.instance, self.store = folder, instance, Store(str(folder / "home"))
        self.errors: dict[str, BaseException] = {}
        self.refuses: set[str] = set()
        for day in (B, A):
            self.arrive(day)

        @dg.asset(key=PROMOTION, partitions_def=partitions.Snapshots(self.find))
        def promotion(context: dg.AssetExecutionContext) -> None:
            with execution.mistakes():
                if context.partition_key in self.errors:
                    raise self.errors[context.partition_key]
                if context.partition_key not in self.refuses:
                    self.publish(context.partition_key)

        @dg.asset_check(asset=promotion, blocking=True)
        def sound(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
            return dg.AssetCheckResult(passed=context.partition_key not in self.refuses)

        self.definitions = dg.Definitions(
            [promotion],
            asset_checks=[sound],
            jobs=[jobs.chain],
            schedules=[schedules.retraining(self.load, self.find)],
            sensors=[sensors.new_snapshots(self.load, self.find)],
        )

    def arrive(self, day: str) -> None:
        write(self.folder / f"{day}.parquet", [("a", "fav", "x")])

    def publish(self, snapshot: str) -> None:
        with self.store.replace(PROMOTION, snapshot, config_hash="c") as draft:
            draft.details = {"release": f"{snapshot}-1", "decision": "promoted", "reason": "better"}

    def load(self) -> Any:
        return make_config(f"{self.folder}/{{snapshot}}.parquet"), self.store

    def find(self) -> list[str]:
        from twhin_pipeline.graph.source import find_snapshots

        return find_snapshots(self.load()[0])

    def tick(self, by: str = "new_snapshots") -> tuple[str | None, str]:
        """Return the snapshot whose run is requested, and what is said where there is none."""
        if by == "new_snapshots":
            sensor = self.definitions.resolve_sensor_def(by)
            made: Any = sensor.evaluate_tick(dg.build_sensor_context(self.instance))
        else:
            schedule = self.definitions.resolve_schedule_def(by)
            made = schedule.evaluate_tick(dg.build_schedule_context(self.instance))
        if not made.run_requests:
            return None, str(made.skip_message)
        [self.request] = made.run_requests
        return self.request.tags[nights.PARTITION], ""

    def run(self, by: str = "new_snapshots") -> str | None:
        """Tick, and run what is requested as the daemon does."""
        snapshot, _ = self.tick(by)
        if snapshot is not None:
            job = self.definitions.resolve_job_def("chain")
            tags = self.request.tags
            job.execute_in_process(instance=self.instance, partition_key=snapshot, tags=tags, raise_on_error=False)
        return snapshot


@pytest.fixture
def chain(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Chain]:
    # A schedule opens the instance anew, so its own has to be on the disk.
    on_disk = "retraining" in request.node.name
    made = dg.DagsterInstance.local_temp(str(tmp_path)) if on_disk else dg.DagsterInstance.ephemeral()
    with made as instance:
        yield Chain(tmp_path, instance)


@pytest.mark.parametrize("by", ["new_snapshots", "retraining"])
def test_every_snapshot_runs_the_oldest_first_and_then_they_rest(chain, by):
    assert [chain.run(by) for _ in range(3)] == [A, B, None]
    assert chain.tick(by) == (None, f"every snapshot has run, the newest is {B} (promoted: better)")
    chain.arrive(C)
    assert chain.run(by) == C
    assert chain.instance.get_dynamic_partitions(partitions.NAME) == [A, B, C]


@pytest.mark.parametrize("by", ["new_snapshots", "retraining"])
def test_a_snapshot_waits_for_the_run_that_is_under_way_whoever_started_it(chain, by):
    chain.publish(A)
    job = chain.definitions.resolve_job_def("chain")
    tags = {"dagster/partition": A}
    run = chain.instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert chain.tick(by) == (None, f"snapshot {A} is under way (run {run.run_id})")
    chain.instance.delete_run(run.run_id)
    assert chain.tick(by)[0] == B


def test_a_run_of_another_job_keeps_nobody_waiting(chain):
    @dg.job
    def search() -> None: ...

    chain.instance.create_run_for_job(search, status=dg.DagsterRunStatus.STARTED)
    assert chain.tick()[0] == A


def test_a_mistake_holds_a_snapshot_and_the_next_runs(chain):
    chain.errors[A] = UserError("vocabulary: no edges; give some")
    assert [chain.run() for _ in range(3)] == [A, B, None]
    told = chain.tick()[1]
    assert f"held are {A}: promotion: vocabulary: no edges; give some" in told
    assert [night.status for night in engine.look(*chain.load(), [A, B])] == ["held", "published"]


def test_a_blocking_check_holds_a_snapshot_and_the_next_runs(chain):
    chain.refuses.add(A)
    assert [chain.run() for _ in range(3)] == [A, B, None]
    assert "sound" in chain.tick()[1]


def test_a_held_snapshot_runs_again_once_its_file_changed(chain):
    chain.errors[A] = UserError("no")
    assert [chain.run() for _ in range(3)] == [A, B, None]
    write(chain.folder / f"{A}.parquet", [("a", "fav", "x"), ("b", "fav", "y")])
    del chain.errors[A]
    assert chain.run() == A and chain.run() is None


@pytest.mark.parametrize("error", [ValueError("out of eggs"), UnavailableError("s3: no answer")])
def test_a_failed_night_is_tried_again_after_a_pause_before_the_next_snapshot(chain, error, monkeypatch):
    chain.errors[A] = error
    assert chain.run() == A
    snapshot, told = chain.tick()
    assert snapshot is None and told.startswith(f"snapshot {A} is tried again at ") and str(error) in told

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + 20 * engine.PAUSE

    monkeypatch.setattr(nights, "datetime", Later)
    assert [chain.run() for _ in range(engine.TRIES - 1)] == [A] * (engine.TRIES - 1)
    assert [chain.run(), chain.run()] == [B, None], "what failed too often is held, and stops nobody"
    assert f"failed {engine.TRIES} times" in chain.tick()[1]


def test_a_run_that_someone_cancelled_is_not_started_anew(chain):
    job = chain.definitions.resolve_job_def("chain")
    run = chain.instance.create_run_for_job(job, tags={"dagster/partition": A}, status=dg.DagsterRunStatus.STARTED)
    chain.instance.report_run_canceled(run)
    assert chain.run() == B
    assert f"{A}: someone cancelled its run" in chain.tick()[1]


def test_a_process_that_was_killed_is_a_failure_that_may_pass(chain):
    job = chain.definitions.resolve_job_def("chain")
    run = chain.instance.create_run_for_job(job, tags={"dagster/partition": A}, status=dg.DagsterRunStatus.STARTED)
    chain.instance.report_run_failed(run)
    assert "is tried again at" in chain.tick()[1]


def test_a_listing_that_fails_starts_nothing_and_says_why(chain):
    def away() -> list[str]:
        raise OSError("the bucket is away")

    request = nights.next_run(chain.instance, chain.load, away, print)
    assert isinstance(request, dg.SkipReason) and "the bucket is away" in str(request.skip_message)
