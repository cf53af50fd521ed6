"""The training set: positives in chunks, their sampled negatives, and the edges that are held out."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest
from twhin_pipeline.words import REPEATS

from . import steps
from .metadata import counts, rounded

STAGE = STAGES["sample"]
TEXTS = {
    "training_set/positives": "Training edges as rows of their tables, in chunks of one relation.",
    "training_set/negatives": "Sampled candidates of each epoch, chunk and side, and the pairs that are true edges.",
    "held_out/validation": "Edges that training does not see and that choose its best checkpoint.",
    "held_out/validation_negatives": "Pools for the validation edges.",
    "held_out/test": "Edges that training does not see and that `evaluation` ranks.",
    REPEATS: "Training edges that happen again in the test's time; `evaluation` ranks them apart.",
}
NEGATIVES = {
    "training_set/negatives": "training_set/positives",
    "held_out/validation_negatives": "held_out/validation",
}
"""Tables of negatives, and the edges that they are sampled for."""


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    specs = [
        steps.spec(
            table,
            STAGE,
            config,
            group=table.partition("/")[0],
            description=TEXTS[table],
            code="training_set.negatives" if table in NEGATIVES else "training_set.positives",
            kinds=["parquet", "duckdb"],
            deps=[NEGATIVES[table]] if table in NEGATIVES else None,
        )
        for table in STAGE.tables(config)
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return what was counted, and what negatives cost."""
    shown = counts(manifest.details)
    if manifest.asset == "training_set/negatives" and manifest.rows:
        edges = step.store.manifest("training_set/positives", step.snapshot).rows
        bytes_each = manifest.bytes / edges / step.config.epochs_of_negatives
        shown = {"bytes_per_edge_and_epoch": rounded(bytes_each), **shown}
    return shown
