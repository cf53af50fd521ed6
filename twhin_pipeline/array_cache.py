"""A local cache of what is made from a table once and then memory-mapped, kept by the table's version."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from twhin_pipeline.store import Manifest, Store


def cached(store: Store, manifest: Manifest, build: Callable[[Path], None]) -> Path:
    """Return the folder that `build` filled for this version of a table; it is filled once, and appears whole.

    The cache is `<root>/.cache`, or for a remote store or one that cannot be written `$XDG_CACHE_HOME/twhin`;
    `TWHIN_CACHE` sets it. Earlier versions of the same table are removed.
    """
    home = _home(store) / manifest.asset / manifest.snapshot
    folder = home / manifest.version
    if folder.exists():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=home))
    try:
        build(draft)
        draft.rename(folder)
    except OSError:
        # Another process was first: a folder that is not empty cannot be renamed onto.
        if not folder.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for path in home.iterdir():
        if path.name < manifest.version and not path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)
    return folder


def _home(store: Store) -> Path:
    if chosen := os.environ.get("TWHIN_CACHE"):
        base = Path(chosen)
    elif store.is_local and os.access(store.root, os.W_OK):
        return Path(store.root, ".cache")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "twhin")
    return base / hashlib.sha256(store.root.encode()).hexdigest()[:12]
