"""Trains public graphs shortly under every loss, and prints how well calibrated probabilities hold on test edges.

    python benchmarks/calibration.py [debian fb15k-237 gowalla] --data FOLDER [--losses bce bsl] [--epochs 3]
        [--dim 64] [--set train_data.global_negatives=100] [--json figures.json]

The graph of Debian is part of the project; the others are not, and `--data` names the folder that holds them. A few
epochs are enough: calibration is fitted to whatever a training has come to. Exit code 1: a bar was missed (`--strict`);
2: the data is not there. docs/quality.md has figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from twhin_pipeline.config import as_override, load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.training import train

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("ingest", "vocabulary", "sample", "train", "evaluate")
LOSSES = ("bce", "softmax", "margin", "self_adversarial", "bsl")
LARGEST_ECE = 0.05
LEAST_EDGES = 200
"""Of a relation that is looked at by itself."""


@dataclass(frozen=True)
class Graph:
    """A graph: its configuration, its snapshot, and its source below the data folder (None: the configuration's)."""

    config: str
    snapshot: str
    source: str | None


GRAPHS = {
    "debian": Graph("debian.yaml", "2025-08-09", None),
    "fb15k-237": Graph("fb15k-237.yaml", "2015-07-31", "fb15k-237/edges.parquet"),
    "gowalla": Graph("gowalla.yaml", "2019-05-20", "gowalla/edges.parquet"),
}


@dataclass(frozen=True)
class Result:
    """What one training came to, over all relations; of tails but for `auc` and `rce`, which are as published."""

    graph: str
    loss: str
    test_edges: int
    auc: float
    rce: float
    calibrated_rce: float
    ece: float
    worst_ece: float | None
    """The largest of a relation with `LEAST_EDGES` test edges or more; None where there is none."""

    @property
    def reached(self) -> bool:
        """Whether both bars were."""
        return self.calibrated_rce > 0 and self.ece < LARGEST_ECE


def measure(
    name: str,
    losses: Sequence[str],
    *,
    data: Path,
    home: Path,
    dim: int | None,
    overrides: Sequence[str],
    say: Callable[[str], None],
) -> list[Result]:
    """Train a graph under each loss, one after the other in one store, and return what evaluation measured.

    Raises:
        UserError: The data is not there, or what was asked for does not fit.
    """
    graph = GRAPHS[name]
    if graph.source is not None and not (data / graph.source).is_file():
        raise UserError(f"{data}: has no {graph.source}; pass the folder of the data sets by --data")
    path = str(ROOT / "configs" / graph.config)
    whole = [
        *([as_override("source.path", str(data / graph.source))] if graph.source is not None else []),
        "training.refit=false", "launch.nproc_per_node=1", "loss.log_q=false", "evaluation.floors={}",
        "evaluation.baselines=[popularity]", *overrides,
    ]  # fmt: skip
    if dim is not None:
        tables = load_config(path, whole).model.model_dump(mode="json", exclude_unset=True)["embeddings"]["tables"]
        whole.append(as_override("model.embeddings.tables", [{**one, "embedding_dim": dim} for one in tables]))
    store = Store(str(home))
    results = []
    for loss in losses:
        mine = [*whole, f"loss.name={loss}"]
        run = Run(load_config(path, mine), path, mine, store, graph.snapshot, train_here)
        say(f"\n{name}, {loss}")
        for stage in STAGES:
            if chain.made_before(run, chain.STAGES[stage], say) is None:
                chain.run_stage(run, chain.STAGES[stage], say)
        results.append(result_of(store, name, loss))
        say(table(results[-1:]))
    return results


def train_here(run: Run) -> None:
    """Train in this process, which saves the start of another one for each loss."""
    train.run(run.config, run.store, run.snapshot)


def result_of(store: Store, name: str, loss: str) -> Result:
    """Return what evaluation measured."""
    snapshot = GRAPHS[name].snapshot
    details = store.manifest("evaluation", snapshot).details
    rows = store.read("evaluation", snapshot).to_pylist()
    of_relations = [
        row["value"]
        for row in rows
        if row["metric"] == "ece" and row["relation"] != "all" and row["edges"] >= LEAST_EDGES
    ]
    figures = {one: float(details["metrics"][one]) for one in ("auc", "rce", "calibrated_rce", "ece")}
    return Result(name, loss, details["edges"], **figures, worst_ece=max(of_relations, default=None))


def table(results: Sequence[Result]) -> str:
    """Return the figures as a Markdown table."""
    lines = [
        "| graph | loss | test edges | AUC | `rce` | `calibrated_rce` | `ece` | worst relation's `ece` |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in results:
        worst = "–" if one.worst_ece is None else f"{one.worst_ece:.4f}"
        lines.append(
            f"| {one.graph} | `{one.loss}` | {one.test_edges:,} | {one.auc:.3f} | {one.rce:.1f} | "
            f"{one.calibrated_rce:.1f} | {one.ece:.4f} | {worst} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Print how well calibrated probabilities hold under every loss.")
    parser.add_argument("graphs", nargs="*", metavar="GRAPH", help=f"of {', '.join(GRAPHS)} (default: all)")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--home", type=Path, help="a folder for the stores (default: a temporary one)")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--dim", type=int, help="of all vectors (default: as configured)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a field")
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    for name in options.graphs:
        if name not in GRAPHS:
            parser.error(f"no graph {name!r}; there are {', '.join(GRAPHS)}")
    every = options.epochs
    overrides = [f"training.num_epochs={every}", f"training.eval_every_n_epochs={every}", *options.set]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch, mock.patch.dict(os.environ, {"TWHIN_NO_TRACKING": "1"}):
        try:
            for name in options.graphs or GRAPHS:
                results += measure(
                    name, options.losses, data=options.data.resolve(), dim=options.dim, overrides=overrides,
                    home=(options.home or Path(scratch)) / name, say=lambda line: print(line, flush=True),
                )  # fmt: skip
        except UserError as error:
            print(f"calibration: {error}", file=sys.stderr)
            return 2
    print(f"\n{table(results)}")
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in results], indent=1))
    missed = [f"{one.graph} under {one.loss}" for one in results if not one.reached]
    print(f"missed: {', '.join(missed)}" if missed else f"every RCE is above 0, every ECE below {LARGEST_ECE}")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
