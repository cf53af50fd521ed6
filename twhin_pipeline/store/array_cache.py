"""A local copy of a table in another form, made once for each version of it, to be memory-mapped."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store


def cached(store: Store, manifest: Manifest, build: Callable[[Path], None], name: str = "_mapped") -> Path:
    """Return the folder that `build` filled for this version of a table; it is filled once, and appears whole.

    It lies in the version's own folder, as `name`, and goes when that goes. Where the store is remote or cannot be
    written, it lies under `$XDG_CACHE_HOME/twhin`, and what was made of earlier versions is removed.

    Raises:
        UserError: Neither can be written.
    """
    version = Path(store.path(manifest.asset, manifest.snapshot, manifest.version))
    inside = store.is_local and os.access(version, os.W_OK)
    folder = version / name if inside else _away(store, manifest, name)
    if folder.exists():
        return folder
    if not inside and (version / name).exists():  # made by who could write there
        return version / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"{folder.parent}: cannot be written ({error.strerror}), and a copy of {manifest.asset} for fast reading "
            "has to be somewhere; set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    try:
        build(draft)
        # A temporary folder is its maker's alone; who may read the table may read its copy.
        shutil.copymode(folder.parent, draft)
        draft.rename(folder)
    except OSError:
        # Another process may have been first: a folder that is not empty cannot be renamed onto.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not inside:
        for path in folder.parent.iterdir():
            if path.name != folder.name and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
    return folder


def new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Return a new file of float32 mapped into memory, whose room on the disk is taken at once.

    Where a disk is full, writing to a mapped page that has no room yet would end the process by a signal.

    Raises:
        OSError: The disk has too little room.
    """
    made = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(path.stat().st_size, 1))
    return made


def _away(store: Store, manifest: Manifest, name: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "twhin")
    root = hashlib.sha256(store.root.encode()).hexdigest()[:12]
    return base / root / manifest.asset / manifest.snapshot / f"{manifest.version}{'' if name == '_mapped' else name}"
