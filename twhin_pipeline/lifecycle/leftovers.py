"""What is beside the versions of tables: checkpoints and logs of trainings, and copies of remote tables here."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from twhin_pipeline import remote
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, array_cache
from twhin_pipeline.store.locks import flocked, is_written, writing
from twhin_pipeline.words import MODELS

CHECKPOINTS, FINISHED, LOCK = "checkpoints", "finished.json", "lock"
LOGS = "logs", "train"
_SNAPSHOT, _HASH = re.compile(r"\d{4}-\d{2}-\d{2}"), re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training: `<parent>/<snapshot>/<hash>` or `<asset>/<snapshot>/checkpoints/<hash>`."""

    asset: str
    snapshot: str
    path: str
    bytes: int
    finished: bool
    """Whether the training has come to its end: its model is in the store."""
    changed: float
    """When a file of it was written last, seconds since 1970."""
    running: bool
    """Whether a process holds it."""


def checkpoints(store: Store, save_dir: str | None = None, snapshot: str | None = None) -> list[Checkpoints]:
    """List the checkpoints of trainings of this store, of one snapshot or of all.

    Args:
        store: Which one.
        save_dir: Another folder of checkpoints (`training.save_dir`).
        snapshot: Which one; None: all.
    """
    wanted = re.compile(re.escape(snapshot)) if snapshot else _SNAPSHOT
    result = []
    for asset in MODELS:
        for at in filter(wanted.fullmatch, store.children(asset)):
            folder = store.path(asset, at, CHECKPOINTS)
            names = store.children(f"{asset}/{at}/{CHECKPOINTS}")
            result += [_look_at(store.fs, store.is_local, asset, at, f"{folder}/{name}") for name in names]
    if save_dir:
        fs, plain = remote.filesystem(save_dir)
        is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        with suppress(FileNotFoundError):
            for parent in fs.ls(plain, detail=False):
                at = str(parent).rstrip("/").rsplit("/", 1)[-1]
                for path in fs.ls(parent, detail=False) if wanted.fullmatch(at) else ():
                    if _HASH.fullmatch(str(path).rstrip("/").rsplit("/", 1)[-1]):
                        whole = str(path) if is_local else str(fs.unstrip_protocol(path))
                        result.append(_look_at(fs, is_local, MODELS[0], at, whole))
    return result


def _look_at(fs: fsspec.AbstractFileSystem, is_local: bool, asset: str, snapshot: str, path: str) -> Checkpoints:
    files = fs.find(fs._strip_protocol(path), detail=True)
    times = [_time(info) for info in files.values()]
    finished = any(str(name).endswith(f"/{FINISHED}") for name in files)
    size = sum(int(info["size"]) for info in files.values())
    running = flocked(f"{path}/{LOCK}") if is_local else is_written(fs, False, path)
    return Checkpoints(asset, snapshot, path, size, finished, max(times, default=0.0), running)


def _time(info: dict[str, Any]) -> float:
    """Return when a file was written, as its file system says it; now where it does not."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = info.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
    return time.time()


def remove_checkpoints(one: Checkpoints) -> bool:
    """Remove the checkpoints of one training, unless a process trains there; tell whether they were removed."""
    fs = remote.filesystem(one.path)[0]
    with _alone(one.path) as alone:
        if alone:
            with suppress(FileNotFoundError):
                fs.rm(fs._strip_protocol(one.path), recursive=True)
        return alone


@contextmanager
def _alone(folder: str) -> Iterator[bool]:
    """Hold a folder's lock or lease, as a training does; False where one holds it."""
    if remote.local_path(folder) is None:
        fs = remote.filesystem(folder)[0]
        with ExitStack() as held:
            try:
                held.enter_context(writing(fs, False, [folder], folder, wait_s=0))
            except UserError:
                yield False
                return
            yield True
        return
    try:
        descriptor = os.open(f"{folder}/{LOCK}", os.O_RDWR)
    except OSError:  # no training ever held it
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def logs(store: Store) -> list[Checkpoints]:
    """List what the ranks of the store's trainings printed, by snapshot; it is described as checkpoints are."""
    base = "/".join(LOGS)
    snapshots = filter(_SNAPSHOT.fullmatch, store.children(base))
    return [_look_at(store.fs, store.is_local, base, at, store.path(*LOGS, at)) for at in snapshots]


@dataclass(frozen=True)
class Copy:
    """What this machine keeps of a version of a remote table, to read it by position."""

    asset: str
    snapshot: str
    version: str
    path: str
    bytes: int


def copies(store: Store) -> list[Copy]:
    """List the copies that this machine's cache has of the store's tables."""
    root = array_cache.away(store)
    result = []
    for folder in sorted(root.glob("**/*-????????")):
        parts = folder.relative_to(root).parts
        if folder.is_dir() and len(parts) > 2 and _SNAPSHOT.fullmatch(parts[-2]):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            result.append(Copy("/".join(parts[:-2]), parts[-2], parts[-1], str(folder), size))
    return result


def remove_copy(one: Copy) -> None:
    """Remove a copy. Who has its files mapped reads on."""
    shutil.rmtree(Path(one.path), ignore_errors=True)
