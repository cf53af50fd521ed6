"""The stages of the chain: each is one step, with the tables that it reads, and its checks run after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from twhin_pipeline.config import relations
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Manifest


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
    from twhin_pipeline.graph import raw_edges

    manifest = raw_edges.ingest(run.config, run.store, run.snapshot)
    rejected = run.store.manifest("raw_edges_rejected", run.snapshot)
    return {"raw_edges": manifest, "raw_edges_rejected": rejected}


def vocabulary(run: Run) -> dict[str, Manifest]:
    """Number the entities: `vocabulary/<entity>`."""
    from twhin_pipeline.graph import vocabulary as room

    room.build(run.config, run.store, run.snapshot)
    return _manifests(run, [f"vocabulary/{name}" for name in run.config.model.table_names])


def sample(run: Run) -> dict[str, Manifest]:
    """Split the edges and sample negatives: `training_set/*` and `held_out/*`."""
    from twhin_pipeline.training_set import negatives, positives

    positives.build_positives(run.config, run.store, run.snapshot)
    negatives.build(run.config, run.store, run.snapshot)
    repeats = ["repeats"] if run.config.split.repeats else []
    parts = ("positives", "negatives"), ("validation", "test", "validation_negatives", *repeats)
    names = [f"training_set/{n}" for n in parts[0]] + [f"held_out/{n}" for n in parts[1]]
    return _manifests(run, [name for name in names if run.store.exists(name, run.snapshot)])


def train(run: Run) -> dict[str, Manifest]:
    """Train under torchrun: `twhin_model`."""
    from twhin_pipeline.training import launch

    launch.run(run.config, run.config_path, run.overrides, run.store, run.snapshot)
    return _manifests(run, ["twhin_model"])


def evaluate(run: Run) -> dict[str, Manifest]:
    """Rank the held-out edges: `evaluation`."""
    from twhin_pipeline.evaluation.evaluate import evaluate as measure

    return {"evaluation": measure(run.config, run.store, run.snapshot)}


def refit(run: Run) -> dict[str, Manifest]:
    """Train once more, on all edges: `refit/twhin_model`. The training set and the model pass the usual checks."""
    from twhin_pipeline.checks import checks
    from twhin_pipeline.stages import refit as again

    prepared, made = again.prepare(run)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, made)
    manifest = again.train(prepared)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, ["twhin_model"])
    return {manifest.asset: manifest}


def _not_refit(run: Run) -> str | None:
    from twhin_pipeline.stages import refit as again

    return again.reason_against(run.config, run.store, run.snapshot)


def export(run: Run) -> dict[str, Manifest]:
    """Write the vectors by id: `embeddings/<entity>` and `embeddings/relations`."""
    from twhin_pipeline.stages import refit as again
    from twhin_pipeline.vectors import export as room

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
    from twhin_pipeline.checks import checks

    tables = run.config.model.table_names
    reads = [t.replace("*", name) for t in stage.reads for name in (tables if t.endswith("*") else [""])]
    run.store.refuse_stale(run.snapshot, reads)
    given = run
    if reads:
        run = replace(run, config=relations.resolve(run.config, run.store, run.snapshot))
    if (reason := stage.left_out(run)) is not None:
        say(f"{stage.name:<11}   left out: {reason}")
        return {}
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


def _manifests(run: Run, assets: Sequence[str]) -> dict[str, Manifest]:
    return {asset: run.store.manifest(asset, run.snapshot) for asset in assets}
