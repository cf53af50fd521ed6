"""An old snapshot that is made anew is replaced whole; what was made from it is stale in the UI and in the store."""

from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from dagster_home import Home, graph

from twhin_pipeline._dagster.resources.store import StoreResource
from twhin_pipeline.definitions import build_defs
from twhin_pipeline.store import Store

OLD, NEW = "2025-01-01", "2025-01-02"
EDGES = ["raw_edges", "raw_edges_rejected"]
VOCABULARY = ["vocabulary/user", "vocabulary/item"]


class Chain:
    """The first two stages, run in this process."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.home, self.instance = Home(folder), instance
        graph(folder / f"edges-{NEW}.parquet", seed=1)
        self.store = Store(str(self.home.store))
        resources = {"store": StoreResource(root=self.store.root)}
        self.definitions = build_defs(config_path=self.home.env["TWHIN_CONFIG"], resource_overrides=resources)

    def make(self, snapshot: str, *tables: str) -> None:
        job = self.definitions.resolve_implicit_global_asset_job_def()
        chosen = [dg.AssetKey(table.split("/")) for table in tables]
        assert job.execute_in_process(
            instance=self.instance, partition_key=snapshot, asset_selection=chosen, raise_on_error=False
        ).success

    def status(self, table: str, snapshot: str) -> StaleStatus:
        """Return what the UI shows."""
        assets = self.definitions.get_repository_def().asset_graph
        resolver = CachingStaleStatusResolver(self.instance, assets, LoadingContextForTest(self.instance))
        return resolver.get_status(dg.AssetKey(table.split("/")), snapshot)


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    monkeypatch.setenv("TWHIN_NO_TRACKING", "1")
    with dg.DagsterInstance.ephemeral() as instance:
        yield Chain(tmp_path, instance)


def test_an_old_snapshot_made_anew_is_replaced_whole_and_what_follows_shows_as_stale(chain):
    for snapshot in (OLD, NEW):
        chain.make(snapshot, *EDGES, *VOCABULARY)
    before = chain.store.manifest("raw_edges", OLD)
    event = chain.instance.get_latest_data_version_record(dg.AssetKey("raw_edges"), partition_key=OLD)
    assert event.asset_materialization.tags["dagster/data_version"] == before.version
    assert {chain.status("vocabulary/user", one) for one in (OLD, NEW)} == {StaleStatus.FRESH}

    graph(chain.home.folder / f"edges-{OLD}.parquet", users=160, seed=2)
    chain.make(OLD, *EDGES)

    edges = chain.store.read("raw_edges", OLD).to_pylist()
    assert {row["lhs"] for row in edges} <= {f"u{n}" for n in range(160)}, "no row of the version before is left"
    assert chain.store.manifest("raw_edges", OLD).version != before.version
    assert chain.store.stale("vocabulary/user", OLD) == ["raw_edges"]
    assert chain.status("vocabulary/user", OLD) is StaleStatus.STALE
    assert chain.status("raw_edges", OLD) is StaleStatus.FRESH
    # The later snapshot's vocabulary grew from the older one's, which is as it was.
    assert chain.store.stale("vocabulary/user", NEW) == [] and chain.status("vocabulary/user", NEW) is StaleStatus.FRESH

    chain.make(OLD, *VOCABULARY)
    assert chain.store.stale("vocabulary/user", OLD) == [] and chain.status("vocabulary/user", OLD) is StaleStatus.FRESH
    assert chain.store.stale("vocabulary/user", NEW) == [f"vocabulary/user@{OLD}"]
