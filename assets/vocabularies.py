"""Vocabularies: one table an entity type, which row an id has."""

from collections.abc import Iterator

import dagster as dg

from twhin_pipeline.config import TwhinConfig

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from . import checks
from .provenance import key
from .stage import POOL, counts, opened, picture, spec, table_metadata


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    names = [f"vocabulary/{entity}" for entity in config.model.table_names]
    specs = [
        spec(
            name,
            group="vocabulary",
            description=f"Each {entity}'s row of its table, for ever, and its number of edges in this snapshot.",
            code="graph.vocabulary",
            deps=["raw_edges"],
            kinds=["duckdb"],
        )
        for name, entity in zip(names, config.model.table_names, strict=True)
    ]

    @dg.multi_asset(name="vocabularies", specs=specs, partitions_def=partitions, pool=POOL)
    def vocabularies(
        context: dg.AssetExecutionContext, configuration: ConfigurationResource, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline.graph import vocabulary
        from twhin_pipeline.views import plots

        with opened(context, configuration, store, ["raw_edges"]) as (loaded, tables, snapshot):
            vocabulary.build(loaded, tables, snapshot)
            for name in names:
                manifest = tables.manifest(name, snapshot)
                degree = tables.read(name, snapshot, ["degree"])["degree"].to_numpy()
                plot = picture(plots.degrees({name.split("/")[1]: degree}), "degrees")
                metadata = table_metadata(tables, manifest) | counts(manifest.details) | {"degrees": plot}
                yield dg.MaterializeResult(asset_key=key(name), metadata=metadata)

    return [vocabularies, checks.make("vocabularies_checks", config, names)]
