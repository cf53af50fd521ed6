"""Commands that ask a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from twhin_pipeline.cli.arguments import AsJson, Home, Snapshot, newest_table, open_store, to_stderr
from twhin_pipeline.errors import UserError

commands = typer.Typer()


@commands.command(rich_help_panel="Use")
def neighbors(
    entity: Annotated[str, typer.Argument(help="The entity type, such as package.")],
    id: Annotated[str, typer.Argument(help="The entity's id; one that begins with - comes after --.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    untrained: Annotated[bool, typer.Option("--untrained", help="Show entities without training edges too.")] = False,
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the entities nearest to one entity."""
    from twhin_pipeline.vectors import reader
    from twhin_pipeline.views import console

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = reader.load_model(store.root, snapshot)  # without a snapshot, the current release
    try:
        nearest = model.neighbors(entity, id, k, untrained=untrained)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if as_json:
        console.print_json([{"id": name, "similarity": score} for name, score in nearest])
    else:
        console.print_table(["id", "similarity"], [(name, f"{score:.4f}") for name, score in nearest])


@commands.command(rich_help_panel="Use")
def vectors(
    folder: Annotated[str, typer.Argument(help="Where to; the files are named after the entity types.")],
    entity: Annotated[
        list[str] | None, typer.Option("--entity", "-e", help="An entity type; may be repeated. Default: all.")
    ] = None,
    compatible_with: Annotated[
        str | None,
        typer.Option(metavar="RELEASE", help="In the space of this earlier release, for models that know its vectors."),
    ] = None,
    format: Annotated[
        Literal["parquet", "npy"], typer.Option(help="npy: an array, and the ids of its rows as Parquet beside it.")
    ] = "parquet",
    data_type: Annotated[Literal["fp32", "fp16"], typer.Option(help="The type of the vectors' elements.")] = "fp32",
    untrained: Annotated[bool, typer.Option("--untrained", help="Entities without training edges too.")] = False,
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Write the current release's vectors as plain files, for programs that know nothing of a store."""
    from twhin_pipeline.vectors import reader, vector_files

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = reader.load_model(store.root, snapshot, compatible_with=compatible_with)
    try:
        paths = vector_files.write(
            model, Path(folder), entity or model.entities, kind=format, data_type=data_type, untrained=untrained
        )
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    for path in paths:
        print(path)


@commands.command(rich_help_panel="Use")
def recommend(
    id: Annotated[str, typer.Argument(help="The head's id, such as a user's; one that begins with - comes after --.")],
    relation: Annotated[
        str | None,
        typer.Option("--relation", "-r", help="The relation; needed where several fit the id."),
    ] = None,
    entity: Annotated[str | None, typer.Option("--entity", "-e", help="The head's entity type.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    exclude: Annotated[
        Literal["relation", "any", "none"],
        typer.Option(help="Leave out tails that the head has by the relation, or by any between the two types."),
    ] = "relation",
    untrained: Annotated[bool, typer.Option("--untrained", help="Show tails without training edges too.")] = False,
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Recommend new tails to a head, such as products to a user.

    Tails that the head already has in the snapshot's edges are left out.
    """
    from twhin_pipeline.vectors import reader, recommendation
    from twhin_pipeline.views import console

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = reader.load_model(store.root, snapshot)  # without a snapshot, the current release
    snapshot = model.snapshot
    details = store.manifest("raw_edges", snapshot).details if store.exists("raw_edges", snapshot) else {}
    edges = details.get("edges_per_relation", {})
    which: dict[str, bool | Literal["any"]] = {"relation": True, "any": "any", "none": False}
    try:
        relation, note = recommendation.choose_relation(model, id, relation, entity, edges)
        best = model.recommend(relation, id, k, which[exclude], untrained=untrained)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if note is not None:
        to_stderr(f"note: {note}")
    if as_json:
        tails = [{"id": tail, "score": score} for tail, score in best]
        console.print_json({"snapshot": snapshot, "id": id, "relation": relation, "tails": tails})
    else:
        console.print_table(["id", "score"], [(tail, f"{score:.4f}") for tail, score in best])


@commands.command(rich_help_panel="Use")
def threshold(
    relation: Annotated[str, typer.Argument(help="The relation.")],
    precision: Annotated[
        float | None, typer.Option(help="Reach this share of edges among the pairs at or above the threshold.")
    ] = None,
    recall: Annotated[
        float | None, typer.Option(help="Reach this share of all edges at or above the threshold.")
    ] = None,
    prior: Annotated[
        float | None,
        typer.Option(
            help="The share of edges among the pairs you ask for; default: 1 in 1 + evaluation.auc_negatives."
        ),
    ] = None,
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Find the probability from which on a relation's pairs reach a precision or a recall."""
    from dataclasses import asdict

    from twhin_pipeline.vectors import reader
    from twhin_pipeline.views import console

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = reader.load_model(store.root, snapshot)  # without a snapshot, the current release
    try:
        found = model.threshold(relation, precision=precision, recall=recall, prior=prior)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if as_json:
        console.print_json({"snapshot": model.snapshot, **asdict(found)})
        return
    row = (f"{found.probability:.6g}", f"{found.precision:.4f}", f"{found.recall:.4f}", f"{found.edges:,}")
    console.print_table(
        ["probability", "precision", "recall", "edges above"], [row], f"{relation}, snapshot {model.snapshot}"
    )
    print(
        f"where each edge comes with {1 / found.prior - 1:,.6g} pairs of the same head and a random tail "
        f"(base rate {found.prior:.4g})"
    )
