"""Publish: the model is registered, the catalog shows every table, and there is a release, which `decide` may promote.

Nothing is published whose vectors or evaluation failed a blocking check. The manifest of the table `published` says
what was published: the versions it was made from, the model's URI and the catalog. Its rows are maps from the new
vectors into the space of the release that was current before (`vectors.compatibility`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from twhin_pipeline.config.training import PostgresConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import refit
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Draft, Manifest, Store
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import CALIBRATION, DRIFT, PUBLISHED


def publish(run: Run) -> Manifest:
    """Register the model and refresh the catalog; return the manifest of `published`.

    Raises:
        UserError: A blocking check of the vectors or of the evaluation failed, or a table is missing.
    """
    from twhin_pipeline import tracking
    from twhin_pipeline.checks import checks
    from twhin_pipeline.store import catalog, releases
    from twhin_pipeline.vectors import index_choice
    from twhin_pipeline.views import entity_map

    config, store, snapshot = run.config, run.store, run.snapshot
    vectors = [f"embeddings/{name}" for name in (*config.model.table_names, "relations")]
    indexes = index_choice.current(store, snapshot, config.indexed_types)
    # An earlier version of this package evaluated without it.
    measured = ["evaluation", *([CALIBRATION] if store.newest(CALIBRATION, snapshot) is not None else [])]
    checks.require_passed(config, store, snapshot, [*measured, *vectors, *indexes])
    model = refit.published(config, store, snapshot)
    maps = entity_map.current(store, snapshot, config.maps.entities)
    parents = store.versions(snapshot, [*measured, *vectors, *indexes, *maps, DRIFT])
    parents |= model.versions(snapshot, ["twhin_model"])
    with store.replace(PUBLISHED, snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.details = {**_register(store, model, snapshot), "catalog": store.path(catalog.CATALOG)}
        draft.details |= _write_maps(run, draft, parents)
        if config.export.postgres is not None:
            draft.details["postgres"] = config.export.postgres.model_dump(mode="json")
    catalog.refresh(store)
    manifest = store.manifest(PUBLISHED, snapshot)
    figures = tracking.finite(store.manifest("evaluation", snapshot).details["metrics"])
    release = releases.make(store, snapshot, {PUBLISHED: manifest.version}, figures, manifest.details.get("model"))
    if config.export.postgres is not None:
        _copy_to_postgres(store, release, config.export.postgres)
    return manifest


def _copy_to_postgres(store: Store, release: Release, settings: PostgresConfig) -> None:
    """Copy the release. A server that is away is no reason to have no release."""
    from twhin_pipeline.vectors import postgres

    try:
        postgres.copy(store, release, settings)
    except UserError as error:
        warnings.warn(f"the release is not in PostgreSQL: {error}", stacklevel=2)


def _write_maps(run: Run, draft: Draft, versions: Mapping[str, str]) -> dict[str, Any]:
    """Write the maps into the space of the current release, if there is one; return what to record."""
    from twhin_pipeline.store import database, releases
    from twhin_pipeline.vectors import compatibility

    before, kind = releases.current(run.store), run.config.export.compatibility
    if before is None or kind == "none":
        draft.write(compatibility.SCHEMA.empty_table())
        return {}
    try:
        with database.connect(run.config, run.store) as con:
            maps = compatibility.table(con, run.store, before, versions, run.snapshot, kind)
    except UserError as error:  # an earlier release that cannot be read is no reason to hold the new one back
        warnings.warn(f"the release has no maps into the space of {before.name}: {error}", stacklevel=2)
        draft.write(compatibility.SCHEMA.empty_table())
        return {}
    draft.write(maps)
    return {"compatible_with": before.name, "compatibility": kind}


def _register(store: Store, model: Store, snapshot: str) -> dict[str, Any]:
    """Register the model, in whose view of the store it is, with what evaluation measured; return what to record."""
    from twhin_pipeline import tracking

    run_id = model.manifest("twhin_model", snapshot).details.get("mlflow_run_id")
    again = f"`twhin track --send`, then `twhin publish --snapshot {snapshot}`, register it later"
    if not run_id:
        return {"notes": ["the model is not registered: its training was not tracked"]}
    if not tracking.run_exists(store, run_id):
        return {"notes": [f"the model is not registered: no run of it at {tracking.uri(store)}; {again}"]}
    metrics = tracking.finite(store.manifest("evaluation", snapshot).details["metrics"])
    try:
        uri = tracking.register_model(model, snapshot, metrics)
    except Exception as error:  # of the server: what is published is in the store
        return {"notes": [f"the model is not registered: {tracking.reason(error)}; {again}"]}
    return {"model": uri, "mlflow_run_id": tracking.resolved(store, run_id), "registry": tracking.uri(store)}
