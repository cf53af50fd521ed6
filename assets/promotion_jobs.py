"""Jobs about releases: `promote` makes a release the current one, `rollback` goes back to one that was current before.

What belongs here: the two jobs, their launchpads and what their runs show. What does not: how `current` is moved
(`twhin_pipeline/lifecycle/promotion.py`), and the stage that decides by gates (`releases.py`).
https://docs.dagster.io/guides/build/jobs
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from ..resources.store import StoreResource
from .execution import mistakes
from .metadata import table

if TYPE_CHECKING:
    from twhin_pipeline.store import Store
    from twhin_pipeline.store.releases import Release

    Move = Callable[[Store, str], tuple[Release, str | None]]

FIRST = {"dagster/priority": "10"}
"""Before the other runs in the queue."""


class PromoteConfig(dg.Config):
    """Which release becomes the current one, and why."""

    release: str = Field(min_length=1, description="The release's name, as the page of the asset `promotion` shows it.")
    reason: str = Field(min_length=1, description="Why; stored with the move.")


class RollbackConfig(dg.Config):
    """Which release becomes the current one again, and why."""

    release: str | None = Field(
        default=None, description="The release to go back to. Empty: the one that was current before."
    )
    reason: str = Field(min_length=1, description="Why; stored with the move.")


# Without the pool of the stages: a move takes no time, and must not wait for a training.
@dg.op(description="Makes a release the current one; MLflow's alias `champion` follows.")
def promote_release(context: dg.OpExecutionContext, config: PromoteConfig, store: StoreResource) -> None:
    """Promote, and show on the run's page what that changed."""
    from twhin_pipeline.lifecycle import promotion

    _move(context, store, lambda tables, by: promotion.promote(tables, config.release, by, config.reason))


@dg.op(description="Goes back to a release that was current before; MLflow's alias `champion` follows.")
def roll_back(context: dg.OpExecutionContext, config: RollbackConfig, store: StoreResource) -> None:
    """Go back, and show on the run's page what that changed."""
    from twhin_pipeline.lifecycle import promotion

    _move(context, store, lambda tables, by: promotion.rollback(tables, config.release, by, config.reason))


def _move(context: dg.OpExecutionContext, store: StoreResource, move: "Move") -> None:
    """Move `current` in the name of this run, and show it."""
    from twhin_pipeline.store import releases

    with mistakes():
        tables = store.open()
        before = releases.current(tables)
        release, note = move(tables, f"{releases.user()}, Dagster run {context.run.run_id}")
        _show(context, tables, before, release, note)


def _show(
    context: dg.OpExecutionContext, store: "Store", before: "Release | None", release: "Release", note: str | None
) -> None:
    """Show the move as the store has it on record, and the figures of both releases."""
    from twhin_pipeline.store import releases

    move = releases.history(store)[-1]
    was = before.figures if before is not None else {}
    names = list(dict.fromkeys((*release.figures, *was)))
    now_and_before = [[one.get(name) for name in names] for one in (release.figures, was)]
    context.add_output_metadata(
        {
            "current": release.name,
            "current_before": before.name if before is not None else "nothing",
            "reason": move.reason,
            "by": move.by,
            "at": move.at,
            "snapshot": release.snapshot,
            "champion": note or release.model_uri or "the release has no registered model",
            "figures": table({"figure": names, "now": now_and_before[0], "before": now_and_before[1]}),
        }
    )
    context.log.info(f"{release.name} of snapshot {release.snapshot} is current: {move.reason}")
    if note:
        context.log.warning(note)


@dg.job(tags=FIRST, description="Make a release the current one, on the record, whatever its gates said.")
def promote() -> None:
    """Make a release the current one."""
    promote_release()


@dg.job(tags=FIRST, description="Go back to a release that was current before, on the record.")
def rollback() -> None:
    """Go back to a release that was current before."""
    roll_back()
