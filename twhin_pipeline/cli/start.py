"""Commands to begin with: a configuration for one's own files, or synthetic data."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from twhin_pipeline.cli.arguments import read_config
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

commands = typer.Typer()


@commands.command(rich_help_panel="Start")
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


@commands.command("generate", rich_help_panel="Start")
def generate_command(
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

    A configuration that trains on it is written too. Degrees follow a power law, and most edges stay within planted
    communities, which a model can learn.
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
    arguments: dict[str, Any] = {
        k: v for k, v in (both | (of_graph if shape == "graph" else of_shop)).items() if v is not None
    }
    if like is not None:
        _generate_like(like, path, edges or 10_000, seed or 0)
    elif path is None:
        what = "Parquet file to write, or --like CONFIG" if shape == "graph" else "folder to write"
        raise UserError(f"generate: give the path of the {what}")
    elif shape == "graph":
        from twhin_pipeline.operations.generate import generate

        written = generate(path, **arguments)
        print(f"{path}: {edges or 1_000_000:,} edges; next: twhin run --config {written}")
    else:
        from twhin_pipeline.operations import shop

        made = shop.generate_shop(path, **arguments | ({"events": _event_types(events)} if events else {}))
        print(f"{path}: {made.events:,} events, {made.follows:,} follows; next: twhin run --config {made.config}")


def _generate_like(like: str, path: str | None, edges: int, seed: int) -> None:
    from twhin_pipeline.operations.generate import generate_like

    config, _ = read_config(like, None)
    if config.model.every_other is not None:
        raise UserError(f"generate: {like}: '*' in model.relations names nothing to generate; list its relations")
    written = generate_like(config, path, edges, seed)
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
