"""Packages that only some uses need, and the extras that bring them: `pip install "twhin-pipeline[train]"`.

Without extras, a store can be read: vectors, neighbors, metrics, SQL. Imports of what follows here are made where they
are used, so that the rest works without.
"""

from __future__ import annotations

import shlex
import shutil
from importlib.util import find_spec

from twhin_pipeline.bundled import CPU_FBGEMM
from twhin_pipeline.errors import UserError

EXTRA_OF = {
    "torch": "train",  # also in `reader`, for scores alone
    "torchrec": "train",
    "fbgemm_gpu": "train",
    "numba": "train",
    "llvmlite": "train",
    "scipy": "train",
    "threadpoolctl": "train",
    "implicit": "train",
    "mlflow": "train",
    "optuna": "train",
    "dagster": "dagster",
    "matplotlib": "dagster",
    "safetensors": "reader",
    "faiss": "index",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "starlette": "serve",
    "psycopg": "postgres",
    "umap": "map",
    "sklearn": "map",
    "kubernetes": "kubernetes",
    "urllib3": "kubernetes",
    "deltalake": "delta",
    "pyiceberg": "iceberg",
    "pyspark": "spark",
    "py4j": "spark",
    "s3fs": "s3",
}
"""The extra that brings a package, by the name it is imported by."""


class MissingExtra(UserError, ImportError):  # noqa: N818 - it is an ImportError, and says what is missing
    """A package is not installed that this use needs. The message names the extra that brings it."""


def missing(module: str | None, what: str = "this command", extra: str | None = None) -> MissingExtra | None:
    """Return the error for a module that cannot be imported; None where it is installed or no extra brings it.

    Args:
        module: A module's full name, such as `torch.nn`.
        what: What needs it, in the plural or with a name: the subject of the message.
        extra: The extra to name, where it is not the one in `EXTRA_OF`.
    """
    package = (module or "").partition(".")[0]
    if package not in EXTRA_OF or find_spec(package) is not None:
        return None
    return MissingExtra(f"{what} needs {package}: {install(extra or EXTRA_OF[package])}", name=package)


def need(module: str, what: str, extra: str | None = None) -> None:
    """Raise MissingExtra where a module is not installed; the arguments are those of `missing`."""
    error = missing(module, what, extra)
    if error is not None:
        raise error


def install(extra: str) -> str:
    """Return the command that installs this package with an extra on this machine.

    torchrec asks pip for the CUDA build of fbgemm, which does not load without NVIDIA's driver.
    """
    words = [f'"twhin-pipeline[{extra}]"']
    if extra in ("train", "dagster") and shutil.which("nvidia-smi") is None:
        words.insert(0, shlex.quote(str(CPU_FBGEMM)))
    return f"pip install {' '.join(words)}"
