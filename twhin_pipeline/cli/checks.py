"""Commands about the soundness of tables: run their checks, accept a failed one, verify checksums."""

from __future__ import annotations

from typing import Annotated

import typer

from twhin_pipeline.cli.arguments import (
    AsJson,
    ConfigPath,
    Home,
    Overrides,
    Snapshot,
    newest_made,
    open_store,
    read_config,
)
from twhin_pipeline.errors import UserError

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
    from twhin_pipeline.config import load_config, relations
    from twhin_pipeline.stages import refit
    from twhin_pipeline.views import console

    store = open_store(home)
    loaded, path = read_config(config, overrides, store)
    snapshot = snapshot or newest_made(store, "raw_edges")
    of_refit = None
    if store.versions_of(refit.TABLE, snapshot) and store.exists("twhin_model", snapshot):
        again = load_config(path, [*(overrides or []), *refit.overrides(store, snapshot)])
        of_refit = relations.resolve(again, store, snapshot)
    resolved = relations.resolve(loaded, store, snapshot)
    outcomes = by_hand.outcomes(resolved, store, snapshot, tables or (), refit=of_refit)
    if as_json:
        console.print_json([asdict(outcome) for outcome in outcomes])
    else:
        console.print_checks(outcomes, f"Checks of snapshot {snapshot}, store {store.root}")
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(1)


@commands.command("accept", rich_help_panel="Run")
def accept_command(
    table: Annotated[str, typer.Argument(help="The table whose newest version failed a check, such as raw_edges.")],
    reason: Annotated[str, typer.Option("--reason", help="Why it is good enough; stored with the version.")],
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Accept a table in spite of its failed checks, on the record.

    Later stages then read it, and it may be exported and published.
    """
    from twhin_pipeline.checks import checks
    from twhin_pipeline.store import releases

    store = open_store(home)
    snapshot = snapshot or newest_made(store, table)
    manifest = checks.accept(store, table, snapshot, releases.user(), reason)
    verdict = store.verdict(table, snapshot, manifest.version)
    failed = ", ".join(verdict.failed_checks) if verdict else ""
    print(f"accepted {table} of snapshot {snapshot}, version {manifest.version}, in spite of {failed}")


@commands.command("verify", rich_help_panel="Operate")
def verify_command(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables; default: all there are.")] = None,
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Read every file of the store's tables and compare it with its checksum.

    Without --snapshot, those of every snapshot. A damaged file makes the exit code 1.
    """
    store = open_store(home)
    damaged = total = size = 0
    for table in tables or store.assets():
        for at in [snapshot] if snapshot else store.snapshots(table):
            for version in store.versions_of(table, at):
                total += 1
                try:
                    size += store.verify(store.manifest(table, at, version))
                except UserError as error:
                    damaged += 1
                    print(error)
    print(f"{total} versions, {size / 2**20:,.1f} MiB read: {damaged or 'none'} damaged")
    if damaged:
        raise typer.Exit(1)
