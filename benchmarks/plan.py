"""Holds the speed that `twhin plan` expects against that of training, at 1 and 2 ranks on this machine.

    python benchmarks/plan.py [--edges 4000000] [--repeats 3] [--json figures.json]

A repeat measures the rates of so many ranks (`twhin rates`), asks for the time of a step (`twhin plan --rates`), and
trains one epoch of the graph of benchmarks/training.py; the ratio is taken within the repeat.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from training import SNAPSHOT, config_of, train, watched

from twhin_pipeline.config import load_config
from twhin_pipeline.operations import plan, rates
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent


def expected(config_path: Path, store: Store, home: Path) -> float:
    """Measure this machine's rates and return the edges a second that they let a plan expect."""
    config = load_config(str(config_path))
    found = rates.measured(config, str(config_path), [], str(home / "rates.yaml"))
    rows = plan.table_rows(config, store, SNAPSHOT, {})
    ranks = config.launch.nproc_per_node
    told = plan.estimate(config, rows, ranks, plan.training_edges(store, SNAPSHOT), found)
    assert told.edges_per_second is not None
    return told.edges_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32_000, help="edges a step, of all ranks")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "plan")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    home: Path = options.home.resolve() / f"{options.edges}-{options.candidates}"
    home.mkdir(parents=True, exist_ok=True)
    store, edges = Store(str(home / "store")), home / "edges.parquet"
    paths = {
        ranks: config_of(home / f"config-{ranks}.yaml", edges, options.candidates, ranks, options.batch)
        for ranks in options.ranks
    }
    if not (home / "ready").exists():
        print(f"generating {options.edges:,} edges, and preparing them …", flush=True)
        generate(str(edges), users=options.edges // 10, items=options.edges // 50, edges=options.edges, seed=1)
        for stage in ("ingest", "vocabulary", "sample"):
            command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(paths[options.ranks[0]])]
            watched([*command, "--home", store.root, "--snapshot", SNAPSHOT], home / f"{stage}.log")
        (home / "ready").touch()
    print(f"{options.edges:,} edges, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    found = []
    for ranks, path in paths.items():
        for repeat in range(options.repeats):
            told, (trained, _) = expected(path, store, home), train(store, path, home)
            found.append({"ranks": ranks, "expected": told, "trained": trained})
            print(
                f"{ranks} rank{'s' * (ranks > 1)}, repeat {repeat + 1}: expected {told:,.0f} edges/s, trained at "
                f"{trained:,.0f}: ratio {told / trained:.2f}",
                flush=True,
            )
        ratios = [row["expected"] / row["trained"] for row in found if row["ranks"] == ranks]
        print(f"{ranks} rank{'s' * (ranks > 1)}: median ratio {statistics.median(ratios):.2f}")
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "runs": found}))


if __name__ == "__main__":
    main()
