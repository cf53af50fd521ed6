"""Waiting that goes by work done, not by the clock: a busy machine is slow, and not wrong."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from typing import Any

import psutil

IDLE_S = 120.0
"""A command of which no process has worked for so long hangs."""
WORK_S = 0.2
"""So much processor time since the last look is work."""


def slowness() -> float:
    """Return by how much the machine's other work slows ours, at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_for(what: Any, seconds: float, told: str) -> Any:
    """Return the first true value of `what()`; `seconds` are those of a machine that has nothing else to do."""
    left, tick = seconds, 0.1
    while left > 0:
        if value := what():
            return value
        time.sleep(tick)
        left -= tick / slowness()
    raise AssertionError(f"not within {seconds:.0f} s of a quiet machine: {told}")


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command for as long as it, or a process that it started, works; return what it printed.

    Raises:
        AssertionError: It did nothing for `IDLE_S`; it is killed, with what it started.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, **options)
        try:
            _watch(process, command)
        finally:
            if process.poll() is None:
                kill(process)
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), err.read())


def kill(process: subprocess.Popen[Any]) -> None:
    """Kill a process that we started, and those that it started."""
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _watch(process: subprocess.Popen[Any], command: list[str]) -> None:
    seen, left = 0.0, IDLE_S
    while left > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
            return
        used = _used(process.pid)
        # A process that has ended takes its time along.
        if abs(used - seen) > WORK_S:
            seen, left = used, IDLE_S
        else:
            left -= 0.5 / slowness()
    raise AssertionError(f"no work for {IDLE_S:.0f} s: {' '.join(command)}")


def _used(pid: int) -> float:
    """Return the processor time of a process and of those that it started, s."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for each in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
    return total
