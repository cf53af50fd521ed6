"""Partitions: one for each snapshot of the source; a new one needs no reload of the code.

What belongs here: which partitions there are, and how Dagster's instance learns of them. What does not: how snapshots
are found (`twhin_pipeline/graph/source.py`), or what runs for a new one (`nights.py`).
https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

import logging
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph.source import check_snapshot

if TYPE_CHECKING:
    from dagster._core.instance import DynamicPartitionsStore

NAME = "snapshots"
logger = logging.getLogger("dagster.twhin")


class Snapshots(dg.DynamicPartitionsDefinition):
    """The snapshots that Dagster's instance knows, in the order of their dates.

    They are registered when the code location loads, by the sensor `register_snapshots`, before a run that a sensor or
    schedule starts, and, which Dagster's own class does not do, when a command asks for a snapshot that the instance
    does not know: `dagster asset materialize --partition …` works on a fresh instance.

    Dates alone (a definition by time windows) would make a partition of each day, and most sources have no snapshot on
    most days.
    """

    find: Callable[[], list[str]]

    def __new__(cls, find: Callable[[], list[str]]) -> "Snapshots":
        """Take `find`, which lists the source's snapshots, oldest first."""
        made = super().__new__(cls, name=NAME)
        made.find = find
        return made

    def has_partition_key(
        self,
        partition_key: str,
        current_time: datetime | None = None,
        dynamic_partitions_store: "DynamicPartitionsStore | None" = None,
    ) -> bool:
        """Tell whether there is such a snapshot; register those of the source where the instance does not know it."""
        # Dagster names the store that a command uses in a context of its own.
        from dagster._core.definitions.partitions.context import partition_loading_context

        with partition_loading_context(current_time, dynamic_partitions_store) as loading:
            if super().has_partition_key(partition_key):
                return True
            if not isinstance(store := loading.dynamic_partitions_store, dg.DagsterInstance):
                return False
            found = listed(self.find, logger.warning)
            # A query does not tell which snapshots it has, and a source that is away tells nothing now.
            register(store, found or [partition_key] if _is_date(partition_key) else [])
            return super().has_partition_key(partition_key)


def _is_date(text: str) -> bool:
    try:
        return bool(check_snapshot(text))
    except UserError:
        return False


def listed(find: Callable[[], list[str]], warn: Callable[[str], object]) -> list[str]:
    """Return the snapshots of the source; none, and one line to `warn`, where the listing fails."""
    try:
        return find()
    except Exception as error:  # the libraries of object stores raise errors of many kinds
        warn(f"the source's snapshots cannot be listed, those that are registered stay: {' '.join(str(error).split())}")
        return []


def register(instance: dg.DagsterInstance, snapshots: Sequence[str]) -> list[str]:
    """Add snapshots to the partitions that an instance knows; return those that are new.

    Dagster lists partitions, and backfills them, in the order in which they were added. Where one arrives late, those
    after it are therefore added anew; what was materialized stays.
    """
    known = instance.get_dynamic_partitions(NAME)
    new = sorted(set(snapshots) - set(known))
    if not new:
        return []
    later = sorted(snapshot for snapshot in known if snapshot > new[0])
    for snapshot in later:
        instance.delete_dynamic_partition(NAME, snapshot)
    instance.add_dynamic_partitions(NAME, sorted({*new, *later}))
    return new


def register_at_load(find: Callable[[], list[str]]) -> None:
    """Register the source's snapshots where a code location loads, so that the UI has them at its first opening.

    The processes of runs and steps load the same code, and need no listing. Neither does a plain import.
    """
    # Private in Dagster: what it loads the code for, and the instance that it does so with.
    from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType
    from dagster._core.storage.defs_state.base import DefsStateStorage

    if not DefinitionsLoadContext.is_set():
        return
    if DefinitionsLoadContext.get().load_type is not DefinitionsLoadType.INITIALIZATION:
        return
    storage = DefsStateStorage.get()
    if storage is not None and storage.has_instance:
        register(storage._instance, listed(find, logger.warning))
    elif os.environ.get("DAGSTER_HOME"):
        with dg.DagsterInstance.get() as instance:
            register(instance, listed(find, logger.warning))
