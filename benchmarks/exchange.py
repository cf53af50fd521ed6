"""What half precision between ranks costs in quality: one training whose ranks send each other float32, and float16.

    python benchmarks/exchange.py [--edges 2000000] [--repeats 2]

Two processes train the graph and model of `training.py`, one thread each. Ranks of one machine would read rows in each
other's memory; here they exchange them, as ranks of several machines do. Printed are the mean reciprocal rank of held-
out edges, of both and of ranks in shared memory, and the bytes that a rank sends in a step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from devices import prepare
from training import RELATIONS, ROOT, SNAPSHOT, config_of, mrr, read

from twhin_pipeline.config import load_config
from twhin_pipeline.operations import plan
from twhin_pipeline.store import Store
from twhin_pipeline.training import train
from twhin_pipeline.training.launch import environment
from twhin_pipeline.vectors.model_files import ModelTables

RANKS = 2
SIDES = ("shared memory", "fp32", "fp16")


def rank(arguments: list[str]) -> None:
    """Train as a rank that exchanges vectors with the others."""
    with mock.patch("twhin_pipeline.sharding.placement.share_tables", return_value="as asked"):
        train.main(arguments)


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=2, help="each with another seed")
    parser.add_argument("--batch", type=int, default=32_000, help="edges a step, of both ranks")
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "exchange")
    options = parser.parse_args()
    home: Path = options.home.resolve() / str(options.edges)
    home.mkdir(parents=True, exist_ok=True)
    store = Store(str(home / "store"))
    path = config_of(home / "config.yaml", home / "edges.parquet", 100, RANKS, options.batch)
    prepare(home, options.edges, path, store)
    held_out = read(store, "held_out/test")
    rows = {name: (store.manifest(f"vocabulary/{name}", SNAPSHOT).rows, "") for name in ("user", "item")}
    for seed in range(options.repeats):
        for side in SIDES:
            exchange = "fp16" if side == "fp16" else "fp32"
            data = yaml.safe_load(path.read_text())
            data["launch"] |= {"device": "cpu", "threads_per_process": 1, "exchange": exchange}
            data["training"]["seed"] = seed
            (home / "now.yaml").write_text(yaml.safe_dump(data))
            config = load_config(str(home / "now.yaml"))
            start = ["-m", "twhin_pipeline.training.train"] if side == "shared memory" else [__file__, "--rank"]
            command = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc-per-node={RANKS}",
                *start,
            ]
            command += ["--config", str(home / "now.yaml"), "--snapshot", SNAPSHOT, "--home", store.root]
            with (home / "log").open("w") as log:
                env = {**os.environ, **environment(config)}
                subprocess.run(command, check=True, stdout=log, stderr=log, env=env)
            tables = ModelTables.open(store, SNAPSHOT)
            vectors = {name: tables.table(name) for name in tables.names}
            operators = tables.relation_rows()
            translation = np.stack([operators[name].numpy() for name, _, _ in RELATIONS])
            found = mrr(vectors, translation, held_out, on_head=True)
            apart = config.launch.model_copy(update={"nnodes": RANKS, "nproc_per_node": 1})
            sent = plan.estimate(config.model_copy(update={"launch": apart}), rows, RANKS).sent_per_step
            told = "nothing but operators" if side == "shared memory" else f"{sent / 2**20:.1f} MiB a step"
            print(f"seed {seed}, {side}: held-out MRR {found:.4f}; a rank sends {told}", flush=True)


if __name__ == "__main__":
    main()
