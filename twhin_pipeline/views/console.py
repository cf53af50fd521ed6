"""What the command line prints: tables for people, JSON and CSV for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from twhin_pipeline.evaluation.results import ALL, BASELINES, TITLES, Comparison, comparisons, current, sides_title

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from twhin_pipeline.checks.by_hand import Outcome
    from twhin_pipeline.operations.doctor import Finding
    from twhin_pipeline.operations.plan import Plan

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
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else escape(str(value))


def _is_number(text: str) -> bool:
    # A dash is a figure that there is not, an asterisk marks the best of a line.
    plain = text.replace(",", "").removesuffix("%").removeprefix("*").removesuffix("–")
    try:
        float(plain or 0)
    except ValueError:
        return False
    return True


def print_checks(outcomes: Sequence[Outcome], title: str) -> None:
    """Print what checks found: a line for each, and below them the first offending rows of those that did not pass."""
    lines = [(o.table, o.check, o.status, o.offending_rows or None, f"{o.seconds:.2f}") for o in outcomes]
    print_table(("table", "check", "result", "offending rows", "seconds"), lines, title)
    for one in outcomes:
        if one.status != "passed":
            console().print(
                f"\n[bold]{one.check} of {one.table}: {one.status}[/]. {escape(f'{one.finding}. {one.description}')}"
            )
            if one.offending:
                print_table(list(one.offending[0]), [list(row.values()) for row in one.offending])
                if (more := one.offending_rows - len(one.offending)) > 0:
                    console().print(f"… and {more:,} more")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Print rows as a table."""
    console().print(table_of(columns, rows, title))


def comparison_table(evaluation: pa.Table, details: Mapping[str, Any], most: int | None = None) -> tuple[Table, int]:
    """Make a table with a line for each relation: the chief metric of the model beside each baseline's, and one metric
    more beside popularity's. A `*` marks the best of a line.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details.
        most: Only so many relations, those with the most test edges; left out, all.

    Returns:
        The table, and how many relations were left out.
    """
    chief = comparisons(evaluation, details)
    metric = chief[0].metric if chief else "filtered_mrr"
    second = "filtered_mrr" if metric != "filtered_mrr" else "filtered_hits@10"
    others = {one.relation: one for one in comparisons(evaluation, details, second)}
    measured = [name for name in BASELINES if any(name in one.baselines for one in chief)]
    further = [name for name in measured if name != "popularity"]
    sampled = bool(further) and any(one.sampled for one in chief)
    columns = ["relation", "edges", metric, *(TITLES[name] for name in measured if name not in further)]
    columns += ["sample"] * sampled + [TITLES[name] for name in further]
    columns += [second, TITLES["popularity"]] if others else []

    def line(one: Comparison) -> list[str]:
        def figure(name: str) -> str:
            return "*" * (one.best == name) + _three(one.value if name == "model" else one.baselines.get(name))

        cells = [one.relation, f"{one.edges:,}", figure("model")]
        cells += [figure(name) for name in measured if name not in further]
        cells += [_three(one.compared)] * sampled + [figure(name) for name in further]
        if others:
            other = others.get(one.relation)
            cells += ["–", "–"] if other is None else [_three(other.value), _three(other.baselines.get("popularity"))]
        return cells

    named = [one for one in chief if one.relation != ALL]
    kept = named[:most]
    return table_of(columns, map(line, [*kept, *(one for one in chief if one.relation == ALL)])), len(named) - len(kept)


def legend(details: Mapping[str, Any]) -> str:
    """Explain the columns of `comparison_table`."""
    text = (
        f"Held-out edges ({sides_title(details)}; recall is of tails) among all entities of the type. "
        "popular = by degree alone; item-kNN, ALS = fitted to the same training edges; * = the best"
    )
    edges, compared = details.get("edges", 0), details.get("compared_edges", 0)
    if 0 < compared < edges:
        text += f". item-kNN and ALS rank {compared:,} of the edges; sample = the model on these"
    if left_out := details.get("edges_left_out"):
        text += f". {left_out:,} held-out edges are left out, as an earlier model that this one started from knows them"
    return text


def print_warnings(warnings: Sequence[str], out: Console | None = None) -> None:
    """Print warnings, one a line."""
    from rich.markup import escape

    out = out or console()
    for line in warnings:
        out.print(f"[yellow]warning:[/] {escape(line)}")


def _three(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def print_metrics(evaluation: pa.Table, details: Mapping[str, Any], heading: str) -> None:
    """Print every relation's chief metric beside the baselines', all metrics over all relations, and the warnings.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details.
        heading: What it is about.
    """
    out = console()
    out.print(f"{heading}\n{legend(details)}\n", soft_wrap=True)
    out.print(comparison_table(evaluation, details)[0])
    rows = [row for row in current(evaluation).to_pylist() if row["relation"] == ALL]
    columns = ["value", *(c for c in (*BASELINES.values(), "compared") if any(row[c] is not None for row in rows))]
    if not 0 < details.get("compared_edges", 0) < details.get("edges", 0):
        columns = [column for column in columns if column != "compared"]
    names = {"value": "model", "compared": "sample"} | {column: TITLES[name] for name, column in BASELINES.items()}
    lines = [(row["metric"], row["side"], *(_three(row[column]) for column in columns)) for row in rows]
    out.print()
    out.print(table_of(("all relations", "side", *(names[column] for column in columns)), lines))
    if details.get("warnings"):
        out.print()
        print_warnings(details["warnings"], out)


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
    out.print(f"{ranks}, sharding {plan.sharding}; from formulas, not measured\n")
    rows = [(t.name, f"{t.rows:,}", size(t.weights), size(t.optimizer), t.origin) for t in plan.tables]
    out.print(table_of(("table", "rows", "weights", "optimizer", "rows from"), rows))
    out.print()
    names = ("tables", "step", "evaluation", "edges", "writing", "process", "total")
    parts = [(r.rank, *(size(getattr(r, name)) for name in names)) for r in plan.ranks]
    out.print(table_of(("rank", "tables", "one step", *names[2:]), parts))
    kept = (
        "each"
        if plan.checkpoints is None
        else f"each, {plan.checkpoints} kept: {size(plan.checkpoint * plan.checkpoints)}"
    )
    out.print()
    out.print(f"one node                {size(plan.node)}, {size(plan.shared)} of it shared by its processes")
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
