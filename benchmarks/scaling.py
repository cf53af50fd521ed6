"""Times training against the number of rows of the tables, and of relations.

    python benchmarks/scaling.py [--rows 100000 1000000 5000000 20000000] [--relations 1 10 100 1000] [--json FILE]

Edges are drawn uniformly, so that no row is seen oftener than another: a batch's rows are then as many in a large table
as in a small one, but for chance, and what is left is the memory's time. Each line also has the microseconds that a row
of such a table takes to be gathered and updated, measured apart from training: what cache misses explain. Settings are
those of benchmarks/training.py, with 64 dimensions. docs/performance.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from training import LR, SNAPSHOT, best, config_of, train, watched

from twhin_pipeline import team
from twhin_pipeline.row_optimizers import RowGradients
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
DIM = 64


@dataclass(frozen=True)
class Point:
    """One training. `row_us` is the time to gather and to update a row of such a table, in microseconds."""

    rows: int
    relations: int
    edges_per_second: float
    gib: float
    row_us: float


def measure(home: Path, rows: int, relations: int, edges: int, batch: int) -> Point:
    """Train one epoch on edges drawn uniformly among `rows` entities and, evenly, `relations`."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    generator = np.random.default_rng(0)
    table = pa.table(
        {
            "lhs": generator.integers(rows, size=edges),
            "rel": generator.permutation(np.arange(edges) % relations),
            "rhs": generator.integers(rows, size=edges),
        }
    )
    pq.write_table(table, home / "edges.parquet")
    config_path = config_of(home / "config.yaml", home / "edges.parquet", 100, 1, batch)
    config = yaml.safe_load(config_path.read_text())
    entity = config["model"]["embeddings"]["tables"][0] | {"name": "entity", "embedding_dim": DIM}
    config["source"]["ids"] = "indexed"
    config["model"]["embeddings"]["tables"] = [entity | {"num_embeddings": rows}]
    config["model"]["relations"] = [
        {"name": f"r{i}", "lhs": "entity", "rhs": "entity", "operator": "translation"} for i in range(relations)
    ]
    config_path.write_text(yaml.safe_dump(config, sort_keys=False))
    store = Store(str(home / "store"))
    for stage in ("ingest", "vocabulary", "sample"):
        command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(config_path)]
        watched([*command, "--home", store.root, "--snapshot", SNAPSHOT], home / f"{stage}.log")
    speed, gib = train(store, config_path, home)
    shutil.rmtree(home)
    return Point(rows, relations, speed, gib, row_time(rows))


def row_time(rows: int) -> float:
    """Return the microseconds to gather and to update one of some random rows, in the order of their numbers."""
    table, momentum = torch.zeros(rows, DIM), torch.zeros(rows)
    drawn = [torch.randint(rows, (20_000,)).unique() for _ in range(20)]
    gradient = torch.zeros(20_000, DIM)
    gather = best(lambda turn: table.index_select(0, drawn[turn % 20]))
    one_each = [RowGradients.of(asked, gradient[: len(asked)]) for asked in drawn]
    update = best(lambda turn: one_each[turn % 20].update(team.rowwise_adagrad, table, momentum, 1, LR, 1e-10))
    return (gather + update) / len(drawn[0]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--relations", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=32_000)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "scaling")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = [(rows, 1) for rows in options.rows] + [(1_000_000, relations) for relations in options.relations]
    print(f"{options.edges:,} edges, {DIM} dimensions, 100 candidates; {len(os.sched_getaffinity(0))} cores")
    print("| rows | relations | edges/s | µs an edge | µs of its two rows | peak GiB |\n|---|---|---|---|---|---|")
    points = []
    for rows, relations in dict.fromkeys(shapes):
        point = measure(options.home.resolve() / "run", rows, relations, options.edges, options.batch)
        points.append(point)
        told = f"{point.edges_per_second:,.0f} | {1e6 / point.edges_per_second:.2f} | {2 * point.row_us:.2f}"
        print(f"| {rows:,} | {relations:,} | {told} | {point.gib:.2f} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(point) for point in points], indent=1))


if __name__ == "__main__":
    main()
