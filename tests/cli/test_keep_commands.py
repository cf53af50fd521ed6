"""`twhin prune`, `pin`, `unpin` and `lineage`."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import days
import pytest
import yaml

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import configuration_file
from twhin_pipeline.lifecycle import retention
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, list[Release]]:
    """Four days, which passed long ago."""

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):  # type: ignore[no-untyped-def]
            return super().now(tz) + timedelta(days=100)

    monkeypatch.setattr(retention, "datetime", Later)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "home"))
    return store, [days.make(store, day) for day in range(4)]


def run(*arguments: str, home: Store) -> int:
    return run_arguments([*arguments, "--home", home.root])


def policy(folder: Path, **fields: int) -> str:
    data = days.CONFIG.model_dump(mode="json", exclude_none=True) | {"retention": fields}
    (folder / "c.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "c.yaml")


def test_without_yes_it_only_shows_what_would_go_and_why_the_rest_stays(
    made: tuple[Store, list[Release]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, published = made
    config = policy(tmp_path, releases=1, snapshots=1)
    assert run("prune", "-c", config, home=store) == 0
    shown = capsys.readouterr().out
    for text in (f"policy of {config}", "embeddings/user", "2025-01-01 … 2025-01-02", "the current release",
                 "nothing was removed (--yes removes it)"):  # fmt: skip
        assert text in shown
    assert len(releases.names(store)) == 4
    assert run("prune", "-c", config, "--yes", "--json", home=store) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["removed"] and found["policy"]["releases"] == 1
    assert found["bytes"] == sum(one["bytes"] for one in found["goes"]) > 0
    assert releases.names(store) == [one.name for one in published[2:]]
    assert run("prune", "-c", config, "--yes", home=store) == 0
    assert "Nothing goes." in capsys.readouterr().out


def test_the_policy_is_that_of_the_configuration_that_made_the_tables_or_the_default(
    made: tuple[Store, list[Release]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = made
    assert run("prune", home=store) == 0
    assert "policy of the defaults" in (shown := capsys.readouterr().out) and "Nothing goes." in shown
    config = policy(tmp_path, releases=1, snapshots=1)
    configuration_file.remember(store, config)
    assert run("prune", home=store) == 0
    assert f"policy of {config}" in (shown := capsys.readouterr().out) and "would go" in shown
    assert run("prune", "--set", "retention.snapshots=4", home=store) == 0
    assert "4 newest snapshots" in capsys.readouterr().out
    assert run("prune", "--set", "retention.releases=0", home=store) == 2
    assert "retention.releases" in capsys.readouterr().err


def test_a_pin_keeps_a_release_and_the_list_of_releases_says_so(
    made: tuple[Store, list[Release]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, published = made
    config = policy(tmp_path, releases=1, snapshots=1)
    assert run("pin", published[0].name, "--reason", "ranking was trained on it", home=store) == 0
    assert run("pin", "nothing", "--reason", "x", home=store) == 2
    assert run("prune", "-c", config, "--yes", home=store) == 0
    capsys.readouterr()
    assert run("releases", "--json", home=store) == 0
    rows = json.loads(capsys.readouterr().out)["releases"]
    assert [(row["state"], row["pinned"]) for row in rows] == [
        ("former", "ranking was trained on it"), ("maps only", None), ("former", None), ("current", None),
    ]  # fmt: skip
    assert run("releases", home=store) == 0
    assert "former, pinned" in capsys.readouterr().out
    assert run("unpin", published[0].name, home=store) == 0
    assert run("prune", "-c", config, "--yes", home=store) == 0
    assert releases.names(store) == [one.name for one in published[2:]]


def test_the_chain_behind_a_vector_is_shown_for_people_and_for_programs(
    made: tuple[Store, list[Release]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, published = made
    assert run("lineage", "user", "u03", home=store) == 0
    shown = capsys.readouterr().out
    for text in (published[-1].name, "started from", "embeddings/user", published[-1].tables["raw_edges"], "likes"):
        assert text in shown
    assert run("lineage", "user", "u03", "--release", published[0].name, "--json", home=store) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["release"]["name"] == published[0].name and not found["release"]["current"]
    assert found["tables"][0]["version"] == published[0].tables["embeddings/user"] and found["edges"]
    assert run("lineage", "user", "nobody", home=store) == 2
