"""Compiled loops are kept by all of the sources: numba knows a loop's own file, and not those of the loops it calls."""

import hashlib
import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure() -> None:
    """Say where numba keeps them, before it is imported; those of other sources go."""
    sources = sorted((ROOT / "twhin_pipeline").glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = ROOT / ".pytest_cache" / "compiled"
    for other in folder.glob("*"):
        if other.name != digest:
            shutil.rmtree(other, ignore_errors=True)
    os.environ.setdefault("NUMBA_CACHE_DIR", str(folder / digest))
