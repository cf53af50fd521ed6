"""Partitions: one for each snapshot of the source.

What belongs here: which partitions there are. What does not: how snapshots are found
(`twhin_pipeline/graph/source.py`).
https://docs.dagster.io/guides/build/partitions-and-backfills/partitioning-assets
"""

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.graph.source import find_snapshots


def snapshots(config: TwhinConfig) -> dg.PartitionsDefinition:
    """Return the snapshots that the source has now; a later one is there once the code location is loaded again."""
    return dg.StaticPartitionsDefinition(find_snapshots(config))
