"""Trains a published graph as `twhin run` does, and prints what evaluation measured beside the published figures.

    python benchmarks/quality.py fb15k-237 [--seed 1] [--set training.num_epochs=20] [--json figures.json]

The data sets are not part of the project; `--data` names the folder that holds them. Exit code 2: the data is not
there, or what was asked for does not fit. docs/quality.md explains protocols and figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from twhin_pipeline import pipeline
from twhin_pipeline.config import TwhinConfig, as_override, load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, database
from twhin_pipeline.training import launch

ROOT = Path(__file__).resolve().parent.parent
RANKS = ("filtered_mrr", "filtered_hits@1", "filtered_hits@3", "filtered_hits@10")
RETRIEVAL = ("recall@20", "ndcg@20")
Figures = Mapping[str, float]


@dataclass(frozen=True)
class Benchmark:
    """One graph, how it is evaluated, and what others have measured so."""

    config: str
    """File in `configs/`."""
    files: tuple[str, ...]
    """What has to be below the data folder."""
    source: str
    """`source.path`, below the data folder."""
    protocol: str
    metrics: tuple[str, ...]
    published: dict[str, Figures]
    """Figures by who has them."""
    snapshot: str
    relations: bool = False
    """Whether each relation's figures are of interest."""
    carved: bool = False
    """Whether validation edges are taken from published training edges, which the published figures train on too."""
    ablation: str | None = None
    """A relation that is then trained on by itself, with the same test edges."""


def _ranks(*values: float | None) -> Figures:
    return {name: value for name, value in zip(RANKS, values, strict=True) if value is not None}


def _retrieval(*values: float) -> Figures:
    return dict(zip(RETRIEVAL, values, strict=True))


FILTERED = (
    "filtered, against every entity, both sides; ties: mean of best and worst rank; test edges with unseen entities"
)
FB15K_237 = Benchmark(
    config="fb15k-237.yaml",
    files=("fb15k-237/edges.parquet",),
    source="fb15k-237/edges.parquet",
    protocol=FILTERED,
    metrics=RANKS,
    published={
        "TransE, LibKGE": _ranks(0.313, 0.221, 0.347, 0.497),
        "DistMult, LibKGE": _ranks(0.343, 0.250, 0.378, 0.531),
        "ComplEx, LibKGE": _ranks(0.348, 0.253, 0.384, 0.536),
        "RotatE, LibKGE": _ranks(0.333, 0.240, 0.368, 0.522),
        "TransE, RotatE's authors or GraphVite": _ranks(0.294, None, None, 0.465),
        "DistMult, RotatE's authors or GraphVite": _ranks(0.295, 0.204, 0.329, 0.478),
        "ComplEx, RotatE's authors or GraphVite": _ranks(0.271, 0.184, 0.301, 0.447),
        "RotatE, RotatE's authors or GraphVite": _ranks(0.337, 0.241, 0.375, 0.533),
    },
    snapshot="2015-07-31",
)
BENCHMARKS: dict[str, Benchmark] = {
    "fb15k-237": FB15K_237,
    "fb15k-237-translation": replace(FB15K_237, config="fb15k-237-translation.yaml"),
    "wn18rr": Benchmark(
        config="wn18rr.yaml",
        files=("wn18rr/edges.parquet",),
        source="wn18rr/edges.parquet",
        protocol=FILTERED,
        metrics=RANKS,
        published={
            "TransE, LibKGE": _ranks(0.228, 0.053, 0.368, 0.520),
            "DistMult, LibKGE": _ranks(0.452, 0.413, 0.466, 0.530),
            "ComplEx, LibKGE": _ranks(0.475, 0.438, 0.490, 0.547),
            "RotatE, LibKGE": _ranks(0.478, 0.439, 0.494, 0.553),
        },
        snapshot="2018-02-01",
    ),
    "gowalla": Benchmark(
        config="gowalla.yaml",
        files=("gowalla/edges.parquet",),
        source="gowalla/edges.parquet",
        protocol="every place that a user has not visited in training is a candidate; mean over users with a test edge",
        metrics=RETRIEVAL,
        published={
            "most popular": _retrieval(0.0416, 0.0317),
            "MF-BPR": _retrieval(0.1627, 0.1378),
            "sampled softmax (YoutubeDNN)": _retrieval(0.1754, 0.1473),
            "MF, cosine and softmax": _retrieval(0.1759, 0.1395),
            "LightGCN": _retrieval(0.1820, 0.1547),
            "UltraGCN": _retrieval(0.1862, 0.1580),
            "SimpleX": _retrieval(0.1872, 0.1557),
            "MF, cosine and BSL (best epoch on test)": _retrieval(0.1882, 0.1584),
        },
        snapshot="2019-05-20",
        carved=True,
    ),
    "flickr": Benchmark(
        config="flickr.yaml",
        files=("flickr/edges.parquet",),
        source="flickr/edges.parquet",
        protocol="favorites held out at random; every photo that a user has not favorited in training or validation is "
        "a candidate; mean over users with a test edge; then the same without follows",
        metrics=RETRIEVAL,
        published={},
        snapshot="2019-07-21",
        carved=True,
        ablation="favorites",
    ),
    "debian-temporal": Benchmark(
        config="debian-temporal.yaml",
        files=("debian/2023-06-10.parquet", "debian/2025-08-09.parquet"),
        source="debian/{snapshot}.parquet",
        protocol="dependencies that are new in 2025-08-09 between packages of 2023-06-10; filtered by the known edges "
        "of both, against every package, both sides",
        metrics=("filtered_mrr", "filtered_hits@10"),
        published={"most popular": {"filtered_mrr": 0.0150}, "first trial": {"filtered_mrr": 0.0713}},
        snapshot="2023-06-10",
        relations=True,
    ),
}


@dataclass(frozen=True)
class Result:
    """What one training came to."""

    what: str
    figures: dict[str, float]
    baseline: dict[str, float]
    """Of ranking by degree alone."""
    relations: dict[str, dict[str, float]]
    hours: float
    train_hours: float
    edges_per_second: float
    steps: int
    chosen_epoch: int
    validation_metric: str
    validation: float | None
    test_edges: int
    device: str
    home: str


@dataclass(frozen=True)
class Report:
    """Everything of one call, as `--json` writes it."""

    name: str
    protocol: str
    published: dict[str, Figures]
    cores: int
    seed: int
    git_commit: str
    overrides: list[str]
    config: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    ratio: dict[str, float] = field(default_factory=dict)
    """Of the figures with all relations to those of the ablation."""


def train(benchmark: Benchmark, what: str, overrides: Sequence[str], home: Path, say: Callable[[str], None]) -> Result:
    """Run the whole chain in a home of its own and return its figures."""
    path = str(ROOT / "configs" / benchmark.config)
    store = Store(str(home))
    # The figures are of the model that is evaluated; nothing is published.
    overrides = [*overrides, "training.refit=false"]
    config = load_config(path, overrides)
    say(f"\n{what}: store {store.root}")
    started = time.monotonic()
    pipeline.run(config, path, overrides, store, benchmark.snapshot, say)
    hours = (time.monotonic() - started) / 3600
    model = store.manifest("twhin_model", benchmark.snapshot).details
    evaluation = store.manifest("evaluation", benchmark.snapshot).details
    figures, baseline, relations = figures_of(store, benchmark)
    return Result(
        what=what, figures=figures, baseline=baseline, relations=relations, hours=hours,
        train_hours=model["seconds"] / 3600, edges_per_second=model["edges_per_second"], steps=model["steps"],
        chosen_epoch=model["chosen_epoch"], validation_metric=model["validation_metric"],
        validation=model["best_validation"], test_edges=evaluation["edges"], device=evaluation["device"],
        home=store.root,
    )  # fmt: skip


def figures_of(
    store: Store, benchmark: Benchmark
) -> tuple[dict[str, float], dict[str, float], dict[str, dict[str, float]]]:
    """Return evaluation's overall metrics, the most-popular baseline's, and those of each relation (both sides).

    Raises:
        UserError: The evaluation has not measured a metric of the benchmark.
    """
    details = store.manifest("evaluation", benchmark.snapshot).details
    missing = [name for name in benchmark.metrics if name not in details["metrics"]]
    if missing:
        raise UserError(f"evaluation has no {', '.join(missing)}; name its k in evaluation.hits_at or recall_at")
    found, baseline = (
        {name: float(details[kind][name]) for name in benchmark.metrics if name in details[kind]}
        for kind in ("metrics", "baseline")
    )
    relations: dict[str, dict[str, float]] = {}
    if benchmark.relations:
        for row in store.read("evaluation", benchmark.snapshot).to_pylist():
            if row["relation"] != "all" and row["side"] == "both" and row["metric"] in benchmark.metrics:
                relations.setdefault(row["relation"], {})[row["metric"]] = row["value"]
    return found, baseline, relations


def edges_by_id(store: Store, config: TwhinConfig, snapshot: str, asset: str, relation: str) -> str:
    """Return the SQL of a relation's edges in a table of rows, as ids (`lhs`, `rhs`)."""
    number = config.model.relation_names.index(relation)
    tables = config.model.relations[number]
    return (
        f"SELECT l.id AS lhs, r.id AS rhs FROM {database.scan(store, asset, snapshot)} e "
        f"JOIN {database.scan(store, f'vocabulary/{tables.lhs}', snapshot)} l ON l.row = e.lhs "
        f"JOIN {database.scan(store, f'vocabulary/{tables.rhs}', snapshot)} r ON r.row = e.rhs WHERE e.rel = {number}"
    )


def write_only(store: Store, config: TwhinConfig, snapshot: str, relation: str, path: Path) -> None:
    """Write one relation's edges of a finished split as Parquet (`lhs`, `rel`, `rhs`, `split`).

    The split is written out, as it would come out otherwise by itself: what keeps an entity's last edge in training
    looks at all of its relations.
    """
    parts = {"training_set/positives": "train", "held_out/validation": "validation", "held_out/test": "test"}
    queries = [
        f"SELECT lhs, {database.literal(relation)} AS rel, rhs, '{split}' AS split FROM "
        f"({edges_by_id(store, config, snapshot, asset, relation)})"
        for asset, split in parts.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with database.connect(config, store) as con:
        union = " UNION ALL ".join(queries)
        con.execute(f"COPY ({union} ORDER BY ALL) TO {database.literal(str(path))} (FORMAT parquet)")


def only(config: TwhinConfig, relation: str, path: Path) -> list[str]:
    """Return the overrides that leave one relation and its tables, read from a file that has its split."""
    kept = config.model.relations[config.model.relation_names.index(relation)]
    tables = [t for t in config.model.embeddings.tables if t.name in (kept.lhs, kept.rhs)]
    given = {"path": str(path), "columns": {"split": "split"}, "snapshots": config.source and config.source.snapshots}
    sections = {
        "source": given,
        "split": {"strategy": "given"},
        "model.relations": [kept.model_dump(mode="json", exclude_none=True)],
        "model.embeddings.tables": [t.model_dump(mode="json", exclude_none=True) for t in tables],
    }
    return [as_override(name, value) for name, value in sections.items()]


def same_edges(stores: Sequence[Store], configs: Sequence[TwhinConfig], snapshot: str, relation: str) -> bool:
    """Tell whether two stores hold out the same test edges of a relation, by id."""
    found = []
    for store, config in zip(stores, configs, strict=True):
        with database.connect(config, store) as con:
            query = edges_by_id(store, config, snapshot, "held_out/test", relation)
            found.append(con.execute(f"{query} ORDER BY ALL").fetchall())
    return len(found[0]) > 0 and found[0] == found[1]


def table(report: Report, metrics: Sequence[str]) -> str:
    """Return the figures beside the published ones, as a Markdown table."""
    names = [name.removeprefix("filtered_").replace("mrr", "MRR").replace("hits", "Hits") for name in metrics]
    rows: list[tuple[str, Figures]] = [(result.what, result.figures) for result in report.results]
    if report.results:
        rows.append(("most popular, as measured here", report.results[0].baseline))
    rows += report.published.items()
    lines = [_row([report.name, *names]), _row(["---"] + ["---:"] * len(names))]
    for what, figures in rows:
        lines.append(_row([what, *(f"{figures[m]:.4f}" if m in figures else "–" for m in metrics)]))
    return "\n".join(lines)


def relations_table(result: Result, metrics: Sequence[str]) -> str:
    """Return the figures of each relation, as a Markdown table."""
    lines = [_row([result.what, *metrics]), _row(["---"] + ["---:"] * len(metrics))]
    for name, figures in result.relations.items():
        lines.append(_row([name, *(f"{figures[m]:.4f}" if m in figures else "–" for m in metrics)]))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def git_commit() -> str:
    """Return the commit of this checkout, marked where files differ from it; empty outside of git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=, with changes", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip()


def run(
    name: str,
    *,
    data: Path,
    home: Path,
    overrides: Sequence[str] = (),
    seed: int = 0,
    refit: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Train and evaluate a benchmark, by itself and as its options ask.

    Raises:
        UserError: The data is not there, `home` is in use, or there is nothing to refit.
    """
    benchmark = BENCHMARKS[name]
    missing = [file for file in benchmark.files if not (data / file).is_file()]
    if missing:
        raise UserError(f"{data}: has no {', '.join(missing)}; pass the folder of the data sets by --data")
    if home.exists() and any(home.iterdir()):
        raise UserError(f"--home {home}: is not empty; a benchmark starts afresh: pass another folder")
    if refit and not benchmark.carved:
        raise UserError(
            f"--refit: {name} comes with its own validation edges; the published figures do not train on them"
        )
    path = str(ROOT / "configs" / benchmark.config)
    whole = [
        as_override("source.path", str(data / benchmark.source)),
        f"training.seed={seed}",
        f"negatives.seed={seed}",
        *overrides,
    ]
    config = load_config(path, whole)
    report = Report(
        name=name, protocol=benchmark.protocol, published=benchmark.published,
        cores=len(os.sched_getaffinity(0)), seed=seed, git_commit=git_commit(), overrides=whole,
        config=config.model_dump(mode="json", exclude_none=True),
    )  # fmt: skip
    say(f"{name}: {benchmark.protocol}")
    ours = train(benchmark, "ours", whole, home / "run", say)
    report.results.append(ours)
    if refit:
        again = [*whole, "split.validation=0", f"training.num_epochs={ours.chosen_epoch}"]
        report.results.append(train(benchmark, "ours, refit on all training edges", again, home / "refit", say))
    if benchmark.ablation is not None:
        relation, file = benchmark.ablation, home / f"{benchmark.ablation}.parquet"
        write_only(Store(ours.home), config, benchmark.snapshot, relation, file)
        fewer = [*whole, *only(config, relation, file)]
        alone = train(benchmark, f"ours, {relation} alone", fewer, home / relation, say)
        stores, configs = (Store(ours.home), Store(alone.home)), (config, load_config(path, fewer))
        if not same_edges(stores, configs, benchmark.snapshot, relation):
            raise UserError(f"{alone.home}: its test edges are not those of {ours.home}, so they cannot be compared")
        report.results.append(alone)
        report.ratio.update({m: ours.figures[m] / alone.figures[m] for m in benchmark.metrics if alone.figures[m]})
    return report


def show(report: Report, say: Callable[[str], None] = print) -> None:
    """Print the tables and how they came about."""
    benchmark = BENCHMARKS[report.name]
    say(f"\n{report.protocol}\n\n{table(report, benchmark.metrics)}\n")
    for result in report.results:
        if result.relations:
            say(f"{relations_table(result, benchmark.metrics)}\n")
    for metric, ratio in report.ratio.items():
        say(f"{metric}: {ratio:.3f} times that of {benchmark.ablation} alone")
    for result in report.results:
        chosen = f" ({result.validation_metric} {result.validation:.4f})" if result.validation is not None else ""
        say(
            f"{result.what}: {result.hours:.2f} h, of which training {result.train_hours:.2f} h at "
            f"{result.edges_per_second:,.0f} edges/s on {result.device}; epoch {result.chosen_epoch}{chosen}; "
            f"{result.test_edges:,} test edges"
        )
    say(f"{report.cores} cores, seed {report.seed}, commit {report.git_commit or 'unknown'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Train a published graph and print figures beside published ones.")
    parser.add_argument("name", choices=list(BENCHMARKS))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--home", type=Path, help="an empty folder for the stores (default: in .twhin/quality)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    parser.add_argument("--seed", type=int, default=0, help="of initial vectors and negatives")
    parser.add_argument(
        "--refit", action="store_true", help="then train on the validation edges too, and evaluate that"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    home = options.home or ROOT / ".twhin" / "quality" / f"{options.name}-{datetime.now():%Y%m%dT%H%M%S}"
    try:
        report = run(
            options.name, data=options.data.resolve(), home=home.resolve(), overrides=options.set, seed=options.seed,
            refit=options.refit, say=lambda line: print(line, flush=True),
        )  # fmt: skip
    except UserError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    except launch.TrainingFailed as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    except launch.TrainingCancelled as error:
        print(f"quality: {error}", file=sys.stderr)
        return 130
    show(report)
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
