"""What the machine gives a rank: threads, and the place of shared memory. This module imports no torch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from twhin_pipeline.config import TwhinConfig

# Where torch puts the memory that processes share; containers often have little of it.
SHARED_MEMORY = Path("/dev/shm")


def threads_per_process(config: TwhinConfig) -> int:
    """Return the threads of a rank: as configured, else the cores this process may use divided by the node's ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return config.launch.threads_per_process or max(1, cores // config.launch.nproc_per_node)


def give_back_memory() -> None:
    """Give memory that this process has freed back to the system, which `launch.environment` tells it to keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
