"""`twhin tune`: a search over hyperparameters, judged on validation edges only.

Optuna's tree-structured Parzen estimator (Bergstra et al., 2011) proposes values of the fields that the section `tune`
names; each trial trains under torchrun like `twhin train` and is a nested MLflow run. Everything is below

    <root>/tune/optuna.db                        what was tried, of every search; the same command goes on with it
    <root>/tune/<snapshot>/<search>/best.yaml    the best values
    <root>/tune/<snapshot>/<search>/logs/        ranks' logs, by trial
    <root>/tune/<snapshot>/<search>/data/        training sets that differ from the store's, shared by the trials
    <root>/tune/<snapshot>/<search>/trial-…/     a store for each trial, with links to the tables that it reads

so that no trial can touch the store's own model. A trial's store is removed when the trial has ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from twhin_pipeline import tracking
from twhin_pipeline.config import TwhinConfig, current_path, load_config, recipes, relations
from twhin_pipeline.config.tune import Searched
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.operations import recipe_search
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch
from twhin_pipeline.training.launch import TrainingCancelled, TrainingFailed

if TYPE_CHECKING:
    import optuna

SECTIONS = ("model", "training", "train_data", "negatives", "loss", "runtime")
# These decide what trials are compared by, so they cannot differ between them.
JUDGES = ("selection_metric", "eval_max_edges", "num_eval_steps", "eval_timeout_in_s", "save_dir")
# Optuna's own defaults, but for the evaluations that a trial has in any case.
TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING = 5, 2
LINKED, SAMPLED = ("raw_edges", "vocabulary"), ("training_set", "held_out")
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Best:
    """What a search came to."""

    metric: str
    value: float
    trial: int
    fields: dict[str, Any]
    """The best values, by the fields' paths."""
    trials: int
    failed: int
    pruned: int
    file: str
    """`fields` as YAML."""
    mlflow_run_id: str
    first: float | None = None
    """The metric of the configuration's own values, where the search reaches them."""

    @property
    def overrides(self) -> list[str]:
        """`fields` as `--set` takes them."""
        return [as_override(path, value) for path, value in self.fields.items()]


class _Pruned(Exception):  # noqa: N818 (it is what happened)
    pass


class Space(Protocol):
    """What a search may try."""

    @property
    def names(self) -> list[str]:
        """What is searched, in words."""

    @property
    def first(self) -> list[dict[str, Any]]:
        """Optuna's parameters of the trials that come first: the configuration's own values, if anything."""

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return a trial's fields, by path."""


class FieldSpace:
    """The fields that `tune.search` names."""

    def __init__(self, config: TwhinConfig) -> None:
        """Take a configuration with the recipe's values."""
        self.searched = config.tune.search
        present = {path: _present(config, path, field) for path, field in self.searched.items()}
        self.first = [] if None in present.values() else [present]
        self.names = list(self.searched)

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return a trial's fields, by path."""
        return {path: _suggest(trial, path, field) for path, field in self.searched.items()}


def run(
    whole: Run,
    say: Callable[[str], None],
    *,
    trials: int | None = None,
    timeout_s: float | None = None,
) -> Best:
    """Search, or go on with a search of the same configuration, and return the best values.

    Args:
        whole: Configuration, store and snapshot. Tables that training reads are made where the store lacks them.
        say: Told one line a trial.
        trials: In place of `tune.trials`.
        timeout_s: In place of `tune.timeout_s`.

    Raises:
        UserError: The section `tune` does not fit, the same search is running, or no trial came to its end.
        TrainingCancelled: A signal came; the same call goes on, and makes the interrupted trial again.
    """
    search = Search(whole, say)
    most, limit = trials or whole.config.tune.trials, timeout_s or whole.config.tune.timeout_s
    started = time.monotonic()

    def proceed(number: int) -> bool:
        if number < most and limit is not None and time.monotonic() - started > limit:
            say(f"timeout after {number} of {most} trials")
            return False
        return number < most

    with search.lock():
        return search.run(proceed)


def as_override(path: str, value: Any) -> str:
    """Return `path=value` for `--set`: the value as YAML on one line, such that it keeps its type."""
    return f"{path}={_as_yaml(value)}"


def check(config: TwhinConfig, config_path: str, overrides: Sequence[str]) -> None:
    """Check that the section `tune` can be searched.

    Raises:
        UserError: There is nothing to search, a path is none of the configuration's, or the metric could not compare
            trials.
    """
    search = config.tune.search
    if not search and (config.recipe == recipes.NONE or not config.all_sources):
        recipe_search.refuse_no_recipe(recipes.NONE)
    for path in search:
        section, _, field = current_path(path).partition(".")
        if section not in SECTIONS:
            raise UserError(f"tune.search: {path}: {unknown('section to search', section, SECTIONS)}")
        if section == "training" and field in JUDGES:
            raise UserError(f"tune.search: {path}: must be the same for all trials; set it in the section training")
    values = {path: field.choices or [field.low, field.high] for path, field in search.items()}
    for number in range(max((len(those) for those in values.values()), default=0)):
        tried = [as_override(path, those[min(number, len(those) - 1)]) for path, those in values.items()]
        try:
            load_config(config_path, [*overrides, *tried])
        except UserError as error:
            raise UserError(f"tune.search: with {', '.join(tried)}: {error}; mend the path or its values") from error


def check_metric(config: TwhinConfig) -> None:
    """Check that trials can be compared by the validation metric, of a configuration with the recipe's values.

    Raises:
        UserError: They cannot.
    """
    metric = config.training.selection_metric
    if not config.tune.search and not config.training.ranks_everything:
        raise UserError(
            f"tune.search: is empty, and trials of different losses cannot be compared by {metric}; leave out "
            "training.selection_metric, or set it to recall@20 or filtered_mrr"
        )
    for path in config.tune.search:
        section, _, field = path.partition(".")
        if not config.training.ranks_everything and section == "negatives":
            why = "also decides on the validation set's candidates, so trials could not be compared"
            raise UserError(f"tune.search: {path}: {why}; set training.selection_metric to filtered_mrr")
        if metric == "loss" and (section == "loss" or field in ("temperature", "comparator")):
            why = "changes the loss itself, which training.selection_metric compares"
            raise UserError(f"tune.search: {path}: {why}; set it to filtered_mrr")


def data_key(config: TwhinConfig) -> str:
    """Return a name of all that the stage `sample` depends on: trials of the same name share their training set."""
    read = config.model_dump(mode="json", include={"source", "sources", "vocabulary", "split", "negatives"})
    for name in ("train_data", "validation_data"):
        read[name] = getattr(config, name).model_dump(mode="json", exclude={"per_replica_batch_size"})
    fields = {"name", "lhs", "rhs", "sides"}
    read["relations"] = [relation.model_dump(mode="json", include=fields) for relation in config.model.relations]
    fields = {"name", "num_embeddings", "vocab"}
    read["tables"] = [table.model_dump(mode="json", include=fields) for table in config.model.embeddings.tables]
    read |= {"epochs": config.epochs_of_negatives, "log_q": config.loss.log_q}
    return digest(read)


class Search:
    """One search: its folder, its Optuna study and its MLflow run."""

    def __init__(
        self, whole: Run, say: Callable[[str], None], *, made_by: TwhinConfig | None = None, random: int = 10
    ) -> None:
        """Check the section `tune`.

        Args:
            whole: See `run`.
            say: See `run`.
            made_by: The configuration whose training set the store has, if it is not that of `whole`.
            random: Trials before proposals go by the earlier ones.

        Raises:
            UserError: The store is not in a local folder, or the section does not fit.
        """
        self.whole, self.say, self.made_by, self.random = whole, say, made_by or whole.config, random
        self.config, self.store, self.snapshot = whole.config, whole.store, whole.snapshot
        if not self.store.is_local:
            raise UserError(f"{self.store.root}: tune needs a store in a folder of this machine; pass --home FOLDER")
        check(self.config, whole.config_path, whole.overrides)
        if self._knows_metric():
            check_metric(self.config)
        told = self.config.tune.model_dump(mode="json", include={"search", "seed", "prune"})
        self.key = digest([self.config.hash(), told])
        self.folder = Path(self.store.path("tune", self.snapshot, self.key))

    def _knows_metric(self) -> bool:
        """Tell whether the metric is known before the recipe is."""
        config = self.config
        no_recipe = config.recipe == recipes.NONE or not config.all_sources
        return no_recipe or "selection_metric" in config.training.model_fields_set

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the search's folder. Raises UserError where another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"{self.folder}: this search is running in another process; wait for it") from error
            for left in self.folder.glob("trial-*"):  # by a process that was killed
                shutil.rmtree(left)
            yield

    def run(self, proceed: Callable[[int], bool]) -> Best:
        """See `run`. `proceed` is asked before each trial, with the number of those that are made."""
        self._make_tables()
        recipe = relations.recipe(self.config, self.store, self.snapshot)
        check_metric(recipe.config)
        self.metric = recipe.config.training.selection_metric
        self.space = self._space(recipe.config)
        self.study = self._open_study()
        self.parent = self._open_parent()
        self.say(
            f"search {self.key}: {self.metric} of {', '.join(self.space.names)}; {len(self._done())} trial(s) made"
        )
        try:
            while proceed(number := len(self._done())):
                # A seed for each trial: a search that was interrupted proposes what it would have proposed.
                self.study.sampler = _sampler(self.config.tune.seed + number, self.random)
                self._trial(self.study.ask())
            best = self._finish()
        except BaseException as error:
            cancelled = isinstance(error, (TrainingCancelled, KeyboardInterrupt))
            self.parent.finish("KILLED" if cancelled else "FAILED")
            raise
        self.parent.finish()
        return best

    def _space(self, resolved: TwhinConfig) -> Space:
        if self.config.tune.search:
            return FieldSpace(resolved)
        listed = relations.with_relations(self.config, self.store, self.snapshot)
        counts = recipes.Counts.read(listed, self.store, self.snapshot)
        assert counts is not None  # the tables are made
        return recipe_search.RecipeSpace(listed, counts)

    def _make_tables(self) -> None:
        """Make what the store lacks of the tables that training reads; its finished tables stay as they are."""
        vocabularies = [f"vocabulary/{name}" for name in self.config.model.table_names]
        sampled = ["training_set/positives", "training_set/negatives", "held_out/validation"]
        for name, tables in (("ingest", ["raw_edges"]), ("vocabulary", vocabularies), ("sample", sampled)):
            if not all(self.store.exists(table, self.snapshot) for table in tables):
                chain.run_stage(self.whole, chain.STAGES[name], self.say)

    def _open_study(self) -> optuna.Study:
        """Open the study; a trial that was interrupted is put first in its queue."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self.config.tune.prune:
            pruner = optuna.pruners.MedianPruner(TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING)
        study = optuna.create_study(
            storage=f"sqlite:///{self.store.path('tune', 'optuna.db')}",
            study_name=f"{self.snapshot} {self.key}",
            direction="minimize" if self.metric == "loss" else "maximize",
            pruner=pruner,
            load_if_exists=True,
        )
        for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            study.set_user_attr(INTERRUPTED, [*study.user_attrs.get(INTERRUPTED, []), trial.number])
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params)
            run_id = trial.user_attrs.get("mlflow_run_id")
            if run_id and tracking.run_exists(self.store, run_id):
                tracking.resume_run(self.store, run_id, owned=True).finish("KILLED")
        if not study.trials:
            for values in self.space.first:
                study.enqueue_trial(values)
        return study

    def _open_parent(self) -> tracking.Run:
        """Go on with the MLflow run of the search, or start it."""
        earlier = self.study.user_attrs.get("mlflow_run_id")
        if earlier and tracking.run_exists(self.store, earlier):
            return tracking.resume_run(self.store, earlier)
        run = self._start_run(f"tune {self.snapshot} {self.key}", {"twhin.search": self.key})
        self.study.set_user_attr("mlflow_run_id", run.run_id)
        run.log_text(self.config.to_yaml(), "config.yaml")
        return run

    def _start_run(self, name: str, tags: Mapping[str, str]) -> tracking.Run:
        tags = {"twhin.snapshot": self.snapshot, "twhin.store": self.store.root, **tags}
        experiment = tracking.experiment_id(self.store)  # also tells MLflow to be quiet
        from mlflow import MlflowClient

        made = MlflowClient(tracking_uri=tracking.uri(self.store)).create_run(experiment, run_name=name, tags=tags)
        return tracking.Run(self.store, made.info.run_id, owned=True)

    def _done(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that came to an end of their own."""
        interrupted = self.study.user_attrs.get(INTERRUPTED, [])
        return [t for t in self.study.trials if t.state.is_finished() and t.number not in interrupted]

    def _trial(self, trial: optuna.Trial) -> None:
        """Make one trial and record how it ended."""
        from optuna.trial import TrialState

        began = time.monotonic()
        fields = self.space.suggest(trial)
        told = ", ".join(as_override(path, value) for path, value in fields.items()) or "the recipe"
        same = next((t for t in self.study.get_trials(states=[TrialState.COMPLETE]) if t.params == trial.params), None)
        if same is not None:  # training is deterministic
            self.study.tell(trial, same.value)
            self.say(f"trial {trial.number}: {told}: as trial {same.number}")
            return
        run = self._start_run(f"trial {trial.number}", {"mlflow.parentRunId": self.parent.run_id})
        trial.set_user_attr("mlflow_run_id", run.run_id)
        for path, value in fields.items():
            run.client.log_param(run.run_id, re.sub(r"[^\w\-./ :]", "_", path), value)
        try:
            value = self._train(trial, fields, run)
        except _Pruned:
            self.study.tell(trial, state=TrialState.PRUNED)
            run.set_tags({"twhin.pruned": "true"})
            run.finish()
            outcome = "pruned"
        except (UserError, TrainingFailed) as error:
            trial.set_user_attr("error", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            run.log_text(str(error), "error.txt")
            run.finish("FAILED")
            outcome = f"failed: {str(error).strip().splitlines()[-1]}"
        except BaseException:
            run.finish("KILLED")  # Optuna takes it for running: the next call finds it and makes it again
            raise
        else:
            self.study.tell(trial, value)
            run.log_metrics({"objective": value}, 0)
            self.parent.log_metrics({"objective": value, "best_objective": self.study.best_value}, trial.number)
            run.finish()
            outcome = f"{self.metric} {value:.4f}"
            outcome += "  (best)" if self.study.best_trial.number == trial.number else ""
        finally:
            shutil.rmtree(self.folder / f"trial-{trial.number:05d}", ignore_errors=True)
        self.say(f"trial {trial.number}: {told}: {outcome}, {time.monotonic() - began:.0f} s")

    def _train(self, trial: optuna.Trial, fields: Mapping[str, Any], run: tracking.Run) -> float:
        """Train with some values and return the validation metric of the best step."""
        ours = {**fields, "training.save_dir": None, "launch.env.MLFLOW_RUN_ID": run.run_id}
        if "MLFLOW_TRACKING_URI" not in os.environ:
            ours["launch.env.MLFLOW_TRACKING_URI"] = tracking.uri(self.store)
        overrides = [*self.whole.overrides, *(as_override(path, value) for path, value in ours.items())]
        config = load_config(self.whole.config_path, overrides)
        store = Store(str(self.folder / f"trial-{trial.number:05d}"))
        _link(store, self.store, LINKED)
        _link(store, self._data(config, overrides), SAMPLED)
        log_dir = str(self.folder / "logs" / f"trial-{trial.number:05d}")
        watch = _Watch(trial, self.metric)
        try:
            launch.run(
                config, self.whole.config_path, overrides, store, self.snapshot, log_dir=log_dir, output=watch.line
            )
        except TrainingCancelled:
            if watch.pruned:
                raise _Pruned from None
            raise
        details = store.manifest("twhin_model", self.snapshot).details
        value = details["best_validation"]
        if value is None:
            raise UserError(f"no evaluation measured {self.metric} on the validation edges")
        return float(value)

    def _data(self, config: TwhinConfig, overrides: Sequence[str]) -> Store:
        """Return the store with the training set for `config`: the store's own where it fits, else one made here."""
        key = data_key(relations.resolve(config, self.store, self.snapshot))
        made_with = self.store.manifest("training_set/negatives", self.snapshot).config_hash
        ours = relations.resolve(self.made_by, self.store, self.snapshot)
        if key == data_key(ours) and made_with == ours.hash():
            store = self.store
        else:
            store = Store(str(self.folder / "data" / key))
            _link(store, self.store, LINKED)
            tables = ("training_set/positives", "training_set/negatives")
            present = all(store.exists(t, self.snapshot) and not store.stale(t, self.snapshot) for t in tables)
            if not present:
                run = Run(config, self.whole.config_path, overrides, store, self.snapshot)
                chain.run_stage(run, chain.STAGES["sample"], self.say)
        if not store.manifest("held_out/validation", self.snapshot).rows:
            raise UserError(
                f"held_out/validation of {self.snapshot} is empty, so trials cannot be compared; hold edges out with "
                "split.validation, such as 0.05"
            )
        return store

    def _finish(self) -> Best:
        """Write and return the best values. Raises UserError where no trial has a value."""
        from optuna.trial import TrialState

        done = self._done()
        count = {state: sum(trial.state == state for trial in done) for state in TrialState}
        if not count[TrialState.COMPLETE]:
            why = next((t.user_attrs["error"] for t in reversed(done) if "error" in t.user_attrs), "no time for any")
            raise UserError(f"none of {len(done)} trial(s) came to its end; the last: {why}")
        trial = self.study.best_trial
        fields = self.space.suggest(_fixed(trial.params))
        own = [t.value for t in done if self.space.first and t.params == self.space.first[0] and t.value is not None]
        file = self.folder / "best.yaml"
        best = Best(
            self.metric, self.study.best_value, trial.number, fields, len(done), count[TrialState.FAIL],
            count[TrialState.PRUNED], str(file), self.parent.run_id, own[0] if own else None,
        )  # fmt: skip
        head = f"# The best of {best.trials} trials of snapshot {self.snapshot}: trial {best.trial}, "
        text = f"{head}{self.metric} {best.value:.6g} on validation edges.\n{yaml.safe_dump(fields, sort_keys=False)}"
        draft = file.with_suffix(".tmp")
        draft.write_text(text)
        os.replace(draft, file)
        self.parent.log_text(text, file.name)
        self.parent.set_tags({"twhin.best_trial": str(best.trial)})
        return best


class _Watch:
    """Reads a trial's lines for its evaluations, and ends it where it is hopeless."""

    def __init__(self, trial: optuna.Trial, metric: str) -> None:
        self.trial, self.pruned, self.evaluations = trial, False, 0
        self.pattern = re.compile(rf"validation at step [\d,]+:.* {re.escape(metric)} (-?[\d.]+)(\s|,|$)")

    def line(self, line: str) -> None:
        """Take one line of a rank."""
        found = self.pattern.search(line)
        if found is None or self.pruned:
            return
        self.trial.report(float(found[1]), self.evaluations)
        self.evaluations += 1
        # `launch.run` passes signals on only where it is in the main thread.
        if self.trial.should_prune() and threading.current_thread() is threading.main_thread():
            self.pruned = True
            signal.raise_signal(signal.SIGTERM)


def _sampler(seed: int, random: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=random)


def _fixed(values: dict[str, Any]) -> optuna.trial.FixedTrial:
    import optuna

    return optuna.trial.FixedTrial(values)


def _suggest(trial: optuna.trial.BaseTrial, path: str, field: Searched) -> Any:
    if field.choices is not None:
        # As text: Optuna's own choices are scalars only.
        return _decoded(field, trial.suggest_categorical(path, [_as_yaml(choice) for choice in field.choices]))
    assert field.low is not None and field.high is not None
    if field.whole:
        return trial.suggest_int(path, int(field.low), int(field.high), log=field.log)
    return trial.suggest_float(path, field.low, field.high, log=field.log)


def _decoded(field: Searched, value: Any) -> Any:
    """Return a parameter of Optuna's as the field's value."""
    if field.choices is None:
        return value
    return next(choice for choice in field.choices if _as_yaml(choice) == value)


def _present(config: TwhinConfig, path: str, field: Searched) -> Any:
    """Return what the configuration has at a path, as Optuna's parameter; None where the search does not reach it."""
    node: Any = config.model_dump(mode="json")
    for key in path.split("."):
        if isinstance(node, list):
            named = {str(item.get("name", i)): item for i, item in enumerate(node) if isinstance(item, dict)}
            node = named.get(key, node[int(key)] if key.isdigit() and int(key) < len(node) else None)
        else:
            node = node.get(key) if isinstance(node, dict) else None
    if field.choices is not None:
        text = _as_yaml(node)
        return text if text in [_as_yaml(choice) for choice in field.choices] else None
    assert field.low is not None and field.high is not None
    fits = isinstance(node, (int, float)) and not isinstance(node, bool) and field.low <= node <= field.high
    return node if fits and (isinstance(node, int) or not field.whole) else None


def _link(store: Store, to: Store, names: Sequence[str]) -> None:
    """Let tables of `store` be those of another."""
    for name in names:
        link = Path(store.path(name))
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(to.path(name), target_is_directory=True)


def _as_yaml(value: Any) -> str:
    # YAML 1.1 takes 1e-05 for a text, so numbers are written by the library that reads them.
    return yaml.safe_dump(value, default_flow_style=True, width=10**9).removesuffix("...\n").strip()


def digest(value: Any) -> str:
    """Return 8 hex digits that name a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]
