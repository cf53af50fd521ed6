"""Opens what was exported: `load_model(path)` returns the read API of a store's model (`reader.TwhinEmbeddings`)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from twhin_pipeline import extras
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store, releases
from twhin_pipeline.vectors.calibration import open_calibrations
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.model_files import locate, model_version, parameters_of
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.vectors.searchers import Wanted
from twhin_pipeline.words import RELATIONS

if TYPE_CHECKING:
    import torch

    from twhin_pipeline.vectors.scoring import EdgeScores
    from twhin_pipeline.vectors.vector_index import VectorIndex


def load_model(path: str, snapshot: str | None = None, *, compatible_with: str | None = None) -> TwhinEmbeddings:
    """Open exported embeddings: nothing is read until it is asked for.

    Args:
        path: A store's root (path or URL); that with `@` and a date for one of its snapshots, or with `@` and the name
            of a release; or an MLflow model URI (`models:/name/3`, `models:/name@alias`, `runs:/<id>/model`).
        snapshot: The snapshot, in place of `@YYYY-MM-DD`. Left out: that of the current release; where nothing has been
            published, the newest that has embeddings.
        compatible_with: An earlier release (`twhin releases` lists them). `get_embedding` then returns vectors in its
            space, for a consumer that was trained on its vectors. While that release is the one that is opened, these
            are its own vectors.

    Raises:
        UserError: There are no embeddings there, they are not one whole set, or no map leads to that release.
    """
    return open_model(*locate(str(path), RELATIONS, snapshot), compatible_with=compatible_with)


def open_model(store: Store, snapshot: str, *, compatible_with: str | None = None) -> TwhinEmbeddings:
    """Open the exported embeddings of a snapshot, at the versions that this store shows (`releases.opened`).

    Raises:
        UserError: They are not there or not one whole set, or no map leads to the release `compatible_with`.
    """
    relations = store.manifest(RELATIONS, snapshot)
    model_config = TwhinModelConfig.model_validate(relations.details["model"])
    tables, manifests = {}, {}
    for name in model_config.table_names:
        manifest = store.manifest(f"embeddings/{name}", snapshot)
        if relations.parents[manifest.asset] != manifest.version:
            raise UserError(
                f"{store.root}: {manifest.asset} of {snapshot} is not of the same export as {RELATIONS}; an export is "
                f"under way or broke off: run `twhin export --snapshot {snapshot}`"
            )
        tables[name], manifests[name] = EntityTable.open(store, manifest), manifest
    version = model_version(relations)
    return TwhinEmbeddings(
        model_config,
        tables,
        partial(_open_scores, model_config, store, relations),
        snapshot,
        version,
        normalized=relations.details["normalize"],
        store=store,
        maps=None if compatible_with is None else _maps(store, relations, compatible_with),
        open_index=partial(_open_index, model_config, store, manifests),
        open_calibrations=partial(open_calibrations, store, relations),
    )


def _open_index(
    model_config: TwhinModelConfig, store: Store, manifests: dict[str, Manifest], table: EntityTable, wanted: Wanted
) -> VectorIndex | None:
    extras.need("torch", "search by an index", "reader")
    from twhin_pipeline.vectors import index_choice, indexing

    # That of the vectors that are open, which may have been removed since.
    manifest = index_choice.manifest_of(store, manifests[table.name])
    return None if manifest is None else indexing.open_index(store, manifest, table, model_config, wanted)


def _maps(store: Store, relations: Manifest, earlier: str) -> dict[str, np.ndarray] | None:
    """Return the maps into an earlier release's space, None where these are that release's own vectors."""
    from twhin_pipeline.vectors import compatibility

    made = [releases.read(store, name) for name in releases.names(store)]
    of_these = [release for release in made if release.tables.get(RELATIONS) == relations.version]
    if of_these and of_these[-1].name == earlier:
        return None
    if of_these:
        return compatibility.maps_into(store, of_these[-1], earlier)
    raise UserError(
        f"{store.root}: these vectors of {relations.snapshot} are in no release, so no map leads from them to "
        f"{earlier}; publish them (`twhin publish --snapshot {relations.snapshot}`)"
    )


def _open_scores(model_config: TwhinModelConfig, store: Store, relations: Manifest) -> EdgeScores:
    extras.need("torch", "scoring an edge", "reader")
    from twhin_pipeline.vectors.scoring import EdgeScores

    rows: dict[str, torch.Tensor] = {}
    for path in store.files_of(relations):
        with store.parquet(path) as file:
            rows |= parameters_of(file.read(columns=["relation", "embedding"]))
    return EdgeScores(model_config, rows)
