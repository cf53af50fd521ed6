"""The command `twhin`: one module for each group of commands.

Importing it must stay quick: what is slow to import, each command imports itself.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twhin_pipeline.cli.program import app, run_arguments

__all__ = ["app", "main", "run_arguments"]


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit: 0, 1 where something failed, 2 (and one line) on a user's mistake, 130 on ctrl-c."""
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        # A plain locale, such as LC_ALL=C: files' names and texts, and what is printed, would be ASCII.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})
    try:
        from twhin_pipeline.cli import program
    except KeyboardInterrupt:  # while modules are read
        print("twhin: interrupted", file=sys.stderr, flush=True)
        os._exit(130)  # Python would end itself by the signal
    code = program.run_arguments(arguments)
    if code == 130:  # what was interrupted cannot always be taken apart, which libraries would report at length
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def __getattr__(name: str) -> Any:
    # Not at the top: an interrupt there would end in a traceback.
    if name in ("app", "run_arguments"):
        from twhin_pipeline.cli import program

        return getattr(program, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
