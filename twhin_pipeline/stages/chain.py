"""The stages of the chain, in their order. The command line and the Dagster assets both run them from here.

A stage makes tables from the tables that it reads, and its tables' checks run after it: on the command line at once
(`run_stage`), in Dagster as a step of their own between two stages (`make`, then the asset's checks).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from twhin_pipeline.config import TwhinConfig, relations, stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import engine, unchanged
from twhin_pipeline.stages.run import Run, Say
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.words import CALIBRATION, DRIFT, INDEX, PROMOTION, PUBLISHED, REPEATS


@dataclass(frozen=True)
class Stage:
    """One step of the chain, under the name of its command."""

    name: str
    summary: str
    function: Callable[[Run], None]
    makes: tuple[str, ...]
    """Its tables, by patterns that `spelled_out` explains."""
    reads: tuple[str, ...] = ()
    """Tables that it is made from. They have to fit each other."""
    after: tuple[str, ...] = ()
    """Other tables that come before it: where their checks fail, it is held back."""
    left_out: Callable[[Run], str | None] = lambda run: None
    """Says why there is nothing to do, or None."""

    def tables(self, config: TwhinConfig) -> list[str]:
        """Return the tables that it makes."""
        return spelled_out(self.makes, config)

    def upstream(self, config: TwhinConfig) -> list[str]:
        """Return the tables that come before it."""
        return spelled_out(dict.fromkeys((*self.reads, *self.after)), config)


def spelled_out(patterns: Iterable[str], config: TwhinConfig) -> list[str]:
    """Return the tables behind patterns: `vocabulary/*` stands for one of each entity type.

    Tables that a configuration does not have are left out: `held_out/repeats`, `refit/twhin_model`, maps that it does
    not name, and of `index/*` those of entity types that no relation leads to.
    """
    from twhin_pipeline.stages import refit as again

    absent = {REPEATS: not config.split.repeats, again.TABLE: not again.is_in_chain(config)}
    absent |= {f"map/{entity}": entity not in config.maps.entities for entity in config.model.table_names}
    result = []
    for pattern in patterns:
        stem, star, _ = pattern.partition("*")
        types = config.indexed_types if stem == f"{INDEX}/" else config.model.table_names
        names = [stem + entity for entity in types] if star else [pattern]
        result += [name for name in names if not absent.get(name)]
    return result


def ingest(run: Run) -> None:
    """Read the source."""
    engine.ingest(run.config, run.store, run.snapshot)


def vocabulary(run: Run) -> None:
    """Number the entities."""
    engine.vocabulary(run.config, run.store, run.snapshot)


def compact(run: Run) -> None:
    """Number the entities, without the rows of those that were evicted."""
    engine.vocabulary(run.config, run.store, run.snapshot, compact=True)


def sample(run: Run) -> None:
    """Split the edges and sample negatives."""
    engine.sample(run.config, run.store, run.snapshot)


def train(run: Run) -> None:
    """Train under torchrun."""
    look_at_tracking(run.store)
    run.train(run)


def look_at_tracking(store: Store) -> None:
    """See whether the training can be tracked, and warn where it cannot now.

    Raises:
        UserError: It never can, as the tracking URI stands.
    """
    from twhin_pipeline import tracking

    if not tracking.is_off() and (why := tracking.check(store)) is not None:
        warnings.warn(
            f"MLflow is away ({why}); the run goes on, what it would log is kept, and `twhin track --send` sends it",
            stacklevel=2,
        )


def evaluate(run: Run) -> None:
    """Rank the held-out edges, and add what was measured to the model's run in MLflow."""
    from twhin_pipeline import tracking
    from twhin_pipeline.evaluation.evaluate import evaluate as measure

    details = measure(run.config, run.store, run.snapshot).details
    measured = details["metrics"] | ({"edges_left_out": details["edges_left_out"]} if details["ancestors"] else {})
    tracking.log_evaluation(run.store, run.store.manifest("twhin_model", run.snapshot), measured)


def refit(run: Run) -> None:
    """Train once more, on all edges. The training set and the model pass the usual checks."""
    from twhin_pipeline.checks import checks
    from twhin_pipeline.stages import refit as again

    prepared, made = again.prepare(run)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, made)
    look_at_tracking(run.store)
    prepared.train(prepared)
    checks.run_blocking(prepared.config, prepared.store, run.snapshot, ["twhin_model"])


def _not_refit(run: Run) -> str | None:
    from twhin_pipeline.stages import refit as again

    return again.reason_against(run.config, run.store, run.snapshot)


def export(run: Run) -> None:
    """Write the vectors by id."""
    from twhin_pipeline.stages import refit as again
    from twhin_pipeline.vectors import export as vectors

    _require_passed(run)
    vectors.export(run.config, again.published(run.config, run.store, run.snapshot), run.snapshot)


def _require_passed(run: Run) -> None:
    """Refuse to export a model that failed a check, or whose evaluation did; one without an evaluation passes."""
    from twhin_pipeline.checks import checks

    store, snapshot = run.store, run.snapshot
    made = [table for table in ("twhin_model", "evaluation", CALIBRATION) if store.newest(table, snapshot) is not None]
    checks.require_passed(run.config, store, snapshot, made)


def index(run: Run) -> None:
    """Build an index for each entity type that is large enough for one; add its recall to the model's run in MLflow."""
    from twhin_pipeline import tracking
    from twhin_pipeline.stages import refit as again
    from twhin_pipeline.vectors import indexing

    made = indexing.build(run.config, run.store, run.snapshot, stage_settings.settings(run.config, "index"))
    recalls = {f"index_recall/{name.partition('/')[2]}": one.details.get("least_recall") for name, one in made.items()}
    model = again.published(run.config, run.store, run.snapshot).manifest("twhin_model", run.snapshot)
    tracking.log_evaluation(run.store, model, recalls)


def _no_index(run: Run) -> str | None:
    from twhin_pipeline.vectors import index_choice

    return index_choice.reason_against(run.config, run.store, run.snapshot)


def lay_out(run: Run) -> None:
    """Lay the entity types of `maps.entities` out on planes."""
    from twhin_pipeline.views import entity_map

    entity_map.build(run.config, run.store, run.snapshot)


def _no_maps(run: Run) -> str | None:
    return None if run.config.maps.entities else "maps.entities names no entity type"


def compare(run: Run) -> None:
    """Measure the new vectors and model beside the current release's."""
    from twhin_pipeline.lifecycle import comparison

    comparison.compare(run.config, run.store, run.snapshot)


def decide(run: Run) -> None:
    """Promote the release, or hold it back."""
    from twhin_pipeline.lifecycle import nights, promotion

    promotion.decide(run.config, run.store, run.snapshot)
    with suppress(OSError, UserError):  # whoever looks next reads the table
        nights.note_decided(run.store, [run.snapshot])


def publish(run: Run) -> None:
    """Register the model, write the release and refresh the catalog."""
    from twhin_pipeline.stages import publish as last

    last.publish(run)


_TRAINED_ON = (
    "training_set/positives",
    "training_set/negatives",
    "held_out/validation",
    "held_out/validation_negatives",
)
_RANKED = ("held_out/test", "held_out/validation", "training_set/positives", REPEATS)
_REFITTED = ("refit/twhin_model",)
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("ingest", "Read the source's edges.", ingest, ("raw_edges", "raw_edges_rejected")),
        Stage("vocabulary", "Give each entity its row.", vocabulary, ("vocabulary/*",), ("raw_edges",)),
        Stage(
            "sample", "Split the edges and sample negatives.", sample, (*_TRAINED_ON, "held_out/test", REPEATS),
            ("raw_edges", "vocabulary/*"),
        ),
        Stage("train", "Train the model under torchrun.", train, ("twhin_model",), (*_TRAINED_ON, "vocabulary/*")),
        Stage(
            "evaluate", "Measure the model on held-out edges.", evaluate, ("evaluation", CALIBRATION),
            ("twhin_model", *_RANKED),
        ),
        Stage(
            "refit", "Train once more, on all edges.", refit, _REFITTED, ("twhin_model", "vocabulary/*"),
            ("evaluation", CALIBRATION), _not_refit,
        ),
        Stage(
            "export", "Write embedding tables by id.", export, ("embeddings/*", "embeddings/relations"),
            ("twhin_model", "vocabulary/*"), ("evaluation", CALIBRATION, *_REFITTED),
        ),
        Stage(
            "index", "Build indexes for approximate search.", index, (f"{INDEX}/*",),
            ("training_set/positives", "embeddings/*", "embeddings/relations"), (), _no_index,
        ),
        Stage(
            "map", "Lay entity types out on maps.", lay_out, ("map/*",), ("embeddings/*", "raw_edges"),
            left_out=_no_maps,
        ),
        Stage(
            "compare", "Compare with the current release.", compare, (DRIFT,),
            ("twhin_model", "held_out/test", "training_set/positives", "embeddings/*", "embeddings/relations"),
        ),
        Stage(
            "publish", "Register the model and write the release.", publish, (PUBLISHED,),
            ("evaluation", CALIBRATION, "embeddings/*", "embeddings/relations", DRIFT), (f"{INDEX}/*", "map/*"),
        ),
        Stage("decide", "Promote the release, or hold it back.", decide, (PROMOTION,), (PUBLISHED, DRIFT)),
    )
}  # fmt: skip


COMPACTION = replace(STAGES["vocabulary"], function=compact)
"""In place of the stage `vocabulary`, for one snapshot; it is no part of the chain."""


def make(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage without the checks of its tables; return the tables' manifests, none where it is left out.

    Raises:
        UserError: The stage says what is wrong, a table that it reads is older than what that was made from, or was
            made with other values of the configuration's fields.
    """
    reads = spelled_out(stage.reads, run.config)
    run.store.refuse_stale(run.snapshot, reads)
    if (why := reason(run, stage)) is not None:
        say(f"{stage.name:<11}   left out: {why}")
        return {}
    resolved = _resolved(run) if reads else run
    _refuse_other_settings(resolved, reads)
    # A training process takes its own lock. Others work on the versions that were there when they began.
    held = [] if stage.function in (train, refit) else stage.tables(run.config)
    with run.store.writing(run.snapshot, held):
        stage.function(replace(resolved, store=run.store.pinned()))
    made = {
        table: run.store.manifest(table, run.snapshot)
        for table in stage.tables(run.config)
        if run.store.exists(table, run.snapshot)
    }
    for line in [*(_undated(run) if stage.name == "ingest" else ()), *_passed_over(run, made)]:
        say(f"  note: {line}")
    for note in (note for manifest in made.values() for note in manifest.details.get("notes", [])):
        say(f"  note: {note}")
    if stage.name == "vocabulary":  # all that a recipe looks at is there now
        for line in relations.recipe(run.config, run.store, run.snapshot).lines():
            say(line)
    return made


def _undated(run: Run) -> list[str]:
    from twhin_pipeline.graph import source

    return source.undated(run.config, run.snapshot)


def _passed_over(run: Run, made: Iterable[str]) -> Iterator[str]:
    """Say which earlier tables were left aside because nobody has checked them; what grows day by day lacks them."""
    for table in made:
        if table == "raw_edges" or table.startswith("vocabulary/"):  # `raw_edges_rejected` has no checks
            for older in run.store.passed_over(table, run.snapshot):
                yield (
                    f"{table} of snapshot {older} is passed over, as its checks never ran; run "
                    f"`twhin check {table} --snapshot {older}` and make {run.snapshot} again, or leave it so"
                )


def reason(run: Run, stage: Stage) -> str | None:
    """Return why a stage has nothing to do, or None where it has."""
    return stage.left_out(_resolved(run)) if stage.reads else None


def _resolved(run: Run) -> Run:
    return replace(run, config=relations.resolve(run.config, run.store, run.snapshot))


_COMPARED = {
    "raw_edges": "ingest",
    "vocabulary": "vocabulary",
    "training_set": "sample",
    "held_out": "sample",
    "twhin_model": "train",
}
"""The stage that made a table, by the first part of the table's name, where later stages depend on its fields."""


def _refuse_other_settings(run: Run, reads: Sequence[str]) -> None:
    """Refuse a table that was made under other values than the configuration has now of the fields that it was made by.

    Limits of checks do not count: they say whether a table is good, not what is in it.
    Of a model only what says how an edge is scored is compared (`stage_settings.SCORING`): how it was trained is no
    matter to who reads it, and the recipe's optimizer depends on the number of ranks.

    Raises:
        UserError: Names the fields, their values then and now, and the remedy.
    """
    for table in reads:
        stage = _COMPARED.get(table.split("/")[0])
        if stage is None or not run.store.exists(table, run.snapshot):
            continue
        manifest = run.store.manifest(table, run.snapshot)
        if not manifest.settings:  # of an earlier version of this package
            continue
        fields = stage_settings.differences(manifest.settings, stage_settings.settings(run.config, stage))
        fields.pop("negatives.epochs", None)  # training that runs longer uses them again
        fields = {path: values for path, values in fields.items() if not stage_settings.LIMITS.fullmatch(path)}
        if stage == "train":
            fields = {path: values for path, values in fields.items() if stage_settings.SCORING.fullmatch(path)}
        if fields:
            shown = "; ".join(f"{path} was {then!r} and is {now!r}" for path, (then, now) in list(fields.items())[:5])
            more = f"; and {len(fields) - 5} more" if len(fields) > 5 else ""
            raise UserError(
                f"{table} of snapshot {run.snapshot} was made with other values: {shown}{more}; make it again with "
                f"`twhin {stage} --snapshot {run.snapshot}`, or give the values that it was made with"
            )


def made_before(run: Run, stage: Stage, say: Say) -> dict[str, Manifest] | None:
    """Return a stage's tables where nothing that it reads has changed since it made them, saying so; else None."""
    config = run.config
    if stage.reads:
        if not run.store.exists("raw_edges", run.snapshot):
            return None
        config = relations.resolve(run.config, run.store, run.snapshot)
    if unchanged.reason_to_run(config, run.store, run.snapshot, stage) is not None:
        return None
    made = {table: run.store.manifest(table, run.snapshot) for table in stage.tables(config)}
    say(f"{stage.name:<11}   unchanged: {_told(made)}")
    return made


def join(run: Run, stage: Stage, say: Say) -> None:
    """Take part in the training of a stage, on a node other than the first (`training.nodes`); other stages pass.

    Raises:
        UnavailableError: The first node does not open the training in time.
        UserError, TrainingFailed, TrainingCancelled: As `training.launch.run` does.
    """
    from twhin_pipeline.stages import refit as again
    from twhin_pipeline.training import nodes

    if stage.function not in (train, refit) or (stage.function is refit and not again.is_in_chain(run.config)):
        say(f"{stage.name:<11}   is left to node 0")
        return
    nodes.wait_for_first(run.config, say)  # it makes the tables before
    if stage.function is train:
        joined = _resolved(run)
    elif (why := _not_refit(_resolved(run))) is not None:
        say(f"{stage.name:<11}   left out: {why}")
        return
    else:
        joined = again.training_run(run)
    run.train(joined)
    nodes.wait_for_close(run.config)
    say(f"{stage.name:<11}   node {run.config.launch.node_rank} has taken part; node 0 goes on with the model")


def run_stage(run: Run, stage: Stage, say: Say) -> dict[str, Manifest]:
    """Run one stage and the checks of its tables, saying one line; on a node other than the first, `join` it.

    Raises:
        UserError: As `make` and `join` do, or a blocking check failed.
    """
    from twhin_pipeline.checks import checks
    from twhin_pipeline.training import nodes

    if nodes.joins(run.config):
        join(run, stage, say)
        return {}
    messages: list[str] = []
    started = time.perf_counter()
    made = make(run, stage, messages.append)
    worked = time.perf_counter()
    if made:
        config = relations.resolve(run.config, run.store, run.snapshot)
        try:
            notes = checks.run_blocking(config, run.store, run.snapshot, made)
        except UserError:
            for line in messages:  # they may name the cause
                say(line)
            raise
        checked = time.perf_counter()
        say(f"{stage.name:<11}{worked - started:7.1f} s + checks {checked - worked:.1f} s: {_told(made)}")
        messages = [f"  note: {note}" for note in notes] + messages
    for line in messages:
        say(line)
    return made


def _told(made: dict[str, Manifest]) -> str:
    """Say what a stage made."""
    if (decided := made.get(PROMOTION)) is not None:
        return f"{decided.details['release']} is {decided.details['decision']}: {decided.details['reason']}"
    if (drift := made.get(DRIFT)) is not None:
        before = drift.details["compared_with"]
        return "nothing is current yet" if before is None else f"{drift.rows} figures beside {before}"
    if all(name.startswith(f"{INDEX}/") for name in made):
        return ", ".join(f"{name} {_told_of_index(manifest.details)}" for name, manifest in made.items())
    if (published := made.get(PUBLISHED)) is not None:
        details = published.details
        registered = f"registered {details['model']} at {details['registry']}, " if "model" in details else ""
        return f"{registered}refreshed {details['catalog']}"
    return ", ".join(f"{name} {manifest.rows:,} rows" for name, manifest in made.items() if manifest.rows) or "nothing"


def _told_of_index(details: Mapping[str, Any]) -> str:
    if details["kind"] == "none":
        return "none (small)"
    recall = "" if details["least_recall"] is None else f", recall {details['least_recall']:.3f}"
    return f"{details['kind']} of {details['rows']:,} vectors{recall}"
