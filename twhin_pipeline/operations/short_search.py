"""`twhin run --tune MINUTES`: a short search between sampling and training, whose best values the run then uses.

It is the search of `tune.py` under a budget of minutes in place of a number of trials. Trials train for fewer epochs,
and on a random part of the edges where a few epochs of all of them would take too long, so that several fit. They are
compared with the recipe under the same conditions, on validation edges.

    <root>/tune/<snapshot>/minutes.json    the search made last: its plan, how long its trials took, what it came to
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from twhin_pipeline.config import TwhinConfig, as_override, load_config, recipes, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import search_space, trial, tune
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Store

FILE = "minutes.json"
TRIALS = 8
"""Trials that a plan makes room for."""
FEWEST_EPOCHS, FEWEST_EDGES = 3, 10_000
"""Fewer would not put values in the order that they have in a full training."""
STARTUP_S = 8.0
"""What a training takes before its first step and after its last, seconds."""
WORK_PER_S = recipes.WORK / 180
"""Edges times dimension that are trained in a second, before the first trial has measured it: of 2 cores."""
EVALUATIONS = 4
CHANGE = 1.5
"""A plan is made anew after its first trial where that makes trials so many times longer or shorter."""
RANDOM_TRIALS = 4
"""Trials before the search goes by the earlier ones."""
LONGER = 1 / 3
"""Of the budget, how long the training after it may take, where the recipe gave a large graph fewer epochs than it
would have: whoever waits for the search waits for them, too."""
MOST_EPOCHS = 120
"""Of such a training, as in configs/gowalla.yaml."""


@dataclass(frozen=True)
class Plan:
    """How long a trial trains."""

    epochs: int
    edges: int | None = None
    """Take so many of the training edges, in a random order; None: all."""

    def visits(self, total: int) -> int:
        """Return the edges that a trial trains on, each counted once an epoch; `total` is how many there are."""
        return self.epochs * min(self.edges or total, total)


@dataclass
class Progress:
    """A search's state, kept in a file: a run that is interrupted goes on with it."""

    key: str
    """Names configuration, graph and budget."""
    plan: Plan
    measured: bool = False
    """Whether the plan is by the speed of a trial here."""
    seconds: list[float] = field(default_factory=list)
    """How long each trial took, those of an earlier plan included."""
    counted: int = 0
    """Where in `seconds` the trials of this plan begin."""
    outcome: dict[str, Any] | None = None
    """What the search came to, as in the model's manifest; None: it has not ended."""
    overrides: list[str] = field(default_factory=list)
    """The best values, as `--set` takes them."""

    @classmethod
    def read(cls, file: Path) -> Progress | None:
        """Read the file; None where there is none that can be read."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**data, "plan": Plan(**data["plan"])})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def write(self, file: Path) -> None:
        """Write the file, in one step."""
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f"{file.name}.{os.getpid()}")
        draft.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        os.replace(draft, file)


def make_plan(edges: int, dim: int, epochs: int, budget_s: float, work_per_s: float = WORK_PER_S) -> Plan:
    """Return the plan by which `TRIALS` trials fit into the budget.

    Args:
        edges: Training edges.
        dim: Of the recipe's vectors.
        epochs: Of a full training; a trial has no more.
        budget_s: Seconds for all trials.
        work_per_s: Edges times dimension that are trained in a second.
    """
    # A budget that start-ups use up gets the shortest trials.
    seconds = max(budget_s / TRIALS - STARTUP_S, budget_s / (4 * TRIALS))
    visits = int(seconds * work_per_s / dim)
    fewest = min(FEWEST_EPOCHS, epochs)
    if visits >= fewest * edges:
        return Plan(min(visits // edges, epochs))
    sample = max(visits // fewest, FEWEST_EDGES)
    return Plan(fewest, sample if sample < edges else None)


def another_fits(budget_s: float, seconds: list[float], counted: int = 0) -> bool:
    """Tell whether another trial would end within the budget.

    Args:
        budget_s: Seconds for all trials.
        seconds: What the trials so far took.
        counted: Where in it the trials of the present plan begin; the longest of them is the estimate.
    """
    now = seconds[counted:]
    return not now or sum(seconds) + max(now) <= budget_s


def check(run: Run) -> None:
    """Raise UserError where a run's configuration cannot be searched, as far as that is known before its tables."""
    if not run.store.is_local:
        raise UserError(f"{run.store.root}: tune needs a store in a folder of this machine; pass --home FOLDER")
    tune.refuse_nodes(run.config)
    search_space.check(run.config, run.config_path, run.overrides)


def tuned(run: Run, say: Say, clock: Callable[[], float] = time.monotonic) -> Run:
    """Search for `tune.minutes` and return the run with the best values set; itself where the recipe is the best.

    Args:
        run: A run whose stage `sample` is done.
        say: Called with one line a trial, and with the outcome.
        clock: Seconds, from any origin.

    Raises:
        UserError: There are no validation edges, or nothing to search, or no trial came to its end.
        TrainingCancelled: A signal came; the same run goes on with the search.
    """
    search = _ShortSearch(run, say, clock)
    progress = search.run()
    assert progress.outcome is not None
    for line in lines(progress.outcome, progress.overrides):
        say(line)
    overrides = [*run.overrides, *progress.overrides, as_override("tune.outcome", progress.outcome)]
    return replace(run, config=load_config(run.config_path, overrides), overrides=overrides)


def lines(outcome: dict[str, Any], overrides: list[str]) -> list[str]:
    """Return the outcome of a search in a few lines."""
    made = f"{outcome['trials']} trial(s) in {outcome['minutes']:.1f} min"
    own = outcome["recipe_value"]
    compared = f"{outcome['metric']} {outcome['value']:.4f}" + ("" if own is None else f", the recipe {own:.4f}")
    result = [f"tune       {made}: {compared}; the best values, now used:"]
    if not outcome["values"]:
        result = [f"tune       {made}: none beat the recipe ({outcome['metric']} {own:.4f}), which is used"]
    if "num_epochs" in outcome:
        result.append(f"  with {outcome['num_epochs']} epochs, as the time for the search is to spare for them, too:")
    return [*result, *(f"  --set '{one}'" for one in overrides)]


def unused(run: Run) -> list[str]:
    """Return a note where a search has better values for a snapshot, and its training does not use them."""
    progress = Progress.read(_file(run.store, run.snapshot)) if run.store.is_local else None
    if run.config.tune.outcome is not None or progress is None or set(progress.overrides) <= set(run.overrides):
        return []
    values = " ".join(f"--set '{one}'" for one in progress.overrides)
    return [f"  note: this training does not use the values that an earlier search found: {values}"]


def _file(store: Store, snapshot: str) -> Path:
    return Path(store.path("tune", snapshot, FILE))


class _ShortSearch:
    """The search of one run."""

    def __init__(self, run: Run, say: Say, clock: Callable[[], float]) -> None:
        check(run)
        assert run.config.tune.minutes is not None
        self.base, self.say, self.clock, self.budget_s = run, say, clock, 60 * run.config.tune.minutes
        self.config: TwhinConfig = relations.resolve(run.config, run.store, run.snapshot)
        if not run.store.manifest("held_out/validation", run.snapshot).rows:
            raise UserError(
                "tune.minutes: no validation edge is held out, which trials are compared by; set split.validation, "
                "such as 0.05, or leave --tune out"
            )
        search_space.check_metric(self.config)
        self.edges = run.store.manifest("training_set/positives", run.snapshot).rows
        section = run.config.tune.model_dump(mode="json", include={"search", "seed", "minutes"})
        counts = recipes.Counts.read(self.config, run.store, run.snapshot)
        assert counts is not None
        self.key = trial.digest([self.config.hash(), section, dict(counts.edges), dict(counts.entities), self.edges])
        self.file = _file(run.store, run.snapshot)

    def run(self) -> Progress:
        """Search, go on with the search, or return what it came to before."""
        progress = Progress.read(self.file)
        if progress is None or progress.key != self.key:
            progress = Progress(self.key, self._plan())
        if progress.outcome is not None:
            self.say("tune       the same search was made before; for another one set tune.seed")
            return progress
        best = None
        while best is None:
            self._describe(progress)
            best = self._trials(progress)
        better = best.first is None or (
            best.value < best.first if best.metric == "loss" else best.value > best.first
        )  # fmt: skip
        progress.outcome = {
            "values": best.fields if better else {},
            "metric": best.metric,
            "value": best.value if better else best.first,
            "recipe_value": best.first,
            "trials": best.trials,
            "minutes": round(sum(progress.seconds) / 60, 2),
            "epochs": progress.plan.epochs,
            "edges": min(progress.plan.edges or self.edges, self.edges),
            "mlflow_run_id": best.mlflow_run_id,
        }
        progress.overrides = best.overrides if better else []
        if (longer := self._longer(progress)) is not None:
            progress.outcome["num_epochs"] = longer
            progress.overrides.append(as_override("training.num_epochs", longer))
        progress.write(self.file)
        return progress

    def _longer(self, progress: Progress) -> int | None:
        """Return how many epochs the training may have, None where those that it has are enough."""
        overrides = [*self.base.overrides, *progress.overrides]
        config = load_config(self.base.config_path, overrides)
        recipe = relations.recipe(config, self.base.store, self.base.snapshot)
        epochs = recipe.config.training.num_epochs
        chosen = any(value.path == "training.num_epochs" and value.chosen for value in recipe.values)
        if recipe.name != recipes.INTERACTIONS or not chosen or epochs >= recipes.MOST_EPOCHS:
            return None
        # The recipe is the first trial of each plan.
        speed = self._speed(progress.plan, progress.seconds[progress.counted])
        affordable = int(LONGER * self.budget_s * speed / (self.edges * recipe.config.model.embedding_dim))
        return min(affordable, MOST_EPOCHS) if affordable > epochs else None

    def _speed(self, plan: Plan, took: float) -> float:
        """Return edges times dimension that a trial of the recipe trained in a second; it took so many seconds."""
        work = plan.visits(self.edges) * self.config.model.embedding_dim
        return work / max(took - STARTUP_S, took / 4)

    def _plan(self, work_per_s: float | None = None) -> Plan:
        dim, epochs = self.config.model.embedding_dim, self.config.training.num_epochs
        return make_plan(self.edges, dim, epochs, self.budget_s, work_per_s or WORK_PER_S)

    def _describe(self, progress: Progress) -> None:
        plan = progress.plan
        part = f"{plan.edges:,} of {self.edges:,} edges" if plan.edges else f"all {self.edges:,} edges"
        of = f"{plan.epochs} of {self.config.training.num_epochs} epochs"
        self.say(f"tune       {self.budget_s / 60:g} min on validation edges; a trial trains {of} on {part}")

    def _trials(self, progress: Progress) -> tune.Best | None:
        """Make trials while there is time; None where the first one showed that they should be longer or shorter."""
        plan, overrides = progress.plan, [*self.base.overrides, *self._overrides(progress.plan)]
        run = replace(self.base, config=load_config(self.base.config_path, overrides), overrides=overrides)
        search = tune.Search(run, self.say, made_by=self.base.config, random=RANDOM_TRIALS)
        began: float | None = None

        def proceed(number: int) -> bool:
            nonlocal began
            now = self.clock()
            if began is not None:
                progress.seconds.append(now - began)
                if not progress.measured:
                    self._measure(progress)
                progress.write(self.file)
            began = now
            fits = another_fits(self.budget_s, progress.seconds, progress.counted)
            return progress.plan == plan and fits

        progress.write(self.file)
        with search.lock():
            best = search.run(proceed)
        return best if progress.plan == plan else None

    def _measure(self, progress: Progress) -> None:
        """Plan anew by the time that the first trial took, where that changes much."""
        progress.measured = True
        plan = self._plan(self._speed(progress.plan, progress.seconds[-1]))
        ratio = plan.visits(self.edges) / progress.plan.visits(self.edges)
        # A second plan is worth its new start only where time is left for some trials.
        if not 1 / CHANGE < ratio < CHANGE and sum(progress.seconds) < self.budget_s / 2:
            progress.plan, progress.counted = plan, len(progress.seconds)

    def _overrides(self, plan: Plan) -> list[str]:
        """Return what makes a training a trial. What the stage `sample` makes stays, where all edges are trained."""
        fields: dict[str, Any] = {
            "training.num_epochs": plan.epochs,
            "training.eval_every_n_epochs": max(1, -(-plan.epochs // EVALUATIONS)),
            "training.early_stopping_patience": None,
            "negatives.epochs": self.config.epochs_of_negatives,
        }
        if plan.edges is not None:
            fields["train_data.limit"] = plan.edges
            fields["negatives.epochs"] = min(plan.epochs, self.config.epochs_of_negatives)
        return [as_override(path, value) for path, value in fields.items()]
