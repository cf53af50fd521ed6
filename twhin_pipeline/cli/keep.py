"""Commands about what a store keeps: remove by policy, pin a release, and the chain behind one vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from twhin_pipeline.cli.arguments import AsJson, ConfigPath, Home, Overrides, open_store, to_stderr

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

commands = typer.Typer()
Release = Annotated[str, typer.Argument(help="The release's name, as `twhin releases` lists it.")]


@commands.command("prune", rich_help_panel="Operate")
def prune_command(
    config: ConfigPath = None,
    home: Home = None,
    overrides: Overrides = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only show what would go.")] = False,
    without_registry: Annotated[
        bool,
        typer.Option("--without-registry", help="Do not ask MLflow which models must stay; it is put on the record."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which tables, releases and checkpoints would go by the policy of retention; with --yes, remove them.

    The configuration's section `retention` has the policy; without a configuration its defaults hold. The current
    release and the one before it, pinned releases, and all that these were made from always stay.
    """
    from twhin_pipeline.config.retention import RetentionConfig
    from twhin_pipeline.errors import UserError
    from twhin_pipeline.lifecycle import removal, retention
    from twhin_pipeline.store import releases
    from twhin_pipeline.views import console, retention_tables

    store = open_store(home)
    if not store.assets() and not releases.names(store):
        raise UserError(f"{store.root}: has no table and no release, so it is no store; correct --home")
    loaded, origin = _policy(config, overrides, store)
    policy = RetentionConfig() if loaded is None else loaded.retention
    save_dir = None if loaded is None else loaded.training.save_dir
    plan = retention.plan(store, policy, save_dir=save_dir, registry=not without_registry)
    done = removal.carry_out(store, plan, releases.user()) if yes else None
    if as_json:
        console.print_json(retention_tables.as_dict(plan, done))
    else:
        print(f"Store {store.root}, policy of {origin}")
        retention_tables.show(plan, done)


def _policy(config: str | None, overrides: list[str] | None, store: Store) -> tuple[TwhinConfig | None, str]:
    """Return the configuration that has the policy, and where that is from: the one that is named, else the one that
    the store's tables were made by; None where there is none.
    """
    from twhin_pipeline.config import configuration_file, load_config
    from twhin_pipeline.errors import UserError

    made_by = configuration_file.record(store)
    if config is None and made_by is not None:
        try:
            return load_config(made_by.path, overrides or ()), made_by.path
        except UserError as error:
            if overrides:
                raise
            to_stderr(f"note: {error}")
    elif config is not None or overrides:
        path = configuration_file.choose(config, store)[0]
        return load_config(path, overrides or ()), path
    return None, "the defaults"


@commands.command("pin", rich_help_panel="Operate")
def pin_command(
    release: Release,
    reason: Annotated[str, typer.Option("--reason", help="Why; stored with the pin.")],
    home: Home = None,
) -> None:
    """Keep a release with all of its tables, whatever the policy of retention says."""
    from twhin_pipeline.store import releases

    releases.pin(open_store(home), release, releases.user(), reason)
    print(f"{release} is pinned")


@commands.command("unpin", rich_help_panel="Operate")
def unpin_command(release: Release, home: Home = None) -> None:
    """Leave a release to the policy of retention again."""
    from twhin_pipeline.store import releases

    releases.unpin(open_store(home), release)
    print(f"{release} is not pinned any more")


@commands.command("lineage", rich_help_panel="Look")
def lineage_command(
    entity: Annotated[str, typer.Argument(help="The entity type.")],
    id: Annotated[str, typer.Argument(help="The entity's id.")],
    release: Annotated[
        str | None,
        typer.Option("--release", "-r", help="A release, as `twhin releases` lists it; default: the current."),
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the chain behind a vector, from its release to the source's files.

    Each table with its version, code and configuration; the model with what it started from; the entity's edges by
    relation; and the files that were read, with size, time and checksum as far as they are known.
    """
    from twhin_pipeline.lifecycle.lineage import trace
    from twhin_pipeline.store import database
    from twhin_pipeline.views import console, lineage_tables

    store = open_store(home)
    with database.connect(store=store) as con:
        found = trace(con, store, entity, id, release)
    if as_json:
        console.print_json(found.as_dict())
    else:
        lineage_tables.show(found)
