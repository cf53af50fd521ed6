"""What the command line prints: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from twhin_pipeline.figures import chief_rows, told_sides

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from twhin_pipeline.doctor import Finding
    from twhin_pipeline.plan import Plan

NESTED = {"list", "array", "struct", "map", "union"}


def console() -> Console:
    """Return the console on standard output; where that is no terminal, lines are not cut at 80 columns."""
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)


def print_json(value: Any) -> None:
    """Print JSON; NaN and infinities, which JSON lacks, become null, and other types text."""
    print(json.dumps(_plain(value), indent=1, default=str, ensure_ascii=False))


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def print_csv(result: duckdb.DuckDBPyRelation) -> None:
    """Print a query's result as CSV, a batch at a time."""
    import pyarrow.csv as csv

    kinds = dict(zip(result.columns, (kind.id for kind in result.types), strict=True))
    if NESTED & set(kinds.values()):  # CSV has no lists: they are written as SQL shows them
        quoted = {column: '"' + column.replace('"', '""') + '"' for column in kinds}
        casts = {column: f"CAST({text} AS VARCHAR) AS {text}" for column, text in quoted.items()}
        result = result.project(", ".join(casts[c] if kind in NESTED else quoted[c] for c, kind in kinds.items()))
    reader = result.to_arrow_reader(10_000)
    with csv.CSVWriter(sys.stdout.buffer, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def table_of(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Table:
    """Make a table; columns that hold numbers only are set to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        numbers = all(_is_number(row[i]) for row in cells)
        table.add_column(name, justify="right" if cells and numbers else "left", overflow="fold")
    for row in cells:
        table.add_row(*row)
    return table


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else escape(str(value))


def _is_number(text: str) -> bool:
    plain = text.replace(",", "").removesuffix("%")
    try:
        float(plain or 0)
    except ValueError:
        return False
    return True


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print rows as a table."""
    console().print(table_of(columns, rows, title))


def metrics_table(evaluation: pa.Table, names: Sequence[str]) -> Table:
    """Make a table with a row a relation and, for each metric, the model beside the baseline.

    Args:
        evaluation: As `figures.chief_rows` gives it.
        names: Metrics.
    """
    values: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    edges: dict[str, int] = {}
    for row in evaluation.to_pylist():
        values.setdefault(row["relation"], {})[row["metric"]] = (row["value"], row["baseline"])
        edges[row["relation"]] = max(edges.get(row["relation"], 0), row["edges"] or 0)
    columns = ["relation", "edges"]
    for name in names:
        columns += [name, "popular"]
    lines = []
    for relation in sorted(values, key=lambda r: (r == "all", -edges[r])):
        line = [relation, f"{edges[relation]:,}"]
        for name in names:
            line += [_three(value) for value in values[relation].get(name, (None, None))]
        lines.append(line)
    return table_of(columns, lines)


def _three(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def print_metrics(evaluation: pa.Table, details: Mapping[str, Any], snapshot: str) -> None:
    """Print every relation's chief metrics beside the baseline's, then all metrics over all relations.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details.
        snapshot: Which one.
    """
    out = console()
    sides = told_sides(details)
    out.print(f"Snapshot {snapshot}: held-out edges, {sides}; `popular` ranks by degree alone.\n")
    out.print(metrics_table(chief_rows(evaluation, details), ("filtered_mrr", "filtered_hits@10")))
    rows = [
        (row["metric"], row["side"], _three(row["value"]), _three(row["baseline"]))
        for row in evaluation.to_pylist()
        if row["relation"] == "all"
    ]
    out.print()
    out.print(table_of(("all relations", "side", "model", "popular"), rows))


def print_findings(findings: Sequence[Finding]) -> None:
    """Print the doctor's findings, one a line."""
    from rich.markup import escape

    signs = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "wrong": "[red]✗[/]"}
    out = console()
    for finding in findings:
        out.print(f"{signs[finding.status]} {finding.name:<20} {escape(finding.line)}")


def print_plan(plan: Plan) -> None:
    """Print an estimate: tables, ranks, and a run's traffic and disk."""
    out = console()
    ranks = f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    out.print(f"{ranks}, sharding {plan.sharding}; upper bounds, from formulas and not measured\n")
    rows = [(t.name, f"{t.rows:,}", size(t.weights), size(t.optimizer), t.origin) for t in plan.tables]
    out.print(table_of(("table", "rows", "weights", "optimizer", "rows from"), rows))
    out.print()
    parts = [(r.rank, *map(size, (r.tables, r.step, r.edges, r.process, r.total))) for r in plan.ranks]
    out.print(table_of(("rank", "tables", "one step", "edges", "process", "total"), parts))
    kept = (
        "each"
        if plan.checkpoints is None
        else f"each, {plan.checkpoints} kept: {size(plan.checkpoint * plan.checkpoints)}"
    )
    out.print()
    out.print(f"one node's ranks        {size(plan.node)}")
    out.print(f"sent by a rank          {size(plan.sent_per_step)} a step of {plan.edges_per_step:,} edges")
    if plan.steps is not None:
        out.print(f"steps                   {plan.steps:,}, so {size(plan.sent_per_step * plan.steps)} sent in all")
    out.print(f"checkpoints             {size(plan.checkpoint)} {kept}")
    out.print(f"scores in evaluation    {size(plan.scoring)}")
    if plan.time is not None:
        goes_to = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in asdict(plan.time).items())
        out.print(f"a step                  {plan.time.total * 1e3:.1f} ms: {goes_to}")
        out.print(f"expected                {plan.edges_per_second:,.0f} edges/s of all ranks")


def size(count: float) -> str:
    """Write a number of bytes in the unit that suits it: B, KiB, MiB, GiB or TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
