"""Times both data engines on generated graphs and the same cores, and Spark from one worker to two.

    python benchmarks/engines.py [--edges 250000 1000000] [--workers 1 2] [--cores 2] [--json figures.json]

Each run is a process of its own: `twhin ingest`, `vocabulary` and `sample` without checks (a pool of 32 uniform and 32
popular candidates for each chunk and side, one epoch, masks of all training edges). The embedded engine has `--cores`
threads; Spark has a standalone master and workers of one core on this machine's loopback, with 1 GiB each. Starting
Java and workers counts. Seconds of processors are printed too: on a machine that others use, they say more than those
of the clock. Of several sizes, the line through them says what is fixed, and what each edge adds. Both engines' tables
are compared by their numbers of edges.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
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


def timed(config: str, home: Path, pids: Sequence[int] = ()) -> dict[str, dict[str, float]]:
    """Run the stages, and return the seconds (`clock`) of each, and those of processors (`cpu`)."""
    seconds: dict[str, dict[str, float]] = {"clock": {}, "cpu": {}}
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for stage in STAGES:
        with CpuTime(pids) as used:
            started = time.perf_counter()
            command = [sys.executable, "-c", f"import engines; engines.work({stage!r})", config, str(home)]
            subprocess.run(command, check=True, env=env)
            seconds["clock"][stage] = time.perf_counter() - started
        seconds["cpu"][stage] = used.seconds
    return seconds


def rows(home: Path) -> dict[str, int]:
    """Return how many rows the tables have."""
    store = Store(str(home))
    return {table: store.manifest(table, SNAPSHOT).rows for table in TABLES}


def measured(edges: int, cores: int, workers: Sequence[int]) -> dict[str, Any]:
    """Prepare a graph on both engines; return seconds by engine, and how many rows the tables have."""
    runs, counts = {}, {}
    with tempfile.TemporaryDirectory(prefix="engines-") as folder:
        base = Path(folder)
        graph = generate(
            str(base / "graph.parquet"), users=max(edges // 10, 100), items=max(edges // 50, 100), edges=edges, seed=1
        )
        runs["embedded"] = timed(configured(graph, cores, {"name": "embedded"}), base / "embedded")
        counts["embedded"] = rows(base / "embedded")
        for number in workers:
            name = f"spark, {number} worker{'s' if number > 1 else ''}"
            with spark_cluster.cluster(base / "cluster", number) as made:
                conf = {"spark.executor.memory": "1g", "spark.driver.memory": "1g"}
                on_spark = {"name": "spark", "master": made.url, "conf": conf}
                runs[name] = timed(configured(graph, cores, on_spark), base / "spark", made.pids)
            counts[name] = rows(base / "spark")
            for used in ("cluster", "spark"):
                shutil.rmtree(base / used)
    same = all(one[table] == counts["embedded"][table] for one in counts.values() for table in TABLES[:-1])
    return {"edges": edges, "load": os.getloadavg()[0], "runs": runs, "rows": counts, "same": same}


def show(figures: dict[str, Any]) -> None:
    """Print the seconds of one graph, and of processors in parentheses."""
    same = figures["same"]
    print(f"{figures['edges']:,} edges, load {figures['load']:.1f}; tables of the same numbers of edges: {same}")
    print(f"{'seconds (CPU)':<18}" + "".join(f"{name:>16}" for name in (*STAGES, "all")) + f"{'edges/CPU s':>14}")
    for name, seconds in figures["runs"].items():
        both = [[seconds[kind][stage] for stage in STAGES] for kind in ("clock", "cpu")]
        clock, cpu = ([*each, sum(each)] for each in both)
        cells = "".join(f"{f'{one:.1f} ({other:.1f})':>16}" for one, other in zip(clock, cpu, strict=True))
        print(f"{name:<18}{cells}{figures['edges'] / cpu[-1]:>14,.0f}")


def show_fit(all_figures: Sequence[dict[str, Any]]) -> None:
    """Print, by engine, what is fixed and what each million edges adds: the line through seconds of processors."""
    print("seconds of processors: fixed, and for each 1,000,000 edges")
    millions = [figures["edges"] / 1e6 for figures in all_figures]
    for name in all_figures[0]["runs"]:
        cells = []
        for stages in (*((stage,) for stage in STAGES), STAGES):
            cpu = [sum(figures["runs"][name]["cpu"][stage] for stage in stages) for figures in all_figures]
            slope, fixed = np.polyfit(millions, cpu, 1)
            cells.append(f"{f'{fixed:.1f} + {slope:.2f}':>16}")
        print(f"{name:<18}{''.join(cells)}")


def main(arguments: list[str] | None = None) -> int:
    """Run, print a table for each graph, and write the figures where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edges", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--cores", type=int, default=2, help="threads of the embedded engine")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    all_figures = []
    for edges in chosen.edges:
        all_figures.append(measured(edges, chosen.cores, chosen.workers))
        show(all_figures[-1])
        if chosen.json:
            Path(chosen.json).write_text(json.dumps(all_figures, indent=1), encoding="utf-8")
    if len(chosen.edges) > 1:
        show_fit(all_figures)
    return 0 if all(figures["same"] for figures in all_figures) else 1


if __name__ == "__main__":
    sys.exit(main())
