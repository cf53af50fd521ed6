"""MLflow runs: one for each training, with its curves. mlflow is imported at first use.

What is logged is a list of events. Where the server does not take one in time, that one and all later ones go to the
outbox, and `send` logs them another time. Nothing here but a wrong MLFLOW_RUN_ID ends a training.
"""

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

import twhin_pipeline.tracking.outbox as outbox
import twhin_pipeline.tracking.server as server
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.stage_settings import flatten
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store, code_version
from twhin_pipeline.tracking.server import artifact_root, connect, reason, uri, within

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
PATIENCE_S = 60.0
"""A run that has waited so long for its server in all does not wait for it any more."""


def experiment_id(store: Store, name: str = EXPERIMENT) -> str:
    """Return the experiment's id; it is made where there is none."""
    client = connect(store)
    result = client.get_experiment_by_name(name)
    if result is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifact_root(store), tags=KIND))
        except Exception:  # another process was quicker
            result = client.get_experiment_by_name(name)
            if result is None:
                raise
    for tag, value in KIND.items():
        if tag not in result.tags:  # made by an earlier version
            client.set_experiment_tag(result.experiment_id, tag, value)
    return str(result.experiment_id)


class Run:
    """A run that is being written. Closing it sets its end, where this process started it."""

    def __init__(self, store: Store, run_id: str, owned: bool, away: str | None = None) -> None:
        """Open it; `away` says why the server does not take anything, if so."""
        self.store, self.run_id, self.owned, self.away = store, run_id, owned, away
        self.client = connect(store)
        self.waited_s = 0.0

    def log_config(self, config: TwhinConfig, **more: Any) -> None:
        """Log every field as a parameter, by its path, and the resolved YAML as an artifact."""
        sections = config.model_dump(mode="json", exclude_none=True)
        if len(config.model.relations) > MOST_RELATIONS:
            sections["model"]["relations"] = f"{len(config.model.relations)} relations; see config.yaml"
        self.log_params(flatten({**sections, **more}))
        self.log_text(config.to_yaml(), "config.yaml")

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Log parameters; those that the run has already stay as they are."""
        params = {allowed_name(key): str(value)[:MAX_PARAM] for key, value in values.items()}
        self._log({"kind": "params", "values": params})

    def log_dataset(self, store: Store, snapshot: str, asset: str, context: str) -> None:
        """Log a table that the run reads as an input of `context`, such as training, by its version in the store."""
        manifest = store.manifest(asset, snapshot)
        files = (
            store.manifest("raw_edges", snapshot).details.get("files") if store.exists("raw_edges", snapshot) else []
        )
        source = {"uri": store.path(asset, snapshot, manifest.version), "raw_edges": files}
        columns = [{"name": name, "type": _mlflow_type(kind)} for name, kind in manifest.schema.items()]
        profile = {"num_rows": manifest.rows, "edges_per_relation": manifest.details.get("edges_per_relation")}
        fields = {
            "name": f"{asset} {snapshot}",
            "digest": manifest.version,
            "source_type": "local" if store.is_local else store.root.partition("://")[0],
            "source": json.dumps(source),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps(profile) if len(json.dumps(profile)) < MAX_PROFILE else None,
        }
        self._log({"kind": "dataset", "fields": fields, "context": context})

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log finite numbers at a step; relations' own (`loss/<relation>`) where they are `MOST_RELATIONS` or fewer."""
        if sum(key.startswith(PER_RELATION) for key in values) > MOST_RELATIONS:
            values = {key: value for key, value in values.items() if not key.startswith(PER_RELATION)}
        finite = {allowed_name(key): float(value) for key, value in values.items() if abs(float(value)) < float("inf")}
        if finite:
            self._log({"kind": "metrics", "values": finite, "step": step, "time": _now()})

    def log_text(self, text: str, file: str) -> None:
        """Log a text as an artifact."""
        self._log({"kind": "text", "text": text, "file": file})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags."""
        self._log({"kind": "tags", "values": dict(tags)})

    def finish(self, status: str = "FINISHED") -> None:
        """Set the run's end, as FINISHED, FAILED or KILLED, unless who gave us the run does.

        What is in the outbox is sent, if the server takes it now.
        """
        if self.owned:
            self._log({"kind": "end", "status": status, "time": _now()})
        if self.run_id in outbox.waiting(self.store):
            try:
                send(self.store, self.run_id)
            except Exception as error:
                place = outbox.folder(self.store) / f"{self.run_id}.jsonl"
                _warn(f"MLflow at {uri(self.store)} has not taken all of this run ({reason(error)}); it is kept in "
                      f"{place}, and `twhin track --send` sends it")  # fmt: skip

    def _log(self, event: dict[str, Any]) -> None:
        """Log an event, or put it into the outbox where the server does not take it in time."""
        if self.away is None:
            began = time.monotonic()
            try:
                within(server.limit_s(self.store), lambda: apply(self.client, self.run_id, event))
                self.waited_s += time.monotonic() - began
                if self.waited_s > PATIENCE_S and server.is_server(uri(self.store)):
                    self._leave(f"it has taken {self.waited_s:.0f} s so far")
                return
            except Exception as error:
                self._leave(reason(error))
        try:
            outbox.add(self.store, self.run_id, event)
        except OSError as error:  # hours of training are not to be lost to what watches it
            _warn(f"what was to be tracked is lost: {error}")

    def _leave(self, why: str) -> None:
        self.away = why
        _warn(f"MLflow at {uri(self.store)} is away ({why}); what it would be told is kept, and training goes on")


def apply(client: Any, run_id: str, event: dict[str, Any]) -> None:
    """Log one event."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    kind = event["kind"]
    if kind == "params":
        known = client.get_run(run_id).data.params
        # A parameter cannot change: a resumed run has it already.
        params = [Param(key, value) for key, value in event["values"].items() if key not in known]
        for start in range(0, len(params), 100):
            client.log_batch(run_id, params=params[start : start + 100])
    elif kind == "metrics":
        metrics = [Metric(key, value, event["time"], event["step"]) for key, value in event["values"].items()]
        for start in range(0, len(metrics), 1_000):
            client.log_batch(run_id, metrics=metrics[start : start + 1_000])
    elif kind == "text":
        client.log_text(run_id, event["text"], event["file"])
    elif kind == "tags":
        for key, value in event["values"].items():
            client.set_tag(run_id, key, value)
    elif kind == "dataset":
        tag = InputTag("mlflow.data.context", event["context"])
        client.log_inputs(run_id, [DatasetInput(Dataset(**event["fields"]), [tag])])
    elif kind == "end":
        client.set_terminated(run_id, event["status"], end_time=event["time"])
    else:
        raise ValueError(f"unknown kind of event {kind!r}")


def send(store: Store, run_id: str) -> str:
    """Send a run's events from the outbox to MLflow; return the id of its run there.

    Raises:
        Exception: MLflow does not take them; they stay in the outbox.
    """
    client = connect(store)
    events = list(outbox.events(store, run_id))

    def log() -> str:
        became = outbox.resolved(store, run_id)
        if became == run_id and events and events[0]["kind"] == "run":
            start = events[0]
            run = client.create_run(
                experiment_id(store), start_time=start["time"], tags=start["tags"], run_name=start["name"]
            )
            became = str(run.info.run_id)
            outbox.note(store, run_id, became)  # now, so that one that breaks off goes on in the same run
        for event in events:
            if event["kind"] != "run":
                apply(client, became, event)
        return became

    within(server.SERVER_LIMIT_S, lambda: client.search_experiments(max_results=1))
    became = within(server.limit_s(store) + len(events), log)
    outbox.remove(store, run_id)
    return became


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


def _now() -> int:
    return int(time.time() * 1000)


class QuietRun:
    """Stands for the run where nothing is tracked: on ranks but the first, and with `--no-tracking`."""

    run_id: str | None = None

    def log_config(self, config: TwhinConfig, **more: Any) -> None:
        """Do nothing."""

    def log_dataset(self, store: Store, snapshot: str, asset: str, context: str) -> None:
        """Do nothing."""

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_text(self, text: str, file: str) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Do nothing."""


def open_run(store: Store, snapshot: str, config: TwhinConfig, earlier: str | None = None) -> Run | QuietRun:
    """Go on with MLFLOW_RUN_ID's run, else with the `earlier` run of a resumed training, else start one."""
    variable = os.environ.get("MLFLOW_RUN_ID") or server.is_off()
    if earlier and not variable and (earlier.startswith(outbox.PREFIX) or run_exists(store, earlier)):
        return resume_run(store, earlier)
    return start_run(store, snapshot, config)


def start_run(
    store: Store, snapshot: str, config: TwhinConfig, tags: Mapping[str, str] | None = None
) -> Run | QuietRun:
    """Start a run for a snapshot's training; with MLFLOW_RUN_ID set, go on with that one."""
    if server.is_off():
        return QuietRun()
    variable = os.environ.get("MLFLOW_RUN_ID")
    if variable:
        return resume_run(store, variable, owned=False)
    known = {
        "twhin.snapshot": snapshot,
        "twhin.config_hash": config.hash(),
        "twhin.store": store.root,
        **_code(),
        **({"twhin.view": store.view} if store.view else {}),
    }
    return begin(store, f"{snapshot} {config.hash()}", {**known, **(tags or {})})


def begin(store: Store, name: str, tags: Mapping[str, str]) -> Run:
    """Start a run of any kind; where the server is away, one whose events wait in the outbox."""
    client = connect(store)
    try:
        made = within(
            server.limit_s(store), lambda: client.create_run(experiment_id(store), run_name=name, tags=dict(tags))
        )
        return Run(store, made.info.run_id, owned=True)
    except Exception as error:
        run = Run(store, outbox.new_id(), owned=True, away=reason(error))
        _warn(f"MLflow at {uri(store)} is away ({run.away}); what it would be told is kept in {outbox.folder(store)}, "
              "and `twhin track --send` sends it")  # fmt: skip
        run._log({"kind": "run", "name": name, "tags": dict(tags), "time": _now()})
        return run


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
    """Go on with a run; where the server is away, its events wait in the outbox.

    Raises:
        UserError: The tracking store has no such run.
    """
    run = Run(store, outbox.resolved(store, run_id), owned)
    if run.run_id.startswith(outbox.PREFIX):
        run.away = "the run began without it"
        return run
    try:
        within(server.limit_s(store), lambda: run.client.get_run(run.run_id))
        if owned:
            within(server.limit_s(store), lambda: run.client.update_run(run.run_id, status="RUNNING"))
    except Exception as error:
        if _is_unknown(error):
            raise UserError(
                f"MLflow has no run {run_id} at {uri(store)}; unset MLFLOW_RUN_ID, or set MLFLOW_TRACKING_URI to its "
                "store"
            ) from error
        run._leave(reason(error))
    return run


def find_run(store: Store, tags: Mapping[str, str]) -> str | None:
    """Return the run that has these tags, None where there is none. Raises MLflow's errors, or Away."""
    if server.is_off():
        return None
    client = connect(store)
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    result = within(server.limit_s(store), lambda: client.search_runs([experiment_id(store)], wanted, max_results=1))
    return str(result[0].info.run_id) if result else None


def _is_unknown(error: Exception) -> bool:
    """Tell whether MLflow answered that it has no such thing, and not that it cannot answer."""
    return getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def run_exists(store: Store, run_id: str) -> bool:
    """Tell whether the tracking store has the run; False where it does not answer."""
    run_id = outbox.resolved(store, run_id)
    if server.is_off() or run_id.startswith(outbox.PREFIX):
        return False
    client = connect(store)
    try:
        within(server.limit_s(store), lambda: client.get_run(run_id))
    except Exception:
        return False
    return True


def log_evaluation(store: Store, model: Manifest, metrics: Mapping[str, float | None]) -> None:
    """Add what evaluation measured to the run that trained a model, where the tracking store has that run."""
    run_id = model.details.get("mlflow_run_id")
    if not run_id or server.is_off():
        return
    try:
        run = resume_run(store, run_id, owned=False)
    except UserError:
        return
    run.log_metrics(finite(metrics), int(model.details.get("steps", 0)))
    run.finish()


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
