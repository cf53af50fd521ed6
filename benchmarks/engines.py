"""Times both data engines on one generated graph and the same cores, and Spark from one worker to two.

    python benchmarks/engines.py [--edges 1000000] [--cores 2] [--json figures.json]

Each run is a process of its own: `twhin ingest`, `vocabulary` and `sample` without checks (a pool of 32 uniform and 32
popular candidates for each chunk and side, one epoch, masks of all training edges). The embedded engine has `--cores`
threads; Spark has a standalone master and workers of one core on this machine's loopback, with 1 GiB each: one worker,
and `--cores` of them. Starting Java and workers counts. Seconds of processors are printed too: on a machine that others
use, they say more than those of the clock. Both engines' tables are compared by their numbers of edges.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import spark_cluster
import yaml

from twhin_pipeline.config import load_config, relations
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.stages import engine
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = "2025-01-01"
STAGES = ("ingest", "vocabulary", "sample")
TABLES = ("raw_edges", "training_set/positives", "held_out/validation", "held_out/test", "training_set/negatives")


def configured(path: str, cores: int, chosen: dict[str, Any]) -> str:
    """Write the configuration of a graph beside it, for an engine; return its path."""
    data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    data |= {
        "recipe": "none",
        "engine": chosen,
        "launch": {"data_threads": cores, "duckdb_memory_limit": "4GB"},
        "train_data": {"global_negatives": 64, "in_batch_negatives": 32},
        "validation_data": {"global_negatives": 64, "in_batch_negatives": 32},
        "negatives": {"epochs": 1},
    }
    made = f"{path.removesuffix('.yaml')}-{chosen['name']}.yaml"
    Path(made).write_text(yaml.safe_dump(data), encoding="utf-8")
    return made


def work(stage: str) -> None:
    """Run a stage in this process, of the configuration and the store that its arguments name."""
    config, store = load_config(sys.argv[1]), Store(sys.argv[2])
    if stage != "ingest":
        config = relations.resolve(config, store, SNAPSHOT)
    getattr(engine, stage)(config, store, SNAPSHOT)


class CpuTime:
    """Seconds of processors that processes take, and all that they or this one start, until the block ends."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids, self.seen, self.ended = [*pids, os.getpid()], {}, threading.Event()
        self.before = self._look()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> dict[tuple[int, float], float]:
        for pid in self.pids:
            with suppress(psutil.Error):
                root = psutil.Process(pid)
                for process in [root, *root.children(recursive=True)]:
                    if process.pid == os.getpid():  # looking at the others takes time, too
                        continue
                    with suppress(psutil.Error):
                        times = process.cpu_times()
                        self.seen[process.pid, process.create_time()] = times.user + times.system
        return dict(self.seen)

    def _watch(self) -> None:
        while not self.ended.wait(0.2):
            self._look()

    def __enter__(self) -> CpuTime:
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.ended.set()
        self.thread.join()
        self.seconds = sum(now - self.before.get(key, 0.0) for key, now in self._look().items())


def timed(config: str, home: Path, pids: Sequence[int] = ()) -> dict[str, float]:
    """Run the stages, and return the seconds of each, and those of processors (`cpu`) of all."""
    seconds = {}
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with CpuTime(pids) as used:
        for stage in STAGES:
            started = time.perf_counter()
            command = [sys.executable, "-c", f"import engines; engines.work({stage!r})", config, str(home)]
            subprocess.run(command, check=True, env=env)
            seconds[stage] = time.perf_counter() - started
    return seconds | {"cpu": used.seconds}


def rows(home: Path) -> dict[str, int]:
    """Return how many rows the tables have."""
    store = Store(str(home))
    return {table: store.manifest(table, SNAPSHOT).rows for table in TABLES}


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table, and write the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, default=1_000_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    figures: dict[str, Any] = {"edges": chosen.edges, "load": os.getloadavg()[0], "runs": {}}
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        base = Path(folder)
        size = chosen.edges
        graph = generate(
            str(base / "graph.parquet"), users=max(size // 10, 100), items=max(size // 50, 100), edges=size, seed=1
        )
        embedded = configured(graph, chosen.cores, {"name": "embedded"})
        figures["runs"]["embedded"] = timed(embedded, base / "embedded")
        counts = {"embedded": rows(base / "embedded")}
        for workers in sorted({1, chosen.cores}):
            name = f"spark, {workers} workers" if workers > 1 else "spark, 1 worker"
            with spark_cluster.cluster(base / f"cluster-{workers}", workers) as made:
                conf = {"spark.executor.memory": "1g", "spark.driver.memory": "1g"}
                on_spark = {"name": "spark", "master": made.url, "conf": conf}
                figures["runs"][name] = timed(
                    configured(graph, chosen.cores, on_spark), base / f"spark-{workers}", made.pids
                )
            counts[name] = rows(base / f"spark-{workers}")
    same = all(one[table] == counts["embedded"][table] for one in counts.values() for table in TABLES[:-1])
    print(f"{chosen.edges:,} edges, load {figures['load']:.1f}; tables of the same numbers of edges: {same}")
    print(
        f"{'':<18}"
        + "".join(f"{stage:>12}" for stage in STAGES)
        + f"{'all':>10}{'edges/s':>10}{'CPU':>10}{'edges/CPU s':>14}"
    )
    for name, seconds in figures["runs"].items():
        total = sum(seconds[stage] for stage in STAGES)
        cells = "".join(f"{seconds[stage]:>10.1f} s" for stage in STAGES)
        rates = f"{chosen.edges / total:>10,.0f}{seconds['cpu']:>8.1f} s{chosen.edges / seconds['cpu']:>14,.0f}"
        print(f"{name:<18}{cells}{total:>8.1f} s{rates}")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(figures | {"rows": counts, "same": same}, indent=1), encoding="utf-8")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
