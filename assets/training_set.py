"""The training set: positives in chunks, their sampled negatives, and the edges that are held out."""

from collections.abc import Iterator

import dagster as dg

from twhin_pipeline.config import TwhinConfig

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from . import checks
from .provenance import key
from .stage import POOL, counts, opened, spec, table_metadata

EDGES = {
    "training_set/positives": "Training edges as rows of their tables, in chunks of one relation.",
    "held_out/validation": "Edges that training does not see and that choose its best checkpoint.",
    "held_out/test": "Edges that training does not see and that `evaluation` ranks.",
}
REPEATS = {"held_out/repeats": "Training edges that happen again in the test's time; `evaluation` ranks them apart."}
NEGATIVES = {
    "training_set/negatives": "Sampled candidates of each epoch, chunk and side, and the pairs that are true edges.",
    "held_out/validation_negatives": "Pools for the validation edges.",
}


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage's two steps and their checks."""
    vocabularies = [f"vocabulary/{entity}" for entity in config.model.table_names]
    above = ["raw_edges", *vocabularies]
    made = EDGES | (REPEATS if config.split.repeats else {})

    @dg.multi_asset(
        name="positives",
        specs=[
            spec(
                name,
                group=name.split("/")[0],
                description=text,
                code="training_set.positives",
                deps=above,
                kinds=["duckdb"],
            )
            for name, text in made.items()
        ],
        partitions_def=partitions,
        pool=POOL,
    )
    def positives(
        context: dg.AssetExecutionContext, configuration: ConfigurationResource, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline.training_set.positives import build_positives

        with opened(context, configuration, store, above) as (loaded, tables, snapshot):
            build_positives(loaded, tables, snapshot)
            for name in made:
                manifest = tables.manifest(name, snapshot)
                metadata = table_metadata(tables, manifest) | counts(manifest.details)
                yield dg.MaterializeResult(asset_key=key(name), metadata=metadata)

    @dg.multi_asset(
        name="negatives",
        specs=[
            spec(
                name,
                group=name.split("/")[0],
                description=text,
                code="training_set.negatives",
                deps=list(EDGES),
                kinds=["duckdb"],
            )
            for name, text in NEGATIVES.items()
        ],
        partitions_def=partitions,
        pool=POOL,
    )
    def negatives(
        context: dg.AssetExecutionContext, configuration: ConfigurationResource, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline.training_set.negatives import build

        with opened(context, configuration, store, EDGES) as (loaded, tables, snapshot):
            build(loaded, tables, snapshot)
            edges = tables.manifest("training_set/positives", snapshot).rows
            for name in NEGATIVES:
                manifest = tables.manifest(name, snapshot)
                metadata = table_metadata(tables, manifest) | counts(manifest.details)
                if name.startswith("training_set"):
                    metadata["bytes_per_edge_and_epoch"] = manifest.bytes / edges / loaded.epochs_of_negatives
                yield dg.MaterializeResult(asset_key=key(name), metadata=metadata)

    return [
        positives,
        checks.make("positives_checks", config, list(made)),
        negatives,
        checks.make("negatives_checks", config, list(NEGATIVES)),
    ]
