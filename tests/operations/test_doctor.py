"""The doctor finds what is wrong, and each finding that is wrong ends in its remedy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.operations import doctor
from twhin_pipeline.store import Store

GOOD = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}


def test_this_environment_is_healthy(tmp_path):
    findings = doctor.examine(Store(str(tmp_path)))
    assert [f.line for f in findings if f.status == "wrong"] == []
    assert {"fbgemm lookup", "collectives (gloo)", "versions", "store"} <= {f.name for f in findings}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fbgemm-gpu-cpu": "1.6.0"}, "torch 2.13.0+cpu needs fbgemm 1.8"),
        ({"torchrec": "1.6.0"}, "torch 2.13.0+cpu needs torchrec 1.8"),
        ({"torch": "2.11.0"}, "only torch 2.13 was tested"),
        ({"torchrec": None}, "torchrec not installed"),
        ({"fbgemm-gpu": None, "fbgemm-gpu-cpu": None}, "fbgemm-gpu-cpu not installed"),
    ],
)
def test_versions_that_do_not_fit_are_named_with_the_remedy(change, told):
    versions = {name: version for name, version in {**GOOD, **change}.items() if version}
    finding = doctor.fitting_versions(versions)
    assert finding.status == "wrong"
    assert told in finding.line
    assert finding.line.endswith(doctor.REINSTALL)


def test_versions_that_fit_pass():
    assert doctor.fitting_versions(GOOD).status == "ok"
    assert doctor.fitting_versions({"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}).status == "ok"


def test_both_builds_of_fbgemm_in_one_folder_are_found():
    finding = doctor.one_fbgemm(["fbgemm-gpu", "fbgemm-gpu-cpu"])
    assert finding.status == "wrong"
    assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in finding.line


def test_owners_of_the_folder_are_read_from_what_is_installed(tmp_path, monkeypatch):
    """The stand-in distribution holds no code, so it must not count as a second build."""
    for name, record in (
        ("fbgemm_gpu-1.8.0.dist-info", "fbgemm_gpu/__init__.py,,\n"),
        ("fbgemm_gpu_cpu-1.8.0.dist-info", "fbgemm_gpu/__init__.py,,\n"),
        ("fbgemm_gpu_nightly-1.8.0.dist-info", "elsewhere/__init__.py,,\n"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        distribution = name.removesuffix("-1.8.0.dist-info").replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.8.0\n")
        (folder / "RECORD").write_text(record)
    # With the backport `importlib_metadata` imported (MLflow's libraries do), files that do not exist are left out.
    for package in ("fbgemm_gpu", "elsewhere"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert doctor.fbgemm_owners() == ["fbgemm-gpu", "fbgemm-gpu-cpu"]


def test_a_library_that_crashes_is_a_finding_and_not_the_end(tmp_path, monkeypatch):
    """The probe runs in a process of its own: a broken build may abort instead of raising."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.probe("fbgemm lookup", doctor.probe_fbgemm, "mend it")
    assert finding.status == "wrong"
    assert finding.line.endswith(": mend it")


def test_an_error_of_a_library_is_told(tmp_path, monkeypatch):
    (tmp_path / "fbgemm_gpu.py").write_text("raise ImportError('libtorch_cuda.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.probe("fbgemm lookup", doctor.probe_fbgemm, "mend it")
    assert finding.status == "wrong"
    assert "libtorch_cuda.so" in finding.line


@pytest.mark.parametrize(
    ("said", "owners", "driver", "status", "told"),
    [
        (("12.6", "True", "1", "True"), ["fbgemm-gpu"], True, "ok", "1 GPU(s), CUDA 12.6, NCCL"),
        (("12.6", "True", "1", "True"), ["fbgemm-gpu-cpu"], True, "wrong", "make setup VARIANT=gpu"),
        (("12.6", "True", "2", "False"), ["fbgemm-gpu"], True, "wrong", "no NCCL"),
        (("None", "False", "0", "False"), ["fbgemm-gpu-cpu"], True, "note", "VARIANT=gpu"),
        (("None", "False", "0", "False"), ["fbgemm-gpu-cpu"], False, "note", "training uses the CPU"),
    ],
)
def test_a_gpu_needs_nccl_and_the_cuda_build(said, owners, driver, status, told):
    finding = doctor.judge_cuda(*said, owners=owners, driver=driver)
    assert finding.status == status
    assert told in finding.line


def test_a_store_that_cannot_be_written_is_found(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("a file where the store's folder should be")
    finding = doctor.writable(Store(str(blocker / "store")))
    assert finding.status == "wrong"
    assert "TWHIN_HOME" in finding.line


def test_too_little_disk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_NEEDED", 1e9)
    finding = doctor.disk(Store(str(tmp_path / "not" / "made")))
    assert finding.status == "wrong"
    assert str(tmp_path) in finding.line


def test_too_little_memory_is_found(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_NEEDED", 1e9)
    assert doctor.memory().status == "wrong"


def test_too_little_shared_memory_is_worth_knowing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHARED_WANTED", 0)
    assert doctor.shared_memory().status == "ok"
    monkeypatch.setattr(doctor, "SHARED_WANTED", 1e9)
    finding = doctor.shared_memory()
    assert finding.status == "note"
    assert "--shm-size" in finding.remedy
    monkeypatch.setattr(doctor, "SHARED_MEMORY", tmp_path / "none")
    assert doctor.shared_memory().detail.startswith("0.0 GiB free")


@pytest.mark.parametrize(
    ("script", "status", "told"),
    [
        (None, "wrong", "sbatch, scontrol, scancel not found: run this on a machine of the cluster"),
        ("echo 'Slurmctld(primary) at head is UP'", "ok", "Slurmctld(primary) at head is UP"),
        ("echo 'Slurmctld(primary) at head is DOWN'", "wrong", "is DOWN: try later, or set launch.kind=local"),
        ("echo no slurm.conf >&2; exit 1", "wrong", "no slurm.conf: try later"),
    ],
)
def test_slurm_is_looked_at_where_it_starts_the_training(script, status, told, tmp_path, monkeypatch):
    for name in ("sbatch", "scontrol", "scancel") if script else ():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}" if script is None else f"{tmp_path}:/bin:/usr/bin")
    assert doctor.scheduler(None) == doctor.scheduler(LaunchConfig()) == []
    (found,) = doctor.scheduler(LaunchConfig(kind="slurm"))
    assert found.status == status and told in found.line


def test_kubernetes_client_is_looked_at_where_it_starts_the_training(monkeypatch):
    launch = LaunchConfig(kind="kubernetes", kubernetes={"image": "twhin:1"})
    assert [found.status for found in doctor.scheduler(launch)] == ["ok"]
    monkeypatch.setattr(doctor.extras, "find_spec", lambda name: None)
    (found,) = doctor.scheduler(launch)
    assert found.status == "wrong" and "twhin-pipeline[kubernetes]" in found.line


def test_the_command_looks_at_slurm_with_a_configuration_that_asks_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "training", lambda versions: [])
    monkeypatch.setenv("PATH", str(tmp_path))
    code = run_arguments(["doctor", "--home", str(tmp_path), "--config", "debian", "--set", "launch.kind=slurm"])
    assert code == 1 and "sbatch" in capsys.readouterr().out


def test_the_command_exits_with_1_where_something_is_wrong(tmp_path: Path, monkeypatch, capsys):
    wrong = doctor.Finding("fbgemm lookup", "wrong", "does not load", "install it anew")
    monkeypatch.setattr(doctor, "examine", lambda store, launch: [wrong])
    assert run_arguments(["doctor", "--home", str(tmp_path)]) == 1
    assert "does not load: install it anew" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda store, launch: [doctor.Finding("store", "ok", "can be written")])
    assert run_arguments(["doctor", "--home", str(tmp_path)]) == 0
