"""Commands about the checks of tables: run them by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from twhin_pipeline.cli.arguments import (
    AsJson,
    ConfigPath,
    Home,
    Overrides,
    Snapshot,
    newest_table,
    open_store,
    read_config,
)

commands = typer.Typer()


@commands.command("check", rich_help_panel="Run")
def check_command(
    tables: Annotated[
        list[str] | None, typer.Argument(help="Tables, such as raw_edges or 'embeddings/*'; default: all there are.")
    ] = None,
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the checks of a snapshot's tables by hand.

    A check that blocks and fails makes the exit code 1.
    """
    from dataclasses import asdict

    from twhin_pipeline.checks import by_hand
    from twhin_pipeline.config import relations
    from twhin_pipeline.views import console

    store = open_store(home)
    loaded, _ = read_config(config, overrides, store)
    snapshot = snapshot or newest_table(store, "raw_edges")
    outcomes = by_hand.outcomes(relations.resolve(loaded, store, snapshot), store, snapshot, tables or ())
    if as_json:
        console.print_json([asdict(outcome) for outcome in outcomes])
    else:
        console.print_checks(outcomes, f"Checks of snapshot {snapshot}, store {store.root}")
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)
