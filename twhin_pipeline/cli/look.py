"""Commands that show what is in a store, and the configuration."""

from __future__ import annotations

import sys
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
    to_stderr,
)
from twhin_pipeline.errors import UserError

commands = typer.Typer()


@commands.command("summary", rich_help_panel="Look")
def summary_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    examples: Annotated[
        str | None, typer.Option(help="ENTITY:ID,ID,… to show neighbors of; default: the best connected.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show in short what a run made.

    Whether its release is current or held, sizes, speed, quality beside the baselines, neighbors, and where everything
    is.
    """
    from twhin_pipeline.config import configuration_file
    from twhin_pipeline.views import console, summary

    store = open_store(home)
    snapshot = snapshot or newest_table(store, "embeddings/relations")
    if config is None and (made_by := configuration_file.record(store)) is not None:
        config = made_by.path
    loaded, path = read_config(config, overrides)
    if as_json:
        console.print_json(summary.as_dict(loaded, store, snapshot, examples, path))
    else:
        summary.show(loaded, store, snapshot, examples, path)


@commands.command(rich_help_panel="Look")
def metrics(snapshot: Snapshot = None, home: Home = None, as_json: AsJson = False) -> None:
    """Show what evaluation measured.

    The model's figures are beside those of the baselines, popularity, item-kNN and ALS, with warnings where it does not
    beat them.
    """
    from twhin_pipeline.views import console

    store = open_store(home)
    snapshot = snapshot or newest_table(store, "evaluation")
    table, details = store.read("evaluation", snapshot), store.manifest("evaluation", snapshot).details
    if as_json:
        warnings = details.get("warnings", [])
        console.print_json({"snapshot": snapshot, "metrics": table.to_pylist(), "warnings": warnings})
    else:
        console.print_metrics(table, details, f"Snapshot {snapshot}, store {store.root}")


@commands.command(rich_help_panel="Look")
def sql(
    query: Annotated[str, typer.Argument(help="DuckDB SQL over the store's tables; `show tables` lists them.")],
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", "-s", help="Only this one's tables; default: all, in a column snapshot.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output.")] = False,
) -> None:
    """Query the store's tables in SQL.

    Tables are views named after the assets: raw_edges, vocabulary_package, training_set_positives, evaluation, …
    """
    import duckdb

    from twhin_pipeline.store import catalog, database
    from twhin_pipeline.views import console

    if not query.strip(" \n\t;"):
        raise UserError("SQL: the query is empty; try `twhin sql 'show tables'`")
    store = open_store(home)
    if catalog.follow(store):
        to_stderr(f"note: the store has been moved, so {store.path(catalog.CATALOG)} was written anew")
    con = database.connect(store=store)
    known = catalog.views(con, store, snapshot)
    try:
        if as_csv:
            relation = con.sql(query)
            if relation is not None:
                console.print_csv(relation)
            return
        result = con.execute(query)
        names = [column[0] for column in result.description or []]
        rows = result.fetchall()
    except duckdb.CatalogException as error:
        where = f"{store.root}{f', snapshot {snapshot}' if snapshot else ''}"
        raise UserError(f"SQL: {str(error).splitlines()[0]} (tables of {where}: {', '.join(known)})") from error
    except duckdb.Error as error:
        raise UserError(f"SQL: {' '.join(str(error).split())}") from error
    if as_json:
        console.print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        console.print_table(names, rows)


@commands.command("config", rich_help_panel="Look")
def config_command(
    config: ConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of such a file.")] = False,
    as_reference: Annotated[bool, typer.Option("--reference", help="The page on the configuration.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="What the recipe chose for the newest snapshot in the store, and why.")
    ] = False,
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Print the configuration with all defaults.

    A recipe's values depend on the graph, so only --explain shows them.
    """
    from twhin_pipeline.views import console

    if schema:
        from twhin_pipeline.config import TwhinConfig

        console.print_json(TwhinConfig.model_json_schema())
    elif as_reference:
        from twhin_pipeline.config import reference

        sys.stdout.write(reference.markdown())
    elif explain:
        from twhin_pipeline.config import relations

        loaded, store = read_config(config, overrides)[0], open_store(home)
        first = f"vocabulary/{loaded.model.table_names[0]}"
        if not (store.snapshots(first) if snapshot is None else store.exists(first, snapshot)):
            raise UserError(
                f"{store.root}: no edges were ingested yet, and a recipe goes by their counts; run `twhin ingest` and "
                "`twhin vocabulary` first"
            )
        sys.stdout.write(relations.recipe(loaded, store, snapshot or newest_table(store, first)).explanation())
    else:
        sys.stdout.write(read_config(config, overrides)[0].to_yaml())
