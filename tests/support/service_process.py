"""`twhin serve` as processes of its own, as a user starts it; or its application in a thread of a test."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from twhin_pipeline.serving.app import create_app
from twhin_pipeline.serving.options import ServeOptions

STARTS_S = 120.0


class ServiceProcess:
    """A running service: where it answers, and what it logged."""

    def __init__(self, home: str, *options: str, env: dict[str, str] | None = None) -> None:
        self.output = tempfile.NamedTemporaryFile(prefix="serve-", suffix=".log")  # noqa: SIM115 - closed in `stop`
        command = [sys.executable, "-m", "twhin_pipeline.cli", "serve", "--home", home, "--port", "0", *options]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TWHIN_")}
        self.process = subprocess.Popen(
            command, stdout=self.output, stderr=subprocess.STDOUT, env={**clean, **(env or {})}
        )
        self.url = ""

    def log(self) -> str:
        """Return what it has printed so far."""
        return Path(self.output.name).read_text()

    def wait(self, opened: int) -> None:
        """Wait until so many workers have opened a release."""
        deadline = time.monotonic() + STARTS_S
        while self.log().count("answering from release") < opened:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        found = re.search(r"twhin serve: (http://\S+)", self.log())
        assert found is not None
        self.url = found[1]
        while True:  # a worker opens its release before it accepts
            try:
                httpx.get(f"{self.url}/healthz")
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline, self.log()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it and return its exit code."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(number)
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()


@contextmanager
def serving(home: str, *options: str, workers: int = 1, env: dict[str, str] | None = None) -> Iterator[ServiceProcess]:
    """Start a service, wait until its workers answer, and end it."""
    service = ServiceProcess(home, "--workers", str(workers), *options, env=env)
    try:
        service.wait(workers)
        yield service
    finally:
        service.stop()
        service.output.close()


@contextmanager
def served(home: str, **options: Any) -> Iterator[httpx.Client]:
    """Answer from this process, in a thread, so that a test can replace parts; yield a client of it."""
    config = uvicorn.Config(create_app(ServeOptions(home, **options)), log_config=None, access_log=False, lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            deadline = time.monotonic() + STARTS_S
            while not server.started:
                assert thread.is_alive() and time.monotonic() < deadline
                time.sleep(0.01)
            with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()
