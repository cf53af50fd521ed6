"""MLflow runs: one for each training, with its curves. mlflow is imported at first use."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import subprocess
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twhin_pipeline import extras
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.stage_settings import flatten
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store, code_version

EXPERIMENT = "twhin"
KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Makes MLflow's pages show the experiment as one of model training, not of language models."""
MAX_PARAM = 500
MAX_NAME = 250
MAX_PROFILE = 65_000
"""Characters of a dataset's profile that every tracking store takes."""
PER_RELATION = "loss/"
MOST_FILES = 20
MOST_RELATIONS = 50
"""Above so many relations a run has no curve and no parameters for each: nobody reads hundreds of charts."""

# What MLflow can write artifacts to (its own registry of them takes a second to import).
ARTIFACT_PROTOCOLS = {"s3", "gs", "wasbs", "abfss", "ftp", "sftp", "dbfs", "hdfs", "viewfs"}


def uri(store: Store) -> str:
    """Return the tracking URI: MLFLOW_TRACKING_URI, else SQLite in the store (for a remote store, in `./.twhin`)."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    folder = store.root if store.is_local else str(Path(".twhin").absolute())
    Path(folder).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder}/mlflow.db"


def artifact_root(store: Store) -> str | None:
    """Return where a new experiment's artifacts go, or None where a tracking server decides.

    That is the store; or, where MLflow does not know the store's protocol, a folder under the working directory.
    """
    if uri(store).startswith(("http", "databricks")):
        return None
    if store.is_local or store.root.partition("://")[0] in ARTIFACT_PROTOCOLS:
        return store.path("mlartifacts")
    return str(Path(".twhin", "mlartifacts").absolute())


def connect(store: Store) -> Any:
    """Return a client of the store's tracking server and registry; MLflow's own telemetry and notices are off."""
    extras.need("mlflow", "reading or writing runs and registered models")
    # MLflow's own telemetry is not ours to send.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import logging

    # The migrations of a new SQLite file are no news to a user.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri(store), registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri(store))


def experiment_id(store: Store, name: str = EXPERIMENT) -> str:
    """Return the experiment's id; it is made where there is none."""
    client = connect(store)
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root(store), tags=KIND))
        except Exception:  # another process was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    for tag, value in KIND.items():
        if tag not in found.tags:  # made by an earlier version
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


class Run:
    """A run that is being written. Closing it sets its end, where this process started it."""

    def __init__(self, store: Store, run_id: str, owned: bool) -> None:
        self.client, self.run_id, self.owned = connect(store), run_id, owned

    def log_config(self, config: TwhinConfig, **more: Any) -> None:
        """Log every field as a parameter, by its path, and the resolved YAML as an artifact."""
        from mlflow.entities import Param

        known = self.client.get_run(self.run_id).data.params
        sections = config.model_dump(mode="json", exclude_none=True)
        if len(config.model.relations) > MOST_RELATIONS:
            sections["model"]["relations"] = f"{len(config.model.relations)} relations; see config.yaml"
        values = {allowed_name(key): value for key, value in flatten({**sections, **more}).items()}
        # A parameter cannot change: a resumed run has it already.
        params = [Param(k, str(v)[:MAX_PARAM]) for k, v in values.items() if k not in known]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])
        self.client.log_text(self.run_id, config.to_yaml(), "config.yaml")

    def log_dataset(self, store: Store, snapshot: str, asset: str, context: str) -> None:
        """Log a table that the run reads as an input of `context`, such as training, by its version in the store."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        manifest = store.manifest(asset, snapshot)
        files = (
            store.manifest("raw_edges", snapshot).details.get("files") if store.exists("raw_edges", snapshot) else []
        )
        source = {"uri": store.path(asset, snapshot, manifest.version), "raw_edges": files}
        columns = [{"name": name, "type": _mlflow_type(kind)} for name, kind in manifest.schema.items()]
        profile = {"num_rows": manifest.rows, "edges_per_relation": manifest.details.get("edges_per_relation")}
        dataset = Dataset(
            name=f"{asset} {snapshot}",
            digest=manifest.version,
            source_type="local" if store.is_local else store.root.partition("://")[0],
            source=json.dumps(source),
            schema=json.dumps({"mlflow_colspec": columns}),
            profile=json.dumps(profile) if len(json.dumps(profile)) < MAX_PROFILE else None,
        )
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log finite numbers at a step; relations' own (`loss/<relation>`) where they are `MOST_RELATIONS` or fewer."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        if sum(key.startswith(PER_RELATION) for key in values) > MOST_RELATIONS:
            values = {key: value for key, value in values.items() if not key.startswith(PER_RELATION)}
        finite = {allowed_name(key): float(value) for key, value in values.items() if abs(float(value)) < float("inf")}
        metrics = [Metric(key, value, now, step) for key, value in finite.items()]
        try:
            if metrics:
                self.client.log_batch(self.run_id, metrics=metrics)
        except Exception as error:  # hours of training are not to be lost to a tracking server
            warnings.warn(f"MLflow did not take the metrics of step {step}: {error}", stacklevel=2)

    def log_text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        self.client.log_text(self.run_id, text, file)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, value)

    def finish(self, status: str = "FINISHED") -> None:
        """Set the run's end, as FINISHED, FAILED or KILLED, unless who gave us the run does."""
        if self.owned:
            self.client.set_terminated(self.run_id, status)


class QuietRun:
    """Stands for the run on ranks that track nothing."""

    run_id: str | None = None

    def log_config(self, config: TwhinConfig, **more: Any) -> None:
        """Do nothing."""

    def log_dataset(self, store: Store, snapshot: str, asset: str, context: str) -> None:
        """Do nothing."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_text(self, text: str, file: str) -> None:
        """Do nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Do nothing."""


def open_run(store: Store, snapshot: str, config: TwhinConfig, earlier: str | None = None) -> Run:
    """Go on with MLFLOW_RUN_ID's run, else with the `earlier` run of a resumed training, else start one."""
    if earlier and not os.environ.get("MLFLOW_RUN_ID") and run_exists(store, earlier):
        return resume_run(store, earlier)
    return start_run(store, snapshot, config)


def start_run(store: Store, snapshot: str, config: TwhinConfig, tags: Mapping[str, str] | None = None) -> Run:
    """Start a run for a snapshot's training; with MLFLOW_RUN_ID set, go on with that one."""
    given = os.environ.get("MLFLOW_RUN_ID")
    if given:
        return resume_run(store, given, owned=False)
    client = connect(store)
    run = client.create_run(
        experiment_id(store),
        run_name=f"{snapshot} {config.hash()}",
        tags={
            "twhin.snapshot": snapshot,
            "twhin.config_hash": config.hash(),
            "twhin.store": store.root,
            **_code(),
            **({"twhin.view": store.view} if store.view else {}),
            **(tags or {}),
        },
    )
    return Run(store, run.info.run_id, owned=True)


def _code() -> dict[str, str]:
    """Return tags that say which code trains: the package's version and, in a clone of the repository, its commit."""
    tags = {"twhin.code_version": code_version(), "mlflow.source.type": "LOCAL", "mlflow.source.name": "twhin_pipeline"}
    clone = Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return tags

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(clone), *arguments]
        return subprocess.run(command, capture_output=True, check=True, timeout=20, encoding="utf-8").stdout.strip()

    try:
        tags["mlflow.source.git.commit"] = git("rev-parse", "HEAD")
        tags["mlflow.source.git.dirty"] = str(bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):  # no git here, or one that does not trust the folder's owner
        pass
    return tags


def _mlflow_type(kind: str) -> str:
    """Return MLflow's name of an Arrow type."""
    known = {"int8": "integer", "int32": "integer", "int64": "long", "float": "float", "double": "double"}
    return known.get(kind, "string")


def resume_run(store: Store, run_id: str, owned: bool = True) -> Run:
    """Go on with a run. Raises UserError where the tracking store has no such run."""
    run = Run(store, run_id, owned)
    from mlflow.exceptions import MlflowException

    try:
        run.client.get_run(run_id)
    except MlflowException as error:
        raise UserError(
            f"MLflow has no run {run_id} at {uri(store)}; unset MLFLOW_RUN_ID, or set MLFLOW_TRACKING_URI to its store"
        ) from error
    if owned:
        run.client.update_run(run_id, status="RUNNING")
    return run


def run_exists(store: Store, run_id: str) -> bool:
    """Tell whether the tracking store has the run."""
    try:
        resume_run(store, run_id, owned=False)
    except UserError:
        return False
    return True


def log_evaluation(store: Store, model: Manifest, metrics: Mapping[str, float | None]) -> None:
    """Add what evaluation measured to the run that trained a model, where the tracking store has that run."""
    run_id = model.details.get("mlflow_run_id")
    if run_id and run_exists(store, run_id):
        resume_run(store, run_id, owned=False).log_metrics(finite(metrics), int(model.details.get("steps", 0)))


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics that have a value, by names that MLflow takes."""
    return {allowed_name(name): float(value) for name, value in metrics.items() if value is not None}


def allowed_name(name: str) -> str:
    """Return a name that MLflow takes for a metric or parameter: itself where it does, with `_at_` for `@` in metrics.

    In other names (a relation may be called anything) what MLflow refuses is replaced, and the beginning of a hash of
    the whole name keeps two of them apart. See `mlflow/utils/validation.py`.
    """
    plain = re.sub(r"@(?=[0-9])", "_at_", name)
    if re.fullmatch(r"[A-Za-z0-9_./: -]+", plain) and len(plain) <= MAX_NAME and _is_path(plain):
        return plain
    cleaned = "/".join(part for part in re.sub(r"[^A-Za-z0-9_./: -]", "_", plain).split("/") if part.strip("."))
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{cleaned[: MAX_NAME - 7]}-{digest}"


def _is_path(name: str) -> bool:
    """Tell whether a name, taken for a relative path, is in its shortest form."""
    return posixpath.normpath(name) == name and not name.startswith(("..", "/")) and name != "."
