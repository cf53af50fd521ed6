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
    remembered,
    untracked,
)

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
    no_tracking: NoTracking = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary as JSON on standard output; progress goes to standard error.")
    ] = False,
) -> None:
    """Run the whole chain, with its checks.

    The stages are ingest, vocabulary, sample, train, evaluate, refit, export, compare, publish and decide. A failed
    blocking check ends the run; a gate that fails in `decide` holds the release back, and the one before stays current.
    """
    from twhin_pipeline import pipeline
    from twhin_pipeline.views import console, summary

    untracked(no_tracking)
    if tune is not None:
        overrides = [*(overrides or []), f"tune.minutes={tune:f}"]
    run, line = make_run(config, home, snapshot, overrides)
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), remembered(run):
        print(line)
        run = pipeline.run(run.config, run.config_path, run.overrides, run.store, run.snapshot, print)
    if as_json:
        console.print_json(summary.as_dict(run.config, run.store, run.snapshot, config_path=run.config_path))
    else:
        print()
        summary.show(run.config, run.store, run.snapshot, config_path=run.config_path)


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
    "compare": "Compare with the current release.",
    "publish": "Register the model and write the release.",
    "decide": "Promote the release, or hold it back.",
}
for _name, _text in STAGE_HELP.items():
    _stage_command(_name, _text)
