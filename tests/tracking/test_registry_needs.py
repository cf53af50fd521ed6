"""Which registered models somebody needs: those with an alias that no registration sets by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from twhin_pipeline import tracking
from twhin_pipeline.store import Store
from twhin_pipeline.tracking import server
from twhin_pipeline.tracking.registry import REMOVED


def test_only_aliases_of_somebodys_own_and_the_champion_are_needs_and_what_has_gone_is_tagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("TWHIN_NO_TRACKING", raising=False)
    store = Store(str(tmp_path / "home"))
    assert tracking.aliased(store) == {} and not (tmp_path / "home").exists(), "to ask makes no database"
    client = server.connect(store)
    client.create_registered_model("twhin")
    for number in (1, 2, 3):
        tags = {"store": store.root, "snapshot": f"2025-01-0{number}", "store_version": f"v{number}", "view": ""}
        client.create_model_version("twhin", str(tmp_path), tags=tags)
        for alias in ("newest", f"snapshot-2025-01-0{number}"):
            client.set_registered_model_alias("twhin", alias, str(number))
    client.set_registered_model_alias("twhin", "ranking", "1")
    client.set_registered_model_alias("twhin", "champion", "3")
    found = tracking.aliased(store)
    assert {alias: one["version"] for alias, one in found.items()} == {
        "models:/twhin@ranking": "v1", "models:/twhin@champion": "v3",
    }  # fmt: skip
    assert found["models:/twhin@ranking"]["view"] is None
    tracking.note_removed(store, ["models:/twhin/2"], "2025-02-02")
    assert client.get_model_version("twhin", "2").tags[REMOVED] == "2025-02-02"
