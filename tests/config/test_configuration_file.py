"""Which configuration a command takes: never the bundled one unless it is named, never one that the store is not of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.cli.arguments import read_config
from twhin_pipeline.config import configuration_file, default_config_path
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.views import summary

CONFIG = """
source: {path: edges.csv}
model:
  embeddings: {tables: [{name: user}, {name: item}]}
  relations: [{name: likes, lhs: user, rhs: item}]
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with edges, and no configuration."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "edges.csv").write_text("lhs,rel,rhs\nann,likes,dune\nbob,likes,emma\nann,likes,emma\n")
    (folder / "rates.yaml").write_text("products: 3\n# model: of a machine\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("TWHIN_CONFIG", raising=False)
    monkeypatch.delenv("TWHIN_HOME", raising=False)
    return folder


def twhin(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in the working directory."""
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize("command", ["run", "ingest", "evaluate", "plan", "config", "tune"])
def test_a_folder_without_a_configuration_never_gets_the_bundled_one(here, command, capsys):
    assert run_arguments([command]) == 2
    told = capsys.readouterr().err
    assert told.startswith("twhin: there is no configuration in this folder")
    assert "`twhin init FILE`" in told and "--config debian" in told
    assert {path.name for path in here.iterdir()} == {"edges.csv", "rates.yaml"}


def test_the_only_configuration_of_the_folder_is_taken_and_said(here):
    (here / "mine.yaml").write_text(CONFIG)
    done = twhin("ingest")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "twhin: note: configuration mine.yaml, the only one in this folder\n"
    assert "raw_edges 3 rows" in done.stdout
    printed = twhin("config")
    assert printed.stderr == done.stderr and yaml.safe_load(printed.stdout)["source"]["path"] == "edges.csv"


def test_of_several_configurations_one_must_be_named(here, capsys):
    for name in ("one.yaml", "two.yml"):
        (here / name).write_text(CONFIG)
    assert run_arguments(["ingest"]) == 2
    assert "several configurations in this folder, one.yaml, two.yml; name one with --config" in capsys.readouterr().err
    assert run_arguments(["ingest", "-c", "two.yml"]) == 0
    assert capsys.readouterr().err == ""


def test_what_is_no_configuration_of_ours_is_passed_over(here):
    (here / "mine.yaml").write_text(CONFIG)
    (here / "latin.yaml").write_bytes(b"\xff\xfemodel:\n")
    (here / "large.yaml").write_text("model:\n" + "#" * configuration_file.LARGEST)
    (here / "folder.yaml").mkdir()
    os.mkfifo(here / "pipe.yaml")
    (here / "gone.yaml").symlink_to("nowhere")
    assert configuration_file.in_folder(".") == ["mine.yaml"]


def test_a_bundled_configuration_goes_by_its_name_unless_there_is_such_a_file(here, capsys):
    assert configuration_file.choose("debian") == (default_config_path(), False)
    assert run_arguments(["config", "-c", "debian"]) == 0
    assert "package" in capsys.readouterr().out
    assert run_arguments(["config", "-c", "debain"]) == 2
    told = capsys.readouterr().err
    assert "debain: is neither a file nor a bundled configuration; did you mean 'debian'" in told
    assert len(told.splitlines()) == 1
    (here / "debian").write_text(CONFIG)
    assert configuration_file.choose("debian") == ("debian", False)


def test_the_environment_variable_names_it_as_the_option_does(here):
    (here / "mine.yaml").write_text(CONFIG)
    done = twhin("config", TWHIN_CONFIG="debian")
    assert "package" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("home", ["home", "memory://configuration"])
def test_a_store_of_another_configuration_is_refused_unless_that_is_named(here, home, capsys):
    (here / "away").mkdir()
    (here / "away" / "other.yaml").write_text(CONFIG.replace("edges.csv", "../edges.csv"))
    assert run_arguments(["ingest", "-c", "away/other.yaml", "--home", home, "-s", "2025-01-01"]) == 0
    (here / "mine.yaml").write_text(CONFIG)
    capsys.readouterr()
    for command in ("ingest", "run", "plan"):
        assert run_arguments([command, "--home", home]) == 2
        told = capsys.readouterr().err
        assert f"the configuration in this folder is mine.yaml; the tables in {Store(home).root}" in told
        assert f"were made by {here}/away/other.yaml; name the one that is meant with --config" in told
        assert len(told.splitlines()) == 1
    assert run_arguments(["ingest", "--home", home, "-c", "mine.yaml", "-s", "2025-01-01"]) == 0
    assert run_arguments(["ingest", "--home", home, "-s", "2025-01-01"]) == 0  # it is the store's now


def test_a_folder_without_a_configuration_is_told_the_one_that_made_the_store(here, capsys):
    (here / "away").mkdir()
    (here / "away" / "other.yaml").write_text(CONFIG.replace("edges.csv", "../edges.csv"))
    assert run_arguments(["ingest", "-c", "away/other.yaml", "-s", "2025-01-01"]) == 0
    assert run_arguments(["ingest"]) == 2
    assert f"the tables in {here}/.twhin were made by {here}/away/other.yaml" in capsys.readouterr().err


def test_a_configuration_that_was_changed_or_moved_with_its_store_is_still_the_stores(here, tmp_path, monkeypatch):
    (here / "mine.yaml").write_text(CONFIG)
    assert run_arguments(["ingest"]) == 0
    (here / "mine.yaml").write_text(CONFIG + "training: {num_epochs: 2}\n")
    assert run_arguments(["ingest"]) == 0
    os.rename(here, tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert run_arguments(["ingest"]) == 0


def test_a_stage_that_fails_before_there_are_edges_leaves_the_store_without_an_owner(here):
    (here / "mine.yaml").write_text(CONFIG)
    (here / "edges.csv").write_text("lhs,rel,rhs\nann,hates,dune\n")
    assert run_arguments(["ingest"]) == 2
    assert configuration_file.record(Store(".twhin")) is None


def test_a_damaged_record_is_as_none(here):
    (here / "mine.yaml").write_text(CONFIG)
    assert run_arguments(["ingest"]) == 0
    for text in ("", "[1]", '{"other": 1}'):
        Path(".twhin", configuration_file.RECORD).write_text(text)
        assert configuration_file.record(Store(".twhin")) is None
        assert run_arguments(["ingest"]) == 0
        assert json.loads(Path(".twhin", configuration_file.RECORD).read_text())["path"] == f"{here}/mine.yaml"


def test_a_run_first_says_which_configuration_snapshot_and_store(here, capsys):
    """The run then fails, since no row is an edge."""
    edges = "lhs,rel,rhs\nann,hates,dune\n"
    (here / "mine.yaml").write_text(CONFIG)
    (here / "edges.csv").write_text(edges)
    os.utime(here / "edges.csv", (1.7e9, 1.7e9))
    assert run_arguments(["run"]) == 2
    shown = capsys.readouterr().out
    assert shown == (
        f"configuration mine.yaml, snapshot 2023-11-14 (the day of the newest file), store {here}/.twhin\n"
    )
    assert run_arguments(["run", "-s", "2024-01-01"]) == 2
    assert "mine.yaml, snapshot 2024-01-01, store" in capsys.readouterr().out
    (here / "mine.yaml").write_text(CONFIG.replace("edges.csv", "'edges-{snapshot}.csv'"))
    for day, how in (("2025-01-01", "the only one"), ("2025-01-02", "the newest of 2")):
        (here / f"edges-{day}.csv").write_text(edges)
        assert run_arguments(["run"]) == 2
        assert f"snapshot {day} ({how}), store" in capsys.readouterr().out


def test_a_summary_takes_the_configuration_that_made_the_store(here, monkeypatch):
    (here / "away").mkdir()
    (here / "away" / "other.yaml").write_text(CONFIG.replace("likes", "reads"))
    store = Store("home")
    with store.replace("embeddings/relations", "2025-01-01", config_hash="0"):
        pass
    configuration_file.remember(store, "away/other.yaml")
    (here / "mine.yaml").write_text(CONFIG)
    shown = []
    monkeypatch.setattr(summary, "show", lambda config, *_: shown.append(config.model.relation_names))
    assert run_arguments(["summary", "--home", "home"]) == 0
    assert run_arguments(["summary", "--home", "home", "-c", "mine.yaml"]) == 0
    assert shown == [["reads"], ["likes"]]


def test_two_ways_in_take_the_same_names(here, monkeypatch):
    monkeypatch.setenv("TWHIN_CONFIG", "gowalla")
    assert ConfigurationResource().file == read_config("gowalla", None)[1] == configuration_file.bundled()["gowalla"]
    assert ConfigurationResource(path="debian").file == default_config_path()
    monkeypatch.delenv("TWHIN_CONFIG")
    assert ConfigurationResource().file == default_config_path()  # Dagster has no working directory of the user's


def test_nothing_is_chosen_where_there_is_nothing_to_choose(here):
    with pytest.raises(UserError, match="there is no configuration in this folder; name one"):
        configuration_file.choose(None, Store("home"))
