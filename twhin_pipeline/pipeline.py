"""The whole chain without Dagster: each stage, its checks, and one line about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twhin_pipeline import relations
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Manifest, Store

Say = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What every stage is given. `config_path` and `overrides` made `config`; training's processes read them again.

    A stage but the first gets `config` with the relations found in the source.
    """

    config: TwhinConfig
    config_path: str
    overrides: Sequence[str]
    store: Store
    snapshot: str


@dataclass(frozen=True)
class Stage:
    """One step of the chain, under the name of its command."""

    name: str
    summary: str
    function: Callable[[Run], dict[str, Manifest]]
    reads: tuple[str, ...] = ()
    """Tables that have to fit each other; `vocabulary/*` stands for every entity type's."""
    left_out: Callable[[Run], str | None] = lambda run: None
    """Says why there is nothing to do, or None."""


def ingest(run: Run) -> dict[str, Manifest]:
    """Read the source: `raw_edges` and `raw_edges_rejected`."""
    from twhin_pipeline import edges

    manifest = edges.ingest(run.config, run.store, run.snapshot)
    rejected = run.store.manifest("raw_edges_rejected", run.snapshot)
    return {"raw_edges": manifest, "raw_edges_rejected": rejected}


def vocabulary(run: Run) -> dict[str, Manifest]:
    """Number the entities: `vocabulary/<entity>`."""
    from twhin_pipeline import vocabulary as room

    room.build(run.config, run.store, run.snapshot)
    return _manifests(run, [f"vocabulary/{name}" for name in run.config.model.table_names])


def sample(run: Run) -> dict[str, Manifest]:
    """Split the edges and sample negatives: `training_set/*` and `held_out/*`."""
    from twhin_pipeline import negatives, training_set

    training_set.build_positives(run.config, run.store, run.snapshot)
    negatives.build(run.config, run.store, run.snapshot)
    repeats = ["repeats"] if run.config.split.repeats else []
    parts = ("positives", "negatives"), ("validation", "test", "validation_negatives", *repeats)
    names = [f"training_set/{n}" for n in parts[0]] + [f"held_out/{n}" for n in parts[1]]
    return _manifests(run, [name for name in names if run.store.exists(name, run.snapshot)])


def train(run: Run) -> dict[str, Manifest]:
    """Train under torchrun: `twhin_model`."""
    from twhin_pipeline import launch

    launch.run(run.config, run.config_path, run.overrides, run.store, run.snapshot)
    return _manifests(run, ["twhin_model"])


def evaluate(run: Run) -> dict[str, Manifest]:
    """Rank the held-out edges: `evaluation`."""
    from twhin_pipeline import evaluation

    return {"evaluation": evaluation.evaluate(run.config, run.store, run.snapshot)}


def refit(run: Run) -> dict[str, Manifest]:
    """Train once more, on all edges: `refit/twhin_model`. The training set and the model pass the usual checks."""
    from twhin_pipeline import checks
    from twhin_pipeline import refit as again

    prepared, made = again.prepare(run)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, made)
    manifest = again.train(prepared)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, ["twhin_model"])
    return {manifest.asset: manifest}


def _not_refit(run: Run) -> str | None:
    from twhin_pipeline import refit as again

    return again.reason_against(run.config, run.store, run.snapshot)


def export(run: Run) -> dict[str, Manifest]:
    """Write the vectors by id: `embeddings/<entity>` and `embeddings/relations`."""
    from twhin_pipeline import export as room
    from twhin_pipeline import refit as again

    room.export(run.config, again.published(run.config, run.store, run.snapshot), run.snapshot)
    return _manifests(run, [f"embeddings/{name}" for name in (*run.config.model.table_names, "relations")])


TRAINED_ON = (
    "training_set/positives",
    "training_set/negatives",
    "held_out/validation",
    "held_out/validation_negatives",
)
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("ingest", "Read the source's edges.", ingest),
        Stage("vocabulary", "Give each entity its row.", vocabulary, ("raw_edges",)),
        Stage("sample", "Split the edges and sample negatives.", sample, ("raw_edges", "vocabulary/*")),
        Stage("train", "Train the model under torchrun.", train, TRAINED_ON),
        Stage("evaluate", "Measure the model on held-out edges.", evaluate, ("twhin_model", "held_out/test")),
        Stage("refit", "Train once more, on all edges.", refit, ("twhin_model", "vocabulary/*"), _not_refit),
        Stage("export", "Write embedding tables by id.", export, ("twhin_model", "vocabulary/*")),
    )
}


def run_stage(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage and the checks of its tables, saying one line.

    Raises:
        UserError: The stage or a blocking check says what is wrong, or a table that it reads is older than what that
            was made from.
    """
    from twhin_pipeline import checks

    tables = run.config.model.table_names
    reads = [t.replace("*", name) for t in stage.reads for name in (tables if t.endswith("*") else [""])]
    run.store.refuse_stale(run.snapshot, reads)
    given = run
    if reads:
        run = replace(run, config=relations.resolve(run.config, run.store, run.snapshot))
    if (reason := stage.left_out(run)) is not None:
        say(f"{stage.name:<11}   left out: {reason}")
        return {}
    if stage.name == "train":
        from twhin_pipeline import short_search

        for line in short_search.unused(run):
            say(line)
    started = time.perf_counter()
    made = stage.function(run)
    worked = time.perf_counter()
    config = relations.resolve(run.config, run.store, run.snapshot)
    notes = checks.run_blocking(config, run.store, run.snapshot, made)
    checked = time.perf_counter()
    told = ", ".join(f"{name} {manifest.rows:,} rows" for name, manifest in made.items() if manifest.rows)
    say(f"{stage.name:<11}{worked - started:7.1f} s + checks {checked - worked:.1f} s: {told or 'nothing'}")
    notes += [note for manifest in made.values() for note in manifest.details.get("notes", [])]
    for note in notes:
        say(f"  note: {note}")
    if stage.name == "vocabulary":  # all that a recipe looks at is there now
        for line in relations.recipe(given.config, run.store, run.snapshot).lines():
            say(line)
    return made


def run(config: TwhinConfig, config_path: str, overrides: Sequence[str], store: Store, snapshot: str, say: Say) -> Run:
    """Run the whole chain for a snapshot; return the run with the values that a search found (`tune.minutes`).

    Raises:
        UserError: A stage or a blocking check says what is wrong; tables of finished stages stay.
        twhin_pipeline.launch.TrainingFailed: Training ended with an error that is not the user's.
        twhin_pipeline.launch.TrainingCancelled: It was told to stop.
    """
    from twhin_pipeline import catalog, short_search

    whole = Run(config, config_path, overrides, store, snapshot)
    if config.tune.minutes is not None:
        short_search.check(whole)
    for stage in STAGES.values():
        run_stage(whole, stage, say)
        if stage.name == "sample" and config.tune.minutes is not None:
            before, whole = whole, short_search.tuned(whole, say)
            if not _samples_alike(before, whole):
                run_stage(whole, stage, say)
    catalog.refresh(store)
    register(whole, say)
    return whole


def _samples_alike(one: Run, other: Run) -> bool:
    """Tell whether the stage `sample` makes the same tables of two runs."""
    from twhin_pipeline import tune

    return len({tune.data_key(relations.resolve(run.config, run.store, run.snapshot)) for run in (one, other)}) == 1


def register(run: Run, say: Say) -> None:
    """Register the model in MLflow with what evaluation measured; where its run is not to be found, say so."""
    from twhin_pipeline import refit as again
    from twhin_pipeline import tracking

    config = relations.resolve(run.config, run.store, run.snapshot)
    published = again.published(config, run.store, run.snapshot)
    run_id = published.manifest("twhin_model", run.snapshot).details.get("mlflow_run_id")
    if not run_id or not tracking.run_exists(run.store, run_id):
        say(f"  note: the model is not registered: no run of it at {tracking.uri(run.store)}")
        return
    measured = run.store.manifest("evaluation", run.snapshot).details["metrics"]
    metrics = {tracking.allowed_name(name): float(value) for name, value in measured.items() if value is not None}
    say(f"registered {tracking.register_model(published, run.snapshot, metrics)} at {tracking.uri(run.store)}")


def _manifests(run: Run, assets: Sequence[str]) -> dict[str, Manifest]:
    return {asset: run.store.manifest(asset, run.snapshot) for asset in assets}
