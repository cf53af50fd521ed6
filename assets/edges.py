"""Raw edges: the source, typed and merged, and the rows that could not be edges."""

from collections.abc import Iterator

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import EVERY_OTHER

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from . import checks
from .stage import POOL, counts, opened, spec, table_metadata

TABLES = ["raw_edges", "raw_edges_rejected"]


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    relations = ", ".join(config.model.relation_names).replace(EVERY_OTHER, "every other one of the source")
    specs = [
        spec(
            "raw_edges",
            group="edges",
            description=f"Typed edges of the snapshot, duplicates merged. Relations: {relations}.",
            code="graph.raw_edges",
            kinds=["duckdb"],
        ),
        spec(
            "raw_edges_rejected",
            group="edges",
            description="Rows that could not be edges, each with the reason, the column to blame, its file and row.",
            code="graph.raw_edges",
            kinds=["duckdb"],
        ),
    ]

    @dg.multi_asset(name="edges", specs=specs, partitions_def=partitions, pool=POOL)
    def edges(
        context: dg.AssetExecutionContext, configuration: ConfigurationResource, store: StoreResource
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline.graph.raw_edges import ingest

        with opened(context, configuration, store, []) as (loaded, tables, snapshot):
            kept = ingest(loaded, tables, snapshot)
            rejected = tables.manifest("raw_edges_rejected", snapshot)
            yield dg.MaterializeResult(
                asset_key="raw_edges",
                metadata=table_metadata(tables, kept) | counts(kept.details, leave_out=["relations"]),
            )
            yield dg.MaterializeResult(
                asset_key="raw_edges_rejected", metadata=table_metadata(tables, rejected) | counts(rejected.details)
            )

    return [edges, checks.make("edges_checks", config, TABLES)]
