"""What `twhin prune` keeps."""

from __future__ import annotations

from pydantic import Field

from twhin_pipeline.config.base import Section


class RetentionConfig(Section):
    """What `twhin prune` keeps. Whatever it says, these stay: the current release and the one before it, pinned
    releases, models to which an alias of your own points in MLflow, and everything that any of them was made from."""

    releases: int = Field(7, ge=1)
    """So many of the newest releases stay, each with all tables that it was made from."""
    weekly_releases: int = Field(0, ge=0)
    """Besides, the newest release of each week stays, for so many weeks."""
    snapshots: int = Field(3, ge=1)
    """Of so many of the newest snapshots the newest version of each table stays, in a release or not."""
    grace_hours: float = Field(24.0, ge=0)
    """What was made, was the newest or was in the current release less than so many hours ago stays: a process that
    has opened it may be reading it still."""
    failed_days: float = Field(7.0, ge=0)
    """What a check refused, checkpoints of a training that was interrupted, and what trainings printed stay so many
    days."""
    seen_edges_days: int = Field(90, ge=1)
    """A model that started from an earlier one is evaluated without the edges that the earlier one was trained on.
    Where the earlier one's training set goes, a number of 64 bits stays for each of its edges, until no model has been
    trained on the edge for so many days."""
    dagster_days: float = Field(90.0, ge=0)
    """Dagster's runs stay so many days, each asset's latest ones longer."""
