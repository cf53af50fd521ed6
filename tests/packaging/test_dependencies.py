"""Each package that is imported is asked for, each that is asked for is imported, and the extras are enough."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import small_store
from small_store import SNAPSHOT

from twhin_pipeline import extras
from twhin_pipeline.operations.doctor import FITS
from twhin_pipeline.vectors.export import export

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = PROJECT["optional-dependencies"]
OURS = {"twhin_pipeline", "assets", "resources"}
MODULE_OF = {"pyyaml": "yaml", "fbgemm-gpu": "fbgemm_gpu", "faiss-cpu": "faiss", "umap-learn": "umap"}
"""Modules that are not called like their distribution."""
COMES_WITH = {
    "annotated_types": "pydantic",
    "pydantic_core": "pydantic",
    "dagster_pipes": "dagster",
    "llvmlite": "numba",
    "sklearn": "umap",
    "starlette": "fastapi",
    "urllib3": "kubernetes",
}
"""Modules whose distribution is required, in the one release that fits, by another that we ask for."""
BY_URL = {"s3fs": "s3"}
"""What fsspec imports for a URL, and the extra that brings it."""
NOT_IMPORTED = {"dagster_webserver", "boto3", *BY_URL}
"""What is run and not imported: the UI; what MLflow imports for artifacts on S3; and what fsspec imports."""


def modules_of(requirements: list[str]) -> set[str]:
    """Return the modules that requirements are for, this package's own extras left out."""
    names = [re.match(r"[A-Za-z0-9._-]+", one)[0].lower() for one in requirements]
    return {MODULE_OF.get(name, name.replace("-", "_")) for name in names} - {"twhin_pipeline"}


def imported() -> dict[str, str]:
    """Return the modules of others that the package imports at run time, each with a file that does."""
    found = {}
    for folder in sorted(OURS):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for name in names:
                    found.setdefault(name.split(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | OURS}


RUNTIME = {extra: modules_of(listed) for extra, listed in OPTIONAL.items() if extra not in ("dev", "docs")}
BASE = modules_of(PROJECT["dependencies"])


def test_every_import_is_of_a_package_that_is_asked_for():
    asked = BASE.union(*RUNTIME.values())
    assert {name: path for name, path in imported().items() if COMES_WITH.get(name, name) not in asked} == {}


def test_every_package_that_is_asked_for_is_imported():
    assert BASE.union(*RUNTIME.values()) - set(imported()) - NOT_IMPORTED == set()


def test_a_missing_package_is_told_with_the_extra_that_brings_it():
    # `reader` is listed first: what training needs too is named by `train`.
    listed = {name: extra for extra, names in RUNTIME.items() for name in names}
    brought = {name: COMES_WITH.get(name, name) for name in imported()}
    wanted = {name: listed[package] for name, package in brought.items() if package not in BASE}
    # Only Dagster starts what speaks to its pipes.
    assert {name: extra for name, extra in wanted.items() if name != "dagster_pipes"} | BY_URL == extras.EXTRA_OF


def test_the_pins_are_releases_that_fit_one_another():
    (torch,) = FITS
    pins = {re.match(r"[a-z-]+", one)[0]: one for one in OPTIONAL["train"]}
    assert pins["torch"].startswith(f"torch>={torch},<")
    assert pins["torchrec"].startswith(f"torchrec>={FITS[torch]['torchrec']},<")
    assert pins["fbgemm-gpu"].startswith(f"fbgemm-gpu=={FITS[torch]['fbgemm']}.")
    stand_in = tomllib.loads((ROOT / "packaging" / "fbgemm-gpu" / "pyproject.toml").read_text())["project"]
    assert stand_in["version"].split("+")[0] == pins["fbgemm-gpu"].split("==")[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> str:
    """A small store with embeddings."""
    small = small_store.make(tmp_path_factory.mktemp("store"), config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    return small.store.root


def run(without: set[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where some packages cannot be imported, as if they were not installed."""
    start = f"import sys; sys.modules.update(dict.fromkeys({sorted(without)!r}))\n"
    env = {name: value for name, value in os.environ.items() if not name.startswith("TWHIN_")}
    command = [sys.executable, "-c", start + code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def twhin(without: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(without, "from twhin_pipeline import cli; cli.main(sys.argv[1:])", *arguments)


WITHOUT_EXTRAS = set(extras.EXTRA_OF)
WITHOUT_TRAINING = WITHOUT_EXTRAS - {"torch"}


def test_vectors_and_neighbors_come_without_any_extra(home):
    code = (
        "from twhin_pipeline import load_model\n"
        "model = load_model(sys.argv[1])\n"
        "assert model.get_user_embedding('u01').shape == (8,)\n"
        "print(*(name for name, _ in model.neighbors('user', 'u01', 3)))\n"
    )
    done = run(WITHOUT_EXTRAS, code, home)
    assert done.returncode == 0, done.stderr
    nearest = twhin(WITHOUT_EXTRAS, "neighbors", "user", "u01", "-k", "3", "--home", home, "--json")
    assert nearest.returncode == 0, nearest.stderr
    assert [one["id"] for one in json.loads(nearest.stdout)] == done.stdout.split()


@pytest.mark.parametrize(
    "arguments",
    [
        ["sql", "select count(*) from embeddings_user", "--home", "HOME"],
        ["config", "--config", "debian"],
        ["config", "--reference"],
        ["init", "examples/debian/2025-08-09.parquet", "-o", "OUT", "--yes"],
        ["doctor", "--home", "HOME"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_no_model_works_without_any_extra(home, tmp_path, arguments):
    places = {"HOME": home, "OUT": str(tmp_path / "c.yaml")}
    done = twhin(WITHOUT_EXTRAS, *(places.get(word, word) for word in arguments))
    assert done.returncode == 0, done.stderr


def test_recommendations_need_the_extra_reader_and_no_more(home):
    arguments = ["recommend", "u01", "--relation", "likes", "-k", "3", "--home", home, "--json"]
    refused = twhin(WITHOUT_EXTRAS, *arguments)
    assert refused.returncode == 2
    last = refused.stderr.splitlines()[-1]
    assert last == 'twhin: scoring an edge needs torch: pip install "twhin-pipeline[reader]"'
    done = twhin(WITHOUT_TRAINING, *arguments)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tails"]) == 3


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["run", "--config", "debian"], "train"),
        (["ingest", "--config", "debian"], "train"),
        (["mlflow"], "train"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
@pytest.mark.parametrize("without", [WITHOUT_EXTRAS, WITHOUT_TRAINING], ids=["none", "reader"])
def test_a_command_without_its_extra_ends_in_one_line_that_names_it(tmp_path, command, extra, without):
    done = twhin(without, *command, "--home", str(tmp_path / "home"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("twhin: this command needs ")
    assert re.search(rf': pip install .*"twhin-pipeline\[{extra}\]"$', line)


def test_without_a_driver_training_is_installed_with_the_cpu_build_of_fbgemm(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    program, verb, stand_in, wanted = shlex.split(extras.install("dagster"))
    assert (program, verb, wanted) == ("pip", "install", "twhin-pipeline[dagster]")
    project = tomllib.loads((Path(stand_in) / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["dependencies"]) == ("fbgemm-gpu", ["fbgemm-gpu-cpu==1.8.0"])
    assert extras.install("reader") == 'pip install "twhin-pipeline[reader]"'
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert extras.install("train") == 'pip install "twhin-pipeline[train]"'
