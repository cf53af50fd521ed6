"""Environments of the programs that ours is timed beside, from PyPI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "PyTorch-BigGraph": ["torchbiggraph==1.0.0", "setuptools<81", "torch==2.13.0", "numpy", "h5py"],
    "PyKEEN": ["pykeen==1.11.1", "torch==2.13.0"],
    "Iceberg": ["pyiceberg[sql-sqlite]==0.12.0", "pyarrow==25.0.1", "numpy"],
    "Lance": ["pylance==14.0.2", "pyarrow==25.0.1", "numpy"],
    "pyarrow": ["pyarrow==25.0.1", "numpy"],
}
_FOLDERS = {
    "PyTorch-BigGraph": "pbg-env",
    "PyKEEN": "pykeen-env",
    "Iceberg": "iceberg-env",
    "Lance": "lance-env",
    "pyarrow": "pyarrow-env",
}


def peer_python(home: Path, name: str) -> Path:
    """Return the interpreter of a peer's environment below `home`, made where it is not there yet."""
    folder = home / _FOLDERS[name]
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"making {name}'s environment in {folder} …", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES[name]], check=True)
        (folder / "ready").touch()
    return python
