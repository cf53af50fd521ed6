"""A run in short: what it is about, what went in, how fast it trained, how good it is, and where everything is."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

if TYPE_CHECKING:
    from rich.console import Console

MOST_RELATIONS = 20
"""Relations with a line of their own: those with the most held-out edges."""
NUM_EXAMPLES = 5
TRAINING_FIGURES = ("edges", "seconds", "edges_per_second", "world_size", "first_loss", "final_loss")
OPTIONAL_FIGURES = ("steps", "chosen_epoch", "validation_metric", "best_validation", "stop_reason")
NUM_NEIGHBORS = 5


@dataclass(frozen=True)
class Example:
    """An entity and those nearest to it, nearest first, with their similarities."""

    id: str
    nearest: list[tuple[str, float]]


def show(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    examples: str | None = None,
    config_path: str | None = None,
    after_run: bool = False,
) -> None:
    """Print the summary of a finished run.

    Args:
        config: The configuration of the run.
        store: Where its tables are.
        snapshot: Which one.
        examples: `entity:id,id,…` to show neighbors of; left out, the best connected of the first entity type.
        config_path: The configuration's file.
        after_run: Whether the run has just ended: what became of its release is then the last line, else the first.

    Raises:
        UserError: A table is missing, or an example is none of its entities.
    """
    from twhin_pipeline.views import release_tables
    from twhin_pipeline.views.console import comparison_table, console, legend, print_warnings

    config = relations.resolve(config, store, snapshot)
    out = console()
    out.print(f"[bold]{_title(store, snapshot)}[/]\n")
    release = [("release", release_tables.state_in_words(store, snapshot))]
    first = [] if after_run else release
    for name, text in [*first, *about(config, store, snapshot, config_path), *facts(config, store, snapshot)]:
        out.print(f"{name:<10}{escape(text)}", soft_wrap=True)
    details = store.manifest("evaluation", snapshot).details
    out.print(f"\n[bold]{legend(details)}[/]", soft_wrap=True)
    table, more = comparison_table(store.read("evaluation", snapshot), details, MOST_RELATIONS)
    out.print(table)
    if more:
        out.print(f"and {more:,} relations with fewer held-out edges; all of them: {command()} metrics")
    if details.get("warnings"):
        out.print()
        print_warnings(details["warnings"], out)
    entity, ids = chosen(config, store, snapshot, examples)
    out.print(f"\n[bold]Nearest to some of entity type {entity}[/] (more: {command()} neighbors {entity} ID)")
    for example in neighbors(store, snapshot, entity, ids):
        nearest = ", ".join(f"{name} {similarity:.2f}" for name, similarity in example.nearest)
        out.print(f"  {escape(example.id):<16} {escape(nearest)}")
    _where(out, config, store, snapshot)
    for name, text in release if after_run else []:
        out.print(f"\n{name:<10}{escape(text)}", soft_wrap=True)


def as_dict(
    config: TwhinConfig, store: Store, snapshot: str, examples: str | None = None, config_path: str | None = None
) -> dict[str, Any]:
    """Return the summary of a finished run as JSON values. Arguments and errors are those of `show`."""
    from twhin_pipeline import tracking

    config = relations.resolve(config, store, snapshot)
    edges = store.manifest("raw_edges", snapshot)
    model = store.manifest("twhin_model", snapshot).details
    evaluation = store.manifest("evaluation", snapshot)
    entity, ids = chosen(config, store, snapshot, examples)
    present, departed = entities(config, store, snapshot)
    tables = [*config.model.table_names, "relations"]
    vectors = {name: store.manifest(f"embeddings/{name}", snapshot) for name in tables}
    return {
        "snapshot": snapshot,
        **_release(store, snapshot),
        "store": store.root,
        "configuration": config_path,
        "configuration_changed": evaluation.config_hash != config.hash(),
        "files": edges.details.get("files") or [],
        "edges": edges.rows,
        "edges_rejected": store.manifest("raw_edges_rejected", snapshot).rows,
        "duplicates_merged": edges.details.get("duplicates_merged", 0),
        "relations": config.model.relation_names,
        "entities": present,
        "departed": {name: count for name, count in departed.items() if count},
        "training": {key: model[key] for key in (*TRAINING_FIGURES, *OPTIONAL_FIGURES) if key in model},
        "metrics": store.read("evaluation", snapshot).to_pylist(),
        "warnings": evaluation.details.get("warnings", []),
        "neighbors": {
            "entity": entity,
            "examples": [
                {"id": one.id, "nearest": [{"id": name, "similarity": value} for name, value in one.nearest]}
                for one in neighbors(store, snapshot, entity, ids)
            ],
        },
        "embeddings": {name: store.path(table.asset, snapshot, table.version) for name, table in vectors.items()},
        "tracking": {"uri": tracking.uri(store), "run_id": model.get("mlflow_run_id")},
    }


def _release(store: Store, snapshot: str) -> dict[str, Any]:
    """Return the snapshot's newest release, whether it is current, what was decided about it, and why."""
    from twhin_pipeline.lifecycle.decisions import HELD, PROMOTED
    from twhin_pipeline.views import release_tables

    row = release_tables.of_snapshot(store, snapshot)
    if row is None:
        return {"release": None, "current": False, "decision": None, "reason": None}
    decision = PROMOTED if row["since"] is not None else HELD if row["state"] == HELD else None
    current = row["state"] == "current"
    return {"release": row["release"], "current": current, "decision": decision, "reason": row["reason"]}


def command() -> str:
    """Return how to call `twhin` from this shell: by its name where it is on the path, else by its place."""
    if shutil.which("twhin"):
        return "twhin"
    return os.path.relpath(Path(sys.executable).parent / "twhin")


def _title(store: Store, snapshot: str) -> str:
    seconds = store.manifest("twhin_model", snapshot).details.get("seconds")
    return f"Snapshot {snapshot}" + (f", trained in {seconds:,.0f} s" if isinstance(seconds, int | float) else "")


def about(config: TwhinConfig, store: Store, snapshot: str, config_path: str | None) -> list[tuple[str, str]]:
    """Return which store, configuration and source data the tables are of, as (heading, text)."""
    made_by = store.manifest("evaluation", snapshot).config_hash
    lines = [("store", store.root)]
    if config_path is not None:
        same = made_by == config.hash()
        lines.append(
            ("config", config_path if same else f"{config_path}, but the run had other values than it has now")
        )
    lines.append(("source", source_text(store.manifest("raw_edges", snapshot).details)))
    return lines


def source_text(details: Mapping[str, Any]) -> str:
    """Say which files the edges came from and, where it is known, of which times, from the manifest of `raw_edges`."""
    files = [str(file) for file in details.get("files") or []]
    text = "unknown files"
    if files:
        text = files[0] if len(files) == 1 else f"{len(files):,} files, {files[0]} to {files[-1]}"
    ranges = [one["time_range"] for one in details.get("sources") or [] if one.get("time_range")]
    if ranges:
        text += f"; times {min(first for first, _ in ranges)} to {max(last for _, last in ranges)}"
    return text


def facts(config: TwhinConfig, store: Store, snapshot: str) -> list[tuple[str, str]]:
    """Return what the tables' manifests tell, as (heading, text)."""
    edges = store.manifest("raw_edges", snapshot)
    rejected = store.manifest("raw_edges_rejected", snapshot).rows
    merged = edges.details.get("duplicates_merged", 0)
    lines = [("edges", f"{edges.rows:,} of {len(config.model.relations)} relations ({rejected:,} rejected, "
             f"{merged:,} duplicates merged)")]  # fmt: skip
    present, departed = entities(config, store, snapshot)
    text = _by_type(present)
    if any(departed.values()):
        text += f"; without an edge in this snapshot: {_by_type({k: n for k, n in departed.items() if n})}"
    lines.append(("entities", text))
    model = store.manifest("twhin_model", snapshot).details
    lines.append(("training", training_text(model)))
    return lines


def entities(config: TwhinConfig, store: Store, snapshot: str) -> tuple[dict[str, int], dict[str, int]]:
    """Count, by entity type, the ids with an edge in the snapshot, and the departed ones, evicted ones among them."""
    vocabularies = {name: store.manifest(f"vocabulary/{name}", snapshot) for name in config.model.table_names}
    departed = {name: int(one.details.get("departed", 0)) for name, one in vocabularies.items()}
    return {name: one.rows - departed[name] for name, one in vocabularies.items()}, departed


def _by_type(counts: Mapping[str, int]) -> str:
    return f"{sum(counts.values()):,} ({', '.join(f'{name} {count:,}' for name, count in counts.items())})"


def training_text(details: dict[str, Any]) -> str:
    """Say how training went, from the model's manifest."""
    first, final = (f"{details[name]:.3f}" for name in ("first_loss", "final_loss"))
    loss = final if first == final else f"{first} to {final}"  # of a short training one loss may be logged alone
    return (
        f"{details['edges']:,.0f} edges in {details['seconds']:,.1f} s, {details['edges_per_second']:,.0f} edges/s, "
        f"by {details['world_size']} process(es); loss {loss}"
    )


def chosen(config: TwhinConfig, store: Store, snapshot: str, examples: str | None) -> tuple[str, list[Any]]:
    """Return the entity type and the ids to show. Raises UserError where `examples` is not of its form."""
    if examples is not None:
        entity, colon, names = examples.partition(":")
        if not colon or not names:
            raise UserError(f"--examples {examples!r} must look like package:vim,nginx")
        return entity, [name.strip() for name in names.split(",")]
    entity = config.model.table_names[0]
    vocabulary = store.read(f"vocabulary/{entity}", snapshot, ["id", "degree"])
    best = vocabulary.sort_by([("degree", "descending"), ("id", "ascending")]).slice(0, NUM_EXAMPLES)
    return entity, best["id"].to_pylist()


def neighbors(store: Store, snapshot: str, entity: str, ids: list[Any]) -> list[Example]:
    """Look up the nearest entities. Raises UserError where an id is not in the vocabulary."""
    from twhin_pipeline.vectors.opening import load_model

    model = load_model(store.root, snapshot)
    examples = []
    for name in ids:
        try:
            examples.append(Example(str(name), [(str(n), s) for n, s in model.neighbors(entity, name, NUM_NEIGHBORS)]))
        except KeyError as error:
            raise UserError(str(error.args[0])) from error
    return examples


def _where(out: Console, config: TwhinConfig, store: Store, snapshot: str) -> None:
    from twhin_pipeline import tracking
    from twhin_pipeline.tracking import pages

    out.print("\n[bold]Where things are[/]")
    first = config.model.table_names[0]
    folder = store.manifest(f"embeddings/{first}", snapshot)
    vectors = f"{store.path(folder.asset, snapshot, folder.version)}/*.parquet"
    lines = [
        ("vectors", f"{vectors} (and embeddings/… of the other types)"),
        ("tables", f'{store.root}; in SQL: {command()} sql "show tables", or {store.path("catalog.duckdb")}'),
        ("runs", tracking.uri(store)),
        ("pages", f"make ui, then Dagster at {pages.dagster()}, MLflow at {pages.mlflow(tracking.uri(store))}"),
        ("", f"and the explorer at {pages.explorer()}"),
    ]
    for name, text in lines:
        out.print(f"{name:<10}{escape(text)}")
