"""Times the chain in Dagster with steps that are forks, as by default, beside steps that load the code anew.

    python benchmarks/dagster_steps.py [--users 300] [--repeats 3] [--json figures.json]

Each repeat materializes every asset of a generated shop log twice, by `dagster asset materialize`, each time into a
fresh store and a fresh instance. A first run that is not counted fills the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twhin_pipeline.config import load_config
from twhin_pipeline.graph.source import find_snapshots

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STARTS = {"fork": None, "spawn": {"spawn": {}}}
"""By name, the run's `start_method`: what the definitions say, or Dagster's own default."""


def materialize(folder: Path, config: Path, start: str) -> float:
    """Materialize everything into a new store below `folder`; return the seconds, the command's own start included."""
    home = folder / "run"
    shutil.rmtree(home, ignore_errors=True)
    (home / "dagster").mkdir(parents=True)
    shutil.copy(ROOT / "resources" / "dagster.yaml", home / "dagster")
    command = [str(BIN / "dagster"), "asset", "materialize", "-m", "twhin_pipeline.definitions", "--select", "*"]
    command += ["--partition", find_snapshots(load_config(str(config)))[-1]]
    if (method := STARTS[start]) is not None:
        execution = {"config": {"multiprocess": {"start_method": method}}}
        command += ["--config-json", json.dumps({"execution": execution})]
    env = {
        **os.environ,
        "DAGSTER_HOME": str(home / "dagster"),
        "TWHIN_HOME": str(home / "store"),
        "TWHIN_CONFIG": str(config),
    }
    started = time.perf_counter()
    with (folder / "run.log").open("wb") as log:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit((folder / "run.log").read_text(errors="replace")[-4_000:])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate = [sys.executable, "-m", "twhin_pipeline.cli", "generate", "--shape", "shop", str(folder / "shop")]
        subprocess.run([*generate, "--users", str(options.users)], check=True, stdout=subprocess.DEVNULL)
        [config] = (folder / "shop").glob("*.yaml")
        materialize(folder, config, "fork")
        found = []
        for _ in range(options.repeats):
            found.append({start: materialize(folder, config, start) for start in STARTS})
            print("  ".join(f"{start} {seconds:6.1f} s" for start, seconds in found[-1].items()), flush=True)
    ratio = statistics.median(one["spawn"] / one["fork"] for one in found)
    print(f"forks take 1/{ratio:.2f} of the time (median of {len(found)}); {len(os.sched_getaffinity(0))} cores")
    if options.json:
        options.json.write_text(json.dumps({"repeats": found, "ratio": ratio}, indent=1))


if __name__ == "__main__":
    main()
