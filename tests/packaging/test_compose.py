"""The image and the compose file name commands, options, extras and files that there are, and no registry."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from twhin_pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "packaging" / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "packaging" / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def command_of(program: str) -> Any:
    """Return a program's command, as its library for command lines has it (click, or typer's copy of it)."""
    if program == "twhin":
        return typer.main.get_command(app)
    (script,) = [one for one in entry_points(group="console_scripts") if one.name == program]
    return import_module(script.module).cli


def parsed(words: str) -> Any:
    """Parse a command line; raises where a command or an option is unknown, or an option has a wrong value."""
    program, *arguments = shlex.split(words)
    command = command_of(program)
    if hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    return command.make_context(program, arguments)


@pytest.mark.parametrize("name", SERVICES)
def test_each_service_runs_a_command_with_options_that_there_are(name: str) -> None:
    assert not parsed(SERVICES[name]["command"]).args


def test_commands_and_options_that_do_not_exist_would_be_noticed() -> None:
    with pytest.raises(KeyError):
        parsed("twhin serves --port 0")
    for wrong in ("twhin serve --nonsense x", "dagster-daemon run --nonsense x", "twhin serve --port many"):
        with pytest.raises(Exception, match=r"(?i)no such option|valid integer"):
            parsed(wrong)


def test_there_is_a_service_for_each_part_and_ports_are_this_machines_alone() -> None:
    assert set(SERVICES) == {"dagster-webserver", "dagster-daemon", "mlflow", "serve"}
    for service in SERVICES.values():
        assert any(volume.startswith("store:/store") for volume in service["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        port = re.search(r"--port (\d+)", service["command"])
        assert (port is None) == ("ports" not in service)
        assert port is None or service["ports"] == [f"127.0.0.1:{port[1]}:{port[1]}"]
    assert {volume.split(":")[0] for one in SERVICES.values() for volume in one["volumes"]} >= set(COMPOSE["volumes"])


def test_the_service_gets_its_key_as_a_secret_and_may_not_write_the_store() -> None:
    serve = SERVICES["serve"]
    (name,) = serve["secrets"]
    assert f"--api-key-file /run/secrets/{name}" in serve["command"] and name in COMPOSE["secrets"]
    assert "store:/store:ro" in serve["volumes"] and "TWHIN_API_KEY" not in serve["environment"]
    assert f"/packaging/{name}" in (ROOT / ".gitignore").read_text().split()
    kind, program, option, code = serve["healthcheck"]["test"]
    assert (kind, program, option) == ("CMD", "python", "-c") and "/healthz" in code
    ast.parse(code)


def test_the_image_is_made_of_files_and_extras_that_there_are() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    sent = (ROOT / "packaging" / "Dockerfile.dockerignore").read_text().split("\n")
    for source in copied:
        assert (ROOT / source).exists()
        assert any(f"!{source}".startswith(line) for line in sent if line.startswith("!")), source
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = re.findall(r"'\.\[(.+?)\]'", DOCKERFILE)
    assert set(named.split(",")) == {"dagster", "serve"} <= set(extras)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert all(any(part.startswith(source) for source in copied) for part in wheel["force-include"])


def test_images_are_plain_names_and_the_process_is_not_root() -> None:
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["python:3.12-slim"] * 2
    assert {one["image"] for one in SERVICES.values()} == {"twhin"}
    assert re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE) == ["10001"]
    for word in re.findall(r"https?://\S+", DOCKERFILE + (ROOT / "packaging" / "compose.yaml").read_text()):
        assert word.startswith("http://127.0.0.1:")
