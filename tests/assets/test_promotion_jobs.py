"""The jobs `promote` and `rollback` move `current` as the command line does, and show what that changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import made_releases
import pytest

from twhin_pipeline._dagster.assets import execution, promotion_jobs
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.definitions import defs
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release

DAYS = made_releases.DAYS
OPS = {"promote": "promote_release", "rollback": "roll_back"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "home"))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


def made(store: Store, day: str, value: float) -> Release:
    """A release about which nothing has been decided."""
    version = made_releases.export(store, day, made_releases.vectors())
    return releases.make(store, day, {"embeddings/user": version}, {"filtered_mrr": value}, None)


def run(store: Store, instance: dg.DagsterInstance, job: str, **config: Any) -> dg.ExecuteInProcessResult:
    return getattr(promotion_jobs, job).execute_in_process(
        instance=instance,
        resources={"store": StoreResource(root=store.root)},
        run_config={"ops": {OPS[job]: {"config": config}}},
        raise_on_error=False,
    )


def shown(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    """What the run's page shows."""
    assert result.success
    [event] = [one for one in result.all_events if one.event_type == dg.DagsterEventType.STEP_OUTPUT]
    return dict(event.step_output_data.metadata)


def refused(result: dg.ExecuteInProcessResult) -> str:
    """Why a run failed, which is not tried again."""
    [event] = [one for one in result.all_events if one.is_step_failure]
    assert event.step_failure_data.user_failure_data is not None, "a mistake is one message, no traceback"
    return execution.cause(event)


def test_a_promotion_is_on_the_record_with_its_run_and_the_page_shows_both_releases_figures(store, instance) -> None:
    first, second = made(store, DAYS[0], 0.25), made(store, DAYS[1], 0.5)
    page = shown(run(store, instance, "promote", release=first.name, reason="the first"))
    assert page["current"].value == first.name and page["current_before"].value == "nothing"
    result = run(store, instance, "promote", release=second.name, reason="looked at by hand")
    page = shown(result)
    assert releases.current(store) == second
    move = releases.history(store)[-1]
    assert move.reason == page["reason"].value == "looked at by hand"
    assert move.by == page["by"].value and result.run_id in move.by
    assert page["current_before"].value == first.name and page["snapshot"].value == DAYS[1]
    [row] = [record.data for record in page["figures"].records]
    assert row == {"figure": "filtered_mrr", "now": "0.5", "before": "0.25"}


def test_a_rollback_goes_to_the_release_before_or_to_the_one_that_is_named(store, instance) -> None:
    every = [made(store, day, 0.1) for day in DAYS]
    for release in every:
        releases.promote(store, release.name, "me", "test")
    assert shown(run(store, instance, "rollback", reason="clicks fell"))["current"].value == every[1].name
    assert releases.history(store)[-1].reason == "rollback: clicks fell"
    run(store, instance, "rollback", reason="further", release=every[0].name)
    assert releases.current(store) == every[0]


def test_what_cannot_be_moved_to_is_refused_with_the_remedy_and_current_stays(store, instance) -> None:
    first, second = made(store, DAYS[0], 0.1), made(store, DAYS[1], 0.2)
    assert "nothing to roll back to" in refused(run(store, instance, "rollback", reason="x"))
    releases.promote(store, first.name, "me", "test")
    assert "was never current" in refused(run(store, instance, "rollback", reason="x", release=second.name))
    assert "unknown release 'nothing'" in refused(run(store, instance, "promote", reason="x", release="nothing"))
    assert releases.current(store) == first and len(releases.history(store)) == 1


@pytest.mark.parametrize("job", OPS)
@pytest.mark.parametrize("config", [{"release": "x"}, {"release": "x", "reason": ""}])
def test_a_move_without_a_reason_does_not_start(store, instance, job, config) -> None:
    release = made(store, DAYS[0], 0.1)
    with pytest.raises((dg.DagsterInvalidConfigError, ValueError), match="reason"):
        getattr(promotion_jobs, job).execute_in_process(
            instance=instance,
            resources={"store": StoreResource(root=store.root)},
            run_config={"ops": {OPS[job]: {"config": config | {"release": release.name}}}},
        )
    assert releases.history(store) == []


def test_they_wait_for_no_stage_and_for_no_other_run_in_the_queue() -> None:
    for name, op in OPS.items():
        job = defs.resolve_job_def(name)
        assert job.get_node_named(op).definition.pool is None
        assert int(job.tags["dagster/priority"]) > 0
