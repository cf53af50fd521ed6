"""The command line as one program: its help, its exit codes, and how a mistake is shown."""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from twhin_pipeline import extras, interrupts, remote
from twhin_pipeline.cli.arguments import to_stderr
from twhin_pipeline.cli.checks import commands as check_commands
from twhin_pipeline.cli.keep import commands as keep_commands
from twhin_pipeline.cli.look import commands as look_commands
from twhin_pipeline.cli.operate import commands as operate_commands
from twhin_pipeline.cli.releases import commands as release_commands
from twhin_pipeline.cli.run import commands as run_commands
from twhin_pipeline.cli.serve import commands as serve_commands
from twhin_pipeline.cli.start import commands as start_commands
from twhin_pipeline.cli.use import commands as use_commands
from twhin_pipeline.errors import UserError, no_handles, out_of_handles

# Errors of a folder that cannot be written, or of a full disk.
UNUSABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


PANELS = ("Start", "Run", "Run one stage", "Look", "Use", "Operate")
"""Groups of commands in the help, in its order; a command names its own by `rich_help_panel`."""


class Panels(TyperGroup):
    """Lists the commands by panel, in plain text, and cuts no line short."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one list of commands for each panel; within one, in the order in which they were added."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panels.setdefault(command.rich_help_panel, []).append((name, command.get_short_help_str(limit=1_000)))
        width = max(len(name) for lines in panels.values() for name, _ in lines)
        for panel, lines in sorted(panels.items(), key=lambda item: PANELS.index(item[0])):
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), text) for name, text in lines])


app = typer.Typer(
    cls=Panels,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _commands in (
    start_commands,
    run_commands,
    check_commands,
    look_commands,
    use_commands,
    serve_commands,
    release_commands,
    keep_commands,
    operate_commands,
):
    app.add_typer(_commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        print(f"twhin-pipeline {metadata.version('twhin-pipeline')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """TwHIN: entity embeddings from typed edges. Each command reads one YAML file and one store.

    Start with `twhin init FILE`, which writes the YAML file for your own edges, then `twhin run`.
    """


def run_arguments(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code; a mistake is one line on standard error, without a traceback."""
    warnings.showwarning = _show_warning
    with interrupts.noticed() as interrupted:
        code = _run(arguments)
        # Libraries turn ctrl-c into errors of their own.
        if code and interrupted():
            to_stderr("interrupted; finished tables stay, and the same command goes on from them")
            return 130
        return code


def _run(arguments: list[str] | None) -> int:
    command: Any = typer.main.get_command(app)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return int(command.main(args=arguments or ["--help"], prog_name="twhin", standalone_mode=False) or 0)
    except UserError as error:
        if not interrupts.interrupted():
            to_stderr(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `twhin sql … | head`
        sys.stderr.close()
        return 0
    except Exception as error:
        if interrupts.interrupted():
            return 130
        return _exit_code(error)


def _exit_code(error: Exception) -> int:
    """Show an error that is known by its name and return its exit code; raise any other error.

    Names, because importing the errors' modules would slow the start.
    """
    if isinstance(error, ModuleNotFoundError) and (lacking := extras.missing(error.name)) is not None:
        to_stderr(str(lacking))
        return 2
    names = {kind.__name__ for kind in type(error).__mro__}
    if "ClickException" in names:
        usage = getattr(error, "ctx", None)
        hint = f" (see `{usage.command_path} --help`)" if usage is not None else ""
        to_stderr(" ".join(error.format_message().split()) + hint)  # type: ignore[attr-defined]
        return 2
    if "Abort" in names:
        return 130
    if out_of_handles(error):
        to_stderr(no_handles(str(getattr(error, "filename", None) or "this command")))
        return 2
    if (problem := remote.refused(error)) is not None:
        to_stderr(str(problem))
        return 2
    if isinstance(error, OSError) and error.errno in UNUSABLE:
        where = f"{error.filename}: " if error.filename else ""
        to_stderr(
            f"{where}{error.strerror}; choose another --home or TMPDIR, or free some space and check the permissions"
        )
        return 2
    if "TrainingCancelled" in names:
        to_stderr(str(error))
        return 130
    if "TrainingFailed" in names:
        to_stderr(str(error))
        return 1
    raise error


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    if issubclass(category, UserWarning):
        to_stderr(f"note: {message}")
