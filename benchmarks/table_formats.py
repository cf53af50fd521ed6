"""The store's versions beside Iceberg's and Lance's: committing many files, opening, and replacing under a reader.

    python benchmarks/table_formats.py [--files 1000] [--repeats 3]

Each runs in an environment of its own, with pyarrow; theirs are made from PyPI. docs/explanation/store.md has the
figures and what was decided by them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from peers.environments import peer_python  # noqa: E402

PEERS = {"iceberg": "Iceberg", "lance": "Lance"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "table_formats")
    options = parser.parse_args()
    home = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    pythons = {"ours": Path(sys.executable), **{name: peer_python(home, peer) for name, peer in PEERS.items()}}
    plain = peer_python(home, "pyarrow")
    size = (
        "import sys; sys.path.insert(0, 'benchmarks/peers'); import table_format; print(table_format.installed_mib())"
    )
    base = float(subprocess.run([plain, "-c", size], check=True, capture_output=True, text=True, cwd=ROOT).stdout)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(options.repeats):
        for name, python in pythons.items():
            with tempfile.TemporaryDirectory(dir=home) as folder:
                command = [str(python), str(ROOT / "benchmarks/peers/table_format.py"), name, f"{folder}/t"]
                environment = os.environ | ({"PYTHONPATH": str(ROOT)} if name == "ours" else {})
                done = subprocess.run(
                    [*command, str(options.files)], check=False, capture_output=True, text=True, env=environment
                )
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr[-2000:]}")
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(name, found[name][-1], flush=True)
    print(f"\nmedians of {options.repeats}; {options.files:,} files of 1,000 rows, then 20 replacements of 5 files")
    for name, runs in found.items():
        middle = {key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "first_error"}
        more = "" if name == "ours" else f"; {middle['installed_mib'] - base:,.0f} MiB more than pyarrow"
        reads = f"{middle['reads']:.0f} reads {middle['wrong_reads']:.0f} wrong, {middle['failed_reads']:.0f} failed"
        print(
            f"{name}: commit {middle['commit_s']:.2f} s, open {middle['open_ms']:.1f} ms, replace "
            f"{middle['replace_ms']:.0f} ms, open after that {middle['open_after_ms']:.1f} ms; of {reads}{more}"
        )


if __name__ == "__main__":
    main()
