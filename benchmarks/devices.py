"""Training on a GPU beside training on this machine's cores: edges a second, in turns, on a generated graph.

    python benchmarks/devices.py [--edges 10000000] [--batch 32000 256000] [--repeats 3] [--devices cpu cuda]

Both run `twhin train` (torchrun, one process) on the graph and model of `training.py`: dimension 100, 100 candidates an
edge and side, row-wise Adagrad. For each size of a step it prints both speeds, the mean reciprocal rank of held-out
edges (a sound training reaches the same on both), and the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training import ROOT, SNAPSHOT, config_of, ours, read

from twhin_pipeline.operations.generate import generate
from twhin_pipeline.store import Store


def configured(home: Path, batch: int, device: str, candidates: int, runtime: dict[str, bool]) -> Path:
    """Write the configuration of one side."""
    path = config_of(home / f"{device}.yaml", home / "edges.parquet", candidates, 1, batch)
    data = yaml.safe_load(path.read_text())
    data["launch"]["device"] = device
    data["runtime"] = runtime if device == "cuda" else {}
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def prepare(home: Path, edges: int, config_path: Path, store: Store) -> None:
    """Generate the graph and make its training set, once."""
    if (home / "ready").exists():
        return
    print(f"generating {edges:,} edges, and preparing them …", flush=True)
    generate(str(home / "edges.parquet"), users=edges // 10, items=edges // 50, edges=edges, seed=1)
    for stage in ("ingest", "vocabulary", "sample"):
        command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(config_path)]
        command += ["--home", store.root, "--snapshot", SNAPSHOT]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (home / "ready").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=10_000_000)
    parser.add_argument("--batch", type=int, nargs="+", default=[32_000, 256_000], help="edges a step")
    parser.add_argument("--candidates", type=int, default=100, help="for each edge and side, half of them in-batch")
    parser.add_argument("--devices", nargs="+", choices=["cpu", "cuda"], default=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tf32", action="store_true", help="TensorFloat-32 for the products on the GPU")
    parser.add_argument("--amp", action="store_true", help="bfloat16 for the products on the GPU")
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "devices")
    options = parser.parse_args()
    if options.edges < 10 * max(options.batch):
        parser.error(f"--edges must be at least {10 * max(options.batch):,}: the first steps are not timed")
    home: Path = options.home.resolve() / f"{options.edges}-{options.candidates}"
    home.mkdir(parents=True, exist_ok=True)
    runtime = {"enable_tensorfloat32": options.tf32, "enable_amp": options.amp}
    store = Store(str(home / "store"))
    prepare(home, options.edges, configured(home, options.batch[0], "cpu", options.candidates, {}), store)
    held_out = read(store, "held_out/test")
    gpu = torch.cuda.get_device_name() if "cuda" in options.devices else "no GPU"
    edges = store.manifest("training_set/positives", SNAPSHOT).rows
    print(f"{len(os.sched_getaffinity(0))} cores; {gpu}; {edges:,} edges")
    for batch in options.batch:
        speeds: dict[str, list[float]] = {device: [] for device in options.devices}
        for repeat in range(options.repeats):
            for device in options.devices:
                found = ours(home, configured(home, batch, device, options.candidates, runtime), held_out)
                speeds[device].append(found.edges_per_second)
                said = f"{found.edges_per_second:,.0f} edges/s, MRR {found.mrr:.4f}, host memory {found.gib:.2f} GiB"
                print(f"{batch:,} edges a step, repeat {repeat + 1}, {device}: {said}", flush=True)
        if len(speeds) == 2:
            ratio = statistics.median(gpu / cpu for cpu, gpu in zip(speeds["cpu"], speeds["cuda"], strict=True))
            print(f"{batch:,} edges a step: {ratio:.2f} times the cores' speed (median)", flush=True)


if __name__ == "__main__":
    main()
