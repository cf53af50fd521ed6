"""`python -m twhin_pipeline.training.with_parent COMMAND…`: COMMAND, which the kernel ends when its parent dies.

COMMAND takes this process's place. Imports the standard library alone: torchrun waits for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
STOP_SIGNAL = signal.SIGUSR1
"""By which a scheduler stops a node (`launchers/node.py`). It may reach every process of the node; one SIGTERM must
come to torchrun, and from it to the ranks, of which a second one would end the writing of a checkpoint."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
        os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python -m twhin_pipeline.training.with_parent COMMAND [ARGUMENT]...")
    die_with_parent()
    signal.signal(STOP_SIGNAL, signal.SIG_IGN)  # which torchrun and its ranks inherit
    os.execvp(sys.argv[1], sys.argv[1:])
