"""A remedy that a message or a page names exists: each command and each of its options."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import typer

from twhin_pipeline.cli import app

ROOT = Path(__file__).resolve().parents[2]
NAMED = re.compile(r"`twhin ([a-z]+)([^`]*)`")


def options() -> dict[str, set[str]]:
    """Return the options of each command."""
    program: Any = typer.main.get_command(app)
    return {name: {option for parameter in command.params for option in parameter.opts}
            for name, command in program.commands.items()}  # fmt: skip


def texts() -> list[tuple[str, str]]:
    """Return file and text of all strings of the code, and of the pages."""
    found = []
    for folder in ("twhin_pipeline", "assets", "resources", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
                    found.append((str(path), "".join(parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append((str(path), node.value))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        found.append((str(path), path.read_text()))
    return found


def test_every_command_and_option_that_is_named_exists():
    known, unknown, seen = options(), [], 0
    for file, text in texts():
        for command, rest in NAMED.findall(text):
            seen += 1
            wrong = {option for option in re.findall(r"--[a-z-]+", rest) if option not in known.get(command, ())}
            if command not in known or wrong - {"--help"}:
                unknown.append(f"{Path(file).name}: twhin {command}{rest}")
    assert unknown == [] and seen > 50
