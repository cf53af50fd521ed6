"""Partitions: new snapshots become partitions without a reload, and a listing that fails takes none away."""

from __future__ import annotations

import logging

import dagster as dg
import pytest
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType

from twhin_pipeline._dagster.assets import jobs, partitions, sensors
from twhin_pipeline.errors import UserError

A, B, C = "2025-01-01", "2025-01-02", "2025-01-03"


def away() -> list[str]:
    raise OSError("the bucket\nis away")


def chain_of(found: list[str] | None) -> dg.Definitions:
    """A chain of one table, whose snapshots are in a list that a test may change; None: the listing fails."""

    def find() -> list[str]:
        return away() if found is None else sorted(found)

    @dg.asset(partitions_def=partitions.Snapshots(find))
    def one() -> None: ...

    return dg.Definitions([one], jobs=[jobs.chain], sensors=[sensors.register_snapshots(find)])


def tick(definitions: dg.Definitions, instance: dg.DagsterInstance) -> str:
    sensor = definitions.resolve_sensor_def("register_snapshots")
    ticked = sensor.evaluate_tick(dg.build_sensor_context(instance))
    assert not ticked.run_requests, "it only registers"
    return str(ticked.skip_message)


def test_the_sensor_registers_what_the_source_has_meanwhile():
    found = [A]
    definitions = chain_of(found)
    with dg.DagsterInstance.ephemeral() as instance:
        assert A in tick(definitions, instance)
        found.append(B)
        assert f"new snapshots: {B}" in tick(definitions, instance)
        assert "none" in tick(definitions, instance)
        assert instance.get_dynamic_partitions(partitions.NAME) == [A, B]


def test_a_snapshot_that_arrives_late_takes_its_place_by_date():
    """Dagster backfills partitions in the order in which they were added."""
    with dg.DagsterInstance.ephemeral() as instance:
        partitions.register(instance, [C, A])
        assert partitions.register(instance, [A, B, C]) == [B]
        assert instance.get_dynamic_partitions(partitions.NAME) == [A, B, C]


def test_a_listing_that_fails_is_one_line_and_registered_snapshots_stay():
    with dg.DagsterInstance.ephemeral() as instance:
        partitions.register(instance, [A])
        told = tick(chain_of(None), instance)
        assert told == "the source's snapshots cannot be listed, those that are registered stay: the bucket is away"
        assert instance.get_dynamic_partitions(partitions.NAME) == [A]


@pytest.mark.parametrize("found", [[B], [], None], ids=["listed", "a query tells none", "the listing fails"])
def test_a_snapshot_that_was_never_registered_can_be_materialized(found):
    definitions = chain_of(found)
    with dg.DagsterInstance.ephemeral() as instance:
        result = definitions.resolve_job_def("chain").execute_in_process(instance=instance, partition_key=B)
        assert result.success and instance.get_dynamic_partitions(partitions.NAME) == [B]


@pytest.mark.parametrize(("key", "found"), [(C, [A, B]), ("newest", [])], ids=["not in the source", "no date"])
def test_a_snapshot_that_there_is_none_of_is_refused(key, found):
    definitions = chain_of(found)
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(dg.DagsterUnknownPartitionError, match=key):
            definitions.resolve_job_def("chain").execute_in_process(instance=instance, partition_key=key)
        assert key not in instance.get_dynamic_partitions(partitions.NAME)


@pytest.mark.parametrize(
    ("load_type", "expected"),
    [("INITIALIZATION", [A, B]), ("RECONSTRUCTION", []), (None, [])],
    ids=["a code location", "the process of a run or step", "a plain import"],
)
def test_only_a_code_location_registers_when_it_loads(tmp_path, load_type, expected):
    loading = DefinitionsLoadContext(DefinitionsLoadType[load_type]) if load_type else None
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance, DefinitionsLoadContext.scoped(loading):
        partitions.register_at_load(lambda: [A, B])
        assert instance.get_dynamic_partitions(partitions.NAME) == expected


def test_definitions_load_where_the_source_cannot_be_listed(tmp_path, monkeypatch, caplog):
    """A listing that failed once kept Dagster from starting."""
    from twhin_pipeline import definitions

    def refused(config: object) -> list[str]:
        raise UserError("s3://bucket/{snapshot}: cannot be read (access denied)")

    monkeypatch.setattr(definitions, "find_snapshots", refused)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        partitions.register(instance, [A])
        loading = DefinitionsLoadContext(DefinitionsLoadType.INITIALIZATION)
        with DefinitionsLoadContext.scoped(loading), caplog.at_level(logging.WARNING, "dagster.twhin"):
            assert definitions.build_defs().resolve_asset_graph().get(dg.AssetKey("published"))
        [line] = [record.getMessage() for record in caplog.records if record.name == "dagster.twhin"]
        assert "access denied" in line and "\n" not in line
        assert instance.get_dynamic_partitions(partitions.NAME) == [A]
