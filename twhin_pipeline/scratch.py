"""Temporary folders, which the next process removes where one died before it could.

All of a process's are in one folder of `TMPDIR`, `twhin-…`, with a lock file that the process holds while it lives.
"""

from __future__ import annotations

import atexit
import fcntl
import glob
import os
import shutil
import tempfile
from contextlib import suppress

LOCK = ".lock"
_roots: dict[tuple[int, str], str] = {}
"""This process's folders, by process and `TMPDIR`."""
_locks: list[int] = []


def folder(name: str) -> tempfile.TemporaryDirectory[str]:
    """Return a new temporary folder, a context manager that removes it; `name` says whose it is."""
    return tempfile.TemporaryDirectory(prefix=f"{name}-", dir=root())


def root() -> str:
    """Return this process's folder for temporary files; those of dead processes are removed when it is made."""
    key = os.getpid(), tempfile.gettempdir()
    if key not in _roots or not os.path.isdir(_roots[key]):
        remove_dead(key[1])
        _roots[key] = _make(key[1])
    return _roots[key]


def reserve(path: str | os.PathLike[str]) -> None:
    """Take the room of a file that is to be mapped on the disk at once.

    Where a disk is full, writing to a mapped page that has no room yet would end the process by a signal.

    Raises:
        OSError: The disk has too little room.
    """
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, max(os.fstat(file.fileno()).st_size, 1))


def remove_dead(parent: str) -> list[str]:
    """Remove the folders in `parent` that processes left which are dead; return which."""
    removed = []
    for lock in glob.glob(f"{glob.escape(parent)}/twhin-*/{LOCK}"):
        with suppress(OSError):
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(os.path.dirname(lock), ignore_errors=True)
                removed.append(os.path.dirname(lock))
            finally:
                os.close(handle)
    return removed


def _make(parent: str) -> str:
    while True:
        made = tempfile.mkdtemp(prefix="twhin-", dir=parent)
        atexit.register(_remove, os.getpid(), made)
        handle = os.open(f"{made}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # no locks there: without the file, nobody takes it for a dead one's
            with suppress(OSError):
                os.unlink(f"{made}/{LOCK}")
            return made
        # Another process may have taken it for a dead one's before it was locked.
        if os.path.exists(f"{made}/{LOCK}"):
            _locks.append(handle)
            return made


def _remove(process: int, made: str) -> None:
    if os.getpid() == process:  # and no child that was forked
        shutil.rmtree(made, ignore_errors=True)
