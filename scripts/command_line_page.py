"""Prints docs/reference/command-line.md, made from the commands' own help."""

from __future__ import annotations

import re
from typing import Any

import typer

from twhin_pipeline.cli import app

HEAD = """# Command line

This page is made from the help of the commands by `make reference`. `twhin COMMAND --help` prints
the same.

Exit codes: 0 for success; 1 if something failed; 2, with one line on standard error, for a mistake in the arguments,
the configuration or the data; 130 after ctrl-c.
"""

TYPES = {"str": "TEXT", "list[str]": "TEXT …", "int": "INTEGER", "float": "NUMBER", "path": "FILE"}
"""What an option takes, by the name that typer gives its type; an ellipsis says that the option may be repeated."""


def command_line() -> str:
    """Return the page of the command `twhin`: the panels of its help, each command with its usage and options."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("twhin", [], resilient_parsing=True)
    parts = [HEAD, "\n", *_rows(group.params, context)]
    panels: dict[str, list[str]] = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = type(context)(command, parent=context, info_name=name)
        usage = " ".join(command.collect_usage_pieces(inner))
        text = f"\n### twhin {name}\n\n{command.help}\n\n```console\n$ twhin {name} {usage}\n```\n\n"
        panels.setdefault(command.rich_help_panel, []).extend([text, *_rows(command.params, inner)])
    for panel, texts in panels.items():
        parts += [f"\n## {panel}\n", *texts]
    return "".join(parts)


def _rows(parameters: list[Any], context: Any) -> list[str]:
    """Return a table of arguments and options."""
    records = [record for one in parameters if (record := one.get_help_record(context)) is not None]
    rows = [f"| `{_plain(name)}` | {text.replace('|', '&#124;').replace('<', '&lt;')} |\n" for name, text in records]
    return ["| option | |\n|---|---|\n", *rows] if rows else []


def _plain(name: str) -> str:
    """Return an option with what it takes in words: `--home TEXT` of `--home <str>`."""
    return re.sub(r"<([a-z\[\]]+)( range)?>", lambda found: TYPES[found[1]], name)


if __name__ == "__main__":
    print(command_line(), end="")
