"""A local copy of a table in another form, made once for each version of it, to be read by position."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from twhin_pipeline import scratch
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store

MAPPED = "_mapped"


def cached(store: Store, manifest: Manifest, build: Callable[[Path], None], name: str = MAPPED) -> Path:
    """Return the folder that `build` filled for this version of a table; it is filled once, and appears whole.

    It lies in the version's own folder, by its `name`, and goes when that goes. Where the store is remote or cannot be
    written, it lies under `$XDG_CACHE_HOME/twhin`, and what was made of earlier versions is removed. Of several
    processes of one machine one builds it, and the others wait.

    Raises:
        UserError: Neither can be written.
    """
    version = Path(store.path(manifest.asset, manifest.snapshot, manifest.version))
    inside = store.is_local and os.access(version, os.W_OK)
    if not inside:
        if store.is_local and (version / name).exists():  # made by who could write there
            return version / name
        version = _away(store, manifest)
    folder = version / name
    if folder.exists():
        return folder
    _make(version, manifest)
    with _locked(version):
        if folder.exists():
            return folder
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=version))
        try:
            build(draft)
            # A temporary folder is its maker's alone; who may read the table may read its copy.
            shutil.copymode(version, draft)
            draft.rename(folder)
        except OSError:
            # On a file system without locks another process may have been first: a folder that is not empty cannot be
            # renamed onto.
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if not inside:
        for path in version.parent.iterdir():
            if path.name != version.name and not path.name.startswith("."):
                shutil.rmtree(path, ignore_errors=True)
    return folder


def new_array(path: Path, shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> np.memmap:
    """Return a new file of numbers mapped into memory, whose room on the disk is taken at once.

    Raises:
        OSError: The disk has too little room.
    """
    made = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    scratch.reserve(path)
    return made


def _make(folder: Path, manifest: Manifest) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}), and a copy of {manifest.asset} for fast reading has to "
            "be somewhere; set XDG_CACHE_HOME to a folder that can be written"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Exclude other processes that build in this folder, as far as its file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def away(store: Store) -> Path:
    """Return the folder of the copies of a store's tables that are not in the store itself."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "twhin")
    return base / hashlib.sha256(store.root.encode()).hexdigest()[:12]


def _away(store: Store, manifest: Manifest) -> Path:
    return away(store) / manifest.asset / manifest.snapshot / manifest.version
