"""Ctrl-c (SIGINT): noticed also where a library is busy, turns it into an error of its own, or swallows it.

Python raises KeyboardInterrupt only between two steps of its own. A query of DuckDB may be one long step, so a thread
that the signal wakes ends it.
"""

from __future__ import annotations

import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

SOON_S = 0.3
"""After so many seconds queries are ended."""
AGAIN_S = 10.0
"""An interrupt that has not ended the command after so many seconds more was swallowed, and is sent again."""
_noticed = threading.Event()
_busy: weakref.WeakSet[Any] = weakref.WeakSet()


def register(connection: Any) -> None:
    """Let an interrupt call `connection.interrupt()`, from another thread."""
    _busy.add(connection)


def interrupted() -> bool:
    """Tell whether an interrupt has arrived within `noticed`."""
    return _noticed.is_set()


@contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Note interrupts, which raise KeyboardInterrupt as usual; yield `interrupted`.

    Where another handler is installed, or in another thread than the main one, nothing changes.
    """
    _noticed.clear()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupted
        return

    def handle(number: int, frame: object) -> None:
        _noticed.set()
        raise KeyboardInterrupt

    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()

    def watch() -> None:
        while signals := os.read(reading, 64):
            if signal.SIGINT not in signals or signal.getsignal(signal.SIGINT) is not handle:
                continue  # training has a handler of its own
            pause = SOON_S
            while not ended.wait(pause):
                for connection in list(_busy):
                    with suppress(Exception):
                        connection.interrupt()
                if pause == AGAIN_S:
                    os.kill(os.getpid(), signal.SIGINT)
                pause = AGAIN_S
        os.close(reading)

    signal.signal(signal.SIGINT, handle)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, name="interrupt", daemon=True).start()
    try:
        yield interrupted
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(writing)
