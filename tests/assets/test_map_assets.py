"""Maps in Dagster: an asset for each entity type that the configuration names, with a picture and its clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import days
import pytest
import yaml

from twhin_pipeline._dagster.assets import maps, provenance
from twhin_pipeline._dagster.resources.configuration import ConfigurationResource
from twhin_pipeline._dagster.resources.launcher import LauncherResource
from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline._dagster.resources.tracking import TrackingResource
from twhin_pipeline.config import load_config
from twhin_pipeline.definitions import build_defs
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Store

DAY = days.name(0)


@pytest.fixture
def config_path(tmp_path: Path) -> str:
    """A configuration with a map of users."""
    data = days.CONFIG.model_dump(mode="json", exclude_defaults=True)
    data |= {"maps": {"entities": ["user"], "method": "pca"}, "source": {"path": "edges.csv", "snapshots": [DAY]}}
    path = tmp_path / "graph.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_map_is_an_asset_between_the_vectors_and_the_release(config_path: str) -> None:
    graph = build_defs(config_path=config_path).resolve_asset_graph()
    key = provenance.key("map/user")
    parents = {provenance.table(one) for one in graph.get(key).parent_keys}
    assert parents == set(STAGES["map"].upstream(load_config(config_path)))
    assert key in graph.get(provenance.key("published")).parent_keys
    assert not graph.has(provenance.key("map/item"))


def test_materializing_a_map_shows_its_picture_and_the_sizes_of_its_clusters(tmp_path: Path, config_path: str) -> None:
    store = Store(str(tmp_path / "home"))
    days.make(store, 0)
    assets = maps.make(load_config(config_path), dg.StaticPartitionsDefinition([DAY]))
    resources: dict[str, Any] = {
        "configuration": ConfigurationResource(path=config_path),
        "store": StoreResource(root=store.root),
        "tracking": TrackingResource(),
        "launcher": LauncherResource(),
    }
    done = dg.materialize(assets, partition_key=DAY, resources=resources, selection=[provenance.key("map/user")])
    (event,) = done.get_asset_materialization_events()
    shown = event.materialization.metadata
    rows = store.read("map/user", DAY).to_pylist()
    assert "![the map, by cluster](<data:image/svg+xml," in shown["map"].value
    assert len(shown["map"].value) < 1_000, "Dagster draws no longer one"
    clusters = shown["clusters"]
    assert isinstance(clusters, dg.TableMetadataValue)
    assert sum(int(one.data["entities"]) for one in clusters.records) == len(rows) == 30
    assert {one.data["cluster"] for one in clusters.records} == {row["cluster_name"] for row in rows}
    assert Path(str(shown["map_large"].value)).read_bytes().startswith(b"\x89PNG")
