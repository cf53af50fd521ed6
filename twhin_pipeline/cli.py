"""The command `twhin`. Everything slow is imported by the command that needs it."""

from __future__ import annotations

import errno
import shlex
import sys
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.pipeline import Run
    from twhin_pipeline.store import Store

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What a folder that cannot be written, or a full disk, gives.
UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}

ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        envvar="TWHIN_CONFIG",
        help="YAML file, or the name of a bundled one, such as debian; default: the only one in this folder.",
    ),
]
Home = Annotated[
    str | None, typer.Option("--home", envvar="TWHIN_HOME", help="The store: a folder or URL; default: .twhin.")
]
Snapshot = Annotated[str | None, typer.Option("--snapshot", "-s", help="YYYY-MM-DD; default: the newest there is.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field by its path, such as training.num_epochs=3.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on standard output.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"twhin-pipeline {metadata.version('twhin-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """TwHIN: entity embeddings from typed edges. Each command reads one YAML file and one store.

    Start with `twhin init FILE`, which writes the YAML file for your own edges, then `twhin run`.
    """


def _config(path: str | None, overrides: list[str] | None, store: Store | None = None) -> tuple[TwhinConfig, str]:
    from twhin_pipeline.config import configuration_file, load_config

    file, found = configuration_file.choose(path, store)
    if found:
        _tell(f"note: configuration {file}, the only one in this folder")
    return load_config(file, overrides or ()), file


def _store(home: str | None) -> Store:
    from twhin_pipeline.store import Store

    try:
        return Store(home)
    except (ValueError, ImportError) as error:
        raise UserError(f"--home {home}: is no folder or URL of a store ({error})") from error


def _newest_table(store: Store, asset: str) -> str:
    found = store.snapshots(asset)
    if not found:
        raise UserError(f"{store.root}: there is no {asset} yet; make one with `twhin run`, or pass --home")
    return found[-1]


def _run_of(config: str | None, home: str | None, snapshot: str | None, overrides: list[str] | None) -> tuple[Run, str]:
    """Return a run, and a line about what it reads and writes."""
    from twhin_pipeline.graph.source import check_snapshot
    from twhin_pipeline.pipeline import Run

    store = _store(home)
    loaded, path = _config(config, overrides, store)
    how = ""
    if snapshot is None:
        snapshot, how = _newest_snapshot(loaded)
    check_snapshot(snapshot)
    line = f"configuration {path}, snapshot {snapshot}{how}, store {store.root}"
    return Run(loaded, path, overrides or [], store, snapshot), line


def _newest_snapshot(config: TwhinConfig) -> tuple[str, str]:
    """Return the newest snapshot, and in parentheses how it was chosen."""
    from twhin_pipeline.graph import source

    found = source.find_snapshots(config)
    newest = found[-1] if found else source.newest_snapshot(config)  # which raises
    if not any(one.snapshots is not None or "{snapshot}" in (one.path or "") for one in config.all_sources):
        return newest, " (the day of the newest file)"
    return newest, f" (the newest of {len(found)})" if len(found) > 1 else " (the only one)"


@contextmanager
def _remembered(run: Run) -> Iterator[None]:
    """Write into the store which configuration its tables were made by, also where a later stage failed."""
    from twhin_pipeline.config import configuration_file

    try:
        yield
    finally:
        if run.store.exists("raw_edges", run.snapshot):
            configuration_file.remember(run.store, run.config_path)


@app.command()
def init(
    files: Annotated[list[str], typer.Argument(help="Parquet, CSV or TSV: files, patterns in quotes, or URLs.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The configuration to write.")] = "twhin.yaml",
    min_share: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out relations with a smaller share of their file's rows.")
    ] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take every guess.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the configuration if it is there.")] = False,
) -> None:
    """Write a configuration for your own files.

    It guesses columns, entity types, relations and the split from names and contents, and says what it guessed. On a
    terminal it asks where it is in doubt.
    """
    import os

    from twhin_pipeline.config import parse_config
    from twhin_pipeline.operations import init_config

    if not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise UserError(f"--out {out}: there is no folder {os.path.dirname(out)}; make it, or choose another file")
    if os.path.exists(out) and not force:
        raise UserError(f"{out}: is there already; pass --force to replace it, or -o for another file")
    asks = not yes and sys.stdin.isatty() and sys.stdout.isatty()
    guess = init_config.guess(files, out, min_share=min_share, choose=_choose if asks else None)
    for line in guess.lines:
        print(line)
    parse_config(guess.data, origin=out)
    with open(out, "w", encoding="utf-8") as file:
        file.write(guess.text)
    print(f"wrote {out}; look through it, then: twhin run --config {shlex.quote(out)}")


def _choose(question: str, options: Sequence[str], default: str) -> str:
    """Ask on the terminal."""
    answer = ""
    while answer not in options:
        answer = str(typer.prompt(f"{question} ({', '.join(options)})", default=default)).strip()
    return answer


@app.command("run")
def run_command(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    tune: Annotated[
        float | None, typer.Option(metavar="MINUTES", help="Search for better values first; sets tune.minutes.")
    ] = None,
) -> None:
    """Run the whole chain, with its checks.

    The stages are ingest, vocabulary, sample, train, evaluate and export. A failed blocking check ends the run.
    """
    from twhin_pipeline import pipeline
    from twhin_pipeline.views import summary

    if tune is not None:
        overrides = [*(overrides or []), f"tune.minutes={tune:f}"]
    run, line = _run_of(config, home, snapshot, overrides)
    print(line)
    with _remembered(run):
        run = pipeline.run(run.config, run.config_path, run.overrides, run.store, run.snapshot, print)
    print()
    summary.show(run.config, run.store, run.snapshot, config_path=run.config_path)


def _stage_command(name: str, text: str) -> None:
    def command(
        config: ConfigPath = None, snapshot: Snapshot = None, home: Home = None, overrides: Overrides = None
    ) -> None:
        from twhin_pipeline import pipeline

        run, _ = _run_of(config, home, snapshot, overrides)
        with _remembered(run):
            made = pipeline.run_stage(run, pipeline.STAGES[name], print)
        for manifest in made.values():
            for line in manifest.details.get("warnings", []):
                print(f"  warning: {line}")

    app.command(name, help=text)(command)


# The names and lines of pipeline.STAGES (a test holds them equal); importing it here would cost the start-up.
STAGE_HELP = {
    "ingest": "Read the source's edges.",
    "vocabulary": "Give each entity its row.",
    "sample": "Split the edges and sample negatives.",
    "train": "Train the model under torchrun.",
    "evaluate": "Measure the model on held-out edges.",
    "refit": "Train once more, on all edges.",
    "export": "Write embedding tables by id.",
}
for _name, _text in STAGE_HELP.items():
    _stage_command(_name, _text)


@app.command()
def metrics(snapshot: Snapshot = None, home: Home = None, as_json: AsJson = False) -> None:
    """Show what evaluation measured.

    The model's figures are beside those of the baselines, popularity, item-kNN and ALS, with warnings where it does not
    beat them.
    """
    from twhin_pipeline.views import console

    store = _store(home)
    snapshot = snapshot or _newest_table(store, "evaluation")
    table, details = store.read("evaluation", snapshot), store.manifest("evaluation", snapshot).details
    if as_json:
        warned = details.get("warnings", [])
        console.print_json({"snapshot": snapshot, "metrics": table.to_pylist(), "warnings": warned})
    else:
        console.print_metrics(table, details, f"Snapshot {snapshot}, store {store.root}")


@app.command()
def neighbors(
    entity: Annotated[str, typer.Argument(help="The entity type, such as package.")],
    id: Annotated[str, typer.Argument(help="The entity's id; one that begins with - comes after --.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    untrained: Annotated[bool, typer.Option("--untrained", help="Show entities without training edges too.")] = False,
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the entities nearest to one."""
    from twhin_pipeline.vectors import reader
    from twhin_pipeline.views import console

    store = _store(home)
    snapshot = snapshot or _newest_table(store, "embeddings/relations")
    model = reader.load_model(store.root, snapshot)
    try:
        found = model.neighbors(entity, id, k, untrained=untrained)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if as_json:
        console.print_json([{"id": name, "similarity": score} for name, score in found])
    else:
        console.print_table(["id", "similarity"], [(name, f"{score:.4f}") for name, score in found])


@app.command()
def recommend(
    id: Annotated[str, typer.Argument(help="The head's id, such as a user's; one that begins with - comes after --.")],
    relation: Annotated[
        str | None, typer.Option("--relation", "-r", help="Which tails; may be left out where only one fits the id.")
    ] = None,
    entity: Annotated[str | None, typer.Option("--entity", "-e", help="The head's entity type.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many.")] = 10,
    exclude: Annotated[
        Literal["relation", "any", "none"],
        typer.Option(help="Leave out tails that the head has by the relation, or by any between the two types."),
    ] = "relation",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Do not leave out tails without training edges.")
    ] = False,
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the best new tails for an entity.

    These are products for a user, say. Tails that the entity already has in the snapshot's edges are left out.
    """
    from twhin_pipeline.vectors import reader, recommendation
    from twhin_pipeline.views import console

    store = _store(home)
    snapshot = snapshot or _newest_table(store, "embeddings/relations")
    model = reader.load_model(store.root, snapshot)
    known = store.manifest("raw_edges", snapshot).details if store.exists("raw_edges", snapshot) else {}
    edges = known.get("edges_per_relation", {})
    which: dict[str, bool | Literal["any"]] = {"relation": True, "any": "any", "none": False}
    try:
        relation, note = recommendation.choose_relation(model, id, relation, entity, edges)
        found = model.recommend(relation, id, k, which[exclude], untrained=untrained)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if note is not None:
        _tell(f"note: {note}")
    if as_json:
        tails = [{"id": tail, "score": score} for tail, score in found]
        console.print_json({"snapshot": snapshot, "id": id, "relation": relation, "tails": tails})
    else:
        console.print_table(["id", "score"], [(tail, f"{score:.4f}") for tail, score in found])


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="DuckDB SQL over the store's tables; `show tables` lists them.")],
    snapshot: Annotated[
        str | None, typer.Option("--snapshot", "-s", help="Only this one's tables; default: all, in a column snapshot.")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output.")] = False,
) -> None:
    """Ask the store in SQL.

    Tables are views named after the assets: raw_edges, vocabulary_package, training_set_positives, evaluation, …
    """
    import duckdb

    from twhin_pipeline.store import catalog, database
    from twhin_pipeline.views import console

    if not query.strip(" \n\t;"):
        raise UserError("SQL: the query is empty; try `twhin sql 'show tables'`")
    store = _store(home)
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


@app.command()
def plan(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks; default: launch.nproc_per_node x launch.nnodes.")
    ] = None,
    rows: Annotated[list[str] | None, typer.Option("--rows", help="A table's rows, such as package=70000.")] = None,
    edges: Annotated[int | None, typer.Option(min=1, help="Training edges; default: the store's, if known.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="A file of rates, as `twhin rates` writes it: for the time of a step.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a training run: memory, traffic, disk.

    With --rates it estimates the speed too.
    """
    from twhin_pipeline.config import relations
    from twhin_pipeline.operations import plan as room
    from twhin_pipeline.operations import rates as rates_room
    from twhin_pipeline.views import console

    store = _store(home)
    loaded, _ = _config(config, overrides, store)
    known = store.snapshots(f"vocabulary/{loaded.model.table_names[0]}")
    snapshot = snapshot or (known[-1] if known else None)
    if snapshot is not None and store.exists("raw_edges", snapshot):
        loaded = relations.resolve(loaded, store, snapshot)
    sizes = room.table_rows(loaded, store, snapshot, room.parse_rows(rows or []))
    ranks = world_size or loaded.launch.nproc_per_node * loaded.launch.nnodes
    speeds = None if rates is None else rates_room.load(rates)
    estimate = room.estimate(loaded, sizes, ranks, edges or room.training_edges(store, snapshot), speeds)
    if as_json:
        console.print_json(estimate.as_dict())
    else:
        console.print_plan(estimate)


@app.command()
def rates(
    out: Annotated[str, typer.Argument(help="The file to write (YAML), for `twhin plan --rates`.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> None:
    """Measure this node's speed, for `twhin plan --rates`.

    It takes seconds. launch.nproc_per_node says how many ranks work at the same time, and the rest of the configuration
    the shapes of a step.
    """
    from twhin_pipeline.operations import rates as room

    loaded, path = _config(config, overrides)
    for name, rate in room.measured(loaded, path, overrides or [], out).model_dump(exclude_none=True).items():
        print(f"{name}: {rate}")


@app.command()
def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check what is installed and whether it works.

    Each finding that is wrong ends in its remedy, and the exit code is then 1.
    """
    from dataclasses import asdict

    from twhin_pipeline.operations import doctor as room
    from twhin_pipeline.views import console

    findings = room.examine(_store(home))
    if as_json:
        console.print_json([asdict(finding) for finding in findings])
    else:
        console.print_findings(findings)
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(1)


@app.command("config")
def config_command(
    config: ConfigPath = None,
    overrides: Overrides = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of such a file.")] = False,
    reference: Annotated[bool, typer.Option("--reference", help="The page docs/configuration.md.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="What the recipe chose for the newest snapshot in the store, and why.")
    ] = False,
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Print the configuration, defaults spelled out.

    Of the recipe's values, which depend on the graph, only --explain tells.
    """
    from twhin_pipeline.views import console

    if schema:
        from twhin_pipeline.config import TwhinConfig

        console.print_json(TwhinConfig.model_json_schema())
    elif reference:
        from twhin_pipeline.config import reference as room

        sys.stdout.write(room.markdown())
    elif explain:
        from twhin_pipeline.config import relations

        loaded, store = _config(config, overrides)[0], _store(home)
        first = f"vocabulary/{loaded.model.table_names[0]}"
        if not (store.snapshots(first) if snapshot is None else store.exists(first, snapshot)):
            raise UserError(
                f"{store.root}: no edges were ingested yet, and a recipe goes by their counts; run `twhin ingest` and "
                "`twhin vocabulary` first"
            )
        sys.stdout.write(relations.recipe(loaded, store, snapshot or _newest_table(store, first)).explanation())
    else:
        sys.stdout.write(_config(config, overrides)[0].to_yaml())


@app.command("tune")
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
) -> None:
    """Search for better hyperparameters.

    The section tune names the fields; trials are compared on validation edges. The same call goes on with a search.
    """
    from twhin_pipeline.operations import tune as room

    run, line = _run_of(config, home, snapshot, overrides)
    print(line)
    with _remembered(run):
        best = room.run(run, print, trials=trials, timeout_s=timeout)
    print(
        f"\nbest of {best.trials} trials (failed {best.failed}, pruned {best.pruned}): {best.metric} {best.value:.4f}"
    )
    for override in best.overrides:
        print(f"  --set {shlex.quote(override)}")
    print(f"written to {best.file}; MLflow run {best.mlflow_run_id}")


@app.command()
def summary(
    config: ConfigPath = None,
    snapshot: Snapshot = None,
    home: Home = None,
    overrides: Overrides = None,
    examples: Annotated[
        str | None, typer.Option(help="ENTITY:ID,ID,… to show neighbors of; default: the best connected.")
    ] = None,
) -> None:
    """Show in short what a run made.

    Sizes, speed, quality beside the baseline, neighbors, and where everything is.
    """
    from twhin_pipeline.config import configuration_file
    from twhin_pipeline.views import summary as room

    store = _store(home)
    snapshot = snapshot or _newest_table(store, "embeddings/relations")
    if config is None and (made_by := configuration_file.record(store)) is not None:
        config = made_by.path
    loaded, path = _config(config, overrides)
    room.show(loaded, store, snapshot, examples, path)


@app.command()
def generate(
    path: Annotated[
        str | None, typer.Argument(help="The Parquet file to write; with --shape shop, the folder.")
    ] = None,
    shape: Annotated[
        Literal["graph", "shop"],
        typer.Option(help="graph: edges of users and items. shop: an event log of views, carts and buys, and follows."),
    ] = "graph",
    like: Annotated[
        str | None, typer.Option(help="A configuration with num_embeddings: write edges that fit it.")
    ] = None,
    users: Annotated[int | None, typer.Option(help="Number of users. Default: 50,000; shop 3,000.")] = None,
    communities: Annotated[int | None, typer.Option(help="Planted communities. Default: 50; shop 20.")] = None,
    exponent: Annotated[
        float | None, typer.Option(help="Of popularity's power law; 0 is flat. Default: 0.75; shop 1.0.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same files. Default: 0.")] = None,
    edges: Annotated[int | None, typer.Option(min=1, help="graph: default 1,000,000; with --like 10,000.")] = None,
    items: Annotated[int | None, typer.Option(help="graph: number of items. Default: 20,000.")] = None,
    within: Annotated[
        float | None, typer.Option(help="graph: share of edges inside a community. Default: 0.8.")
    ] = None,
    ids: Annotated[str | None, typer.Option(help="graph: string, integer or indexed. Default: string.")] = None,
    products: Annotated[int | None, typer.Option(help="shop: number of products. Default: 2,000.")] = None,
    days: Annotated[int | None, typer.Option(help="shop: days of the log. Default: 30.")] = None,
    events_per_user: Annotated[
        float | None, typer.Option(help="shop: mean events of a user, of all types. Default: 40.")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="shop: spread of events per user (lognormal). Default: 0.8.")
    ] = None,
    background: Annotated[
        float | None, typer.Option(help="shop: share of views outside a user's taste. Default: 0.15.")
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(
            help="shop: event types of view, cart, buy, wishlist, share, review, each with its probability if not the "
            "default one. Default: view,cart=0.12,buy=0.4."
        ),
    ] = None,
    follows_per_user: Annotated[
        float | None, typer.Option(help="shop: mean users that a user follows; 0 for no follows. Default: 6.")
    ] = None,
    dirty: Annotated[float | None, typer.Option(help="shop: share of dirty rows. Default: 0.007.")] = None,
    start: Annotated[str | None, typer.Option(help="shop: first day, YYYY-MM-DD. Default: 2025-01-01.")] = None,
    format: Annotated[str | None, typer.Option(help="shop: csv or parquet. Default: csv.")] = None,
    truth: Annotated[
        bool | None, typer.Option("--truth/--no-truth", help="shop: write the true probabilities too. Default: yes.")
    ] = None,
) -> None:
    """Write a synthetic graph or event log.

    A configuration that trains on it is written too. Degrees follow a power law, and most edges stay in planted
    communities, so there is something to learn.
    """
    both = {"users": users, "communities": communities, "exponent": exponent, "seed": seed}
    of_graph = {"edges": edges, "items": items, "within": within, "ids": ids}
    of_shop = {
        "products": products, "days": days, "events_per_user": events_per_user, "sigma": sigma,
        "background": background, "events": events, "follows_per_user": follows_per_user, "dirty": dirty,
        "start": start, "format": format, "truth": truth,
    }  # fmt: skip
    other = of_shop if shape == "graph" else {**of_graph, "like": like}
    unused = [name for name, value in other.items() if value is not None]
    if unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        raise UserError(f"generate: --shape {shape} does not use {flags}; leave it out, or choose the other shape")
    given: dict[str, Any] = {
        k: v for k, v in (both | (of_graph if shape == "graph" else of_shop)).items() if v is not None
    }
    if like is not None:
        _generate_like(like, path, edges or 10_000, seed or 0)
    elif path is None:
        what = "Parquet file to write, or --like CONFIG" if shape == "graph" else "folder to write"
        raise UserError(f"generate: give the path of the {what}")
    elif shape == "graph":
        from twhin_pipeline.operations import generate as graph

        written = graph.generate(path, **given)
        print(f"{path}: {edges or 1_000_000:,} edges; next: twhin run --config {written}")
    else:
        from twhin_pipeline.operations import shop

        made = shop.generate_shop(path, **given | ({"events": _event_types(events)} if events else {}))
        print(f"{path}: {made.events:,} events, {made.follows:,} follows; next: twhin run --config {made.config}")


def _generate_like(like: str, path: str | None, edges: int, seed: int) -> None:
    from twhin_pipeline.operations import generate as graph

    config, _ = _config(like, None)
    if config.model.every_other is not None:
        raise UserError(f"generate: {like}: '*' in model.relations names nothing to generate; list its relations")
    written = graph.generate_like(config, path, edges, seed)
    print(f"{written}: {edges:,} edges; next: twhin run --config {like}")


def _event_types(text: str) -> dict[str, float | None]:
    types: dict[str, float | None] = {}
    for part in text.split(","):
        name, _, chance = (word.strip() for word in part.partition("="))
        try:
            types[name] = float(chance) if chance else None
        except ValueError:
            raise UserError(f"--events: {part.strip()!r} must look like cart=0.12") from None
    return types


@app.command()
def mlflow(
    home: Home = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Serve MLflow's UI on the store's runs."""
    import os

    from twhin_pipeline import tracking

    extras.need("mlflow", "this command")
    store = _store(home)
    uri = tracking.uri(store)
    if uri.startswith(("http://", "https://", "databricks")):
        raise UserError(f"runs are tracked at {uri}: open that page, or unset MLFLOW_TRACKING_URI for the store's own")
    print(f"MLflow: http://{host}:{port} on {uri} (ctrl-c ends it)", flush=True)
    # MLflow's telemetry is not ours to send, and its job runners (seven processes) have nothing to do here.
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")):
        os.environ.setdefault(name, value)
    arguments = ["ui", "--backend-store-uri", uri, "--host", host, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", *arguments])


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0, 1 where something failed, 2 (and one line) on a user's mistake, 130 on ctrl-c."""
    raise SystemExit(run_arguments(arguments))


def run_arguments(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; a mistake is told on standard error without a traceback."""
    warnings.showwarning = _show_warning
    command: Any = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return int(command.main(args=arguments or ["--help"], prog_name="twhin", standalone_mode=False) or 0)
    except UserError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `twhin sql … | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        return _judge(error)


def _judge(error: Exception) -> int:
    """Tell errors that are known by name, so that their modules need not be imported at the start; raise the others."""
    if isinstance(error, ModuleNotFoundError) and (lacking := extras.missing(error.name)) is not None:
        _tell(str(lacking))
        return 2
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ClickException" in names:
        usage = getattr(error, "ctx", None)
        hint = f" (see `{usage.command_path} --help`)" if usage is not None else ""
        _tell(" ".join(error.format_message().split()) + hint)  # type: ignore[attr-defined]
        return 2
    if "Abort" in names:
        return 130
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        where = f"{error.filename}: " if error.filename else ""
        _tell(f"{where}{error.strerror}; choose another --home or TMPDIR, or make room and see to the permissions")
        return 2
    if "TrainingCancelled" in names:
        _tell(str(error))
        return 130
    if "TrainingFailed" in names:
        _tell(str(error))
        return 1
    raise error


def _tell(message: str) -> None:
    print(f"twhin: {message}", file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        print(f"twhin: note: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
