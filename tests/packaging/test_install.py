"""The wheel installed by pip into a fresh environment, with each extra, does the shortest useful thing.

These tests need pip's index and minutes: `make test-long`. TORCH_INDEX_URL is the index for torch, as in `make setup`.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small_store
from lake_tables import SCHEMA, WRITERS
from small_store import SNAPSHOT
from wheels import ROOT, build

from twhin_pipeline.vectors.export import export

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> str:
    """A small store with embeddings."""
    small = small_store.make(tmp_path_factory.mktemp("store"), config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    return small.store.root


class Installed:
    """A fresh environment with the wheel, and a folder outside the checkout to work in."""

    def __init__(self, folder: Path, wheel: Path, extra: str = "") -> None:
        self.bin, self.work, self.wheel = folder / "env" / "bin", folder / "work", wheel
        self.work.mkdir()
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        self.pip("install", f"twhin-pipeline[{extra}]")

    def pip(self, *arguments: str) -> None:
        """Run pip; this package comes from the wheel."""
        torch = os.environ.get("TORCH_INDEX_URL")
        if torch and {"twhin-pipeline[reader]", "twhin-pipeline[train]", "twhin-pipeline[dagster]"} & set(arguments):
            self("pip", "install", "-q", "--index-url", torch, "torch>=2.13,<2.14")
        named = [f"{one} @ {self.wheel.as_uri()}" if "twhin-pipeline" in one else one for one in arguments]
        self("pip", *named, "-q")
        self("pip", "check")

    def __call__(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment. The checkout is not on its path."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("TWHIN_", "PYTHON"))}
        env = {**kept, "DAGSTER_HOME": str(self.work), "OMP_NUM_THREADS": "1"}
        command = [str(self.bin / program), *arguments]
        done = subprocess.run(command, cwd=self.work, env=env, capture_output=True, text=True)
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    def python(self, code: str) -> str:
        """Run Python code and return what it prints."""
        return self("python", "-c", code).stdout

    def packages(self) -> set[str]:
        """Return the names of what is installed."""
        listed = json.loads(self("pip", "list", "--format", "json").stdout)
        return {one["name"].lower().replace("_", "-") for one in listed}


def test_without_extras_a_store_is_read(tmp_path, wheel, home):
    env = Installed(tmp_path, wheel)
    assert not {"torch", "dagster", "mlflow", "numba", "pandas"} & env.packages()
    assert env("twhin", "--version").stdout == f"twhin-pipeline {importlib.metadata.version('twhin-pipeline')}\n"
    nearest = json.loads(env("twhin", "neighbors", "user", "u01", "-k", "3", "--home", home, "--json").stdout)
    code = f"from twhin_pipeline import load_model; print(load_model({home!r}).neighbors('user', 'u01', 3)[0][0])"
    assert env.python(code).strip() == nearest[0]["id"]
    assert "30" in env("twhin", "sql", "select count(*) from embeddings_user", "--home", home).stdout
    env("twhin", "doctor", "--home", str(tmp_path / "new"))
    refused = env("twhin", "run", "-c", "debian", check=False)
    assert refused.returncode == 2
    assert refused.stderr.endswith('"twhin-pipeline[train]"\n')


def test_the_extra_reader_recommends_without_what_trains(tmp_path, wheel, home):
    env = Installed(tmp_path, wheel, "reader")
    assert not {"torchrec", "fbgemm-gpu", "dagster", "mlflow", "numba"} & env.packages()
    found = env("twhin", "recommend", "u01", "-r", "likes", "-k", "3", "--home", home, "--json").stdout
    assert len(json.loads(found)["tails"]) == 3
    code = f"from twhin_pipeline import load_model; print(load_model({home!r}).predict_relation('u01', 10, 'likes'))"
    assert 0 < float(env.python(code)) < 1


def install_as_told(env: Installed, extra: str) -> None:
    """Install an extra by the command that the package names for this machine."""
    told = env.python(f"from twhin_pipeline import extras; print(extras.install({extra!r}))")
    program, *arguments = shlex.split(told)
    assert program == "pip"
    env.pip(*arguments)


def test_the_extra_train_runs_the_whole_chain(tmp_path, wheel):
    env = Installed(tmp_path, wheel)
    install_as_told(env, "train")
    assert "dagster" not in env.packages()
    env("twhin", "doctor", "--home", "store")
    env("twhin", "generate", "graph.parquet", "--users", "300", "--items", "200", "--edges", "6000")
    done = env("twhin", "run", "-c", "graph.yaml", "--home", "store", "--set", "training.num_epochs=2")
    assert "registered models:/twhin/1" in done.stdout
    found = env("twhin", "recommend", "user_1", "-r", "fav", "-k", "3", "--home", "store", "--json").stdout
    assert len(json.loads(found)["tails"]) == 3
    # The bundled example is there too; its edges are read.
    env("twhin", "ingest", "-c", "debian", "-s", "2021-08-14", "--home", "debian")


def test_the_extra_dagster_shows_the_definitions(tmp_path, wheel):
    env = Installed(tmp_path, wheel)
    install_as_told(env, "dagster")
    done = env("dagster", "definitions", "validate", "-m", "twhin_pipeline.definitions")
    assert "Validation successful" in done.stdout + done.stderr


@pytest.mark.parametrize("extra", ["delta", "iceberg"])
def test_the_extras_of_lakes_read_a_table(tmp_path, wheel, extra):
    env = Installed(tmp_path, wheel, extra)
    path = WRITERS[extra](tmp_path / "table")
    code = f"from twhin_pipeline.graph import lake; print(*lake.names({path!r}, {extra!r}))"
    assert env.python(code).split() == SCHEMA.names
