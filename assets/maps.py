"""Maps: an entity type's vectors on a plane, for the explorer."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, picture, table, thumbnail

STAGE = STAGES["map"]


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage; nothing where `maps.entities` names no entity type."""
    specs = [
        steps.spec(
            name, STAGE, config, group="embeddings", code="views.entity_map",
            description=f"Each {name.partition('/')[2]} as a point of a plane, for `twhin serve` to show.",
        )
        for name in STAGE.tables(config)
    ]  # fmt: skip
    return steps.make(STAGE, config, partitions, specs=specs, page=page) if specs else []


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return the map as a picture, and its clusters."""
    from twhin_pipeline.views import entity_map, plots, thumbnails

    entity = manifest.asset.partition("/")[2]
    points, groups = entity_map.read(step.store, manifest)
    names = manifest.details["clusters"]
    sizes = {name: groups.count(name) for name in dict.fromkeys(names)}
    title = f"{len(points):,} of {manifest.details['entities']:,}: {entity}"
    drawn = plots.map_2d(points, groups, title, "cluster")
    return {
        "map": thumbnail(thumbnails.scatter(points, groups), "the map, by cluster"),
        "clusters": table({"cluster": list(sizes), "entities": list(sizes.values())}),
        **counts(manifest.details, leave_out=["clusters"]),
        "map_large": picture(step.store, manifest, "map", drawn),
    }
