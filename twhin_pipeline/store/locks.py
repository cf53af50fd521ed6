"""Writers of one table and snapshot exclude each other.

In a folder the lock is the operating system's (`filelock`), which ends with its process, however that dies. Behind a
URL it is a lease: an object that is created only where there is none, and renewed while its writer lives. One that has
not been renewed for `LEASE_S`, or whose process was of this machine and has ended, belongs to a dead writer. Of those
that wait for it one takes it over, by a conditional write (`conditional`); where the store has none, nobody does.

A writer that was cut off for longer than that may have lost its lease without knowing. So whoever makes something
visible calls `confirm` just before.
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

import psutil
from filelock import FileLock, Timeout

import twhin_pipeline.store.conditional as conditional
from twhin_pipeline.errors import UnavailableError, UserError
from twhin_pipeline.store.conditional import Changed

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
        writer = _parsed(bytes(fs.cat_file(f"{folder}/{WRITER}")))
    except OSError:
        return False
    return bool(writer) and not _is_dead(writer)


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


class _Lease:
    """An object that says who writes a folder; its writer renews it, and nobody else changes it while that goes on."""

    def __init__(self, fs: Any, folder: str, what: str) -> None:
        self.fs, self.path, self.what = fs, f"{folder}/{WRITER}", what
        self.mine = {**_writer(), "machine": _machine(), "started": _started(os.getpid()), "token": uuid.uuid4().hex}
        self.tag = ""
        self.changing = threading.Lock()
        """Held by the thread that renews it, or by the one that confirms it."""
        self.lost = False

    def acquire(self, wait_s: float) -> None:
        """Create it, or take over that of a dead writer. Raises UnavailableError where the writer lives."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                self.tag = conditional.create(self.fs, self.path, self._content())
                break
            except FileExistsError:
                pass
            try:
                content, tag = conditional.read(self.fs, self.path)
            except FileNotFoundError:  # its writer has just let go
                content, tag = b"", ""
            writer = _parsed(content)
            if writer.get("token") == self.mine["token"]:  # written, but the answer was lost, and a retry refused
                self.tag = tag
                break
            if _is_dead(writer):
                if not conditional.excludes(self.fs):
                    raise UnavailableError(
                        f"{self.what}: {_named(writer)} seems to have ended without a word, and this store has no "
                        f"conditional writes by which one of several could take its place; make sure that it has "
                        f"ended, and remove {self.path}"
                    )
                with suppress(Changed):
                    self.tag = conditional.replace(self.fs, self.path, self._content(), tag)
                    break
            if time.monotonic() > deadline:
                raise _refused(self.what, writer)
            time.sleep(POLL_S)
        self._check_server()

    def _check_server(self) -> None:
        """See once whether the server heeds conditions; an old one may ignore them without a word."""
        server = type(self.fs).__name__, self.fs.storage_options.get("endpoint_url"), self.path.split("/")[2:3]
        if str(server) in _heeding:
            return
        problem = "If-None-Match"
        with suppress(FileExistsError):
            conditional.create(self.fs, self.path, self._content())
            problem = ""
        if problem and conditional.excludes(self.fs):
            with suppress(Changed):
                conditional.replace(self.fs, self.path, self._content(), '"0"')
                problem = ""
        if not problem:
            with suppress(OSError):
                self.fs.rm_file(self.path)
            raise UserError(
                f"{self.path}: this server ignores conditional writes (If-None-Match, If-Match), so that two writers "
                "would not exclude each other; take a server that has them, or a folder"
            )
        _heeding.add(str(server))

    def renew(self) -> None:
        """Say that the writer lives. Raises UnavailableError where another has taken its place."""
        with self.changing:
            if not self.lost:
                try:
                    self.tag = conditional.replace(self.fs, self.path, self._content(), self.tag)
                    return
                except Changed:
                    self.lost = not self._is_mine()
        if self.lost:
            raise UnavailableError(
                f"{self.what}: this process was cut off from the store for so long that another could take its place; "
                "nothing of its work was made visible; run this again"
            )

    def release(self) -> None:
        """Let others write, unless another has taken its place."""
        with self.changing, suppress(Exception):  # what a store that is away keeps, ends by itself
            if not self.lost:
                conditional.remove(self.fs, self.path, self.tag)

    def _is_mine(self) -> bool:
        """Tell whether the object is ours, and take its tag: of a write whose answer was lost a retry is refused."""
        try:
            content, tag = conditional.read(self.fs, self.path)
        except FileNotFoundError:
            return False
        self.tag = tag
        return bool(_parsed(content).get("token") == self.mine["token"])

    def _content(self) -> bytes:
        return json.dumps({**self.mine, "renewed": time.time()}).encode()


_leases: dict[str, _Lease] = {}
"""This process's, by folder."""
_heeding: set[str] = set()
"""Servers that were seen to heed conditions."""


@contextmanager
def _lease(fs: Any, folder: str, what: str, wait_s: float) -> Iterator[None]:
    lease = _Lease(fs, folder, what)
    lease.acquire(wait_s)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_S):
            try:
                lease.renew()
            except UnavailableError:  # `confirm` says so where it matters
                return
            except Exception:  # of any kind of store: it is away now, and is asked again
                continue

    thread = threading.Thread(target=renew, name="twhin-lease", daemon=True)
    thread.start()
    _leases[folder] = lease
    try:
        yield
    finally:
        del _leases[folder]
        ended.set()
        thread.join()
        lease.release()


def confirm(folder: str) -> None:
    """See whether this process, if it holds a lease of a folder, still holds it, and renew it.

    Raises:
        UnavailableError: Another writer has taken its place.
    """
    if (lease := _leases.get(folder)) is not None:
        lease.renew()


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        writer = json.loads(content)
    except ValueError:
        return {}
    return writer if isinstance(writer, dict) else {}


def _is_dead(writer: dict[str, Any]) -> bool:
    """Tell whether a lease has not been renewed, or is of a process of this machine that has ended."""
    if not writer:
        return False
    if time.time() - float(writer.get("renewed", 0)) > LEASE_S:
        return True
    here = writer.get("machine") is not None and writer["machine"] == _machine()
    return here and _started(int(writer["process"])) != writer.get("started")


def _machine() -> str | None:
    """Return what names this start of this machine, and its processes' numbers; None where nothing does."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(process: int) -> float | None:
    """Return when a process of this machine began; None where there is none of that number that runs."""
    try:
        found = psutil.Process(process)
        return None if found.status() == psutil.STATUS_ZOMBIE else found.create_time()
    except psutil.Error:
        return None


def _named(writer: dict[str, Any]) -> str:
    if not writer:
        return "another process"
    return f"process {writer.get('process')} on {writer.get('host')}, since {writer.get('since')},"


def _refused(what: str, writer: dict[str, Any]) -> UnavailableError:
    who = _named(writer).removesuffix(",")
    return UnavailableError(f"{what}: is being written by {who}; wait until it is done, or end it, and run this again")
