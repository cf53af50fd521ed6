"""A small graph, a configuration of it, and a fresh Dagster instance: what the tests of the front door start from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import patience
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from patience import kill

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SNAPSHOT = "2025-01-01"
RELATIONS = [
    {"name": "likes", "lhs": "user", "rhs": "item"},
    {"name": "follows", "lhs": "user", "rhs": "user"},
]


def graph(path: Path, users: int = 200, items: int = 120, communities: int = 8, seed: int = 0) -> None:
    """Write named edges, nearly all inside a community (the entity's number modulo `communities`)."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[str]] = {"lhs": [], "rel": [], "rhs": []}
    for relation, kind, count in (("likes", "i", items), ("follows", "u", users)):
        lhs = rng.integers(0, users, 3_000)
        rhs = rng.integers(0, count // communities, 3_000) * communities + lhs % communities
        noise = rng.random(3_000) < 0.03
        rhs[noise] = rng.integers(0, count, int(noise.sum()))
        pairs = sorted({(int(a), int(b)) for a, b in zip(lhs, rhs, strict=True) if relation == "likes" or a != b})
        columns["lhs"] += [f"u{a}" for a, _ in pairs]
        columns["rel"] += [relation] * len(pairs)
        columns["rhs"] += [f"{kind}{b}" for _, b in pairs]
    pq.write_table(pa.table(columns), path)


def config(folder: Path, **sections: Any) -> dict[str, Any]:
    """A configuration that trains on the graph by two processes in a few seconds."""
    data: dict[str, Any] = {
        "source": {"path": f"{folder}/edges-{{snapshot}}.parquet"},
        "model": {
            "embeddings": {"tables": [{"name": name, "embedding_dim": 16} for name in ("user", "item")]},
            "relations": RELATIONS,
            "comparator": "cosine",
            "temperature": 0.1,
        },
        "training": {
            "num_epochs": 8, "train_log_every_n": 4, "eval_log_every_n": 20, "checkpoint_every_n": 20,
            "num_eval_steps": -1,
        },
        "train_data": {"per_replica_batch_size": 500, "global_negatives": 32, "in_batch_negatives": 16},
        "validation_data": {"per_replica_batch_size": 500, "global_negatives": 32, "in_batch_negatives": 16},
        "negatives": {"chunk_size": 100},
        "launch": {"nproc_per_node": 2, "threads_per_process": 1, "device": "cpu", "duckdb_memory_limit": "1GB"},
    }  # fmt: skip
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields}
    return data


class Home:
    """A folder with a graph, a store and a Dagster instance of its own."""

    def __init__(self, folder: Path, **sections: Any) -> None:
        self.folder, self.store = folder, folder / "store"
        (folder / "dagster").mkdir(parents=True)
        shutil.copy(ROOT / "resources" / "dagster.yaml", folder / "dagster")
        graph(folder / f"edges-{SNAPSHOT}.parquet")
        (folder / "config.yaml").write_text(yaml.safe_dump(config(folder, **sections)))
        # pytest's own variables and those of an outer run are not a user's.
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "TWHIN_", "DAGSTER_", "PYTEST_"))}
        self.env = {
            **kept,
            "DAGSTER_HOME": str(folder / "dagster"),
            "TWHIN_HOME": str(self.store),
            "TWHIN_CONFIG": str(folder / "config.yaml"),
            "PYTHONWARNINGS": "ignore::FutureWarning",
        }

    def command(self, selection: str, *more: str) -> list[str]:
        """Return the command that materializes a selection."""
        chosen = ["--select", selection, "--partition", SNAPSHOT]
        return [str(BIN / "dagster"), "asset", "materialize", "-m", "twhin_pipeline.definitions", *chosen, *more]

    def materialize(self, selection: str = "*") -> subprocess.CompletedProcess[str]:
        """Run `dagster asset materialize` in a process of its own, from the repository's root as `make demo` does."""
        return self._run(self.command(selection))

    def materialize_quickly(self, selection: str, **resources: Any) -> subprocess.CompletedProcess[str]:
        """The same with all steps in one process, none tried again, and resources configured for this run."""
        settings = {
            "execution": {"config": {"in_process": {"retries": {"disabled": {}}}}},
            "resources": {name: {"config": fields} for name, fields in resources.items()},
        }
        return self._run(self.command(selection, "--config-json", json.dumps(settings)))

    def _run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return patience.run(command, cwd=ROOT, env=self.env)

    def start(self, selection: str) -> subprocess.Popen[bytes]:
        """Start the same in the background, its output in a file."""
        with open(self.folder / "started.log", "wb") as log:
            return subprocess.Popen(self.command(selection), cwd=ROOT, env=self.env, stdout=log, stderr=log)

    def ranks(self) -> list[int]:
        """Return the ids of the processes that train for this store."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if f"--home {self.store}" in line and state != "Z":
                found.append(int(folder.name))
        return found


def end(process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Interrupt a process that we started and wait for it; where it does not end, kill it and those that it started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            kill(process)
