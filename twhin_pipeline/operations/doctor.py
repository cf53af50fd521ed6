"""What is installed and whether it works here: each finding that is wrong ends in its remedy.

Compiled code is tried in a process of its own, so that a library that crashes is a finding, not the end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from twhin_pipeline import extras, scratch
from twhin_pipeline.bundled import CHECKOUT
from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.machine import SHARED_MEMORY
from twhin_pipeline.store import Store

# Each release of fbgemm and of torchrec is built for one release of torch (major.minor).
FITS = {
    "2.13": {"torchrec": "1.8", "fbgemm": "1.8"},
}
if CHECKOUT:
    REINSTALL = "run `make clean-venv setup` (with VARIANT=gpu for CUDA)"
    USE_GPU = "run `make setup VARIANT=gpu`"
else:
    REINSTALL = f"make a new environment and run `{extras.install('train')}` in it"
    USE_GPU = "make a new environment with the CUDA builds of torch and fbgemm-gpu"
PROBE_TIMEOUT = 120.0  # seconds
SHARED_WANTED = 1.0  # GiB free, for tables of some millions of rows
DISK_NEEDED = 2.0  # GiB free, for the bundled example with its checkpoints
MEMORY_NEEDED = 4.0  # GiB available, for the same

Status = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `wrong` makes the doctor exit with 1; a `note` is worth knowing."""

    name: str
    status: Status
    detail: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The finding in one line, its remedy last."""
        return f"{self.detail}: {self.remedy}" if self.remedy else self.detail


def examine(store: Store, launch: LaunchConfig | None = None) -> list[Finding]:
    """Look at everything, the cheapest first. What cannot work without a broken part is left out.

    Args:
        store: Where tables are.
        launch: How training starts, where a configuration says so: its scheduler is looked at too.
    """
    distributions = installed()
    findings = [python_version(sys.version_info[:2])]
    if reads_only(distributions):
        message = "not installed; stores can be read"
        findings.append(Finding("training", "note", message, f"`{extras.install('train')}` adds it"))
    else:
        findings += training(distributions)
    findings += [disk(store), writable(store), *scheduler(launch)]
    return [*findings, chromium()] if CHECKOUT else findings


def reads_only(versions: Mapping[str, str]) -> bool:
    """Tell whether nothing is installed that only training needs."""
    return not {"torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu"} & set(versions)


def training(versions: Mapping[str, str]) -> list[Finding]:
    """Look at what training needs."""
    findings = [fitting_versions(versions), one_fbgemm(fbgemm_owners())]
    probes: list[tuple[str, Callable[[], None], str]] = [
        ("fbgemm lookup", probe_fbgemm, REINSTALL),
        (
            "collectives (gloo)",
            probe_gloo,
            "let processes on this machine reach 127.0.0.1, then run `twhin doctor` again",
        ),
    ]
    if "torch" in versions:
        findings += [probe(*p) for p in probes]
        findings.append(cuda())
    return [*findings, memory(), shared_memory()]


def installed() -> dict[str, str]:
    """Return the versions of the distributions whose fit matters, by name; what is missing is left out."""
    names = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "dagster", "duckdb", "mlflow", "pyarrow", "pydantic")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def python_version(version: tuple[int, ...]) -> Finding:
    """3.11 to 3.13."""
    text = f"Python {version[0]}.{version[1]}"
    if not (3, 11) <= version < (3, 14):
        return Finding("python", "wrong", text, "take Python 3.11 to 3.13 and make the environment anew")
    return Finding("python", "ok", text)


def fitting_versions(versions: Mapping[str, str]) -> Finding:
    """torch, torchrec and fbgemm of releases that were built for one another."""
    name = "versions"
    missing = [n for n in ("torch", "torchrec") if n not in versions]
    if "fbgemm-gpu" not in versions and "fbgemm-gpu-cpu" not in versions:
        missing.append("fbgemm-gpu-cpu")
    if missing:
        return Finding(name, "wrong", f"{', '.join(missing)} not installed", REINSTALL)
    fbgemm = versions.get("fbgemm-gpu-cpu") or versions["fbgemm-gpu"]
    line = f"torch {versions['torch']}, torchrec {versions['torchrec']}, fbgemm {fbgemm}"
    fits = FITS.get(_release(versions["torch"]))
    if fits is None:
        return Finding(name, "wrong", f"{line}; only torch {', '.join(FITS)} was tested", REINSTALL)
    wrong = [
        f"{part} {fits[part]}"
        for part, version in (("torchrec", versions["torchrec"]), ("fbgemm", fbgemm))
        if _release(version) != fits[part]
    ]
    if wrong:
        return Finding(name, "wrong", f"{line}; torch {versions['torch']} needs {' and '.join(wrong)}", REINSTALL)
    return Finding(name, "ok", line)


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def fbgemm_owners() -> list[str]:
    """Return the distributions that put code into the folder `fbgemm_gpu/`."""
    owners = []
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu", "fbgemm-gpu-genai"):
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError:
            continue
        if any(file.parts[0] == "fbgemm_gpu" for file in files):
            owners.append(name)
    return owners


def one_fbgemm(owners: list[str]) -> Finding:
    """One build of fbgemm: the CUDA and the CPU build overwrite each other's files, and then neither loads."""
    name = "one fbgemm"
    if len(owners) > 1:
        remedy = f"`pip uninstall -y {' '.join(owners)}`, then {REINSTALL}"
        return Finding(name, "wrong", f"{' and '.join(owners)} share the folder fbgemm_gpu/", remedy)
    if not owners:
        return Finding(name, "wrong", "no build of fbgemm is installed", REINSTALL)
    return Finding(name, "ok", owners[0])


def probe(name: str, function: Callable[[], None], remedy: str) -> Finding:
    """Run one of this module's probe functions in a process of its own."""
    code = f"from twhin_pipeline.operations import doctor; doctor.{function.__name__}()"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Finding(name, "wrong", f"no answer within {PROBE_TIMEOUT:.0f} s", remedy)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1].strip()[:200] if lines else f"ended by signal or code {done.returncode}"
        return Finding(name, "wrong", why, remedy)
    return Finding(name, "ok", done.stdout.strip().splitlines()[-1])


def probe_fbgemm() -> None:
    """Look one row up in a torchrec table and step it by the fused optimizer. Raises where that does not work."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    cuda = torch.cuda.is_available()
    place = (EmbeddingLocation.DEVICE, ComputeDevice.CUDA) if cuda else (EmbeddingLocation.HOST, ComputeDevice.CPU)
    device = torch.device("cuda" if cuda else "cpu")
    table = SplitTableBatchedEmbeddingBagsCodegen(
        embedding_specs=[(4, 8, *place)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        pooling_mode=PoolingMode.NONE,
        device=device,
    )
    weights = table.split_embedding_weights()[0]
    weights.data.fill_(1.0)
    ids = torch.tensor([2], device=device)
    out = table(ids, torch.tensor([0, 1], device=device))
    out.sum().backward()
    moved = (weights != 1.0).any(dim=1).tolist()
    if moved != [False, False, True, False]:
        raise RuntimeError(f"a step on row 2 moved rows {moved}")
    print(f"a row is found and stepped on {device.type}")


def probe_gloo() -> None:
    """Add two processes' numbers. Raises where that does not work."""
    import torch.multiprocessing as mp

    with scratch.folder("doctor") as folder:
        # Fork is quick, and nothing has started threads yet.
        mp.start_processes(_gloo_rank, args=(f"{folder}/meet",), nprocs=2, start_method="fork")
    print("two processes added their numbers")


def _gloo_rank(rank: int, path: str) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    if total.item() != 3.0:
        raise RuntimeError(f"1 + 2 came to {total.item()} by gloo")


def cuda() -> Finding:
    """A GPU, if there is one, must have NCCL and the CUDA build of fbgemm; none is no mistake."""
    code = (
        "import torch, torch.distributed as d; print(torch.version.cuda, torch.cuda.is_available(), "
        "torch.cuda.device_count(), d.is_nccl_available())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, encoding="utf-8")
    if done.returncode:
        return Finding("torch", "wrong", (done.stderr.strip().splitlines() or ["does not load"])[-1], REINSTALL)
    return judge_cuda(*done.stdout.split(), owners=fbgemm_owners(), driver=shutil.which("nvidia-smi") is not None)


def judge_cuda(version: str, available: str, count: str, nccl: str, *, owners: list[str], driver: bool) -> Finding:
    """Judge what torch says of CUDA: its build's version or None, and the rest as True, False and a number."""
    name = "GPU"
    if available == "True":
        if "fbgemm-gpu" not in owners:
            return Finding(
                name,
                "wrong",
                f"{count} GPU(s), but fbgemm is the CPU build",
                f"{USE_GPU}, or train with `--set launch.device=cpu`",
            )
        if nccl != "True":
            return Finding(name, "wrong", f"{count} GPU(s), but torch has no NCCL", REINSTALL)
        return Finding(name, "ok", f"{count} GPU(s), CUDA {version}, NCCL")
    if driver:
        return Finding(
            name,
            "note",
            f"an NVIDIA driver is here, torch does not use it (CUDA build: {version})",
            f"{USE_GPU} to train on it",
        )
    return Finding(name, "note", "none; training uses the CPU")


def memory() -> Finding:
    """Memory that is free for a run of the bundled example."""
    import psutil

    available = psutil.virtual_memory().available / 2**30
    line = f"{available:.1f} GiB available"
    if available < MEMORY_NEEDED:
        remedy = "close programs, or lower launch.nproc_per_node and launch.duckdb_memory_limit"
        return Finding("memory", "wrong", f"{line}, the bundled example takes up to {MEMORY_NEEDED:.0f}", remedy)
    return Finding("memory", "ok", line)


def shared_memory() -> Finding:
    """Room for the tables that ranks on the CPUs of one machine share."""
    free = shutil.disk_usage(SHARED_MEMORY).free / 2**30 if SHARED_MEMORY.exists() else 0.0
    line = f"{free:.1f} GiB free at {SHARED_MEMORY}"
    if free < SHARED_WANTED:
        remedy = "with several processes on the CPU, give the container more (docker run --shm-size=8g)"
        return Finding("shared memory", "note", f"{line}, so ranks exchange the vectors of larger tables", remedy)
    return Finding("shared memory", "ok", line)


def disk(store: Store) -> Finding:
    """Room where the store is."""
    if not store.is_local:
        return Finding("disk", "note", f"{store.root} is not on this machine")
    folder = store.root
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / 2**30
    if free < DISK_NEEDED:
        remedy = "free some, or put the store elsewhere with TWHIN_HOME"
        return Finding("disk", "wrong", f"{free:.1f} GiB free at {folder}, the example takes {DISK_NEEDED:.0f}", remedy)
    return Finding("disk", "ok", f"{free:.0f} GiB free at {folder}")


def writable(store: Store) -> Finding:
    """A file can be written to the store, read and removed."""
    remedy = "give yourself the right to write there, or set TWHIN_HOME to another place"
    made_root = not store.fs.exists(store.root)
    path = store.path(f".doctor-{uuid.uuid4().hex}")
    try:
        store.fs.makedirs(store.root, exist_ok=True)
        store.fs.pipe_file(path, b"twhin")
        content = store.fs.cat_file(path)
        store.fs.rm_file(path)
        if made_root and store.is_local:
            os.rmdir(store.root)
    except Exception as error:  # any storage backend's own errors
        return Finding("store", "wrong", f"{store.root}: {type(error).__name__}: {error}", remedy)
    if content != b"twhin":
        return Finding("store", "wrong", f"{store.root}: what was read is not what was written", remedy)
    return Finding("store", "ok", f"{store.root} can be written")


def scheduler(launch: LaunchConfig | None) -> list[Finding]:
    """What `launch.kind` needs to submit a job: Slurm's commands and controller, or Kubernetes' client."""
    if launch is None or launch.kind == "local":
        return []
    elsewhere = "or set launch.kind=local"
    if launch.kind == "kubernetes":
        lacking = extras.missing("kubernetes", "launch.kind: kubernetes")
        if lacking is not None:
            return [Finding("Kubernetes", "wrong", "its client is not installed", f"`{extras.install('kubernetes')}`")]
        return [Finding("Kubernetes", "ok", "its client is installed; the cluster was not asked")]
    missing = [name for name in ("sbatch", "scontrol", "scancel") if shutil.which(name) is None]
    if missing:
        remedy = f"run this on a machine of the cluster on which sbatch works, {elsewhere}"
        return [Finding("Slurm", "wrong", f"{', '.join(missing)} not found", remedy)]
    try:
        done = subprocess.run(["scontrol", "ping"], capture_output=True, encoding="utf-8", timeout=20)
    except subprocess.TimeoutExpired:
        return [Finding("Slurm", "wrong", "its controller does not answer within 20 s", f"try later, {elsewhere}")]
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode or " UP" not in said:
        return [Finding("Slurm", "wrong", said or "scontrol ping fails", f"try later, {elsewhere}")]
    return [Finding("Slurm", "ok", said)]


def chromium() -> Finding:
    """A browser for the test of the UI; nothing else needs it."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Finding("chromium", "ok", path)
    return Finding(
        "chromium", "note", "none", "install it to run the test of the UI (Debian: apt-get install chromium)"
    )


def open_store(home: str | None) -> Store:
    """Open the store for examination. Raises UserError where its address is none."""
    try:
        return Store(home)
    except (ValueError, ImportError) as error:
        raise UserError(f"{home}: is no folder or URL of a store ({error}); set TWHIN_HOME") from error
