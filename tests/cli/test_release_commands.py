"""`twhin releases`, `promote`, `rollback`, `drift`."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release


@pytest.fixture
def home(tmp_path: Path) -> str:
    return str(tmp_path / "home")


def made(home: str, snapshot: str, value: float) -> Release:
    store = Store(home)
    with store.replace("embeddings/user", snapshot, config_hash="c") as draft:
        table = {"id": ["a", "b"], "row": [0, 1], "embedding": [[1.0, value], [value, 1.0]], "trained_edges": [1, 1]}
        draft.write(pa.table(table))
    version = store.manifest("embeddings/user", snapshot).version
    return releases.make(store, snapshot, {"embeddings/user": version}, {"recall@20": value}, None)


def test_releases_are_listed_with_figures_state_and_reason(home: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = (made(home, f"2025-01-0{n}", n / 10) for n in (1, 2, 3))
    for release, reason in ((first, "the first"), (second, "better")):
        assert run_arguments(["promote", release.name, "--reason", reason, "--home", home]) == 0
    capsys.readouterr()
    assert run_arguments(["releases", "--home", home, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["release"], row["state"], row["reason"]) for row in found["releases"]] == [
        (first.name, "former", "the first"), (second.name, "current", "better"), (third.name, "waiting", None)
    ]  # fmt: skip
    assert [move["release"] for move in found["history"]] == [first.name, second.name]
    assert run_arguments(["releases", "--home", home]) == 0
    shown = capsys.readouterr().out
    for text in (first.name, "former", "0.1000", "better"):
        assert text in shown


def test_a_rollback_goes_to_the_release_before_and_back_again(home: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (made(home, f"2025-01-0{n}", n / 10) for n in (1, 2))
    for release in (first, second):
        run_arguments(["promote", release.name, "--reason", "x", "--home", home])
    for expected in (first, second):
        assert run_arguments(["rollback", "--reason", "clicks fell", "--home", home]) == 0
        assert releases.current(Store(home)) == expected
    assert releases.history(Store(home))[-1].reason == "rollback: clicks fell"
    assert f"{first.name} of snapshot 2025-01-01 is current" in capsys.readouterr().out


def test_what_was_never_current_is_promoted_and_not_rolled_back_to(
    home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (made(home, f"2025-01-0{n}", n / 10) for n in (1, 2))
    assert run_arguments(["rollback", "--reason", "x", "--home", home]) == 2
    assert "nothing to roll back to; no release has ever been current" in capsys.readouterr().err
    run_arguments(["promote", first.name, "--reason", "x", "--home", home])
    assert run_arguments(["rollback", second.name, "--reason", "x", "--home", home]) == 2
    assert f"was never current; make it so by `twhin promote {second.name}" in capsys.readouterr().err
    assert run_arguments(["promote", "nothing", "--reason", "x", "--home", home]) == 2
    assert "unknown release 'nothing'" in capsys.readouterr().err
    assert releases.current(Store(home)) == first


def test_drift_compares_the_newest_release_with_the_one_before(home: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_arguments(["drift", "--home", home]) == 2
    assert "no release yet" in capsys.readouterr().err
    first = made(home, "2025-01-01", 0.0)
    assert run_arguments(["drift", "--home", home]) == 2
    assert f"no release before {first.name}" in capsys.readouterr().err
    second, third = made(home, "2025-01-02", 0.5), made(home, "2025-01-03", 0.5)
    assert run_arguments(["drift", "--home", home, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"]) == (second.name, third.name)
    assert found["types"][0]["cosine"] == pytest.approx(1)
    assert run_arguments(["drift", first.name, second.name, "--home", home]) == 0
    shown = capsys.readouterr().out
    assert "user" in shown and f"{1 / 1.25**0.5:.4f}" in shown


def test_drift_compares_with_what_consumers_had_and_not_with_a_release_that_waits(
    home: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _, third = (made(home, f"2025-01-0{n}", n / 10) for n in (1, 2, 3))
    run_arguments(["promote", first.name, "--reason", "x", "--home", home])
    capsys.readouterr()
    assert run_arguments(["drift", "--home", home, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"]) == (first.name, third.name)


@pytest.mark.parametrize("command", ["promote", "rollback", "pin", "accept"])
def test_a_decision_without_a_reason_is_refused(home: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    release = made(home, "2025-01-01", 0.1)
    about = {"accept": ["embeddings/user"], "rollback": []}.get(command, [release.name])
    assert run_arguments([command, *about, "--reason", " ", "--home", home]) == 2
    assert "is empty; say why" in capsys.readouterr().err
    assert releases.history(Store(home)) == [] and releases.pins(Store(home)) == {}


def test_a_home_without_a_table_is_no_store_to_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_arguments(["prune", "--home", str(tmp_path / "nowhere"), "--yes"]) == 2
    assert "it is no store; correct --home" in capsys.readouterr().err
