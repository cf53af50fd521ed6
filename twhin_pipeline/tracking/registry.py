"""MLflow's model registry: a registered version is a pointer into the store, not a copy of the vectors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import twhin_pipeline.tracking.outbox as outbox
import twhin_pipeline.tracking.server as server
from twhin_pipeline import scratch
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.tracking.runs import EXPERIMENT, Run, run_exists
from twhin_pipeline.tracking.server import connect, uri, within

MODEL_FOLDER, POINTER = "model", "twhin.json"
MOVING = re.compile(r"newest|snapshot-\d{4}-\d{2}-\d{2}")
"""Aliases that each registration sets, so that they say nothing about what somebody needs."""
REMOVED = "twhin.removed"
"""The tag of a version whose tables retention has removed: when."""


def register_model(
    store: Store, snapshot: str, metrics: Mapping[str, float] | None = None, name: str = EXPERIMENT
) -> str:
    """Register a snapshot's trained model with its metrics, and return the version's URI (`models:/<name>/<version>`).

    The version holds a pointer into the store, not the vectors. Metrics become its tags (and its run's metrics), and
    the aliases `newest` and `snapshot-<date>` point to it.

    Raises:
        UserError: The model has no run.
        Exception: As MLflow raises; or `server.Away`, where it takes too long.
    """
    return within(3 * server.limit_s(store), lambda: _register(store, snapshot, metrics, name))


def _register(store: Store, snapshot: str, metrics: Mapping[str, float] | None, name: str) -> str:
    manifest = store.manifest("twhin_model", snapshot)
    run_id = manifest.details.get("mlflow_run_id")
    if not run_id or not run_exists(store, run_id):
        raise UserError(
            f"the model for {snapshot} has no run at {uri(store)}; set MLFLOW_TRACKING_URI as it was in training"
        )
    run_id = outbox.resolved(store, run_id)
    client = connect(store)
    with scratch.folder("model") as folder:
        registered = {
            "store": store.root,
            "snapshot": snapshot,
            "version": manifest.version,
            "view": store.view,
            "model": manifest.details["model"],
        }
        (Path(folder) / POINTER).write_text(json.dumps(registered, indent=1), encoding="utf-8")
        source = store.path("twhin_model", snapshot, manifest.version, "relations.parquet")
        store.fs.get_file(store.fs._strip_protocol(source), f"{folder}/relations.parquet")
        client.log_artifacts(run_id, folder, MODEL_FOLDER)
    result = client.search_registered_models(filter_string=f"name = '{name}'")
    if not result:
        client.create_registered_model(name, description="TwHIN embeddings; open with twhin_pipeline load_model")
    source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL_FOLDER}"
    tags = {"snapshot": snapshot, "store": store.root, "store_version": manifest.version, "view": store.view or ""}
    tags |= {key: f"{value:.6g}" for key, value in (metrics or {}).items()}
    version = str(client.create_model_version(name, source, run_id, tags=tags).version)
    for alias in ("newest", f"snapshot-{snapshot}"):
        client.set_registered_model_alias(name, alias, version)
    Run(store, run_id, owned=False).log_metrics(metrics or {}, int(manifest.details.get("steps", 0)))
    return f"models:/{name}/{version}"


def set_champion(store: Store, model_uri: str) -> None:
    """Let the alias `champion` point to a registered version, `models:/<name>/<version>`.

    Raises:
        Exception: As MLflow raises; or `server.Away`, where it takes too long.
    """
    name, version = model_uri.removeprefix("models:/").rsplit("/", 1)
    within(server.limit_s(store), lambda: connect(store).set_registered_model_alias(name, "champion", version))


def aliased(store: Store) -> dict[str, dict[str, Any]]:
    """Return what is behind each alias that somebody set, or that is `champion`, by `models:/<name>@<alias>`.

    Those of models of other stores are among them; a version's name is unique.

    Raises:
        Exception: As MLflow raises; or `server.Away`, where it takes too long.
    """
    path = server.sqlite_path(uri(store))
    if path is not None and not path.exists():
        return {}  # nothing was ever tracked
    client = connect(store)

    def read() -> dict[str, dict[str, Any]]:
        models, token = [], None
        while True:
            page = client.search_registered_models(page_token=token)
            models += list(page)
            token = page.token
            if not token:
                break
        uris = [f"models:/{one.name}@{alias}" for one in models for alias in one.aliases if not MOVING.fullmatch(alias)]
        return {one: _read(client, one) for one in uris}

    return within(server.limit_s(store), read)


def note_removed(store: Store, model_uris: Sequence[str], when: str) -> None:
    """Tag registered versions, `models:/<name>/<version>`, whose tables have gone.

    Raises:
        Exception: As MLflow raises; or `server.Away`, where it takes too long.
    """
    client = connect(store)

    def tag() -> None:
        for one in model_uris:
            name, version = one.removeprefix("models:/").rsplit("/", 1)
            client.set_model_version_tag(name, version, REMOVED, when)

    within(server.limit_s(store), tag)


def pointer(model_uri: str) -> dict[str, Any]:
    """Return `store`, `snapshot`, `version` and `view` behind `models:/twhin/1`, `models:/twhin@newest` or `runs:/…`.

    The tracking store is MLFLOW_TRACKING_URI, else that of the default store.

    Raises:
        UserError: There is no such model, or it is not one of ours.
    """
    store = Store()
    client = connect(store)
    try:
        registered = within(server.limit_s(store), lambda: _read(client, model_uri))
    except Exception as error:
        variables = [name for name in ("MLFLOW_TRACKING_URI", "TWHIN_HOME") if os.environ.get(name)]
        remedy = (
            f"it is looked for there by {' and '.join(variables)}; "
            if variables
            else "set MLFLOW_TRACKING_URI or TWHIN_HOME, "
        )
        raise UserError(
            f"{model_uri}: no such model at {uri(store)} ({server.reason(error)}); {remedy}register it with "
            "`twhin publish`, or give the path of its store"
        ) from error
    if not Store(registered["store"]).assets() and store.versions_of(_table(registered), registered["snapshot"]):
        registered["store"] = store.root  # the store has moved, and its registry with it
    return registered


def _table(registered: Mapping[str, Any]) -> str:
    return "twhin_model" if not registered.get("view") else f"{registered['view']}/twhin_model"


def _read(client: Any, model_uri: str) -> dict[str, Any]:
    """Return what is registered: a version's tags say it, and a file of the run, which may have been moved."""
    if model_uri.startswith("models:/"):
        reference = model_uri.removeprefix("models:/")
        if "@" in reference:
            version = client.get_model_version_by_alias(*reference.split("@", 1))
        else:
            version = client.get_model_version(*reference.split("/", 1))
        if "view" in version.tags:
            tags = version.tags
            return {
                "store": tags["store"],
                "snapshot": tags["snapshot"],
                "version": tags["store_version"],
                "view": tags["view"] or None,
            }
        source = version.source
    else:
        run_id, _, rest = model_uri.removeprefix("runs:/").partition("/")
        source = f"{client.get_run(run_id).info.artifact_uri}/{rest or MODEL_FOLDER}"
    import mlflow.artifacts

    registered: dict[str, Any] = json.loads(mlflow.artifacts.load_text(f"{source}/{POINTER}"))
    return registered
