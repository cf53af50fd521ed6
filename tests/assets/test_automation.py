"""A stage follows when what it is made from was made anew; a new snapshot starts nothing by this."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pytest

from twhin_pipeline._dagster.assets import automation, partitions

A, B = "2025-01-01", "2025-01-02"


class Chain:
    """Three tables of a chain, with a blocking check of the first, all with the condition of the pipeline's assets."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self.instance, self.passes, self.cursor = instance, True, None
        snapshots = partitions.Snapshots(lambda: [A, B])

        def table(name: str, *deps: str) -> dg.AssetsDefinition:
            spec = dg.AssetSpec(name, deps=deps, automation_condition=automation.FOLLOWS)

            @dg.multi_asset(name=f"make_{name}", specs=[spec], partitions_def=snapshots)
            def make() -> dg.MaterializeResult:
                return dg.MaterializeResult(asset_key=name)

            return make

        @dg.multi_asset_check(specs=[dg.AssetCheckSpec("sound", asset="edges", blocking=True)])
        def check() -> dg.AssetCheckResult:
            return dg.AssetCheckResult(passed=self.passes)

        tables = [table("edges"), table("vocabulary", "edges"), table("model", "vocabulary")]
        self.definitions = dg.Definitions(tables, asset_checks=[check], sensors=[automation.sensor()])

    def make(self, selection: str, snapshot: str = A) -> None:
        job = self.definitions.resolve_implicit_global_asset_job_def()
        chosen = [dg.AssetKey(one) for one in selection.split()]
        job.execute_in_process(
            instance=self.instance, partition_key=snapshot, asset_selection=chosen, raise_on_error=False
        )

    def requested(self) -> dict[str, set[Any]]:
        """Evaluate the conditions; return the snapshots that are requested, by table."""
        result = dg.evaluate_automation_conditions(self.definitions, self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        found = {name: result.get_requested_partitions(dg.AssetKey(name)) for name in ("edges", "vocabulary", "model")}
        return {name: snapshots for name, snapshots in found.items() if snapshots}


@pytest.fixture
def chain() -> Iterator[Chain]:
    with dg.DagsterInstance.ephemeral() as instance:
        partitions.register(instance, [A])
        made = Chain(instance)
        made.requested()  # what there was before the switch was on does not count
        yield made


def test_what_follows_a_table_that_was_made_anew_is_requested_for_its_snapshot(chain):
    chain.make("edges vocabulary model")
    assert chain.requested() == {}, "a run of the whole chain leaves nothing to do"
    chain.make("edges")
    assert chain.requested() == {"vocabulary": {A}, "model": {A}}
    assert chain.requested() == {}, "once"


def test_a_blocking_check_that_fails_holds_back_what_follows(chain):
    chain.make("edges vocabulary model")
    chain.requested()
    chain.passes = False
    chain.make("edges")
    assert chain.requested() == {}


def test_a_new_snapshot_starts_nothing(chain):
    partitions.register(chain.instance, [B])
    assert chain.requested() == {}
