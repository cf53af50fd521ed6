"""A standalone Spark cluster on the loopback: a master and workers as processes, by the pip package's scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyspark

CLASS = "org.apache.spark.deploy"
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Cluster:
    """A running cluster: its master's URL, and its processes' numbers."""

    url: str
    pids: list[int]


@contextmanager
def cluster(folder: Path, workers: int, cores: int = 1, memory: str = "1g") -> Iterator[Cluster]:
    """Start a master and workers; they end with the block.

    Args:
        folder: For logs, and for the workers' files.
        workers: How many.
        cores: Of each.
        memory: Of each.
    """
    with ExitStack() as stack:
        log = folder / "master.log"
        options = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0"]
        processes = [stack.enter_context(_process(f"{CLASS}.master.Master", options, log))]
        url = _found(log, r"Starting Spark master at (spark://[\d.]+:\d+)")
        for number in range(workers):
            own = folder / f"worker-{number}"
            options = ["--host", "127.0.0.1", "--port", "0", "--webui-port", "0", "--cores", str(cores)]
            options += ["--memory", memory, "--work-dir", str(own), url]
            log = folder / f"worker-{number}.log"
            processes.append(stack.enter_context(_process(f"{CLASS}.worker.Worker", options, log)))
        for number in range(workers):
            _found(folder / f"worker-{number}.log", r"(Successfully registered with master)")
        yield Cluster(url, [process.pid for process in processes])


@contextmanager
def _process(name: str, options: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    home = Path(pyspark.__file__).parent
    paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {
        "SPARK_HOME": str(home),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "256m",
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        # `spark-class` replaces itself by Java, so that the process is ours to end.
        process = subprocess.Popen([home / "bin" / "spark-class", name, *options], env=env, stdout=file, stderr=file)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def _found(log: Path, pattern: str) -> str:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if (match := re.search(pattern, log.read_text(errors="replace"))) is not None:
            return match[1]
        time.sleep(0.2)
    raise RuntimeError(f"{log}: says nothing of {pattern!r} after {PATIENCE_S:g} s")
