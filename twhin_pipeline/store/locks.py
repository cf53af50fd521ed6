"""Writers of one table and snapshot exclude each other.

In a folder the lock is the operating system's (`filelock`), which ends with its process, however that dies. Behind a
URL it is a lease: an object that is created only where there is none, and renewed while its writer lives; one that has
not been renewed for `LEASE_S` belongs to a dead writer and is taken over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twhin_pipeline.errors import UnavailableError, UserError

LOCK, WRITER = ".lock", ".writer.json"
WAIT_S = 10.0
"""How long a second writer waits before it is refused, s."""
LEASE_S, RENEW_S, POLL_S = 120.0, 20.0, 0.1

_held: dict[str, int] = {}
"""Folders that this process writes, with how often: a stage that holds a lock may begin versions below it."""
_guard = threading.Lock()


@contextmanager
def writing(fs: Any, is_local: bool, folders: Sequence[str], what: str, wait_s: float | None = None) -> Iterator[None]:
    """Hold the locks of some folders, in their order by name, so that two that wait never wait for each other.

    Args:
        fs: The store's filesystem.
        is_local: Whether the folders are on this machine's disks.
        folders: Paths or URLs of `<asset>/<snapshot>` folders.
        what: What is written, for the message.
        wait_s: How long to wait for another writer; None: `WAIT_S`.

    Raises:
        UnavailableError: Another writer holds one, and did not let go in time; the message names it.
    """
    wait_s = WAIT_S if wait_s is None else wait_s
    with ExitStack() as stack:
        for folder in sorted(set(folders)):
            with _guard:
                nested = folder in _held
                _held[folder] = _held.get(folder, 0) + 1
            stack.callback(_release, folder)
            if not nested:
                stack.enter_context(_file_lock(folder, what, wait_s) if is_local else _lease(fs, folder, what, wait_s))
        yield


def _release(folder: str) -> None:
    with _guard:
        _held[folder] -= 1
        if not _held[folder]:
            del _held[folder]


def holds(folder: str) -> bool:
    """Tell whether this process holds a folder's lock."""
    with _guard:
        return folder in _held


def is_written(fs: Any, is_local: bool, folder: str) -> bool:
    """Tell whether another process holds a folder's lock. Nothing is written to find out."""
    if holds(folder):
        return False
    if is_local:
        return flocked(f"{folder}/{LOCK}")
    try:
        writer = json.loads(fs.cat_file(f"{folder}/{WRITER}"))
    except (OSError, ValueError):
        return False
    return time.time() - float(writer.get("renewed", 0)) <= LEASE_S


def flocked(path: str) -> bool:
    """Tell whether a process holds the operating system's lock of a file."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _writer() -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now}


@contextmanager
def _file_lock(folder: str, what: str, wait_s: float) -> Iterator[None]:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
            raise
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); choose another --home, or check its permissions"
        ) from error
    lock = FileLock(f"{folder}/{LOCK}", thread_local=False)
    who = Path(folder) / WRITER
    try:
        lock.acquire(timeout=wait_s, poll_interval=POLL_S)
    except Timeout:
        writer = {}
        with suppress(OSError, ValueError):
            writer = json.loads(who.read_text(encoding="utf-8"))
        raise _refused(what, writer) from None
    try:
        who.write_text(json.dumps(_writer()), encoding="utf-8")
        yield
    finally:
        who.unlink(missing_ok=True)
        lock.release()


@contextmanager
def _lease(fs: Any, folder: str, what: str, wait_s: float) -> Iterator[None]:
    path = f"{folder}/{WRITER}"
    mine = {**_writer(), "token": uuid.uuid4().hex}

    def write(mode: str) -> None:
        fs.pipe_file(path, json.dumps({**mine, "renewed": time.time()}).encode(), mode=mode)

    deadline = time.monotonic() + wait_s
    while True:
        try:
            write("create")
            break
        except FileExistsError:
            writer: dict[str, Any] = {}
            with suppress(OSError, ValueError):
                writer = json.loads(fs.cat_file(path))
            if writer and time.time() - float(writer.get("renewed", 0)) > LEASE_S:
                with suppress(FileNotFoundError):
                    fs.rm_file(path)
                continue
            if time.monotonic() > deadline:
                raise _refused(what, writer) from None
            time.sleep(POLL_S)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            with suppress(OSError):
                write("overwrite")

    thread = threading.Thread(target=renew, name="twhin-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(OSError, ValueError):
            if json.loads(fs.cat_file(path)).get("token") == mine["token"]:
                fs.rm_file(path)


def _refused(what: str, writer: dict[str, Any]) -> UnavailableError:
    who = "another process"
    if writer:
        who = f"process {writer.get('process')} on {writer.get('host')}, since {writer.get('since')}"
    return UnavailableError(f"{what}: is being written by {who}; wait until it is done, or end it, and run this again")
