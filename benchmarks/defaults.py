"""The first run on one's own data: a minimal configuration, beside what a user would otherwise choose.

    python benchmarks/defaults.py [GRAPH …] [--seeds 3] [--json figures.json] [--picture figures.png]

Each configuration has sources, names of entity types and relations, and a split; everything else is the recipe's. The
chain runs by the command line, as a user runs it. Its figures stand beside the baselines that evaluation fits to the
same training edges (most popular, item-kNN, ALS), and beside two oracles (`default_oracles.py`) where the graph is
generated and its truth is known; with `--pbg` beside PyTorch-BigGraph by its own defaults, too (`defaults_pbg.py`).
Exit code 1: a goal is missed. Exit code 2: no graph's data is there, or an argument does not fit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import defaults_pbg
from default_graphs import ALL, BASELINES, GENERATED, GRAPHS, MRR, RECALL, Goal, Graph, configuration, read_truth
from default_oracles import INFERRED, ORACLE, recalls
from quality import ROOT, _row, git_commit

from twhin_pipeline.config import as_override, load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]

TITLES = {"popularity": "popularity", "item_knn": "item-kNN", "als": "ALS"}
PBG = "pbg"
"""PyTorch-BigGraph's key among the baselines of a figure; no goal is of it."""
LEAST_EDGES = 200
"""Test edges below which a relation has no line and no goal."""


@dataclass(frozen=True)
class Figure:
    """One relation's figure (or that of all), beside the baselines'.

    `compared` is the model's on the test edges that item-kNN and ALS ranked, where these are a sample.
    """

    relation: str
    metric: str
    edges: int
    value: float
    baselines: dict[str, float]
    compared: float | None = None
    oracle: float | None = None
    inferred: float | None = None


@dataclass(frozen=True)
class Run:
    """One seed's run of the chain."""

    seed: int
    seconds: float
    train_seconds: float
    epochs: int | None
    figures: list[Figure]
    home: str


@dataclass(frozen=True)
class Line:
    """A line of the table: means over the runs of a graph."""

    graph: str
    relation: str
    metric: str
    edges: int
    ours: float
    spread: float | None
    """Standard deviation over seeds; None for one."""
    popularity: float | None
    item_knn: float | None
    als: float | None
    oracle: float | None
    inferred: float | None
    ratios: dict[str, float]
    """Ours to each baseline (on the same test edges), and to the oracles."""
    seconds: float
    train_seconds: float
    pbg: float | None = None

    def ratio(self, names: Iterable[str]) -> float | None:
        """Return the ratio to the best of some, or None where none was measured."""
        return min((self.ratios[name] for name in names if name in self.ratios), default=None)


@dataclass(frozen=True)
class Outcome:
    """A goal, and whether it is reached. `reached` is None where its figure was not measured."""

    graph: str
    text: str
    reached: bool | None


def run_chain(config: Path, home: Path, overrides: Sequence[str]) -> float:
    """Run the chain by the command line, and return its seconds. Its output goes to `run.log` in `home`.

    Raises:
        UserError: It failed; names the log, with its last lines.
    """
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "twhin_pipeline.cli", "run", "--config", str(config), "--home", str(home)]
    for override in overrides:
        command += ["--set", override]
    # The command of this checkout, not of the one that is installed.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.monotonic()
    with open(home / "run.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=home, env=environment).returncode
    seconds = time.monotonic() - started
    if code:
        last = "\n".join((home / "run.log").read_text(encoding="utf-8").splitlines()[-8:])
        raise UserError(f"{config}: the run ended with exit code {code}; see {home / 'run.log'}:\n{last}")
    return seconds


def figures_of(rows: Sequence[Mapping[str, Any]], details: Mapping[str, Any], graph: Graph) -> list[Figure]:
    """Return the figures of relations with at least `LEAST_EDGES` test edges, and of all together.

    Args:
        rows: Of the table `evaluation`; it may lack columns of baselines.
        details: Its manifest's details.
        graph: Says which metric and whether all together are of interest.
    """
    two_types = {name: lhs != rhs for name, lhs, rhs in graph.relations}
    sides = details.get("sides", "both")
    found = []
    for row in rows:
        name = row["relation"]
        if name == ALL or row["edges"] < LEAST_EDGES:
            continue
        metric = graph.metric or (RECALL if two_types.get(name) else MRR)
        mine = sides if isinstance(sides, str) else sides.get(name, "both")
        if row["metric"] == metric and row["side"] == ("rhs" if metric == RECALL else mine):
            baselines = {key: row[column] for key, column in BASELINES.items() if _is_known(row.get(column))}
            compared = row["compared"] if _is_known(row.get("compared")) else None
            found.append(Figure(name, metric, row["edges"], row["value"], baselines, compared))
    found.sort(key=lambda figure: -figure.edges)
    if graph.overall and graph.metric is not None and graph.metric in details["metrics"]:
        overall = {key: details.get(column, {}).get(graph.metric) for key, column in BASELINES.items()}
        baselines = {key: value for key, value in overall.items() if _is_known(value)}
        compared = details.get("compared", {}).get(graph.metric)
        value = details["metrics"][graph.metric]
        found.insert(0, Figure(ALL, graph.metric, details["edges"], value, baselines, compared))
    return found


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def measure(
    name: str,
    graph: Graph,
    folder: Path,
    home: Path,
    seed: int,
    overrides: Sequence[str],
    say: Say,
    pbg: Path | None = None,
) -> Run:
    """Write the configuration, run the chain, and return the figures, with those of PyTorch-BigGraph where `pbg` is
    its interpreter. A failure of that is printed.

    Raises:
        UserError: The run failed.
    """
    home.mkdir(parents=True, exist_ok=True)
    config = home / "twhin.yaml"
    config.write_text(yaml.safe_dump(configuration(graph, folder, seed), sort_keys=False), encoding="utf-8")
    say(f"{name}, seed {seed}: {home}")
    seconds = run_chain(config, home / "store", overrides)
    store = Store(str(home / "store"))
    snapshot = store.snapshots("evaluation")[-1]
    evaluation, model = (store.manifest(asset, snapshot).details for asset in ("evaluation", "twhin_model"))
    figures = figures_of(store.read("evaluation", snapshot).to_pylist(), evaluation, graph)
    if graph.truth is not None:
        relations = [relation for relation, _, _ in graph.relations]
        found = recalls(read_truth(folder / graph.truth), store, snapshot, relations)
        figures = [replace(one, **{of: values.get(one.relation) for of, values in found.items()}) for one in figures]
    if pbg is not None:
        try:
            settings = load_config(str(config), overrides)
            rows, metrics = defaults_pbg.measure(pbg, settings, store, snapshot, home / "pbg", say)
            figures = with_pbg(figures, figures_of(rows, {**evaluation, "metrics": metrics}, graph))
        except UserError as error:
            say(f"PBG: left out of {name}, seed {seed}: {error}")
    return Run(seed, seconds, model["seconds"], model.get("chosen_epoch"), figures, store.root)


def with_pbg(figures: Sequence[Figure], of_pbg: Sequence[Figure]) -> list[Figure]:
    """Return the figures with those of PyTorch-BigGraph, of the same relations, beside the baselines'."""
    values = {figure.relation: figure.value for figure in of_pbg}
    return [replace(one, baselines={**one.baselines, PBG: values[one.relation]}) for one in figures]


def lines_of(name: str, runs: Sequence[Run]) -> list[Line]:
    """Return the means over the runs of a graph, by relation."""
    lines = []
    for relation in (figure.relation for figure in runs[0].figures):
        here = [figure for run in runs for figure in run.figures if figure.relation == relation]
        values = [figure.value for figure in here]
        ours = fmean(values)
        ratios = {}
        baselines: dict[str, float | None] = dict.fromkeys((*BASELINES, PBG))
        for key in baselines:
            measured = [(figure, figure.baselines[key]) for figure in here if key in figure.baselines]
            if measured:
                baselines[key] = mean = fmean(value for _, value in measured)
                same = fmean(
                    figure.value if key in ("popularity", PBG) or figure.compared is None else figure.compared
                    for figure, _ in measured
                )
                if mean:
                    ratios[key] = same / mean
        oracles: dict[str, float | None] = {}
        for key in (ORACLE, INFERRED):
            known = [getattr(figure, key) for figure in here if getattr(figure, key) is not None]
            oracles[key] = mean_of = fmean(known) if known else None
            if mean_of:
                ratios[key] = ours / mean_of
        lines.append(
            Line(
                graph=name, relation=relation, metric=here[0].metric, edges=here[0].edges, ours=ours,
                spread=stdev(values) if len(values) > 1 else None, **baselines, **oracles, ratios=ratios,
                seconds=fmean(run.seconds for run in runs), train_seconds=fmean(run.train_seconds for run in runs),
            )
        )  # fmt: skip
    return lines


def outcomes(name: str, goals: Sequence[Goal], lines: Sequence[Line]) -> list[Outcome]:
    """Compare a graph's lines with its goals."""
    found = []
    for goal in goals:
        here = [
            line for line in lines if line.relation == goal.relation or (goal.relation is None and line.relation != ALL)
        ]
        for line in here:
            what = f"{line.relation}: {line.metric}"
            if goal.of:
                ratio = line.ratio(goal.of)
                best = "the oracle" if goal.of == (ORACLE,) else "the best of " + ", ".join(TITLES[n] for n in goal.of)
                if len(goal.of) == 1 and goal.of != (ORACLE,):
                    best = TITLES[goal.of[0]]
                if goal.of == (ORACLE,) and ratio is None:
                    continue
                told = "not measured" if ratio is None else f"{ratio:.3f} times"
                reached = None if ratio is None else ratio >= goal.floor
                found.append(Outcome(name, f"{what} is {told} {best}, goal {goal.floor:g}", reached))
            else:
                found.append(Outcome(name, f"{what} is {line.ours:.4f}, goal {goal.floor:g}", line.ours >= goal.floor))
        if not here and goal.relation is not None:
            found.append(Outcome(name, f"{goal.relation}: not measured, goal {goal.floor:g}", None))
    return found


def table(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table; PyTorch-BigGraph has its columns where it was measured."""
    more = _has_pbg(lines)
    names = ["graph", "relation", "test edges", "metric", "ours", *TITLES.values(), *["PBG"] * more, ORACLE, INFERRED]
    names += ["to the best", *["to PBG"] * more, f"to {INFERRED}", "seconds"]
    rows = [_row(names), _row(["---", "---", "---:", "---", *["---:"] * (len(names) - 4)])]
    for line in lines:
        ours = f"{line.ours:.4f}" + ("" if line.spread is None else f" ± {line.spread:.4f}")
        cells = [line.graph, line.relation, f"{line.edges:,}", line.metric, ours]
        beside = (line.popularity, line.item_knn, line.als, *[line.pbg] * more, line.oracle, line.inferred)
        cells += [_number(value) for value in beside]
        ratios = (line.ratio(BASELINES), *[line.ratio([PBG])] * more, line.ratio([INFERRED]))
        rows.append(_row([*cells, *(_number(ratio, 3) for ratio in ratios), f"{line.seconds:,.0f}"]))
    return "\n".join(rows)


def _has_pbg(lines: Sequence[Line]) -> bool:
    return any(line.pbg is not None for line in lines)


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def picture(lines: Sequence[Line], path: Path) -> None:
    """Draw the lines as bars, a panel for each metric, and write them as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    series = {"ours": "#0072B2", "popularity": "#B8B8B8", "item_knn": "#E69F00", "als": "#009E73", "oracle": "#CC79A7"}
    titles = {**TITLES, PBG: "PBG"}
    if any(line.inferred is not None for line in lines):
        series[INFERRED] = "#882255"
    if _has_pbg(lines):
        series[PBG] = "#56B4E9"
    kept = _largest(lines)
    panels = [(metric, [line for line in kept if line.metric == metric]) for metric in (RECALL, MRR)]
    panels = [(metric, some) for metric, some in panels if some]
    heights = [len(some) + 1 for _, some in panels]
    drawing = Drawing(figsize=(9, 1.2 + 0.62 * sum(heights)), layout="constrained", dpi=120)
    FigureCanvasAgg(drawing)
    every = drawing.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    width = 0.8 / len(series)
    for axes, (metric, some) in zip(every, panels, strict=True):
        place = np.arange(len(some))
        for number, (key, colour) in enumerate(series.items()):
            values = np.array([getattr(line, key) for line in some], dtype=float)
            error = [line.spread or 0 for line in some] if key == "ours" and any(line.spread for line in some) else None
            at = place + (number - (len(series) - 1) / 2) * width
            axes.barh(at, values, width, xerr=error, color=colour, label=titles.get(key, key))
        for y, line in zip(place, some, strict=True):
            axes.annotate(
                f"{line.ours:.3f}", (line.ours, y - (len(series) - 1) / 2 * width), (3, 0),
                textcoords="offset points", va="center", fontsize=7, color=series["ours"],
            )  # fmt: skip
        axes.set_yticks(
            place, [f"{line.graph}: {_short(line.relation)}" for line in some], fontsize=8, parse_math=False
        )
        axes.set_ylim(len(some) - 0.45, -0.55)
        axes.set_xlim(left=0)
        dropped = ", the largest relations of each graph" if len(kept) < len(lines) else ""
        axes.set_title(("Recall@20" if metric == RECALL else "filtered MRR") + dropped, fontsize=10, loc="left")
        axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = every[0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=len(series), frameon=False, fontsize=9)
    drawing.savefig(path, format="png")


MOST_BARS, LONGEST = 8, 40
"""Lines of a graph in the picture, and characters of a relation's name there."""


def _largest(lines: Sequence[Line]) -> list[Line]:
    """Return the first `MOST_BARS` lines of each graph; they are in order of their test edges."""
    count: dict[str, int] = {}
    kept = []
    for line in lines:
        count[line.graph] = count.get(line.graph, 0) + 1
        if count[line.graph] <= MOST_BARS:
            kept.append(line)
    return kept


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else "…" + name[1 - LONGEST :]


def _in_tables(field_: str, value: Any) -> list[str]:
    return [as_override(f"model.embeddings.tables.{name}.{field_}", value) for name in GRAPHS["shop"].tables]


RECIPE = "the recipe"
ABLATION: dict[str, list[str]] = {
    RECIPE: [],
    "cosine, temperature .1, init_scale 1": [
        "model.comparator=cosine", "model.temperature=0.1", "model.init_scale=1",
    ],
    "cosine, temperature 1": ["model.comparator=cosine", "model.temperature=1"],
    "in-batch and popular negatives, no log_q": [
        "train_data.in_batch_negatives=64", "train_data.global_negatives=256", "negatives.degree_share=0.5",
        "loss.log_q=false",
    ],
    "mask: known": ["negatives.mask=known"],
    "mask: own": ["negatives.mask=own"],
    "sides: rhs": ["negatives.sides=rhs"],
    "no dropout": ["model.embedding_dropout=0"],
    "no penalty": ["model.regularization.entities=0"],
    "dimension 32": _in_tables("embedding_dim", 32),
    "dimension 128": _in_tables("embedding_dim", 128),
    "rowwise_adagrad, lr .1": _in_tables("optimizer", {"rowwise_adagrad": {"lr": 0.1}}),
    "10 epochs": ["training.num_epochs=10"],
    "follows left out (weight 0)": ["model.relations.follows.weight=0"],
    "follows in full (weight 1)": ["model.relations.follows.weight=1"],
    "recipe: none, 20 epochs": ["recipe=none", "training.num_epochs=20"],
}  # fmt: skip
"""Changes to the recipe, one at a time, of the shop."""


def ablation_table(lines: Mapping[str, Sequence[Line]]) -> str:
    """Return Recall@20 after each change, with the difference to the recipe, as a Markdown table."""
    relations = (ALL, "view", "cart", "buy")
    recipe = {line.relation: line.ours for line in lines.get(RECIPE, ())}
    rows = [_row(["change", *relations, "seconds"]), _row(["---", *["---:"] * 5])]
    for what, some in lines.items():
        value = {line.relation: line.ours for line in some}
        cells = [f"{value[name]:.3f}" if name in value else "–" for name in relations]
        if what != RECIPE:
            differences = [value[n] - recipe[n] if n in value and n in recipe else None for n in relations]
            cells = [c if d is None else f"{c} ({d:+.3f})" for c, d in zip(cells, differences, strict=True)]
        rows.append(_row([what, *cells, f"{some[0].seconds:,.0f}" if some else "–"]))
    return "\n".join(rows)


@dataclass(frozen=True)
class Report:
    """Everything of one call, as `--json` writes it."""

    cores: int
    seeds: int
    scale: float
    overrides: list[str]
    git_commit: str
    runs: dict[str, list[Run]] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)
    goals: list[Outcome] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """By graph, why its run failed."""


def _chosen(options: argparse.Namespace, say: Say) -> dict[str, tuple[Graph, Path]]:
    """Return the graphs to run and the folder of each one's files; generated ones are written.

    Raises:
        UserError: A name is unknown.
    """
    generated: list[str] = []
    if options.generated is not None:
        generated = list(GENERATED) if options.generated == "all" else options.generated.split(",")
    names = options.graphs or ([] if generated else list(GRAPHS))
    for name, known in [*((name, GRAPHS) for name in names), *((name, GENERATED) for name in generated)]:
        if name not in known:
            raise UserError(f"no graph is named {name!r}; there are {', '.join(known)}")
    found = {}
    for name in names:
        missing = [file for file in GRAPHS[name].files if not (options.data / file).is_file()]
        if missing:
            say(f"{name}: skipped, {options.data} has no {', '.join(missing)}")
        else:
            found[name] = (GRAPHS[name], options.data)
    for name in generated:
        folder = options.home / name / "data"
        folder.mkdir(parents=True, exist_ok=True)
        found[name] = (GENERATED[name].make(folder, options.scale), folder)
    return found


def run_graphs(
    graphs: Mapping[str, tuple[Graph, Path]], report: Report, home: Path, say: Say, pbg: Path | None = None
) -> None:
    """Run each graph with each seed, and add to the report. A graph whose run fails is named there, with its goals."""
    for name, (graph, folder) in graphs.items():
        runs = report.runs[name] = []
        try:
            for seed in range(report.seeds):
                here = home / name / f"seed-{seed}"
                runs.append(measure(name, graph, folder, here, seed, report.overrides, say, pbg))
        except UserError as error:
            report.failed[name] = str(error)
            say(f"{name}: {error}")
            continue
        lines = lines_of(name, runs)
        report.lines.extend(lines)
        report.goals.extend(outcomes(name, graph.goals, lines))
        say(f"{table(lines)}\n")


def show(report: Report, say: Say = print) -> None:
    """Print the table and the goals."""
    say(f"\n{table(report.lines)}\n")
    words = {True: "ok", False: "missed", None: "not measured"}
    for goal in report.goals:
        say(f"{words[goal.reached]:<12} {goal.graph}, {goal.text}")
    for name in report.failed:
        say(f"{'failed':<12} {name}")
    say(f"\n{report.cores} cores, {report.seeds} seeds, commit {report.git_commit or 'unknown'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Train graphs with minimal configurations, beside simple baselines.")
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help=f"{', '.join(GRAPHS)}; default: all")
    parser.add_argument("--generated", metavar="all|NAMES", help=f"generated ones, by commas: {', '.join(GENERATED)}")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the size of generated graphs")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--home", type=Path, help="an empty folder for the stores (default: in .twhin/defaults)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each graph; the table has their mean")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field in all runs")
    parser.add_argument("--ablation", action="store_true", help="measure what changes to the recipe do to the shop")
    parser.add_argument("--pbg", action="store_true", help="train PyTorch-BigGraph too, by its own defaults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the results, as PNG")
    options = parser.parse_args(arguments)
    options.data = options.data.resolve()
    home = options.home or ROOT / ".twhin" / "defaults" / f"{datetime.now():%Y%m%dT%H%M%S}"
    options.home = home = home.resolve()
    report = Report(
        cores=len(os.sched_getaffinity(0)), seeds=options.seeds, scale=options.scale, overrides=options.set,
        git_commit=git_commit(),
    )  # fmt: skip

    def say(line: str) -> None:
        print(line, flush=True)

    try:
        if options.seeds < 1 or options.scale <= 0:
            raise UserError("--seeds must be at least 1, and --scale above 0")
        if home.exists() and any(home.iterdir()):
            raise UserError(f"--home {home}: is not empty; a benchmark starts afresh: pass another folder")
        if options.ablation and (options.graphs or options.generated or options.picture or options.pbg):
            raise UserError("--ablation: is of the shop; give it without graphs, --generated, --picture and --pbg")
        if options.ablation:
            options.graphs = ["shop"]
        graphs = _chosen(options, say)
    except UserError as error:
        print(f"defaults: {error}", file=sys.stderr)
        return 2
    if not graphs:
        print("defaults: no graph's data is there; pass the folder of the data sets by --data", file=sys.stderr)
        return 2
    if options.ablation:
        code = run_ablation(graphs["shop"], report, home, say)
    else:
        run_graphs(graphs, report, home, say, defaults_pbg.interpreter(say) if options.pbg else None)
        show(report, say)
        code = 1 if report.failed or any(goal.reached is not True for goal in report.goals) else 0
    if options.picture is not None and report.lines:
        picture(report.lines, options.picture)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1), encoding="utf-8")
    return code


def run_ablation(shop: tuple[Graph, Path], report: Report, home: Path, say: Say) -> int:
    """Run the shop after each change, print the table, and return the exit code."""
    graph, folder = shop
    found: dict[str, list[Line]] = {}
    for number, (what, overrides) in enumerate(ABLATION.items()):
        runs = report.runs[what] = []
        try:
            for seed in range(report.seeds):
                here = home / f"{number:02d}" / f"seed-{seed}"
                runs.append(measure(what, graph, folder, here, seed, [*report.overrides, *overrides], say))
        except UserError as error:
            report.failed[what] = str(error)
            say(f"{what}: {error}")
            continue
        found[what] = lines_of(what, runs)
        report.lines.extend(found[what])
        say(ablation_table(found))
    say(f"\n{ablation_table(found)}\n\n{report.cores} cores, {report.seeds} seeds, commit {report.git_commit}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
