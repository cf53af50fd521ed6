"""Indexes: approximate search in the vectors of each entity type that a relation leads to, with its measured recall."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, rounded, rows_of, thumbnail

STAGE = STAGES["index"]
SHOWN = 20


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks; nothing where the configuration has no indexes."""
    specs = [
        steps.spec(
            table,
            STAGE,
            config,
            group="embeddings",
            description=f"An index of the vectors of {table.partition('/')[2]}, and how well searches by it find.",
            code="vectors.indexing",
        )
        for table in STAGE.tables(config)
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page) if specs else []


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return the recall and the latency of the slowest relation as numbers, and each relation's as bars and a table."""
    import numpy as np
    import pyarrow.compute as pc

    from twhin_pipeline.views import thumbnails

    figures = step.store.read(manifest.asset, step.snapshot)
    shown = counts(manifest.details, first=["kind", "least_recall"], leave_out=["efforts", "neighbors"])
    if not figures.num_rows:
        return shown
    columns = figures.to_pydict()
    speed = np.array(columns["exact_ms"]) / np.array(columns["latency_ms"])
    shown |= {"largest_latency_ms": rounded(max(columns["latency_ms"])), "times_as_fast_as_exact": rounded(speed.min())}
    small = thumbnails.bars(np.array(columns["recall"]), np.array(columns["wanted_recall"]))
    shown["recall"] = thumbnail(small, "recall of each relation and k, and the wanted one as marks")
    asked = figures.set_column(0, "relation", pc.fill_null(figures["relation"], "(neighbors)"))
    shown["relations"] = rows_of(asked.select(["relation", "k", "recall", "latency_ms", "parameters"]), SHOWN)
    return shown
