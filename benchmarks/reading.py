"""Times opening exported embeddings and looking ids up, and what memory that takes.

    python benchmarks/reading.py [--rows 10000000] [--dim 16] [--ids string] [--json figures.json]

It writes a table of random vectors as `twhin export` does, and the files beside it that reading maps. A fresh process
then opens the model and asks for 1,000 and for 100,000 ids that are drawn at random, one by one and all at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from twhin_pipeline.config import parse_config
from twhin_pipeline.store import Store
from twhin_pipeline.vectors import entity_table
from twhin_pipeline.vectors.model_files import vectors_array, vectors_type

SNAPSHOT, BATCH = "2025-01-01", 1 << 18
MIB = 1 << 20


def id_of(row: int, kind: str) -> str | int:
    """Return the id of a row; neither ids nor their texts are in the order of rows."""
    mixed = row * 2_654_435_761 % (1 << 40)
    return f"user-{mixed:x}" if kind == "string" else mixed


def write(root: str, rows: int, dim: int, kind: str) -> dict[str, float]:
    """Write the embeddings of one entity type and return the seconds of the table and of the files for reading."""
    store, rng = Store(root), np.random.default_rng(0)
    table = {"name": "user", "embedding_dim": dim}
    relations = [{"name": "follows", "lhs": "user", "rhs": "user"}]
    section = {"embeddings": {"tables": [table]}, "relations": relations}
    config = parse_config({"source": {"path": "none.csv"}, "model": section})
    schema = pa.schema(
        [
            ("id", pa.string() if kind == "string" else pa.int64()),
            ("row", pa.int64()),
            pa.field("embedding", vectors_type(dim), nullable=False),
            ("trained_edges", pa.int64()),
        ]
    )
    started = time.perf_counter()
    model = {"twhin_model": "none"}
    with (
        store.replace("embeddings/user", SNAPSHOT, config_hash="benchmark", parents=model) as draft,
        draft.writer("part-00000.parquet", schema) as writer,
    ):
        for first in range(0, rows, BATCH):
            numbers = np.arange(first, min(first + BATCH, rows))
            ids = pa.array([id_of(row, kind) for row in numbers.tolist()], schema.field("id").type)
            vectors = vectors_array(rng.normal(size=(len(numbers), dim)).astype(np.float32))
            edges = pa.array(np.ones(len(numbers), np.int64))
            writer.write_table(pa.Table.from_arrays([ids, pa.array(numbers), vectors, edges], schema=schema))
    written = store.manifest("embeddings/user", SNAPSHOT)
    parents = {**model, "embeddings/user": written.version}
    with store.replace("embeddings/relations", SNAPSHOT, config_hash="benchmark", parents=parents) as draft:
        draft.write(pa.table({"relation": ["follows"], "embedding": [[0.0] * dim]}))
        draft.details = {"model": config.model.model_dump(mode="json"), "normalize": False}
    middle = time.perf_counter()
    entity_table.prepare(store, written)
    return {"table_s": middle - started, "index_s": time.perf_counter() - middle}


def read(root: str, rows: int, kind: str) -> dict[str, Any]:
    """Open the model in this process and look ids up."""
    from twhin_pipeline.vectors.opening import load_model

    process = psutil.Process()

    def own() -> float:
        info = process.memory_info()
        return (info.rss - info.shared) / MIB  # pages of mapped files are the system's to take back

    before, started = own(), time.perf_counter()
    model = load_model(root)
    found: dict[str, Any] = {"open_s": time.perf_counter() - started, "open_mib": own() - before}
    rng = np.random.default_rng(1)
    for count in (1_000, 100_000):
        ids = [id_of(row, kind) for row in rng.integers(0, rows, count).tolist()]
        started = time.perf_counter()
        vectors = model.get_embedding("user", ids)
        found[f"together_{count}_s"] = time.perf_counter() - started
        assert vectors.shape[0] == count
    ids = [id_of(row, kind) for row in rng.integers(0, rows, 1_000).tolist()]
    started = time.perf_counter()
    for one in ids:
        model.get_embedding("user", one)
    found["one_by_one_1000_s"] = time.perf_counter() - started
    missing = [f"{one}-x" for one in ids] if kind == "string" else [-int(one) - 1 for one in ids]
    started = time.perf_counter()
    assert not any(model.has("user", one) for one in missing)
    found["missing_1000_s"] = time.perf_counter() - started
    found["all_mib"] = own() - before
    return found


def main() -> None:
    """Write, then read in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--ids", choices=("string", "integer"), default="string")
    parser.add_argument("--json", help="write the figures here, too")
    parser.add_argument("--read", metavar="STORE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read, options.rows, options.ids)))
        return
    with tempfile.TemporaryDirectory(prefix="twhin-reading-") as root:
        figures: dict[str, Any] = write(root, options.rows, options.dim, options.ids)
        folder = next(Path(root).rglob("_index"))
        figures["index_mib"] = sum(path.stat().st_size for path in folder.iterdir()) / MIB
        figures["parquet_mib"] = sum(path.stat().st_size for path in Path(root).rglob("part-*.parquet")) / MIB
        arguments = ["--rows", str(options.rows), "--ids", options.ids, "--read", root]
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
        figures |= json.loads(done.stdout.splitlines()[-1])
    for name, value in figures.items():
        print(f"{name:<20}{value:>12,.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
