"""Ctrl-c ends a command with one line and exit code 130; what a dead process left is removed by the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from edge_files import SNAPSHOT, make_config, write

from twhin_pipeline import interrupts, scratch
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.cli.program import app

ENDLESS = "SELECT range AS lhs, 'fav' AS rel, hash(range) AS rhs FROM range(1000000000000) WHERE hash(range) % 7 = 9"

LINE = "twhin: interrupted; finished tables stay, and the same command goes on from them\n"


def configuration(folder: Path, source: dict[str, str]) -> str:
    data = make_config("unused").model_dump(mode="json", exclude_none=True)
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump({**data, "source": source}))
    return str(path)


def started(tmp_path: Path, source: dict[str, str]) -> subprocess.Popen[str]:
    """Start `twhin ingest`, and return it once it has a temporary folder."""
    temporary = tmp_path / "tmp"
    temporary.mkdir(exist_ok=True)
    before = set(temporary.glob("twhin-*/ingest-*"))
    command = [sys.executable, "-m", "twhin_pipeline.cli", "ingest", "--config", configuration(tmp_path, source)]
    process = subprocess.Popen(
        [*command, "--home", str(tmp_path / "home"), "--snapshot", SNAPSHOT],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)},
    )  # fmt: skip
    while process.poll() is None and not set(temporary.glob("twhin-*/ingest-*")) - before:
        time.sleep(0.05)
    return process


def test_an_interrupt_amid_a_query_is_one_line_and_leaves_nothing(tmp_path):
    process = started(tmp_path, {"sql": ENDLESS})
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and out == ""
    assert err == LINE
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_next_command_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    killed = started(tmp_path, {"sql": ENDLESS})
    killed.kill()
    killed.communicate()
    (left,) = (tmp_path / "tmp").iterdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tmp").symlink_to(tmp_path / "tmp")
    living = started(other, {"sql": ENDLESS})
    try:
        (now,) = (tmp_path / "tmp").iterdir()
        assert now != left
        done = started(tmp_path, {"path": str(write(tmp_path / "e.parquet", [("a", "fav", "x")]))})
        assert done.communicate()[1] == "" and done.returncode == 0
        assert list((tmp_path / "tmp").iterdir()) == [now]
    finally:
        living.kill()
        living.communicate()


def test_an_interrupt_that_a_library_turns_into_an_error_or_loses_ends_the_command(monkeypatch, capsys):
    monkeypatch.setattr(interrupts, "AGAIN_S", 0.2)
    swallowed = []

    def command() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            swallowed.append(1)
        try:
            time.sleep(5)
        except KeyboardInterrupt as error:
            raise RuntimeError("Query interrupted") from error

    app.command("odd")(command)
    try:
        assert run_arguments(["odd"]) == 130
    finally:
        app.registered_commands = [one for one in app.registered_commands if one.name != "odd"]
    assert swallowed
    assert capsys.readouterr().err == LINE
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupt" and thread.join(2)]


@pytest.mark.parametrize("is_locked", [True, False])
def test_only_folders_of_dead_processes_are_removed(tmp_path, monkeypatch, is_locked):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = Path(scratch.root())
    (tmp_path / "twhin-without-a-lock").mkdir()
    if not is_locked:
        os.close(scratch._locks.pop())
    removed = scratch.remove_dead(str(tmp_path))
    assert mine.exists() is is_locked and removed == ([] if is_locked else [str(mine)])
    assert (tmp_path / "twhin-without-a-lock").exists(), "it may be somebody else's"
