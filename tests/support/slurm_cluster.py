"""A real Slurm of Debian's packages on this machine: a controller and a daemon for each node, all on 127.0.0.1.

Each process is this module's own, in a folder of its own, and is ended by its number.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
NODES = ("node1", "node2")


def why_not() -> str:
    """Return why no cluster can be made here; empty where one can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): apt-get install slurmctld slurmd munge"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the daemons of Slurm's nodes run as root"
    return ""


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Yield the variables that a client needs; the cluster is there until the block ends."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    env = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]),
    }
    (folder / "slurm.conf").write_text(_conf(folder))
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")]
    commands = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            log = (folder / f"daemon-{number}.out").open("wb")
            started.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            if number == 0:
                wait_for((folder / "munge.socket").exists, 20, "munged listens")

        def idle() -> bool:
            sinfo = ["sinfo", "--noheader", "--Node", "--format=%T"]
            done = subprocess.run(sinfo, env=env, capture_output=True, text=True)
            return done.stdout.split() == ["idle"] * len(NODES)

        wait_for(idle, 30, f"both nodes are idle; see {folder}")
        yield {"SLURM_CONF": env["SLURM_CONF"]}
        subprocess.run(["scancel", "--user", getpass.getuser()], env=env, capture_output=True)
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def _conf(folder: Path) -> str:
    host, user = socket.gethostname(), getpass.getuser()
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={_port()} CPUs={os.cpu_count()}" for node in NODES
    ]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={_port()}",
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        # Without cgroups, which a container may not have.
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        *nodes,
        f"PartitionName=main Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
    ]
    return "\n".join([*lines, ""])
