"""Times training against the number of rows of the tables, and of relations.

    python benchmarks/scaling.py [--rows 100000 1000000 5000000 20000000] [--relations 1 10 100 1000] [--repeats 1]

Edges are drawn uniformly, so that no row is seen oftener than another: a batch has nearly as many rows in a large table
as in a small one (its repeats are fewer), and what is left is the memory's time. Each line also has the microseconds
that an edge's rows of such a table take, measured apart from training: to be copied to their places, their gradients
added up, and updated. How they grow is what cache misses and fewer repeats explain. A repeat measures all shapes one
after the other; medians are printed. Settings are those of benchmarks/training.py, with 64 dimensions.
docs/performance.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from training import LR, SNAPSHOT, config_of, train, turns, watched

from twhin_pipeline.kernels import parallel, radix
from twhin_pipeline.model.rows import add_up, addresses
from twhin_pipeline.sharding.row_optimizers import RowGradients
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
DIM = 64
# As `config_of` has them: of a chunk, drawn for a side; and how often an edge's rows are measured.
CHUNK, POOL, TURNS = 1000, 50, 40


@dataclass(frozen=True)
class Point:
    """One training. `rows_us` is the time that an edge's rows of such a table take by themselves, in microseconds."""

    rows: int
    relations: int
    edges_per_second: float
    gib: float
    rows_us: float

    @property
    def edge_us(self) -> float:
        """Microseconds an edge."""
        return 1e6 / self.edges_per_second


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
    return Point(rows, relations, speed, gib, rows_time(rows, batch))


def rows_time(rows: int, batch: int) -> float:
    """Return the microseconds that an edge's rows take in steps of `batch` edges, as training has them in one process.

    They are two ends, and a share of the chunk's pools; drawn uniformly, with what repeats in a step updated once.
    """
    places = 2 * batch + 2 * POOL * (batch // CHUNK)
    table, momentum = torch.zeros(rows, DIM), torch.zeros(rows)
    copied, gradient, total = (torch.zeros(places, DIM) for _ in range(3))
    drawn = []
    for _ in range(TURNS):
        found, _, place = radix.unique(torch.randint(rows, (places,)).numpy())
        drawn.append((torch.from_numpy(found), torch.from_numpy(place)))

    def step(turn: int) -> None:
        found, place = drawn[turn]
        sums = total[: len(found)]
        address = addresses(table, found).index_select(0, place)
        parallel.gather(places, parallel.ROWS_A_THREAD, address.numpy(), copied.numpy())
        add_up(place, [gradient], sums)
        RowGradients.of(found, sums).update(parallel.rowwise_adagrad, table, momentum, 1, LR, 1e-10)

    return statistics.median(turns(step, TURNS)) / batch * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 5_000_000, 20_000_000])
    parser.add_argument("--relations", type=int, nargs="*", default=[1, 10, 100, 1000])
    parser.add_argument("--edges", type=int, default=4_000_000)
    parser.add_argument("--batch", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "scaling")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shapes = [(rows, 1) for rows in options.rows] + [(1_000_000, relations) for relations in options.relations]
    print(f"{options.edges:,} edges, {DIM} dimensions, 100 candidates; {len(os.sched_getaffinity(0))} cores")
    points: dict[tuple[int, int], list[Point]] = {shape: [] for shape in shapes}
    for repeat in range(options.repeats):
        for shape, found in points.items():
            found.append(measure(options.home.resolve() / "run", *shape, options.edges, options.batch))
            told = f"{found[-1].edge_us:.2f} µs an edge, {found[-1].rows_us:.2f} of its rows"
            print(f"repeat {repeat + 1}: {shape[0]:,} rows, {shape[1]:,} relations: {told}", flush=True)
    print("\n| rows | relations | edges/s | µs an edge | µs of its rows | peak GiB |\n|---|---|---|---|---|---|")
    for (rows, relations), found in points.items():
        speed, edge, own, gib = (
            statistics.median(getattr(point, name) for point in found)
            for name in ("edges_per_second", "edge_us", "rows_us", "gib")
        )
        print(f"| {rows:,} | {relations:,} | {speed:,.0f} | {edge:.2f} | {own:.2f} | {gib:.2f} |")
    if options.json:
        told = [asdict(point) for found in points.values() for point in found]
        options.json.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
