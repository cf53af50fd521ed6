"""What README.md and the pages of docs/ tell a reader to type works as it is written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pytest

from twhin_pipeline.store import Store, catalog

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SMALLER = {"generate": ["--users", "200", "--products", "100"], "run": ["--set", "training.num_epochs=2"]}
"""What a test adds to a command, so that it takes seconds: a smaller shop, fewer epochs."""


def section(title: str) -> str:
    """Return a section of README.md."""
    return (ROOT / "README.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def commands(text: str) -> list[str]:
    """Return the lines of all `sh` blocks, comments left out."""
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    return [bare for line in lines if (bare := line.partition(" #")[0].strip())]


def python(text: str) -> str:
    """Return all Python blocks as one script."""
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@dataclass
class Shell:
    """Runs commands in a folder, each line once, and keeps what they printed."""

    folder: Path
    outputs: dict[str, str] = field(default_factory=dict)

    def run(self, line: str) -> str:
        if line not in self.outputs:
            words = shlex.split(line)
            words += SMALLER.get(words[1], []) if "shop" in line else []
            self.outputs[line] = self.execute(words)
        return self.outputs[line]

    def execute(self, words: list[str]) -> str:
        env = {**os.environ, "OMP_NUM_THREADS": "1"} | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        for name in ("TWHIN_CONFIG", "TWHIN_HOME", "MLFLOW_TRACKING_URI"):
            env.pop(name, None)
        done = subprocess.run(words, cwd=self.folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Shell:
    """The folder of a reader who typed README's "Your first run": one shop and one store for all tests of this file."""
    shell = Shell(tmp_path_factory.mktemp("shop"))
    for line in commands(section("Your first run")):
        shell.run(line)
    return shell


def test_the_snippet_for_own_edges_is_short():
    text = section("Your own edges")
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(config.strip().splitlines()) + len(commands(text)) <= 10


def test_the_snippet_for_own_edges_trains_on_a_csv_and_finds_neighbors(tmp_path):
    text = section("Your own edges")
    (config,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    rng = np.random.default_rng(0)
    books = ["dune", *(f"book{i}" for i in range(1, 20))]
    lines = ["lhs,rel,rhs", "ann,reads,dune"]
    lines += [f"reader{rng.integers(40)},reads,{books[rng.integers(20)]}" for _ in range(400)]
    lines += [f"reader{rng.integers(40)},follows,reader{rng.integers(40)}" for _ in range(100)]
    (tmp_path / "edges.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "mine.yaml").write_text(config)
    shell = Shell(tmp_path)
    outputs = [shell.run(line) for line in commands(text)]
    nearest = [line.split()[0] for line in outputs[-1].splitlines()[1:]]
    assert len(nearest) == 3
    assert set(nearest) <= set(books) - {"dune"}


def test_the_first_run_goes_from_an_event_log_to_recommendations(shop):
    """The commands as they are written, on a smaller shop and with fewer epochs."""
    outputs = {line.split()[1]: output for line, output in shop.outputs.items()}
    assert "recipe     interactions" in outputs["run"]
    assert re.search(r"relation +edges +recall@20 +popular +item-kNN +ALS", outputs["run"])
    recommended = [line.split()[0] for line in outputs["recommend"].splitlines()[1:]]
    assert len(set(recommended)) == 5
    assert all(product.startswith("SKU-") for product in recommended)


def test_the_commands_of_the_pages_run_after_the_first_run(shop):
    """Those of the tutorial and of pages that go on from it; the long ones are README's own, so they run once."""
    first = commands(section("Your first run"))
    tutorial = commands((DOCS / "tutorial.md").read_text())
    assert [line for line in tutorial if line in first] == first
    others = ("index.md", "how-to/use-the-vectors.md", "how-to/retrieve.md", "reference/tables.md")
    pages = [tutorial] + [commands((DOCS / page).read_text()) for page in others]
    for line in (line for page in pages for line in page):
        assert shop.run(line).strip(), line
    assert "empty id" in shop.run(next(line for line in tutorial if "raw_edges_rejected" in line))


def test_the_python_of_the_pages_runs_after_the_first_run(shop):
    blocks = [python(section("Your first run"))]
    pages = ("how-to/use-the-vectors.md", "how-to/retrieve.md", "tutorial.md")
    blocks += [python((DOCS / page).read_text()) for page in pages]
    assert all(blocks)
    printed = shop.execute([sys.executable, "-c", "\n".join(blocks)])
    assert len(re.findall(r"^SKU-\d+ -?[\d.]+$", printed, re.MULTILINE)) == 5
    assert "['user', 'product']" in printed


def test_what_the_tutorial_names_in_dagster_is_there(shop, monkeypatch):
    from twhin_pipeline.definitions import build_defs

    monkeypatch.setenv("TWHIN_HOME", str(shop.folder / "store"))
    definitions = build_defs(config_path=str(shop.folder / "shop.yaml"))
    text = (DOCS / "tutorial.md").read_text()
    there = {one.name for one in (*definitions.schedules, *definitions.sensors)}
    named = set(re.findall(r"(?:schedule|sensor) `(\w+)`", text))
    assert named and named <= there
    keys = {key.to_user_string() for key in definitions.resolve_all_asset_keys()}
    assert {"raw_edges", "vocabulary/user", "embeddings/product", "evaluation"} <= keys


def documented() -> dict[str, list[str]]:
    """Return the columns of each table that docs/reference/tables.md has a section on."""
    text = (DOCS / "reference" / "tables.md").read_text()
    found = {}
    for part in text.split("\n### ")[1:]:
        title, _, body = part.partition("\n")
        rows = [line for line in body.split("\n## ")[0].splitlines() if line.startswith("| `")]
        found[title.replace("&lt;", "<").replace("&gt;", ">")] = [
            name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])
        ]
    views = [*found.pop("twhin_model"), *(name for name in found["calibration"] if name.startswith("calibration_"))]
    rows = [line for line in text.splitlines() if re.match(r"\| `(twhin_model|calibration)_", line)]
    assert views == [re.findall(r"`([^`]+)`", row)[0] for row in rows]
    columns = [re.findall(r"`([^`]+)`", row.split(" | ")[1]) for row in rows]
    found["calibration"] = [name for name in found["calibration"] if name not in views]
    return found | dict(zip(views, columns, strict=True))


def test_the_page_of_tables_has_every_table_and_its_columns(shop):
    store = Store(str(shop.folder / "store"))
    pages = documented()
    same = {
        "held_out_validation": "training_set/positives",
        "held_out_test": "training_set/positives",
        "held_out_validation_negatives": "training_set/negatives",
    }
    with duckdb.connect() as con:
        (snapshot,) = store.snapshots("raw_edges")
        for view in catalog.views(con, store, snapshot):
            if view == "tables" or view.startswith("refit_"):
                continue
            columns = {row[0] for row in con.execute(f'DESCRIBE "{view}"').fetchall()}
            page = same.get(view) or next(
                name
                for name in pages
                if re.fullmatch(name.replace("/", "_").replace("<entity>", "(user|product)"), view)
            )
            expected = {re.sub("<.*>", "<>", name) for name in pages[page]} - {"row_before"}  # of `twhin compact` alone
            assert {re.sub("^(loss|learning_rate)/.*", r"\1/<>", name) for name in columns} == expected, view
