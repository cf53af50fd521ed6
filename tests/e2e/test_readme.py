"""What README.md tells a reader to do with edges of their own works as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def blocks() -> tuple[str, list[str]]:
    """Return the YAML and the commands of the section on one's own edges."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## Your own edges")[1].split("\n## ")[0]
    (config,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return config, commands.strip().splitlines()


def test_the_snippet_is_short():
    config, commands = blocks()
    assert len(config.strip().splitlines()) + len(commands) <= 10


def test_the_snippet_trains_on_a_csv_and_finds_neighbors(tmp_path):
    config, commands = blocks()
    rng = np.random.default_rng(0)
    books = ["dune", *(f"book{i}" for i in range(1, 20))]
    lines = ["lhs,rel,rhs", "ann,reads,dune"]
    lines += [f"reader{rng.integers(40)},reads,{books[rng.integers(20)]}" for _ in range(400)]
    lines += [f"reader{rng.integers(40)},follows,reader{rng.integers(40)}" for _ in range(100)]
    (tmp_path / "edges.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "mine.yaml").write_text(config)
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("TWHIN_CONFIG", None)
    outputs = []
    for command in commands:
        done = subprocess.run(shlex.split(command), cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    nearest = [line.split()[0] for line in outputs[-1].splitlines()[1:]]
    assert len(nearest) == 3
    assert set(nearest) <= set(books) - {"dune"}


def test_the_first_run_goes_from_an_event_log_to_recommendations(tmp_path):
    """The commands as they are written, on a smaller shop and with fewer epochs."""
    section = (ROOT / "README.md").read_text().split("## Your first run")[1].split("\n## ")[0]
    (commands,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    env = {**os.environ, "OMP_NUM_THREADS": "1"} | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("TWHIN_CONFIG", None)
    outputs = {}
    for command in commands.strip().splitlines():
        words = shlex.split(command)
        words += {"generate": ["--users", "200", "--products", "100"], "run": ["--set", "training.num_epochs=2"]}.get(
            words[1], []
        )
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        outputs[words[1]] = done.stdout
    assert "recipe     interactions" in outputs["run"]
    assert re.search(r"relation +edges +recall@20 +popular +item-kNN +ALS", outputs["run"])
    recommended = [line.split()[0] for line in outputs["recommend"].splitlines()[1:]]
    assert len(set(recommended)) == 5
    assert all(product.startswith("SKU-") for product in recommended)
