"""Commands that ask a trained model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twhin_pipeline.cli.arguments import AsJson, Home, Snapshot, newest_table, open_store, to_stderr
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

commands = typer.Typer()

IdsFile = Annotated[
    Path | None, typer.Option("--ids", metavar="FILE", help="A text file with an id a line, instead of ids.")
]
All = Annotated[bool, typer.Option("--all", help="All entities of the type that have training edges.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write a row for each answer there: a file .parquet or .csv, which appears when whole.",
    ),
]
SearchBy = Annotated[
    Literal["auto", "exact", "index"],
    typer.Option(help="Compare all, or search by an index; auto: where there is one."),
]
SkipUnknown = Annotated[bool, typer.Option("--skip-unknown", help="Leave out ids that have no vector.")]


@commands.command(rich_help_panel="Use")
def neighbors(
    entity: Annotated[str, typer.Argument(help="The entity type, such as package.")],
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids; those that begin with - come after --.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    every: All = False,
    ids_file: IdsFile = None,
    output: Output = None,
    skip_unknown: SkipUnknown = False,
    untrained: Annotated[bool, typer.Option("--untrained", help="Show entities without training edges too.")] = False,
    search: SearchBy = "auto",
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the entities nearest to one entity, or to many."""
    from twhin_pipeline.vectors import opening
    from twhin_pipeline.views import console

    asked = _asked(ids, ids_file, every, output)
    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = opening.load_model(store.root, snapshot)  # without a snapshot, the current release
    single = _single(asked, output, skip_unknown)
    try:
        if single is None:
            missing = _missing(asked, skip_unknown)
            answers = model.neighbors(entity, asked, k, untrained=untrained, missing=missing, search=search)
        else:
            nearest = model.neighbors(entity, single, k, untrained=untrained, search=search)
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if single is None:
        _show(answers, output, as_json, {}, "neighbors")
    elif as_json:
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
        Literal["parquet", "npy", "safetensors"],
        typer.Option(help="npy, safetensors: arrays, and the ids of their rows as Parquet beside them."),
    ] = "parquet",
    data_type: Annotated[
        Literal["fp32", "fp16", "int8", "pq"],
        typer.Option(help="int8: 8 bits, with a scale for each vector; pq: product-quantized codes and codebooks."),
    ] = "fp32",
    untrained: Annotated[bool, typer.Option("--untrained", help="Entities without training edges too.")] = False,
    snapshot: Snapshot = None,
    home: Home = None,
) -> None:
    """Write the current release's vectors as plain files, for programs that know nothing of a store.

    What compression costs is measured, shown, and written beside the vectors.
    """
    from twhin_pipeline.vectors import opening, vector_files

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = opening.load_model(store.root, snapshot, compatible_with=compatible_with)
    try:
        paths = vector_files.write(
            model, Path(folder), entity or model.entities, kind=format, data_type=data_type, untrained=untrained
        )
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    for path in paths:
        print(path)
        if path.name.endswith(".compression.json"):
            print("  " + ", ".join(f"{name} {value}" for name, value in json.loads(path.read_text()).items()))


@commands.command(rich_help_panel="Use")
def recommend(
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID]...", help="Heads, such as users; those that begin with - come after --."),
    ] = None,
    relation: Annotated[
        str | None,
        typer.Option("--relation", "-r", help="The relation; needed where several fit the id."),
    ] = None,
    entity: Annotated[str | None, typer.Option("--entity", "-e", help="The head's entity type.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    every: All = False,
    ids_file: IdsFile = None,
    output: Output = None,
    skip_unknown: SkipUnknown = False,
    exclude: Annotated[
        Literal["relation", "any", "none"],
        typer.Option(help="Leave out tails that the head has by the relation, or by any between the two types."),
    ] = "relation",
    untrained: Annotated[bool, typer.Option("--untrained", help="Show tails without training edges too.")] = False,
    many_interests: Annotated[
        bool, typer.Option("--interests", help="Search by several vectors a head, one for each of its interests.")
    ] = False,
    search: SearchBy = "auto",
    snapshot: Snapshot = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Recommend new tails to a head, such as products to a user; or to many heads.

    Tails that the head already has in the snapshot's edges are left out.
    """
    from twhin_pipeline.vectors import opening, recommendation
    from twhin_pipeline.vectors.interests import Interests
    from twhin_pipeline.views import console

    asked = _asked(ids, ids_file, every, output)
    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = opening.load_model(store.root, snapshot)  # without a snapshot, the current release
    snapshot = model.snapshot
    details = store.manifest("raw_edges", snapshot).details if store.exists("raw_edges", snapshot) else {}
    edges = details.get("edges_per_relation", {})
    which: dict[str, bool | Literal["any"]] = {"relation": True, "any": "any", "none": False}
    note, single = None, _single(asked, output, skip_unknown)
    try:
        if asked:
            relation, note = recommendation.choose_relation(model, asked[0], relation, entity, edges)
        interests = Interests() if many_interests else None
        ask = partial(
            model.recommend, relation, k=k, exclude_known=which[exclude], untrained=untrained, interests=interests,
            search=search,
        )  # fmt: skip
        if single is None:
            answers = ask(ids=asked, missing=_missing(asked, skip_unknown))
        else:
            best = ask(ids=single)
            chances = model.probabilities(relation, [score for _, score in best])
    except KeyError as error:
        raise UserError(str(error.args[0])) from error
    if note is not None:
        to_stderr(f"note: {note}")
    if single is None:
        _show(answers, output, as_json, {"snapshot": snapshot, "relation": relation or model.relations[0]}, "tails")
    elif as_json:
        tails = [{"id": tail, "score": score} for tail, score in best]
        if chances is not None:
            tails = [one | {"probability": chance} for one, chance in zip(tails, chances.tolist(), strict=True)]
        console.print_json({"snapshot": snapshot, "id": single, "relation": relation, "tails": tails})
    elif chances is None:
        console.print_table(["id", "score"], [(tail, f"{score:.4f}") for tail, score in best])
    else:
        shown = [(tail, f"{score:.4f}", f"{chance:.4f}") for (tail, score), chance in zip(best, chances, strict=True)]
        console.print_table(["id", "score", "probability"], shown)


def _asked(ids: list[str] | None, file: Path | None, every: bool, output: Path | None) -> list[str] | None:
    """Return the ids that are asked for, None for all. Raises UserError where that is not clear."""
    if sum([bool(ids), file is not None, every]) != 1:
        raise UserError("give ids, or --ids FILE, or --all")
    if every and output is None:
        raise UserError("--all needs --output FILE, such as -o all.parquet")
    if file is None:
        return None if every else ids
    try:
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--ids {file}: cannot be read ({error}); give a text file with an id a line") from error


def _single(asked: list[str] | None, output: Path | None, skip_unknown: bool) -> str | None:
    """Return the only id, where its answer is to be shown as that of one."""
    return asked[0] if asked is not None and len(asked) == 1 and output is None and not skip_unknown else None


def _missing(asked: list[str] | None, skip_unknown: bool) -> Literal["error", "skip"]:
    return "skip" if skip_unknown and asked is not None else "error"


def _show(answers: pa.RecordBatchReader, output: Path | None, as_json: bool, beside: dict[str, Any], what: str) -> None:
    """Write a stream of answers to a file, or print it: with --json an object for each entity that was asked for."""
    from twhin_pipeline.vectors import vector_files
    from twhin_pipeline.views import console

    if output is not None:
        rows = vector_files.write_stream(answers, output)
        print(output)
        to_stderr(f"{rows:,} rows")
        return
    table = answers.read_all()
    table = table.select([name for name in table.column_names if table[name].null_count < max(table.num_rows, 1)])
    query, other, rank, *values = table.column_names
    rows_of = table.to_pylist()
    if as_json:
        grouped: dict[Any, list[dict[str, Any]]] = {}
        for row in rows_of:
            grouped.setdefault(row[query], []).append({"id": row[other]} | {name: row[name] for name in values})
        console.print_json({**beside, "answers": [{"id": one, what: found} for one, found in grouped.items()]})
    else:
        shown = [(row[query], row[other], str(row[rank]), *(f"{row[name]:.4f}" for name in values)) for row in rows_of]
        console.print_table([query, other, rank, *values], shown)


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

    from twhin_pipeline.vectors import opening
    from twhin_pipeline.views import console

    store = open_store(home)
    newest_table(store, "embeddings/relations")  # says how to make them, where there are none
    model = opening.load_model(store.root, snapshot)  # without a snapshot, the current release
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
