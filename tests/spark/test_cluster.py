"""The chain on a standalone master with two workers of one core, by the commands that the page names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest

from twhin_pipeline.config import load_config
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.pipeline import run_stage
from twhin_pipeline.spark import examples
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

SNAPSHOT = "2025-01-01"
EDGES = 1_000_000
SAMPLED = ["train_data={global_negatives: 32, in_batch_negatives: 16}", "negatives.epochs=1", "recipe=none"]


def twhin(*arguments: str, home: Path) -> str:
    """Run a command line as a person would, in a process of its own."""
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TWHIN_HOME": str(home)})
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def differing(one: Store, other: Store, table: str, columns: str) -> int:
    """Return how many rows only one of two stores has."""
    scans = [f"read_parquet({store.files(table, SNAPSHOT)!r})" for store in (one, other)]
    with duckdb.connect() as con:
        query = f"SELECT count(*) FROM ((SELECT {columns} FROM {{}}) EXCEPT ALL (SELECT {columns} FROM {{}}))"
        return sum(con.execute(query.format(*pair)).fetchall()[0][0] for pair in (scans, scans[::-1]))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_workers_of_a_standalone_master_prepare_a_million_edges_as_one_process_does(
    java: None, tmp_path: Path
) -> None:
    """Every edge, row and part is the same; checks of all tables pass, as each command runs them."""
    from spark_cluster import cluster

    config = generate(str(tmp_path / "graph.parquet"), users=100_000, items=20_000, edges=EDGES)
    settings = [option for one in SAMPLED for option in ("--set", one)]
    stages = ("ingest", "vocabulary", "sample")
    with cluster(tmp_path / "cluster", workers=2) as made:
        chosen = ["engine.name=spark", f"engine.master={made.url}", "engine.conf={spark.executor.memory: 1g}"]
        on_spark = [option for one in chosen for option in ("--set", one)]
        for stage in stages:
            twhin(stage, "--config", config, *settings, *on_spark, home=tmp_path / "spark")
        # Each worker has run tasks.
        assert all(list((tmp_path / "cluster" / f"worker-{number}").glob("app-*/*")) for number in (0, 1))
    for stage in stages:
        twhin(stage, "--config", config, *settings, home=tmp_path / "embedded")
    one, other = (Store(str(tmp_path / name)) for name in ("embedded", "spark"))
    assert len(other.files("raw_edges", SNAPSHOT)) > 1
    assert differing(one, other, "raw_edges", "lhs, rel, rhs, weight") == 0
    for entity in load_config(config).model.table_names:
        assert differing(one, other, f"vocabulary/{entity}", "id, row, degree") == 0
    for table in ("training_set/positives", "held_out/validation", "held_out/test"):
        assert differing(one, other, table, "lhs, rel, rhs, weight") == 0
        assert (
            one.manifest(table, SNAPSHOT).details["leakage" if "held" in table else "without_row"]
            == (other.manifest(table, SNAPSHOT).details["leakage" if "held" in table else "without_row"])
        )
    counts = [store.manifest("training_set/negatives", SNAPSHOT).details for store in (one, other)]
    # Chunks are cut a little otherwise, so some candidates differ, and their masks with them.
    assert counts[1]["masked"] == pytest.approx(counts[0]["masked"], rel=0.02)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_training_on_either_engines_tables_is_equally_good(
    spark: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into chunks otherwise, the same edges train as good a model: within what seeds make of it."""
    path = generate(str(tmp_path / "graph.parquet"), users=600, items=300, edges=12_000, communities=8)
    common = [
        *(f"model.embeddings.tables.{name}.embedding_dim=16" for name in ("user", "item")),
        "recipe=none",
        "training={num_epochs: 6, refit: false}",
        "train_data={per_replica_batch_size: 1000, global_negatives: 32, in_batch_negatives: 16}",
        "negatives.chunk_size=250",
        "launch={device: cpu, threads_per_process: 1}",
        "evaluation.baselines=[]",
    ]

    def quality(name: str, *more: str) -> float:
        overrides = [*common, *more]
        run = Run(load_config(path, overrides), path, overrides, Store(str(tmp_path / name)), SNAPSHOT)
        for stage in ("ingest", "vocabulary", "sample", "train", "evaluate"):
            run_stage(run, STAGES[stage], lambda _: None)
        metrics: dict[str, Any] = run.store.manifest("evaluation", SNAPSHOT).details["metrics"]
        return float(metrics["filtered_mrr"])

    seeds = [quality(f"embedded-{seed}", f"training.seed={seed}", f"negatives.seed={seed}") for seed in range(3)]
    monkeypatch.setattr(examples, "EDGES_PER_FILE", 1_000)
    made = quality("spark", "engine={name: spark, master: 'local[2]'}")
    chunks = [
        Store(str(tmp_path / name)).manifest("training_set/positives", SNAPSHOT).details["num_chunks"]
        for name in ("embedded-0", "spark")
    ]
    assert chunks[1] > chunks[0]
    spread = max(seeds) - min(seeds)
    assert min(seeds) - 2 * spread <= made <= max(seeds) + 2 * spread, (seeds, made)
    assert min(seeds) > 0.02


@pytest.mark.long
def test_a_master_that_is_not_there_is_one_clear_error(java: None, tmp_path: Path) -> None:
    config = generate(str(tmp_path / "graph.parquet"), users=50, items=20, edges=100)
    command = [sys.executable, "-m", "twhin_pipeline.cli", "ingest", "--config", config]
    command += ["--home", str(tmp_path / "home"), "--set", "engine={name: spark, master: 'spark://127.0.0.1:9'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("twhin: engine.master: Spark starts no session at spark://127.0.0.1:9"), done.stderr
