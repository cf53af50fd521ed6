"""`make ui`: Dagster, MLflow's pages of the same runs, and the explorer, in one terminal. They end together."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
GRACE_S = 20.0
"""How long a server may take to end before it is killed."""


def serve(commands: Mapping[str, Sequence[str]], env: Mapping[str, str]) -> int:
    """Run servers until one of them ends or a signal comes, then end them all; return the exit code.

    Each has a process group of its own, so that the processes that it starts end with it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    servers: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            servers[name] = subprocess.Popen(command, env=dict(env), start_new_session=True)
        while True:
            for name, process in servers.items():
                if (code := process.poll()) is not None:
                    print(f"{name} ended with exit code {code}; the others are ended too", file=sys.stderr)
                    return code or 1
            time.sleep(0.3)
    except KeyboardInterrupt:
        return 0
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        _end(list(servers.values()))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _end(servers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt process groups as ctrl-c does; after `GRACE_S` kill what is left of them."""
    for process in servers:
        _signal(process, signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    for process in servers:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def in_use(port: int) -> bool:
    """Tell whether another process listens on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False


def main() -> int:
    """Start them and wait; return the exit code."""
    from twhin_pipeline import tracking
    from twhin_pipeline.store import Store
    from twhin_pipeline.tracking import pages

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dagster-port", type=int, default=3000)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    parser.add_argument("--service-port", type=int, default=8000)
    ports = parser.parse_args()
    uri = tracking.uri(Store())
    served_elsewhere = uri.startswith(("http://", "https://", "databricks"))
    wanted = {"UI_PORT": ports.dagster_port} | ({} if served_elsewhere else {"MLFLOW_PORT": ports.mlflow_port})
    if not (service := os.environ.get(pages.SERVICE_ENV)):
        wanted["SERVICE_PORT"] = ports.service_port
    for name, port in wanted.items():
        if in_use(port):
            print(f"port {port} is in use; choose another one: make ui {name}={port + 1}", file=sys.stderr)
            return 2
    env = {**os.environ, pages.DAGSTER_ENV: f"http://{HOST}:{ports.dagster_port}"}
    # What others' packages warn of is no news to who looks at the pages.
    env["PYTHONWARNINGS"] = "ignore::FutureWarning"
    dagster = [str(Path(sys.executable).parent / "dagster"), "dev", "-h", HOST, "-p", str(ports.dagster_port)]
    commands = {"Dagster": [*dagster, "-m", "twhin_pipeline.definitions"]}
    if not served_elsewhere:
        env[pages.MLFLOW_ENV] = f"http://{HOST}:{ports.mlflow_port}"
        mlflow = [sys.executable, "-m", "twhin_pipeline.cli", "mlflow", "--host", HOST]
        commands["MLflow"] = [*mlflow, "--port", str(ports.mlflow_port)]
    if not service:
        env[pages.SERVICE_ENV] = service = f"http://{HOST}:{ports.service_port}"
        explorer = [sys.executable, "-m", "twhin_pipeline.cli", "serve", "--host", HOST, "--no-access-log"]
        commands["twhin serve"] = [*explorer, "--port", str(ports.service_port)]
    configuration = os.environ.get("TWHIN_CONFIG") or "the bundled configs/debian.yaml, as TWHIN_CONFIG is not set"
    print(f"Dagster:       {env[pages.DAGSTER_ENV]} (its state is in {os.environ.get('DAGSTER_HOME', '.')})")
    runs = f"/#/experiments/{tracking.experiment_id(Store())}/runs?{pages.MODEL_TRAINING}"
    print(f"MLflow:        {env[pages.MLFLOW_ENV] + runs if pages.MLFLOW_ENV in env else uri}")
    print(f"Explorer:      {service.rstrip('/')}/explore/")
    print(f"Configuration: {configuration}")
    print("Ctrl-c ends them all.", flush=True)
    return serve(commands, env)


if __name__ == "__main__":
    sys.exit(main())
