"""Indexes in Dagster: an asset for each type with its recall, and a step that says why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import small_store
from small_store import SNAPSHOT

from twhin_pipeline._dagster.assets import indexes
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.vectors.export import export


def materialize(folder: Path, kind: str) -> dg.ExecuteInProcessResult:
    """Run the stage and its checks as Dagster does, on a small store."""
    config = small_store.config(indexes={"kind": kind, "recall_at": [3, 10]}, training={"refit": False})
    small = small_store.make(folder, config=config)
    export(config, small.store, SNAPSHOT)
    (folder / "c.yaml").write_text(config.to_yaml())
    made: list[Any] = indexes.make(config, dg.StaticPartitionsDefinition([SNAPSHOT]))
    resources: dict[str, Any] = {
        "configuration": ConfigurationResource(path=str(folder / "c.yaml")),
        "store": StoreResource(root=small.store.root),
        "tracking": TrackingResource(),
        "launcher": LauncherResource(),
    }
    return dg.materialize(made, partition_key=SNAPSHOT, resources=resources)


def test_each_index_shows_its_recall_as_a_number_a_picture_and_a_table_and_is_checked(tmp_path: Path) -> None:
    done = materialize(tmp_path, "flat")
    events = {
        one.materialization.asset_key.to_user_string(): one.materialization.metadata
        for one in done.get_asset_materialization_events()
    }
    assert set(events) == {"index/user", "index/item"}
    shown = events["index/item"]
    assert list(shown)[:2] == ["kind", "least_recall"] and shown["least_recall"].value == 1.0
    assert shown["largest_latency_ms"].value > 0 and shown["times_as_fast_as_exact"].value > 0
    picture = shown["recall"].value
    assert isinstance(picture, str) and "data:image/svg+xml," in picture and len(picture) < 1_000
    rows = [record.data for record in shown["relations"].records]  # type: ignore[union-attr]
    assert [row["relation"] for row in rows] == ["likes", "likes", "rates", "rates"]
    columns = shown["dagster/column_schema"].value.columns  # type: ignore[union-attr]
    assert all(column.description for column in columns)
    checked = done.get_asset_check_evaluations()
    assert len(checked) == 2 and all(one.passed for one in checked)


def test_a_small_graph_says_why_it_has_no_index_and_its_check_has_nothing_to_find(tmp_path: Path) -> None:
    done = materialize(tmp_path, "auto")
    for event in done.get_asset_materialization_events():
        assert "exact search is fast enough" in str(event.materialization.metadata["left_out"].value)
    checked = done.get_asset_check_evaluations()
    assert len(checked) == 2 and all(one.passed for one in checked)
    assert {str(one.metadata["note"].value) for one in checked} == {"no index was made, so there is nothing to check"}


def test_without_indexes_there_is_no_step() -> None:
    config = small_store.config(indexes={"kind": "none"})
    assert indexes.make(config, dg.StaticPartitionsDefinition([SNAPSHOT])) == []
