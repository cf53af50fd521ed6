"""`make ui` runs servers that end together, with every process that they started."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import wait_for

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import ui

PARENT = (
    "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
)
"""A server that starts a process of its own, as both servers do."""


def start(folder: Path, other: str) -> subprocess.Popen[bytes]:
    """Serve a server with a child, which writes its id to a file, beside another one."""
    commands = {"one": [sys.executable, "-c", PARENT, str(folder / "pid")], "two": [sys.executable, "-c", other]}
    code = f"import os, sys, ui; sys.exit(ui.serve({commands!r}, os.environ))"
    env = {**os.environ, "PYTHONPATH": str(Path(ui.__file__).parent)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)


def child_of(folder: Path) -> int:
    pid = folder / "pid"
    return int(wait_for(lambda: pid.exists() and pid.read_text(), 60, "a child"))


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_signal_ends_both_and_what_they_started(tmp_path):
    process = start(tmp_path, "import time; time.sleep(600)")
    child = child_of(tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0 and gone(child)


def test_where_one_ends_the_other_is_ended_and_the_exit_code_says_so(tmp_path):
    waits = f"import os, sys, time\nwhile not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\nsys.exit(3)"
    process = start(tmp_path, waits)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 3 and b"two ended with exit code 3" in told
    assert gone(child_of(tmp_path))


def test_a_port_that_is_in_use_is_found():
    with socket.socket() as server:
        server.bind((ui.HOST, 0))
        server.listen()
        assert ui.in_use(server.getsockname()[1])


@pytest.mark.parametrize("elsewhere", ["", "https://recommend.example/"])
def test_the_explorer_is_served_too_unless_it_is_elsewhere(tmp_path, monkeypatch, capsys, elsewhere):
    found: dict[str, Any] = {}
    monkeypatch.setattr(ui, "serve", lambda commands, env: found.update(commands=commands, env=env) or 0)
    monkeypatch.setattr(sys, "argv", ["ui.py", "--dagster-port", "0", "--mlflow-port", "0", "--service-port", "0"])
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path))
    monkeypatch.setenv("TWHIN_SERVICE_URL", elsewhere)
    assert ui.main() == 0
    assert ("twhin serve" in found["commands"]) == (not elsewhere)
    address = elsewhere or f"http://{ui.HOST}:0"
    assert found["env"]["TWHIN_SERVICE_URL"] == address
    assert f"{address.rstrip('/')}/explore/" in capsys.readouterr().out
    if not elsewhere:
        assert found["commands"]["twhin serve"][-2:] == ["--port", "0"]
