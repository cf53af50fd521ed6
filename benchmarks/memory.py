"""Holds the memory that `twhin plan` expects of a training run against the most that its ranks take.

    python benchmarks/memory.py [--only NAME ...] [--every 0.1] [--json figures.json]

Five runs of different shapes: many rows and few edges, many edges and few rows, long vectors with Adagrad, RMSprop with
validation against every entity, and two processes. Each trains on a graph that is generated once, evaluates, writes
checkpoints, and writes its model. What is measured is the memory of all processes of `twhin train`: the pages that each
has for itself, and pages that several have once (`Pss` of /proc/<pid>/smaps_rollup), looked at every `--every` seconds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml
from training import RELATIONS, SNAPSHOT

from twhin_pipeline.config import load_config, relations
from twhin_pipeline.operations import plan
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Shape:
    """One run: its graph, and what of the configuration is its own."""

    users: int
    items: int
    edges: int
    dim: int
    optimizer: dict[str, Any]
    processes: int = 1
    batch: int = 16_000
    """Edges a step, of a rank."""
    candidates: int = 100
    """Of each edge and side; half of the chunk, half of the entity type."""
    rows: int | None = None
    """Rows of each table, where it has more than entities."""
    sections: dict[str, Any] | None = None


SHAPES = {
    "many rows": Shape(100_000, 20_000, 1_000_000, 64, {"rowwise_adagrad": {"lr": 0.1}}, rows=3_000_000),
    "many edges": Shape(
        100_000, 20_000, 8_000_000, 128, {"rowwise_adagrad": {"lr": 0.1}}, batch=64_000, candidates=1_000
    ),
    "long vectors": Shape(400_000, 100_000, 1_000_000, 256, {"adagrad": {"lr": 0.1}}),
    "rmsprop": Shape(
        400_000, 100_000, 1_000_000, 128, {"rmsprop": {"lr": 0.01}}, rows=600_000,
        sections={"training": {"selection_metric": "filtered_mrr", "eval_max_edges": 2_000}},
    ),
    "two processes": Shape(1_500_000, 300_000, 5_000_000, 128, {"rowwise_adagrad": {"lr": 0.1}}, processes=2),
}  # fmt: skip


def config_of(path: Path, edges: Path, shape: Shape) -> Path:
    """Write a run's configuration."""
    tables = [
        {"name": name, "embedding_dim": shape.dim, "optimizer": shape.optimizer, "num_embeddings": shape.rows}
        for name in ("user", "item")
    ]
    data: dict[str, Any] = {
        "source": {"path": str(edges), "snapshots": [SNAPSHOT]},
        "split": {"strategy": "random", "validation": 0.01, "test": 0.01},
        "model": {
            "embeddings": {"tables": [{k: v for k, v in table.items() if v is not None} for table in tables]},
            "relations": [
                {"name": name, "lhs": lhs, "rhs": rhs, "operator": "translation"} for name, lhs, rhs in RELATIONS
            ],
            "comparator": "dot",
        },
        "training": {
            "num_epochs": 1,
            "num_train_steps": 24,
            "num_eval_steps": 16,
            "eval_log_every_n": 12,
            "checkpoint_every_n": 8,
            "checkpoint_max_to_keep": 1,
            "train_log_every_n": 8,
        },
        "train_data": {
            "per_replica_batch_size": shape.batch,
            "global_negatives": shape.candidates // 2,
            "in_batch_negatives": shape.candidates // 2,
        },
        "validation_data": {"per_replica_batch_size": 4_000, "global_negatives": 50, "in_batch_negatives": 0},
        "negatives": {"chunk_size": 1000, "degree_share": 0.0, "epochs": 1},
        "loss": {"name": "softmax"},
        "launch": {"nproc_per_node": shape.processes, "threads_per_process": max(1, 2 // shape.processes)},
    }
    for name, fields in (shape.sections or {}).items():
        data[name] = {**data[name], **fields}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def memory_of(process: psutil.Process) -> int:
    """Return a process's memory in bytes, pages that it shares with others by its part."""
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def is_rank(process: psutil.Process) -> bool:
    command = process.cmdline()
    return "twhin_pipeline.training.train" in command and "torch.distributed.run" not in command


def trained(command: list[str], log: Path, every: float, trace: bool) -> tuple[int, int]:
    """Run a training; return the most memory of all its processes, and of its ranks alone, in bytes."""
    peak = of_ranks = 0
    done = threading.Event()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)

        def watch() -> None:
            nonlocal peak, of_ranks
            parent = psutil.Process(process.pid)
            last = 0
            while not done.wait(every):
                try:
                    memory = {one: memory_of(one) for one in [parent, *parent.children(recursive=True)]}
                    ranks = sum(size for one, size in memory.items() if is_rank(one))
                except (psutil.Error, OSError):
                    continue
                now = sum(memory.values())
                peak, of_ranks = max(peak, now), max(of_ranks, ranks)
                if trace and abs(now - last) > 20 << 20:
                    last = now
                    lines = [line for line in log.read_text().splitlines() if line.strip()]
                    print(f"    {now / 2**20:8,.0f} MiB after: {lines[-1][:60] if lines else ''}", flush=True)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    if code:
        raise SystemExit(f"training failed with {code}; the end of {log}:\n{log.read_text()[-3000:]}")
    return peak, of_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--every", type=float, default=0.1)
    parser.add_argument("--trace", action="store_true", help="print how the memory grows")
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "memory")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.only:
        shape = SHAPES[name]
        home: Path = options.home.resolve() / name.replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        store, path = Store(str(home / "store")), config_of(home / "config.yaml", home / "edges.parquet", shape)
        if not (home / "ready").exists():
            generate(str(home / "edges.parquet"), users=shape.users, items=shape.items, edges=shape.edges, seed=1)
            for stage in ("ingest", "vocabulary", "sample"):
                command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(path)]
                command += ["--home", store.root, "--snapshot", SNAPSHOT]
                subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
            (home / "ready").touch()
        config = relations.resolve(load_config(str(path)), store, SNAPSHOT)
        sizes = plan.table_rows(config, store, SNAPSHOT, {})
        planned = plan.estimate(config, sizes, shape.processes, plan.training_edges(store, SNAPSHOT))
        shutil.rmtree(home / "store" / "twhin_model", ignore_errors=True)
        command = [sys.executable, "-m", "twhin_pipeline.cli", "train", "--config", str(path)]
        command += ["--home", store.root, "--snapshot", SNAPSHOT]
        measured, ranks = trained(command, home / "train.log", options.every, options.trace)
        expected = planned.node
        row = {"run": name, "planned": expected, "measured": measured, "ranks": ranks}
        rows.append(row)
        print(
            f"{name}: planned {expected / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB, ratio "
            f"{expected / measured:.2f}; the ranks alone {ranks / 2**30:.2f} GiB",
            flush=True,
        )
        for rank in planned.ranks if options.trace else []:
            print("   ", {k: round(v / 2**20) for k, v in vars(rank).items() if isinstance(v, int) and k != "rank"})
    if options.json:
        options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
