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
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from twhin_pipeline import tracking
from twhin_pipeline.config import TwhinConfig, as_override, recipes, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import recipe_search
from twhin_pipeline.operations.search_space import FieldSpace, Space, check, check_metric
from twhin_pipeline.operations.trial import Pruned, Trials, digest
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.training.launch import TrainingCancelled, TrainingFailed

if TYPE_CHECKING:
    import optuna

# Optuna's own defaults, but for the evaluations that a trial has in any case.
TRIALS_BEFORE_PRUNING, EVALUATIONS_BEFORE_PRUNING = 5, 2
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
    mlflow_run_id: str | None
    first: float | None = None
    """The metric of the configuration's own values, where the search reaches them."""

    @property
    def overrides(self) -> list[str]:
        """`fields` as `--set` takes them."""
        return [as_override(path, value) for path, value in self.fields.items()]


def run(
    base: Run,
    say: Callable[[str], None],
    *,
    trials: int | None = None,
    timeout_s: float | None = None,
) -> Best:
    """Search, or continue a search of the same configuration, and return the best values.

    Args:
        base: Configuration, store and snapshot. Tables that training reads are made where the store lacks them.
        say: Called with one line for each trial.
        trials: In place of `tune.trials`.
        timeout_s: In place of `tune.timeout_s`.

    Raises:
        UserError: The section `tune` does not fit, the same search is running, or no trial came to its end.
        TrainingCancelled: A signal came; the same call goes on, and makes the interrupted trial again.
    """
    search = Search(base, say)
    most, limit = trials or base.config.tune.trials, timeout_s or base.config.tune.timeout_s
    started = time.monotonic()

    def proceed(number: int) -> bool:
        if number < most and limit is not None and time.monotonic() - started > limit:
            say(f"timeout after {number} of {most} trials")
            return False
        return number < most

    with search.lock():
        return search.run(proceed)


def refuse_nodes(config: TwhinConfig) -> None:
    """Raise UserError where trials would train on several nodes: a trial's configuration is known on this one alone."""
    if config.launch.nnodes > 1:
        raise UserError(
            f"launch.nnodes is {config.launch.nnodes}: a search runs on one node; search with launch.nnodes=1, and "
            "give what it finds to all nodes"
        )


class Search:
    """One search: its folder, its Optuna study and its MLflow run."""

    def __init__(
        self, base: Run, say: Callable[[str], None], *, made_by: TwhinConfig | None = None, random: int = 10
    ) -> None:
        """Check the section `tune`.

        Args:
            base: See `run`.
            say: See `run`.
            made_by: The configuration whose training set the store has, if it is not that of `base`.
            random: Trials before proposals go by the earlier ones.

        Raises:
            UserError: The store is not in a local folder, or the section does not fit.
        """
        self.base, self.say, self.made_by, self.random = base, say, made_by or base.config, random
        self.config, self.store, self.snapshot = base.config, base.store, base.snapshot
        if not self.store.is_local:
            raise UserError(f"{self.store.root}: tune needs a store in a folder of this machine; pass --home FOLDER")
        refuse_nodes(self.config)
        check(self.config, base.config_path, base.overrides)
        if self._knows_metric():
            check_metric(self.config)
        section = self.config.tune.model_dump(mode="json", include={"search", "seed", "prune"})
        self.key = digest([self.config.hash(), section])
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
        self.trials = Trials(self.base, self.folder, self.metric, self.say, self.made_by)
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
                chain.run_stage(self.base, chain.STAGES[name], self.say)

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

    def _open_parent(self) -> tracking.Run | tracking.QuietRun:
        """Go on with the MLflow run of the search, or start it."""
        earlier = self.study.user_attrs.get("mlflow_run_id")
        if earlier and tracking.run_exists(self.store, earlier):
            return tracking.resume_run(self.store, earlier)
        run = self._start_run(f"tune {self.snapshot} {self.key}", {"twhin.search": self.key})
        self.study.set_user_attr("mlflow_run_id", run.run_id)
        run.log_text(self.config.to_yaml(), "config.yaml")
        return run

    def _start_run(self, name: str, tags: Mapping[str, str]) -> tracking.Run | tracking.QuietRun:
        if tracking.is_off():
            return tracking.QuietRun()
        return tracking.begin(
            self.store, name, {"twhin.snapshot": self.snapshot, "twhin.store": self.store.root, **tags}
        )

    def _done(self) -> list[optuna.trial.FrozenTrial]:
        """Return the trials that came to an end of their own."""
        interrupted = self.study.user_attrs.get(INTERRUPTED, [])
        return [t for t in self.study.trials if t.state.is_finished() and t.number not in interrupted]

    def _trial(self, trial: optuna.Trial) -> None:
        """Make one trial and record how it ended."""
        from optuna.trial import TrialState

        began = time.monotonic()
        fields = self.space.suggest(trial)
        values = ", ".join(as_override(path, value) for path, value in fields.items()) or "the recipe"
        same = next((t for t in self.study.get_trials(states=[TrialState.COMPLETE]) if t.params == trial.params), None)
        if same is not None:  # training is deterministic
            self.study.tell(trial, same.value)
            self.say(f"trial {trial.number}: {values}: as trial {same.number}")
            return
        run = self._start_run(f"trial {trial.number}", {"mlflow.parentRunId": self.parent.run_id or ""})
        trial.set_user_attr("mlflow_run_id", run.run_id)
        run.log_params(fields)
        try:
            value = self.trials.train(trial, fields, run)
        except Pruned:
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
            shutil.rmtree(self.trials.store(trial.number).root, ignore_errors=True)
        self.say(f"trial {trial.number}: {values}: {outcome}, {time.monotonic() - began:.0f} s")

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
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, file)
        self.parent.log_text(text, file.name)
        self.parent.set_tags({"twhin.best_trial": str(best.trial)})
        return best


def _sampler(seed: int, random: int) -> optuna.samplers.BaseSampler:
    import optuna

    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=random)


def _fixed(values: dict[str, Any]) -> optuna.trial.FixedTrial:
    import optuna

    return optuna.trial.FixedTrial(values)
