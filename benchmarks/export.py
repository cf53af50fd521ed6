"""Times `twhin export` beside writing as many bytes to the same disk.

    python benchmarks/export.py [--users 1000000] [--repeats 3] [--json figures.json]

A generated graph is trained for one epoch of few edges, so that each user and item has its vector of 128 numbers. A
repeat writes a file of random bytes as long as the export, with and without waiting for the disk (fsync), and exports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

from training import SNAPSHOT, config_of, train, watched

from twhin_pipeline.config import load_config
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.vectors.export import export

ROOT = Path(__file__).resolve().parent.parent
BLOCK = os.urandom(1 << 24)


def plain(path: Path, size: int) -> tuple[float, float]:
    """Write so many bytes; return the seconds until they are handed over, and until they are on the disk."""
    started = time.perf_counter()
    with path.open("wb") as file:
        for at in range(0, size, len(BLOCK)):
            file.write(BLOCK[: size - at])
        file.flush()
        handed_over = time.perf_counter() - started
        os.fsync(file.fileno())
    on_disk = time.perf_counter() - started
    path.unlink()
    return handed_over, on_disk


def size_of(manifests: dict[str, Manifest]) -> int:
    """Return the bytes of an export's files."""
    return sum(int(file["bytes"]) for manifest in manifests.values() for file in manifest.files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "export")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    home: Path = options.home.resolve() / str(options.users)
    home.mkdir(parents=True, exist_ok=True)
    edges, store = home / "edges.parquet", Store(str(home / "store"))
    config_path = config_of(home / "config.yaml", edges, 100, 1, 32_000)
    config = load_config(str(config_path))
    if not (home / "ready").exists():
        print("generating a graph, and training on it …", flush=True)
        generate(str(edges), users=options.users, items=options.users // 5, edges=4 * options.users, seed=1)
        for stage in ("ingest", "vocabulary", "sample"):
            command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(config_path)]
            watched([*command, "--home", store.root, "--snapshot", SNAPSHOT], home / f"{stage}.log")
        train(store, config_path, home)
        (home / "ready").touch()
    manifests = export(config, store, SNAPSHOT)
    size, rows = size_of(manifests), sum(manifest.rows for manifest in manifests.values())
    print(f"{rows:,} rows, {size / 1e6:,.0f} MB; {len(os.sched_getaffinity(0))} cores")
    found = []
    for repeat in range(options.repeats):
        load = os.getloadavg()[0]
        handed_over, on_disk = plain(home / "plain.bin", size)
        started = time.perf_counter()
        export(config, store, SNAPSHOT)
        seconds = time.perf_counter() - started
        found.append({"load": load, "handed_over": handed_over, "on_disk": on_disk, "export": seconds})
        print(
            f"repeat {repeat + 1}: export {seconds:.2f} s, {size / seconds / 1e6:,.0f} MB/s; plain bytes "
            f"{size / handed_over / 1e6:,.0f} MB/s, {size / on_disk / 1e6:,.0f} with fsync (load before: {load:.1f})",
            flush=True,
        )
    for name in ("handed_over", "on_disk"):
        shares = [row[name] / row["export"] for row in found]
        print(f"share of the rate of plain bytes, {name.replace('_', ' ')}: median {statistics.median(shares):.0%}")
    if options.json:
        options.json.write_text(
            json.dumps({"options": {k: str(v) for k, v in vars(options).items()}, "repeats": found})
        )


if __name__ == "__main__":
    main()
