"""What is in the wheel, and what works of it without a checkout. Nothing is installed, and no network is needed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from wheels import ROOT, build

PACKAGE = "twhin_pipeline"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel, as an archive."""
    return zipfile.ZipFile(build(ROOT, tmp_path_factory.mktemp("wheel")))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    """The wheel's files in a folder, as pip would put them into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    wheel.extractall(folder)
    return folder


def run(unpacked: Path, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python outside the checkout, on the unpacked wheel alone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TWHIN_", "DAGSTER_"))}
    kept |= {"PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=kept, capture_output=True, text=True)


def files(folder: Path) -> set[str]:
    """Return the names of the files in a folder of the repository, compiled ones left out."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name for name in found if "__pycache__" not in name}


def test_nothing_but_the_package_goes_into_site_packages(wheel):
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {PACKAGE}


def test_every_module_is_in_the_wheel_once_with_the_dagster_side_and_the_bundled_example(wheel):
    expected = {f"{PACKAGE}/{name}" for name in files(ROOT / PACKAGE) if not name.startswith("_dagster/")}
    expected.add(f"{PACKAGE}/_dagster/__init__.py")
    for source, target in (
        ("assets", "_dagster/assets"),
        ("resources", "_dagster/resources"),
        ("configs", "_bundled/configs"),
        ("examples/debian", "_bundled/examples/debian"),
        ("packaging/fbgemm-gpu", "_bundled/fbgemm-gpu"),
    ):
        expected |= {f"{PACKAGE}/{target}/{name}" for name in files(ROOT / source)}
    held = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert set(held) == expected
    assert len(held) == len(expected)
    assert f"{PACKAGE}/checks/sql/ids_unique.sql" in held


def test_the_metadata_name_the_pythons_and_the_extras(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
    assert metadata["Requires-Python"] == "<3.14,>=3.11"
    assert {"reader", "train", "dagster", "delta", "iceberg", "s3", "dev"} <= set(metadata.get_all("Provides-Extra"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in required if line.startswith(("torch", "dagster", "mlflow", "numba", "fbgemm"))]


def test_the_bundled_example_is_found_outside_the_checkout(unpacked, tmp_path):
    code = (
        "from twhin_pipeline.config import load_config, configuration_file\n"
        "from twhin_pipeline.graph.source import find_snapshots\n"
        "print(configuration_file.named('debian'))\n"
        "print(*find_snapshots(load_config(configuration_file.named('debian'))))\n"
    )
    done = run(unpacked, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    path, snapshots = done.stdout.splitlines()
    assert path == str(unpacked / PACKAGE / "_bundled" / "configs" / "debian.yaml")
    assert snapshots.split() == ["2021-08-14", "2023-06-10", "2025-08-09"]


def test_the_command_of_the_wheel_says_its_version(unpacked, tmp_path):
    done = run(unpacked, tmp_path, "-m", "twhin_pipeline.cli", "--version")
    assert (done.returncode, done.stdout) == (0, "twhin-pipeline 0.1.0\n")


def test_dagster_finds_the_definitions_of_the_wheel(unpacked, tmp_path):
    code = (
        "import sys, twhin_pipeline.definitions as found\n"
        "from twhin_pipeline._dagster.resources import launcher, pipes\n"
        "print(pipes.__file__, launcher.REPORTER)\n"
        "assert not {'assets', 'resources'} & set(sys.modules)\n"
        "print(*sorted(key.to_user_string() for key in found.defs.resolve_asset_graph().get_all_asset_keys()))\n"
    )
    done = run(unpacked, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    reporter, keys = done.stdout.splitlines()
    file, name = reporter.split()
    assert file == str(unpacked / PACKAGE / "_dagster" / "resources" / "pipes.py")
    assert name == "twhin_pipeline._dagster.resources.pipes:PipesReporter"
    assert {"raw_edges", "vocabulary/package", "twhin_model", "embeddings/package"} <= set(keys.split())
