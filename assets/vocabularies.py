"""Vocabularies: one table an entity type, which row an id has."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, picture, thumbnail

STAGE = STAGES["vocabulary"]


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    specs = [
        steps.spec(
            f"vocabulary/{entity}",
            STAGE,
            config,
            group="vocabulary",
            description=f"Each {entity}'s row of its table, for ever, and its number of edges in this snapshot.",
            code="graph.vocabulary",
            kinds=["parquet", "duckdb"],
        )
        for entity in config.model.table_names
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return what was counted, and how edges are spread over entities."""
    from twhin_pipeline.views import plots, thumbnails

    degree = step.store.read(manifest.asset, step.snapshot, ["degree"])["degree"].to_numpy()
    drawn = plots.degrees({manifest.asset.partition("/")[2]: degree})
    shown = counts(manifest.details, first=["largest_degree"])
    shown["degrees"] = thumbnail(thumbnails.degrees(degree), "entities by their number of edges")
    return shown | {"degrees_large": picture(step.store, manifest, "degrees", drawn)}
