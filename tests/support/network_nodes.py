"""Nodes on one machine: network namespaces on a bridge, each with its own processes, folder and temporary files.

Nothing is common to them but the network, and what is read only: this checkout. It takes root and Linux.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

ROOT = Path(__file__).parents[2]
_IN_NODE = 'for other in {others}; do mount -t tmpfs none "$other" || exit 97; done; cd {folder} || exit 98; exec "$@"'


def reason_against() -> str | None:
    """Return why namespaces cannot be made here, None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces take Linux and root"
    try:
        with Network.of(1) as network:
            done = network.start(0, ["true"])
            return None if done.wait(30) == 0 else "a namespace for processes and mounts is not permitted here"
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not permitted here ({error})"


@dataclass
class Network:
    """Nodes 0, 1, … of a bridge of this machine, whose address is `here`."""

    name: str
    subnet: str
    folders: list[Path]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    @contextmanager
    def of(cls, count: int, base: Path = Path("/nonexistent")) -> Iterator[Network]:
        """Make a network of so many nodes, each with a folder in `base`; end its processes and remove it at the end."""
        name = f"tw{uuid.uuid4().hex[:7]}"
        network = cls(name, _free_subnet(), [base / f"node-{i}" for i in range(count)])
        with ExitStack() as undo:
            _ip("link", "add", name, "type", "bridge")
            undo.callback(_ip, "link", "delete", name)
            _ip("address", "add", f"{network.here}/24", "dev", name)
            _ip("link", "set", name, "up")
            for i in range(count):
                inside = f"{name}-{i}"
                _ip("netns", "add", inside)
                undo.callback(_ip, "netns", "delete", inside)  # and its end of the cable, with the other
                _ip("link", "add", f"{name}v{i}", "type", "veth", "peer", "name", "eth0", "netns", inside)
                _ip("link", "set", f"{name}v{i}", "master", name, "up")
                _ip("-n", inside, "address", "add", f"{network.address(i)}/24", "dev", "eth0")
                _ip("-n", inside, "link", "set", "eth0", "up")
                _ip("-n", inside, "link", "set", "lo", "up")
            undo.callback(network.end)
            yield network

    @property
    def here(self) -> str:
        """The address at which nodes find this machine."""
        return f"{self.subnet}.1"

    def address(self, node: int) -> str:
        """Return a node's address."""
        return f"{self.subnet}.{10 + node}"

    def start(
        self, node: int, command: Sequence[str], env: Mapping[str, str] | None = None, output: IO[str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in a node's folder. It finds other nodes' folders empty, and none of their processes.

        Where it is killed, all processes that it started end with it, as those of a machine that loses its power.
        """
        folder, inside = self.folders[node], 'cd /; exec "$@"'
        more: dict[str, str] = {}
        if folder.parent.exists():
            for name in ("", "tmp", "cache"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            others = " ".join(shlex.quote(str(one)) for one in self.folders if one != folder and one.exists())
            inside = _IN_NODE.format(others=others, folder=shlex.quote(str(folder)))
            more = {"TMPDIR": f"{folder}/tmp", "XDG_CACHE_HOME": f"{folder}/cache", "HOME": str(folder)}
        started = subprocess.Popen(
            ["ip", "netns", "exec", f"{self.name}-{node}", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc",
             "sh", "-c", inside, "sh", *command],
            env={**os.environ, "PYTHONPATH": str(ROOT), **more, **(env or {})}, stdout=output or subprocess.DEVNULL,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(started)
        return started

    def cut(self, node: int) -> None:
        """Pull a node's cable."""
        _ip("link", "set", f"{self.name}v{node}", "down")

    def mend(self, node: int) -> None:
        """Plug it in again."""
        _ip("link", "set", f"{self.name}v{node}", "up")

    def end(self) -> None:
        """End what runs in the nodes."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def _free_subnet() -> str:
    """Return the first three numbers of a network for measurements (RFC 2544) that no interface here is in."""
    taken: set[Any] = {a.address.rpartition(".")[0] for all_ in psutil.net_if_addrs().values() for a in all_}
    start = os.getpid() % 250
    return next(f"198.18.{(start + i) % 250}" for i in range(250) if f"198.18.{(start + i) % 250}" not in taken)
