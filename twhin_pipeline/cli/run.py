"""Commands that make tables: the whole chain, one stage of it, and the search over hyperparameters."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated

import typer

from twhin_pipeline.cli.arguments import (
    ConfigPath,
    Home,
    NoTracking,
    Overrides,
    Snapshot,
    make_run,
    open_store,
    read_config,
    remembered,
    to_stderr,
    untracked,
)
from twhin_pipeline.errors import UserError

commands = typer.Typer()


@commands.command("run", rich_help_panel="Run")
def run_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    tune: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Search for better values first; sets tune.minutes.")
    ] = None,
    skip_unchanged: Annotated[
        bool,
        typer.Option("--skip-unchanged", help="Leave out stages of which no input, field or code has changed since."),
    ] = False,
    no_tracking: NoTracking = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary as JSON on standard output; progress goes to standard error.")
    ] = False,
) -> None:
    """Run the whole chain, with its checks.

    The stages are ingest, vocabulary, sample, train, evaluate, refit, export, index, map, compare, publish and decide.
    A failed blocking check ends the run; a gate that fails in `decide` holds the release back, and the one before stays
    current.
    """
    from twhin_pipeline import pipeline
    from twhin_pipeline.lifecycle import nights
    from twhin_pipeline.views import console, summary

    untracked(no_tracking)
    if tune is not None:
        overrides = [*(overrides or []), f"tune.minutes={tune:f}"]
    run, line = make_run(config, home, snapshot, overrides)
    if run.config.launch.node_rank:
        print(line)
        pipeline.run(run.config, run.config_path, run.overrides, run.store, run.snapshot, print)
        return
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), remembered(run):
        print(line)
        with nights.noted(run.config, run.store, run.snapshot):
            run = pipeline.run(
                run.config, run.config_path, run.overrides, run.store, run.snapshot, print, skip_unchanged
            )
    if as_json:
        console.print_json(summary.as_dict(run.config, run.store, run.snapshot, config_path=run.config_path))
    else:
        print()
        summary.show(run.config, run.store, run.snapshot, config_path=run.config_path, after_run=True)


@commands.command("backfill", rich_help_panel="Run")
def backfill_command(
    first: Annotated[
        str | None, typer.Option("--from", help="The first snapshot, YYYY-MM-DD; default: the oldest.")
    ] = None,
    last: Annotated[
        str | None, typer.Option("--to", help="The last snapshot, YYYY-MM-DD; default: the newest.")
    ] = None,
    config: ConfigPath = None,
    home: Home = None,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="Run snapshots that were published before, too.")] = False,
    skip_held: Annotated[
        bool, typer.Option("--skip-held", help="Leave held snapshots until their source or the configuration changes.")
    ] = False,
    stop_when_held: Annotated[
        bool, typer.Option("--stop-when-held", help="Stop at a snapshot that a check or a mistake holds back.")
    ] = False,
    no_tracking: NoTracking = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The table as JSON on standard output; progress goes to standard error.")
    ] = False,
) -> None:
    """Run the whole chain for every snapshot that was not published yet, the oldest first.

    A snapshot that a check or a mistake holds back does not stop the next one. One that fails does: what follows would
    grow from it. The table at the end says what was decided about each release: promoted, or held by a gate. The exit
    code is 1 unless every snapshot is published.
    """
    from dataclasses import asdict

    from twhin_pipeline import pipeline
    from twhin_pipeline.graph import source
    from twhin_pipeline.lifecycle import nights
    from twhin_pipeline.lifecycle.decisions import in_words
    from twhin_pipeline.stages.run import Run
    from twhin_pipeline.views import console
    from twhin_pipeline.words import PROMOTION

    untracked(no_tracking)
    store = open_store(home)
    loaded, path = read_config(config, overrides, store)
    if loaded.launch.node_rank:
        raise UserError(
            "launch.node_rank: backfill runs on node 0 alone; the other nodes join each of its snapshots with "
            "`twhin run --snapshot DAY`"
        )
    for day in (first, last):
        if day is not None:
            source.check_snapshot(day)
    found = source.find_snapshots(loaded) or [source.newest_snapshot(loaded)]
    chosen = [one for one in found if (first or one) <= one <= (last or one)]
    if not chosen:
        raise UserError(
            f"no snapshot from {first or found[0]} to {last or found[-1]}; there are {', '.join(found[-12:])}"
        )

    def run_one(snapshot: str) -> str:
        print(f"\nsnapshot {snapshot}", flush=True)
        run = Run(loaded, path, overrides or [], store, snapshot)
        with remembered(run), nights.noted(loaded, store, snapshot):
            pipeline.run(loaded, path, overrides or [], store, snapshot, print, skip_unchanged=not again)
        return in_words(store.manifest(PROMOTION, snapshot).details)

    results = []
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), nights.alone(store):
        print(f"configuration {path}, {len(chosen)} snapshots from {chosen[0]} to {chosen[-1]}, store {store.root}")
        known = nights.look(loaded, store, chosen)
        options = {"again": again, "skip_held": skip_held, "stop_when_held": stop_when_held}
        for result in nights.backfill(known, run_one, **options):
            results.append(result)
            if result.status != "published":
                to_stderr(f"snapshot {result.snapshot} {result.status}: {result.reason}")
    if as_json:
        console.print_json([asdict(result) for result in results])
    else:
        print()
        # A check's message has tables; it was printed in full above.
        rows = [[one.snapshot, one.status, f"{one.seconds:,.0f}", one.reason.partition("\n")[0]] for one in results]
        console.print_table(["snapshot", "status", "seconds", "reason"], rows)
    if any(result.status != "published" for result in results):
        raise typer.Exit(1)


@commands.command("tune", rich_help_panel="Run")
def tune_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials, those of earlier calls included; default: tune.trials.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1, help="Seconds after which no trial begins; default: tune.timeout_s.")
    ] = None,
    no_tracking: NoTracking = False,
) -> None:
    """Search for better hyperparameters.

    The configuration's section `tune` names the fields; trials are compared on validation edges. The same command
    continues an unfinished search.
    """
    from twhin_pipeline.operations import tune

    untracked(no_tracking)
    run, line = make_run(config, home, snapshot, overrides)
    print(line)
    with remembered(run):
        best = tune.run(run, print, trials=trials, timeout_s=timeout)
    print(
        f"\nbest of {best.trials} trials (failed {best.failed}, pruned {best.pruned}): {best.metric} {best.value:.4f}"
    )
    for override in best.overrides:
        print(f"  --set {shlex.quote(override)}")
    print(f"written to {best.file}" + (f"; MLflow run {best.mlflow_run_id}" if best.mlflow_run_id else ""))


@commands.command("job", rich_help_panel="Operate")
def job_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
) -> None:
    """Print what `train` submits with launch.kind: the batch script for Slurm, or the manifests for Kubernetes."""
    from twhin_pipeline.launchers import printed

    run, _ = make_run(config, home, snapshot, overrides)
    print(printed.text(run.config, run.config_path, run.overrides, run.store, run.snapshot))


def _stage_command(name: str, text: str) -> None:
    def command(
        config: ConfigPath = None,
        snapshot: Snapshot = None,
        home: Home = None,
        overrides: Overrides = None,
        no_tracking: NoTracking = False,
    ) -> None:
        from twhin_pipeline import pipeline

        untracked(no_tracking)
        run, _ = make_run(config, home, snapshot, overrides)
        with remembered(run):
            made = pipeline.run_stage(run, pipeline.STAGES[name], print)
        for manifest in made.values():
            for line in manifest.details.get("warnings", []):
                print(f"  warning: {line}")

    commands.command(name, help=text, rich_help_panel="Run one stage")(command)


# The names and lines of pipeline.STAGES (a test holds them equal); importing it here would cost the start-up.
STAGE_HELP = {
    "ingest": "Read the source's edges.",
    "vocabulary": "Give each entity its row.",
    "sample": "Split the edges and sample negatives.",
    "train": "Train the model under torchrun.",
    "evaluate": "Measure the model on held-out edges.",
    "refit": "Train once more, on all edges.",
    "export": "Write embedding tables by id.",
    "index": "Build indexes for approximate search.",
    "map": "Lay entity types out on maps.",
    "compare": "Compare with the current release.",
    "publish": "Register the model and write the release.",
    "decide": "Promote the release, or hold it back.",
}
for _name, _text in STAGE_HELP.items():
    _stage_command(_name, _text)
