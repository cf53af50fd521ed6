"""Embeddings: the vectors by id, with what a person can judge them by."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest
from twhin_pipeline.words import RELATIONS

from . import steps
from .metadata import counts, picture, rounded, table, thumbnail

STAGE = STAGES["export"]

MOST_FOR_NEIGHBOURS = 2_000_000
"""Above so many entities the page shows no nearest neighbours: they would need the whole table."""


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    texts = {f"embeddings/{entity}": f"Each {entity}'s vector, by its id." for entity in config.model.table_names}
    texts[RELATIONS] = "Each relation's operator and its parameters; completes the set of tables."
    vocabularies = {f"vocabulary/{entity}" for entity in config.model.table_names}
    specs = []
    for name in STAGE.tables(config):
        others = vocabularies - {name.replace("embeddings/", "vocabulary/")}
        deps = [table for table in STAGE.upstream(config) if table not in others]
        specs.append(
            steps.spec(
                name, STAGE, config, group="embeddings", description=texts[name], code="vectors.export", deps=deps
            )
        )
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return a map of the vectors, the neighbours of well-known entities, and the vectors' lengths."""
    from twhin_pipeline.vectors.opening import load_model
    from twhin_pipeline.views import neighborhood, plots, thumbnails

    figures = counts(manifest.details, leave_out=["model", "mlflow_run_id", "notes"])
    if manifest.asset == RELATIONS:
        return figures
    entity = manifest.asset.partition("/")[2]
    sample = neighborhood.sample(step.store, manifest)
    points, share = plots.principal_components(sample.vectors)
    norms = neighborhood.norms(sample.vectors)
    shown: dict[str, Any] = {}
    if manifest.rows <= MOST_FOR_NEIGHBOURS:
        model = load_model(step.store.root, step.snapshot)
        known = neighborhood.best_known(step.store, entity, step.snapshot)
        near = [
            ", ".join(f"{other} {cosine:.2f}" for other, cosine in model.neighbors(entity, one, 5)) for one in known
        ]
        shown["nearest_neighbours"] = table({entity: [str(one) for one in known], "nearest (cosine)": near})
    large = {}
    for kind, groups in neighborhood.commonest(step.config, step.store, step.snapshot, entity, sample.rows).items():
        title = f"{len(points):,} of {manifest.rows:,}: {entity} ({share:.0%} of the variance)"
        name = f"map_by_{kind.replace(' ', '_')}"
        shown[name] = thumbnail(thumbnails.scatter(points, groups), f"map by {kind}")
        large[f"{name}_large"] = picture(step.store, manifest, name, plots.map_2d(points, groups, title, kind))
    shown |= {"mean_norm": rounded(norms.mean()), "largest_norm": rounded(norms.max())}
    return shown | figures | large
