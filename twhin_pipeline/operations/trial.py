"""One trial of a search: a training with some values, in a store of its own, ended early where it is hopeless."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twhin_pipeline import tracking
from twhin_pipeline.config import TwhinConfig, as_override, load_config, relations, stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch
from twhin_pipeline.training.launch import TrainingCancelled
from twhin_pipeline.training.reporting import ValidationRecord

if TYPE_CHECKING:
    import optuna

LINKED, SAMPLED = ("raw_edges", "vocabulary"), ("training_set", "held_out")


class Pruned(Exception):  # noqa: N818 (it is what happened)
    """The trial was ended because it was worse than earlier ones."""


class Trials:
    """Trains the trials of one search."""

    def __init__(self, run: Run, folder: Path, metric: str, say: Say, made_by: TwhinConfig) -> None:
        """Take the run to search for.

        Args:
            run: Configuration, store and snapshot; its store is read only.
            folder: Of the search; trials' stores, logs and training sets are below it.
            metric: The validation metric to return.
            say: Called with a line for each training set that is made.
            made_by: The configuration whose training set the store has.
        """
        self.run, self.folder, self.metric, self.say, self.made_by = run, folder, metric, say, made_by

    def store(self, number: int) -> Store:
        """Return the store of the trial of this number."""
        return Store(str(self.folder / f"trial-{number:05d}"))

    def train(self, trial: optuna.Trial, fields: Mapping[str, Any], tracked: tracking.Run | tracking.QuietRun) -> float:
        """Train with some values and return the validation metric of the best step.

        Args:
            trial: Gets the evaluations' values, and decides whether to go on.
            fields: The values, by path.
            tracked: The trial's MLflow run.

        Raises:
            Pruned: The trial was ended early.
            UserError: The values do not fit, or no evaluation was made.
            TrainingFailed: As `launch.run` does.
            TrainingCancelled: As `launch.run` does.
        """
        ours = {**fields, "training.save_dir": None}
        if tracked.run_id is None or (isinstance(tracked, tracking.Run) and tracked.away):
            ours["launch.env.TWHIN_NO_TRACKING"] = "1"
        else:
            ours["launch.env.MLFLOW_RUN_ID"] = tracked.run_id
            ours["launch.env.MLFLOW_TRACKING_URI"] = tracking.uri(self.run.store)
        overrides = [*self.run.overrides, *(as_override(path, value) for path, value in ours.items())]
        config = load_config(self.run.config_path, overrides)
        store = self.store(trial.number)
        _link(store, self.run.store, LINKED)
        _link(store, self._training_set(config, overrides), SAMPLED)
        log_dir = str(self.folder / "logs" / f"trial-{trial.number:05d}")
        pruning = Pruning(trial, self.metric)
        try:
            launch.run(
                config,
                self.run.config_path,
                overrides,
                store,
                self.run.snapshot,
                log_dir=log_dir,
                output=lambda line: None,
                on_validation=pruning.judge,
            )
        except TrainingCancelled:
            if pruning.pruned:
                raise Pruned from None
            raise
        details = store.manifest("twhin_model", self.run.snapshot).details
        value = details["best_validation"]
        if value is None:
            raise UserError(f"no evaluation measured {self.metric} on the validation edges")
        return float(value)

    def _training_set(self, config: TwhinConfig, overrides: Sequence[str]) -> Store:
        """Return the store with the training set for `config`: the store's own where it fits, else one made here."""
        key = data_key(relations.resolve(config, self.run.store, self.run.snapshot))
        made_with = self.run.store.manifest("training_set/negatives", self.run.snapshot).config_hash
        ours = relations.resolve(self.made_by, self.run.store, self.run.snapshot)
        if key == data_key(ours) and made_with == ours.hash():
            store = self.run.store
        else:
            store = Store(str(self.folder / "data" / key))
            _link(store, self.run.store, LINKED)
            tables = ("training_set/positives", "training_set/negatives")
            present = all(store.exists(t, self.run.snapshot) and not store.stale(t, self.run.snapshot) for t in tables)
            if not present:
                run = Run(config, self.run.config_path, overrides, store, self.run.snapshot)
                chain.run_stage(run, chain.STAGES["sample"], self.say)
        if not store.manifest("held_out/validation", self.run.snapshot).rows:
            raise UserError(
                f"held_out/validation of {self.run.snapshot} is empty, so trials cannot be compared; hold edges out "
                "with split.validation, such as 0.05"
            )
        return store


class Pruning:
    """Ends a trial whose evaluations fall behind those of earlier trials."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        """Take Optuna's trial and the validation metric by which it is compared."""
        self.trial, self.metric, self.pruned, self.evaluations = trial, metric, False, 0

    def judge(self, record: ValidationRecord) -> None:
        """Report an evaluation to Optuna, and stop the training where Optuna says so."""
        value = record.metrics.get(self.metric, math.nan)
        if self.pruned or not record.complete or not math.isfinite(value):
            return
        self.trial.report(value, self.evaluations)
        self.evaluations += 1
        # `launch.run` passes signals on only where it is in the main thread.
        if self.trial.should_prune() and threading.current_thread() is threading.main_thread():
            self.pruned = True
            signal.raise_signal(signal.SIGTERM)


def data_key(config: TwhinConfig) -> str:
    """Return a name of all that the stage `sample` depends on: trials of the same name share their training set."""
    read = {stage: stage_settings.settings(config, stage) for stage in ("ingest", "vocabulary", "sample")}
    return digest(read)


def _link(store: Store, to: Store, names: Sequence[str]) -> None:
    """Let tables of `store` be those of another."""
    for name in names:
        link = Path(store.path(name))
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(to.path(name), target_is_directory=True)


def digest(value: Any) -> str:
    """Return 8 hex digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
