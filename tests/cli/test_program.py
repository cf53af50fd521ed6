"""The command line: quick to start, readable help, one line and exit code 2 on a mistake."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from edge_files import make_config, write

from twhin_pipeline import cli, pipeline
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.cli.run import STAGE_HELP

ROOT = Path(__file__).resolve().parents[2]
SNAPSHOT = "2025-01-01"


def commands() -> dict[str, Any]:
    """Return every command by its name."""
    group: Any = typer.main.get_command(cli.app)
    return dict(group.commands)


def test_help_loads_few_modules_and_nothing_slow():
    """It takes about 0.2 s: modules are counted, since a clock tells more of the machine's other work."""
    code = (
        "import sys; from twhin_pipeline.cli import run_arguments; run_arguments(['--help']);"
        "slow = {'torch', 'duckdb', 'mlflow', 'pandas', 'pyarrow', 'dagster', 'pydantic'} & set(sys.modules);"
        "sys.exit(f'loaded {slow}' if slow else f'{len(sys.modules)} modules' if len(sys.modules) > 500 else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_command_alone_shows_its_help_and_every_text_of_it_is_complete(columns):
    command = [sys.executable, "-m", "twhin_pipeline.cli"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns})
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("Usage: twhin ")
    words = " ".join(done.stdout.split())
    for name, one in commands().items():
        assert f"{name} {one.get_short_help_str(limit=1_000)}" in words
    assert "..." not in words.partition("Start:")[2]


def test_commands_are_in_panels_by_what_one_does_with_them(capsys):
    assert run_arguments(["--help"]) == 0
    panels = re.findall(r"^(\w[\w ]*):\n((?:  .*\n)+)", capsys.readouterr().out, re.MULTILINE)
    names = {title: re.findall(r"^  (\w+)", lines, re.MULTILINE) for title, lines in panels if title != "Options"}
    assert names.pop("Run one stage") == list(pipeline.STAGES)
    assert list(names) == ["Start", "Run", "Look", "Use", "Operate"]
    assert names["Start"][0] == "init" and names["Run"][0] == "run" and names["Look"][0] == "summary"
    assert {name for some in names.values() for name in some} | set(pipeline.STAGES) == set(commands())


COMPLETION = {
    "bash": {"COMP_WORDS": "twhin neigh", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "twhin neigh"},
    "fish": {"_TYPER_COMPLETE_ARGS": "twhin neigh", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", COMPLETION)
def test_shells_complete_commands_by_the_script_that_the_command_shows(shell):
    command = [sys.executable, "-m", "twhin_pipeline.cli"]
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([*command, "--show-completion", shell], capture_output=True, text=True, env=env)
    assert shown.returncode == 0 and f"_TWHIN_COMPLETE=complete_{shell}" in shown.stdout
    env = {**env, **COMPLETION[shell], "_TWHIN_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert "neighbors" in done.stdout and "recommend" not in done.stdout


def test_the_version_is_that_of_the_package(capsys):
    assert run_arguments(["--version"]) == 0
    assert capsys.readouterr().out == f"twhin-pipeline {metadata.version('twhin-pipeline')}\n"


def test_every_command_explains_itself_and_its_options(capsys):
    for name, one in commands().items():
        assert run_arguments([name, "--help"]) == 0
        assert f"Usage: twhin {name}" in capsys.readouterr().out
        assert one.help and all(parameter.help for parameter in one.params)


def test_stage_commands_are_the_stages_of_the_chain_in_order():
    assert {name: stage.summary for name, stage in pipeline.STAGES.items()} == STAGE_HELP
    assert list(pipeline.STAGES) == list(STAGE_HELP)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nosuch"], "No such command"),
        (["neighbors"], "Missing argument"),
        (["run", "--nosuch"], "No such option"),
        (["plan", "--world-size", "0"], "--world-size"),
        (["config", "--config", "absent.yaml"], "absent.yaml: cannot be read"),
        (["config", "-c", "debian", "--set", "training.num_epoch=3"], "did you mean 'num_epochs'"),
        (["config", "-c", "debian", "--set", "nothing"], "must look like training.num_epochs=3"),
        (["run", "-c", "debian", "--snapshot", "yesterday"], "must be a date, YYYY-MM-DD"),
        (
            ["ingest", "-c", "debian", "--set", "source.path=absent-{snapshot}.parquet"],
            "absent-{snapshot}.parquet; correct the path, or pass --snapshot",
        ),
        (["ingest", "-c", "debian", "--snapshot", "1999-01-01"], "no file for snapshot 1999-01-01"),
        (["metrics"], "there is no evaluation yet; make one with `twhin run`"),
        (["neighbors", "package", "vim"], "there is no embeddings/relations yet"),
        (["evaluate", "-c", "debian"], "make it with `twhin"),
        (["summary"], "there is no embeddings/relations yet"),
        (["plan", "-c", "debian"], "--rows package="),
        (["generate"], "give the path of the Parquet file"),
        (["generate", "graph.csv"], "must be a local path that ends in .parquet"),
    ],
)
def test_a_mistake_is_one_line_on_standard_error_and_exit_code_2(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TWHIN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(ROOT)
    assert run_arguments(arguments) == 2
    captured = capsys.readouterr()
    assert told in captured.err
    assert captured.err.startswith("twhin: ") and captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_mistake_shows_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, "-m", "twhin_pipeline.cli", "metrics", "--home", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and done.stderr.startswith("twhin: ")


def test_an_error_that_is_ours_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("twhin_pipeline.operations.doctor.examine", lambda store, launch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_arguments(["doctor"])


def test_an_empty_query_and_a_home_that_is_a_file_are_told_in_one_line(tmp_path, capsys):
    assert run_arguments(["sql", " ; ", "--home", str(tmp_path)]) == 2
    assert "the query is empty" in capsys.readouterr().err
    config = make_config(write(tmp_path / "e.parquet", [("a", "fav", "x")]))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    (tmp_path / "file").write_text("no folder")
    home = str(tmp_path / "file")
    assert run_arguments(["ingest", "-c", str(tmp_path / "c.yaml"), "--home", home, "-s", SNAPSHOT]) == 2
    told = capsys.readouterr().err
    assert home in told and "--home" in told and len(told.splitlines()) == 1
