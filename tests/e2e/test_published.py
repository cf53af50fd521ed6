"""The published system's configuration runs as it is, on generated indexed edges; only its length is overridden."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twhin_pipeline.store import Store
from twhin_pipeline.vectors.opening import load_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "twitter.yaml")


def twhin(*arguments: str, folder: Path) -> str:
    """Run a command in `folder`, to which the configuration's paths are relative."""
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    env = {**os.environ, "TWHIN_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Generate the edges and run the chain for 25 of the 100,000 steps."""
    folder = tmp_path_factory.mktemp("published")
    twhin("generate", "--like", CONFIG, folder=folder)
    assert len(list(folder.glob("examples/twitter/*.parquet"))) == 1
    short = ["training.num_train_steps=25", "negatives.epochs=2", f"training.save_dir={folder}/checkpoints"]
    short += ["evaluation.candidates=1000"]
    twhin("run", "--config", CONFIG, *[word for s in short for word in ("--set", s)], folder=folder)
    return folder


def test_limit_and_offset_choose_the_edges(folder):
    """9,990 edges train and the 10 after them are held out, less what is merged or has no row."""
    store = Store(str(folder / "home"))
    (snapshot,) = store.snapshots("twhin_model")
    positives = store.manifest("training_set/positives", snapshot)
    assert 9_900 <= positives.rows <= 9_990
    assert 1 <= store.manifest("held_out/validation", snapshot).rows <= 10


def test_tables_have_the_published_sizes_and_exports_the_vocabulary_s(folder):
    store = Store(str(folder / "home"))
    (snapshot,) = store.snapshots("twhin_model")
    model = store.manifest("twhin_model", snapshot)
    rows = {"user": 0, "tweet": 0}
    for file in model.files:
        parts = file["path"].split("/")
        if parts[0] == "tables":
            rows[parts[1]] += file["rows"]
    assert rows == {"user": 424_241, "tweet": 72_543}
    assert model.details["steps"] == 25
    for entity in rows:
        exported = store.manifest(f"embeddings/{entity}", snapshot).rows
        assert exported == store.manifest(f"vocabulary/{entity}", snapshot).rows


def test_checkpoints_are_in_save_dir(folder):
    assert any((folder / "checkpoints").rglob("*"))


def test_the_published_getters_answer(folder):
    model = load_model(str(folder / "home"))
    store = Store(str(folder / "home"))
    (snapshot,) = store.snapshots("twhin_model")
    users = store.read("vocabulary/user", snapshot)["id"].to_pylist()
    tweets = store.read("vocabulary/tweet", snapshot)["id"].to_pylist()
    assert model.get_user_embedding(users[0]).shape == (4,)
    assert model.get_tweet_embedding(tweets[:3]).shape == (3, 4)
    assert 0 < model.predict_relation(users[0], tweets[0], "magic_recs") < 1
    found = json.loads(twhin("neighbors", "user", str(users[0]), "-k", "2", "--json", folder=folder))
    assert [row["id"] for row in found] == [name for name, _ in model.neighbors("user", users[0], 2)]
