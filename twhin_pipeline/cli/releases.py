"""Commands about releases: list them, move `current`, and compare two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from twhin_pipeline.cli.arguments import AsJson, ConfigPath, Home, Overrides, open_store, read_config, to_stderr
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.store.releases import Release

commands = typer.Typer()
Reason = Annotated[str, typer.Option("--reason", help="Why; stored with the move.")]


@commands.command("releases", rich_help_panel="Look")
def releases_command(home: Home = None, as_json: AsJson = False) -> None:
    """List the releases: what each measured, which one is current, and what it replaced.

    A release names the versions of a snapshot's tables that belong together; `load_model` opens the current one.
    """
    from twhin_pipeline.views import console, release_tables

    store = open_store(home)
    rows = release_tables.listed(store)
    if as_json:
        console.print_json({"releases": rows, "history": release_tables.moves(store)})
    elif not rows:
        print(f"{store.root} has no release; `twhin run` makes one when its checks have passed")
    else:
        print(f"Releases of store {store.root}")
        console.print_table(*release_tables.shown(rows))


@commands.command("promote", rich_help_panel="Operate")
def promote_command(
    release: Annotated[str, typer.Argument(help="The release's name, as `twhin releases` lists it.")],
    reason: Reason,
    home: Home = None,
) -> None:
    """Make a release the current one, on the record; MLflow's alias `champion` follows."""
    from twhin_pipeline.lifecycle import promotion
    from twhin_pipeline.store import releases

    _moved(*promotion.promote(open_store(home), release, releases.user(), reason))


@commands.command("rollback", rich_help_panel="Operate")
def rollback_command(
    reason: Reason,
    release: Annotated[
        str | None, typer.Argument(help="The release to go back to; default: the one that was current before.")
    ] = None,
    home: Home = None,
) -> None:
    """Go back to a release that was current before, on the record.

    Readers that have the other one open read on; the next that open the store get this one.
    """
    from twhin_pipeline.lifecycle import promotion
    from twhin_pipeline.store import releases

    _moved(*promotion.rollback(open_store(home), release, releases.user(), reason))


@commands.command("postgres", rich_help_panel="Operate")
def postgres_command(
    release: Annotated[
        str | None, typer.Argument(help="A release to copy too; default: the current one alone.")
    ] = None,
    config: ConfigPath = None,
    home: Home = None,
    overrides: Overrides = None,
) -> None:
    """Copy the current release into PostgreSQL with pgvector, and let the views there show it.

    `publish` and `promote` do so by themselves where `export.postgres` is set; this catches up when the server was
    away, and copies releases that were made before. The server's address is in the variable TWHIN_POSTGRES, or in
    libpq's own.
    """
    from twhin_pipeline.config.training import PostgresConfig
    from twhin_pipeline.store import releases
    from twhin_pipeline.vectors import postgres

    store = open_store(home)
    settings = read_config(config, overrides, store)[0].export.postgres or PostgresConfig()
    current = releases.current(store)
    if current is None:
        raise UserError(f"{store.root}: no release is current; `twhin run` makes one, `twhin promote` chooses one")
    wanted = None if release is None else releases.read(store, release)
    postgres.show(store, current, settings)
    print(f"the views in {settings.schema_name} show {current.name}")
    if wanted is not None:  # afterwards, as a switch drops what is older than the latest `keep`
        print(f"{wanted.name} is {'copied' if postgres.copy(store, wanted, settings) else 'there already'}")


@commands.command("drift", rich_help_panel="Look")
def drift_command(
    before: Annotated[str | None, typer.Argument(help="The earlier release; default: the one before `after`.")] = None,
    after: Annotated[str | None, typer.Argument(help="The later release; default: the newest.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many neighbors of an id are compared.")] = 10,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show how far the vectors of two releases are apart, by entity type.

    Cosine and distance between an id's two vectors, cosine after the best rotation, lengths, the share of nearest
    neighbors that stayed, and how many ids came and went. Of large types a sample of 20,000 ids is looked at.
    """
    from dataclasses import asdict

    from twhin_pipeline.lifecycle.drift import drift
    from twhin_pipeline.store import database
    from twhin_pipeline.views import console, release_tables

    store = open_store(home)
    first, second = release_tables.two(store, before, after)
    with database.connect(store=store) as con:
        result = drift(con, store, first, second, k)
    if as_json:
        console.print_json({"before": first.name, "after": second.name, "types": [asdict(one) for one in result]})
    else:
        print(f"From {first.name} to {second.name}, store {store.root}")
        console.print_table(*release_tables.drift_shown(result, k))


def _moved(release: Release, note: str | None) -> None:
    print(f"{release.name} of snapshot {release.snapshot} is current")
    if note:
        to_stderr(note)
