"""Times the preparation of a generated graph with string ids beside PyTorch-BigGraph's importer and PyKEEN's.

    python benchmarks/preparation.py [--edges 10000000] [--repeats 3] [--json figures.json]

Ours reads Parquet, merges duplicates, gives entities their rows, splits, encodes and shuffles the edges, and samples
negatives with masks (50 in-batch and 50 uniform candidates for each edge and side); checks are timed apart. A peer
reads the first `--peer-edges` edges as a TSV file, gives entities their rows and encodes the edges: what we do from
ingest to encoding. Each peer gets an environment of its own below `--home` (made on the first call, from PyPI). A
repeat runs all of them one after the other; ratios are taken within a repeat, and medians over repeats are printed.
Smaller graphs, as dense as the whole one, show how the time grows with the edges. With `--memory-limit GIB` ours runs
in a memory cgroup of that size, its file cache included (root alone may make one). `--work CONFIG STORE [--no-checks]`
prepares one graph that is there in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import yaml
from peers.environments import PACKAGES, peer_python

from twhin_pipeline.checks import checks
from twhin_pipeline.config import load_config
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives, positives

ROOT = Path(__file__).resolve().parent.parent
SNAPSHOT = "2025-01-01"
RELATIONS = [
    ("follows", "user", "user"),
    ("fav", "user", "item"),
    ("reply", "user", "item"),
    ("retweet", "user", "item"),
]
ENTITIES = ("user", "item")
HELD_OUT = ("held_out/validation", "held_out/test", "held_out/validation_negatives")
STAGES = ("ingest", "vocabulary", "encoding", "negatives")
CHECKS = tuple(f"checks of {stage}" for stage in ("edges", "vocabulary", "sample"))
# What each figure of edges a second is about.
SPANS = {
    "vocabulary + encoding": ("vocabulary", "encoding"),
    "vocabulary to negatives": ("vocabulary", "encoding", "negatives"),
    "ingest to encoding": ("ingest", "vocabulary", "encoding"),
    "whole": STAGES,
    "whole with checks": STAGES + CHECKS,
}
IMPORTERS = {
    "PyTorch-BigGraph": """
import json, sys, time
from pathlib import Path
from torchbiggraph.config import EntitySchema, RelationSchema
from torchbiggraph.converters.import_from_tsv import convert_input_data
path, home, told = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
relations = [
    RelationSchema(name=name, lhs=lhs, rhs=rhs, operator="translation") for name, lhs, rhs in told["relations"]
]
entities = {name: EntitySchema(num_partitions=1) for name in told["entities"]}
(home / "edges").mkdir(parents=True)
(home / "entities").mkdir()
started = time.perf_counter()
convert_input_data(
    entities, relations, str(home / "entities"), [str(home / "edges")], [path], lhs_col=0, rhs_col=2, rel_col=1
)
print("seconds", time.perf_counter() - started)
""",
    "PyKEEN": """
import sys, time
from pykeen.triples import TriplesFactory
started = time.perf_counter()
TriplesFactory.from_path(sys.argv[1])
print("seconds", time.perf_counter() - started)
""",
}


def config_of(path: Path, edges_path: Path, threads: int) -> Path:
    """Write the configuration of our side."""
    data: dict[str, Any] = {
        "source": {"path": str(edges_path), "snapshots": [SNAPSHOT]},
        "split": {"strategy": "random", "validation": 0.0, "test": 0.002},
        "model": {
            "embeddings": {
                "tables": [{"name": name, "embedding_dim": 128, "optimizer": {"sgd": {"lr": 0.1}}} for name in ENTITIES]
            },
            "relations": [
                {"name": name, "lhs": lhs, "rhs": rhs, "operator": "translation"} for name, lhs, rhs in RELATIONS
            ],
        },
        "training": {"num_epochs": 1},
        "train_data": {"per_replica_batch_size": 8000, "global_negatives": 50, "in_batch_negatives": 50},
        "validation_data": {"global_negatives": 16, "in_batch_negatives": 0},
        "negatives": {"chunk_size": 1000, "degree_share": 0.0},
        "launch": {"data_threads": threads},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def work(config_path: str, home: str, *options: str) -> None:
    """Prepare the graph in this process, and print the seconds of each stage and, but for `--no-checks`, its checks."""
    config, store = load_config(config_path), Store(home)
    vocabularies = [f"vocabulary/{name}" for name in ENTITIES]
    seconds = {}

    def timed(name: str, function: Any, *arguments: Any) -> None:
        started = time.perf_counter()
        function(*arguments)
        seconds[name] = time.perf_counter() - started

    def check(name: str, tables: list[str]) -> None:
        if "--no-checks" not in options:
            timed(f"checks of {name}", checks.run_blocking, config, store, SNAPSHOT, tables)

    timed("ingest", raw_edges.ingest, config, store, SNAPSHOT)
    check("edges", ["raw_edges"])
    timed("vocabulary", vocabulary.build, config, store, SNAPSHOT)
    check("vocabulary", vocabularies)
    timed("encoding", positives.build_positives, config, store, SNAPSHOT)
    timed("negatives", negatives.build, config, store, SNAPSHOT)
    check("sample", ["training_set/positives", "training_set/negatives", *HELD_OUT])
    print(json.dumps(seconds))


def watched(command: list[str]) -> tuple[str, float]:
    """Run a command; return the last line of its output, and the peak of its memory in GiB (shared pages once)."""
    peak = 0.0
    done = threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)

    def watch() -> None:
        nonlocal peak
        parent = psutil.Process(process.pid)
        while not done.wait(0.2):
            try:
                peak = max(peak, parent.memory_full_info().pss / 2**30)
            except psutil.Error:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed with {process.returncode}; the end of what it said:\n{output[-2000:]}")
    return output.strip().splitlines()[-1], peak


@contextmanager
def limited(gib: float | None) -> Iterator[list[str]]:
    """Yield how a command begins that runs with so much memory, in a cgroup of its own; nothing without a limit."""
    if gib is None:
        yield []
        return
    old = Path("/sys/fs/cgroup/memory")
    group = (old if old.exists() else Path("/sys/fs/cgroup")) / f"twhin-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if old.exists() else "memory.max")).write_text(str(int(gib * 2**30)))
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def ours(home: Path, config_path: Path, limit: float | None, checks: bool) -> tuple[dict[str, float], float]:
    """Prepare the graph in a process of its own; return the seconds by stage, and the peak of memory."""
    shutil.rmtree(home / "store", ignore_errors=True)
    command = [sys.executable, __file__, "--work", str(config_path), str(home / "store")]
    with limited(limit) as begin:
        line, gib = watched([*begin, *command, *([] if checks else ["--no-checks"])])
    return json.loads(line), gib


def peer(name: str, python: Path, home: Path, path: Path) -> tuple[float, float]:
    """Import a TSV file in a process of its own; return the seconds, and the peak of memory."""
    shutil.rmtree(home / "peer", ignore_errors=True)
    told = json.dumps({"relations": RELATIONS, "entities": ENTITIES})
    line, gib = watched([str(python), "-c", IMPORTERS[name], str(path), str(home / "peer"), told])
    return float(line.split()[-1]), gib


def graph(home: Path, size: int, threads: int) -> Path:
    """Generate a graph of so many edges where it is not there yet; return its configuration."""
    folder = home / str(size)
    if not (folder / "ready").exists():
        print(f"generating {size:,} edges …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = str(folder / "edges.parquet")
        generate(path, users=max(size // 10, 100), items=max(size // 50, 100), edges=size, seed=1)
        (folder / "ready").touch()
    return config_of(folder / "config.yaml", folder / "edges.parquet", threads)


def first_edges(source: Path, path: Path, size: int) -> int:
    """Write the first edges of a Parquet file as TSV; return how many there are."""
    written = 0
    schema = pa.schema([(column, pa.string()) for column in ("lhs", "rel", "rhs")])
    options = pc.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with pc.CSVWriter(path, schema, write_options=options) as writer:
        for batch in pq.ParquetFile(source).iter_batches(columns=schema.names):
            taken = batch.slice(0, size - written)
            writer.write_batch(pa.record_batch(taken.columns, schema=schema))
            written += len(taken)
            if written == size:
                break
    return written


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--sizes", type=int, nargs="*", help="smaller graphs (default: a tenth and three tenths)")
    parser.add_argument("--peer-edges", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "preparation")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--memory-limit", type=float, help="GiB for ours, its file cache included")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    home: Path = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    pythons = {} if options.no_peers else {name: peer_python(home, name) for name in PACKAGES}
    smaller = [options.edges // 10, options.edges * 3 // 10] if options.sizes is None else options.sizes
    sizes = [*sorted(set(smaller) - {0, options.edges}), options.edges]
    configs = {size: graph(home, size, options.threads) for size in sizes}
    tsv = home / "edges.tsv"
    peer_edges = first_edges(home / str(options.edges) / "edges.parquet", tsv, options.peer_edges) if pythons else 0
    print(f"{options.edges:,} edges, {options.threads} threads, {len(os.sched_getaffinity(0))} cores")
    # Compiled kernels are kept beside their modules; the first run makes them.
    ours(home, configs[sizes[0]], None, checks=not options.no_checks)
    spans = {name: span for name, span in SPANS.items() if not (options.no_checks and set(span) & set(CHECKS))}
    rows = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        row: dict[str, Any] = {"load": load, "ours": {}, "peers": {}}
        for size in sizes:
            seconds, gib = ours(home, configs[size], options.memory_limit, checks=not options.no_checks)
            speeds = {name: size / sum(seconds[stage] for stage in span) for name, span in spans.items()}
            row["ours"][size] = {"seconds": seconds, "edges_per_second": speeds, "gib": gib}
            told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
            print(f"repeat {repeat + 1}, ours, {size:,} edges: {told}; peak {gib:.2f} GiB", flush=True)
        for name, python in pythons.items():
            taken, gib = peer(name, python, home, tsv)
            row["peers"][name] = {"edges_per_second": peer_edges / taken, "gib": gib}
            print(
                f"repeat {repeat + 1}, {name}, {peer_edges:,} edges: {taken:.1f} s; peak {gib:.2f} GiB "
                f"(load before the repeat: {load:.1f})",
                flush=True,
            )
        rows.append(row)
    print("\nmedians, edges/s")
    for size in sizes:
        found = [row["ours"][size] for row in rows]
        told = ", ".join(
            f"{name} {statistics.median(one['edges_per_second'][name] for one in found):,.0f}" for name in spans
        )
        print(f"ours, {size:,} edges: {told}; peak {max(one['gib'] for one in found):.2f} GiB")
    for stage in (*STAGES, *(() if options.no_checks else CHECKS)):
        taken = statistics.median(row["ours"][options.edges]["seconds"][stage] for row in rows)
        print(f"  {stage}: {taken:.2f} s, {options.edges / taken:,.0f} edges/s")
    for name in pythons:
        speeds = [row["peers"][name]["edges_per_second"] for row in rows]
        print(f"{name}, {peer_edges:,} edges: {statistics.median(speeds):,.0f}")
        for span in ("ingest to encoding", "vocabulary + encoding"):
            own = [row["ours"][options.edges]["edges_per_second"][span] for row in rows]
            ratios = [a / b for a, b in zip(own, speeds, strict=True)]
            told = ", ".join(f"{ratio:.1f}" for ratio in ratios)
            print(f"  ours ({span}) to {name}'s: median {statistics.median(ratios):.1f} of {told}")
    print(f"load: {', '.join(format(row['load'], '.1f') for row in rows)}")
    if options.json:
        options.json.write_text(json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "repeats": rows}))


if __name__ == "__main__":
    main()
