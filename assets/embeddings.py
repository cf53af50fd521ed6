"""Embeddings: the vectors by id, with what a person can judge them by; then the model is registered."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Manifest, Store

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from ..resources.tracking import TrackingResource
from . import checks, refit
from .provenance import key
from .stage import POOL, counts, opened, picture, spec, table, table_metadata

MOST_FOR_NEIGHBOURS = 2_000_000
"""Above so many entities the page shows no nearest neighbours: they would need the whole table."""


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    entities = config.model.table_names
    names = [f"embeddings/{name}" for name in (*entities, "relations")]
    # The evaluation is above so that its gates hold back vectors that fail them.
    above = ["twhin_model", "evaluation", *([refit.TABLE] if refit.exists(config) else [])]
    vocabularies = [f"vocabulary/{entity}" for entity in entities]
    texts = {f"embeddings/{entity}": f"Each {entity}'s vector, by its id." for entity in entities}
    texts["embeddings/relations"] = "Each relation's operator and its parameters; completes the set of tables."

    def specs() -> Iterator[dg.AssetSpec]:
        for name in names:
            own = [v for v in vocabularies if v.partition("/")[2] == name.partition("/")[2]]
            yield spec(name, group="embeddings", description=texts[name], code="vectors.export", deps=[*above, *own])

    @dg.multi_asset(
        name="embeddings",
        specs=list(specs()),
        partitions_def=partitions,
        pool=POOL,
    )
    def embeddings(
        context: dg.AssetExecutionContext,
        configuration: ConfigurationResource,
        store: StoreResource,
        tracking: TrackingResource,
    ) -> Iterator[dg.MaterializeResult]:
        from twhin_pipeline.stages.refit import published as refitted
        from twhin_pipeline.vectors.export import export
        from twhin_pipeline.vectors.reader import load_model

        with opened(context, configuration, store, [*above, *vocabularies]) as (loaded, tables, snapshot):
            published = refitted(loaded, tables, snapshot)
            manifests = export(loaded, published, snapshot)
            model = load_model(tables.root, snapshot)
            for name in names:
                manifest = manifests[name]
                metadata = table_metadata(tables, manifest) | counts(
                    manifest.details, leave_out=["model", "mlflow_run_id"]
                )
                if name != "embeddings/relations":
                    metadata |= _metadata(tables, manifest, loaded, model)
                else:
                    metadata |= tracking.register(published, snapshot)
                yield dg.MaterializeResult(asset_key=key(name), metadata=metadata)

    return [embeddings, checks.make("embeddings_checks", config, names)]


def _metadata(store: Store, manifest: Manifest, config: TwhinConfig, model: Any) -> dict[str, Any]:
    from twhin_pipeline.views import neighborhood, plots

    entity = manifest.asset.partition("/")[2]
    sample = neighborhood.sample(store, manifest)
    points, share = plots.principal_components(sample.vectors)
    norms = neighborhood.norms(sample.vectors)
    metadata: dict[str, Any] = {"mean_norm": float(norms.mean()), "largest_norm": float(norms.max())}
    for kind, groups in neighborhood.commonest(config, store, manifest.snapshot, entity, sample.rows).items():
        title = f"{len(points):,} of {manifest.rows:,}: {entity} ({share:.0%} of the variance)"
        metadata[f"map_by_{kind.replace(' ', '_')}"] = picture(
            plots.map_2d(points, groups, title, kind), f"map by {kind}"
        )
    if manifest.rows <= MOST_FOR_NEIGHBOURS:
        known = neighborhood.best_known(store, entity, manifest.snapshot)
        near = [
            ", ".join(f"{other} {cosine:.2f}" for other, cosine in model.neighbors(entity, one, 5)) for one in known
        ]
        metadata["nearest_neighbours"] = table({entity: known, "nearest (cosine)": near})
    return metadata
