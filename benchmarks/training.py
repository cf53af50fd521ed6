"""Times one epoch of training on a generated graph beside PyTorch-BigGraph, and how good the vectors are.

    python benchmarks/training.py [--edges 10000000] [--repeats 3] [--json figures.json]

Both train the same edges with the same settings: dimension 128, row-wise Adagrad, translation, dot product, softmax,
and for each edge and side 50 candidates of its chunk and 50 of its entity type. PyTorch-BigGraph gets an environment of
its own below `--home` (made on the first call, from PyPI). A repeat trains one after the other; the ratio is taken
within a repeat, and the median over repeats is printed. docs/performance.md explains the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from peers.environments import peer_python

from twhin_pipeline.config import load_config
from twhin_pipeline.kernels import parallel
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.sharding.row_optimizers import RowGradients
from twhin_pipeline.store import Store
from twhin_pipeline.training.launch import environment, torchrun_command
from twhin_pipeline.vectors.model_files import ModelTables

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = "2025-01-01"
RELATIONS = [
    ("follows", "user", "user"),
    ("fav", "user", "item"),
    ("reply", "user", "item"),
    ("retweet", "user", "item"),
]
DIM, LR = 128, 0.1
CANDIDATES = 1000
"""Uniform entities that a held-out edge's tail is ranked against."""


@dataclass(frozen=True)
class Outcome:
    """One training: edges a second in its epoch, the MRR of held-out tails, and the peak of memory."""

    edges_per_second: float
    mrr: float
    gib: float


def config_of(path: Path, edges: Path, candidates: int, processes: int, batch: int) -> Path:
    """Write the configuration of our side."""
    table = {"embedding_dim": DIM, "optimizer": {"rowwise_adagrad": {"lr": LR}}}
    data: dict[str, Any] = {
        "source": {"path": str(edges), "snapshots": [SNAPSHOT]},
        "split": {"strategy": "random", "validation": 0.0, "test": 0.002},
        "model": {
            "embeddings": {"tables": [{"name": name, **table} for name in ("user", "item")]},
            "relations": [
                {"name": name, "lhs": lhs, "rhs": rhs, "operator": "translation"} for name, lhs, rhs in RELATIONS
            ],
            "translation_optimizer": {"adagrad": {"lr": LR}},
            "comparator": "dot",
        },
        "training": {
            "num_epochs": 1,
            "num_train_steps": 1_000_000,
            "num_eval_steps": 0,
            "train_log_every_n": max(1, 400_000 // batch),
            "checkpoint_every_n": 1_000_000,
        },
        "train_data": {
            "per_replica_batch_size": batch // processes,
            "global_negatives": candidates // 2,
            "in_batch_negatives": candidates // 2,
        },
        "validation_data": {"global_negatives": 16, "in_batch_negatives": 0},
        "negatives": {"chunk_size": 1000, "degree_share": 0.0},
        "loss": {"name": "softmax"},
        "launch": {"nproc_per_node": processes},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


# To look at the pages of a process of some GiB takes a tenth of a second of a core.
WATCHED_EVERY_S = 3.0


def watched(command: list[str], log: Path, env: dict[str, str] | None = None) -> float:
    """Run a command, its output in `log`; return the peak of its processes' memory in GiB (shared pages once)."""
    peak = 0.0
    done = threading.Event()
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT)

        def watch() -> None:
            nonlocal peak
            parent = psutil.Process(process.pid)
            while not done.wait(WATCHED_EVERY_S):
                total = 0
                try:
                    for one in [parent, *parent.children(recursive=True)]:
                        total += one.memory_full_info().pss
                except psutil.Error:
                    continue
                peak = max(peak, total / 2**30)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    if code:
        raise SystemExit(f"{' '.join(command[:4])} … failed with {code}; the end of {log}:\n{log.read_text()[-2000:]}")
    return peak


def ours(home: Path, config_path: Path, held_out: dict[str, np.ndarray]) -> Outcome:
    """Train, and rank the held-out tails."""
    store = Store(str(home / "store"))
    speed, gib = train(store, config_path, home)
    tables = ModelTables.open(store, SNAPSHOT)
    vectors = {name: tables.table(name) for name in tables.names}
    operators = tables.relation_rows()
    translation = np.stack([operators[name].numpy() for name, _, _ in RELATIONS])
    return Outcome(speed, mrr(vectors, translation, held_out, on_head=True), gib)


def train(store: Store, config_path: Path, home: Path) -> tuple[float, float]:
    """Train as `twhin train` does, under torchrun; return edges a second and the peak of memory in GiB."""
    config = load_config(str(config_path))
    command = torchrun_command(config, str(config_path), store, SNAPSHOT, str(home / "ranks"))
    gib = watched(command, home / "ours.log", {**os.environ, **environment(config)})
    losses = ModelTables.open(store, SNAPSHOT).read("losses").to_pylist()
    # The first record has the time in which kernels are compiled or loaded, and memory is first touched.
    steps = np.diff([0, *(row["step"] for row in losses)])[1:]
    seconds = [n / row["edges_per_second"] for n, row in zip(steps, losses[1:], strict=True)]
    return float(steps.sum() / sum(seconds)), gib


def peer(home: Path, python: Path, work: Path, held_out: dict[str, np.ndarray]) -> Outcome:
    """Train with PyTorch-BigGraph."""
    folder = Path(json.loads(work.read_text())["home"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = home / "pbg.log"
    gib = watched([str(python), str(ROOT / "benchmarks/peers/pbg.py"), str(work)], log)
    (edges, seconds), *_ = re.findall(r"Processed (\d+) edges in ([0-9.]+) s", log.read_text())
    found = np.load(folder / "vectors.npz")
    vectors = {name: found[name] for name in ("user", "item")}
    return Outcome(float(edges) / float(seconds), mrr(vectors, found["translation"], held_out, on_head=False), gib)


def read(store: Store, asset: str) -> dict[str, np.ndarray]:
    """Return `lhs`, `rel` and `rhs` of a table."""
    table = store.read(asset, SNAPSHOT)
    return {name: table.column(name).to_numpy() for name in ("lhs", "rel", "rhs")}


@dataclass(frozen=True)
class Floor:
    """What an edge cannot do without: its matrix products, and gathering and updating its rows, at the machine's rates.

    `gflops` is the rate of the products of ten chunks of 1,000 edges; `gather_us` and `update_us` are microseconds a
    row of a table of a million, the update being a compiled loop of row-wise Adagrad over distinct, ascending rows.
    """

    gflops: float
    gather_us: float
    update_us: float

    def edges_per_second(self, candidates: int) -> float:
        """Return the bound: on each side a product forward and two backward, and the two ends and its chunk's pools."""
        flop = 2 * 3 * 2 * DIM * candidates
        rows = 2 + 2 * (candidates // 2) / 1000
        return 1e6 / (flop / self.gflops / 1e3 + rows * (self.gather_us + self.update_us))


def floor(candidates: int) -> Floor:
    """Measure the rates, each the best of some repeats."""
    queries, others = torch.randn(10, 1000, DIM), torch.randn(10, DIM, candidates)
    # Results go to memory that is there, as they do in training.
    scores = torch.empty(10, 1000, candidates)
    product = best(lambda _: torch.bmm(queries, others, out=scores))
    table, momentum = torch.randn(1_000_000, DIM), torch.zeros(1_000_000)
    gradient = torch.randn(20_000, DIM)
    drawn = [torch.randint(1_000_000, (20_000,)).unique() for _ in range(20)]
    rows = len(drawn[0])
    gather = best(lambda turn: torch.index_select(table, 0, drawn[turn % 20], out=gradient[: len(drawn[turn % 20])]))
    one_each = [RowGradients.of(asked, gradient[: len(asked)]) for asked in drawn]
    update = best(lambda turn: one_each[turn % 20].update(parallel.rowwise_adagrad, table, momentum, 1, LR, 1e-10))
    return Floor(2 * 10 * 1000 * DIM * candidates / product / 1e9, gather / rows * 1e6, update / rows * 1e6)


def best(work: Callable[[int], object], repeats: int = 40) -> float:
    """Return the shortest time of `work`, in seconds; see `turns`."""
    return min(turns(work, repeats))


def turns(work: Callable[[int], object], repeats: int) -> list[float]:
    """Return the seconds of each turn of `work`, which gets the turn's number; one turn before is not counted."""
    work(0)
    times = []
    for turn in range(repeats):
        started = time.perf_counter()
        work(turn)
        times.append(time.perf_counter() - started)
    return times


def mrr(
    vectors: dict[str, np.ndarray], translation: np.ndarray, held_out: dict[str, np.ndarray], *, on_head: bool
) -> float:
    """Return the mean reciprocal rank of held-out tails among themselves and uniform entities of their type.

    The translation is added to heads, as we do, or to tails, as PyTorch-BigGraph does.
    """
    ranks = []
    generator = np.random.default_rng(0)
    for number, (_, lhs, rhs) in enumerate(RELATIONS):
        chosen = held_out["rel"] == number
        heads = vectors[lhs][held_out["lhs"][chosen]].astype(np.float32)
        tails = vectors[rhs][held_out["rhs"][chosen]].astype(np.float32)
        others = vectors[rhs][generator.integers(len(vectors[rhs]), size=CANDIDATES)].astype(np.float32)
        if on_head:
            heads = heads + translation[number]
        else:
            tails, others = tails + translation[number], others + translation[number]
        true = (heads * tails).sum(1, keepdims=True)
        scores = heads @ others.T
        ranks.append(1 + (scores > true).sum(1) + 0.5 * (scores == true).sum(1))
    return float((1 / np.concatenate(ranks)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--candidates", type=int, default=100, help="for each edge and side, half of them in-batch")
    parser.add_argument("--processes", type=int, default=1, help="ranks of ours; their threads share the cores")
    parser.add_argument("--batch", type=int, default=32_000, help="edges a step of ours, of all ranks")
    parser.add_argument("--workers", type=int, default=2, help="of PyTorch-BigGraph")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "training")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    least = max(2_000_000, 10 * options.batch)
    if options.edges < least:
        parser.error(f"--edges must be at least {least:,}: the first 400,000, or first step, are not timed")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    home: Path = options.home.resolve() / f"{options.edges}-{options.candidates}"
    home.mkdir(parents=True, exist_ok=True)
    python = None if options.no_peer else peer_python(options.home.resolve(), "PyTorch-BigGraph")
    edges = home / "edges.parquet"
    config_path = config_of(home / "config.yaml", edges, options.candidates, options.processes, options.batch)
    store = Store(str(home / "store"))
    if not (home / "ready").exists():
        print(f"generating {options.edges:,} edges, and preparing them …", flush=True)
        generate(str(edges), users=options.users, items=options.items, edges=options.edges, seed=1)
        for stage in ("ingest", "vocabulary", "sample"):
            command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(config_path)]
            watched([*command, "--home", store.root, "--snapshot", SNAPSHOT], home / f"{stage}.log")
        np.savez(home / "edges.npz", **read(store, "training_set/positives"))
        (home / "ready").touch()
    held_out = read(store, "held_out/test")
    work = home / "work.json"
    told = {
        "home": str(home / "pbg"),
        "edges": str(home / "edges.npz"),
        "entities": {name: store.manifest(f"vocabulary/{name}", SNAPSHOT).rows for name in ("user", "item")},
        "relations": RELATIONS,
        "settings": {
            "dimension": DIM,
            "comparator": "dot",
            "global_emb": False,
            "loss_fn": "softmax",
            "lr": LR,
            "relation_lr": LR,
            "num_epochs": 1,
            "batch_size": 1000,
            "num_batch_negs": options.candidates // 2,
            "num_uniform_negs": options.candidates // 2,
            "workers": options.workers,
        },
    }
    work.write_text(json.dumps(told))
    trained = store.manifest("training_set/positives", SNAPSHOT).rows
    print(
        f"{trained:,} edges, {options.candidates} candidates an edge and side, {len(os.sched_getaffinity(0))} cores; "
        f"MRR of {len(held_out['lhs']):,} held-out tails among {CANDIDATES:,} uniform candidates"
    )
    rows = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        rates = floor(options.candidates)
        bound = rates.edges_per_second(options.candidates)
        told = f"{rates.gflops:.0f} GFLOP/s, a row: {rates.gather_us:.2f} µs to gather, {rates.update_us:.2f} to update"
        print(f"repeat {repeat + 1}, floor: {bound:,.0f} edges/s ({told})")
        found = {"ours": ours(home, config_path, held_out)}
        if python is not None:
            found["PyTorch-BigGraph"] = peer(home, python, work, held_out)
        for name, outcome in found.items():
            print(
                f"repeat {repeat + 1}, {name}: {outcome.edges_per_second:,.0f} edges/s, MRR {outcome.mrr:.4f}, peak "
                f"{outcome.gib:.2f} GiB (load before: {load:.1f})",
                flush=True,
            )
        rows.append(
            {
                "load": load,
                "floor": asdict(rates),
                "bound": bound,
                **{name: asdict(outcome) for name, outcome in found.items()},
            }
        )
    shares = [row["ours"]["edges_per_second"] / row["bound"] for row in rows]
    print(
        f"share of the floor: median {statistics.median(shares):.0%} of {', '.join(f'{share:.0%}' for share in shares)}"
    )
    if python is not None:
        ratios = [row["ours"]["edges_per_second"] / row["PyTorch-BigGraph"]["edges_per_second"] for row in rows]
        told = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"edges/s, ours to PyTorch-BigGraph's: median {statistics.median(ratios):.2f} of {told}")
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "repeats": rows}))


if __name__ == "__main__":
    main()
