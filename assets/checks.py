"""Asset checks, made from the registry of `twhin_pipeline/checks/checks.py`: one step a stage, each check selectable.

What belongs here: how a check's result looks in Dagster. What does not: what is checked (`twhin_pipeline/checks/sql`).
https://docs.dagster.io/guides/test/asset-checks
"""

from collections.abc import Iterator, Sequence

import dagster as dg

from twhin_pipeline.checks import checks
from twhin_pipeline.config import TwhinConfig, relations
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store
from twhin_pipeline.words import INDEX

from ..resources.configuration import ConfigurationResource
from ..resources.store import StoreResource
from . import metadata, provenance
from .execution import POOL, mistakes

SEVERITY = {"ERROR": dg.AssetCheckSeverity.ERROR, "WARN": dg.AssetCheckSeverity.WARN}
SHOWN = 20


def make(name: str, config: TwhinConfig, tables: Sequence[str]) -> list[dg.AssetChecksDefinition]:
    """Return one definition with every check of `tables`; none where they have no checks.

    One step for all: a process each would take far longer.
    """
    pairs = checks.of_tables(config, tables)
    if not pairs:
        return []
    specs = [
        dg.AssetCheckSpec(
            check.name,
            asset=provenance.key(table),
            description=check.description,
            blocking=check.blocking,
            metadata={"sql": dg.MetadataValue.md(f"```sql\n{check.sql}\n```")},
        )
        for check, table in pairs
    ]

    @dg.multi_asset_check(name=name, specs=specs, can_subset=True, pool=POOL)
    def run_checks(
        context: dg.AssetCheckExecutionContext, configuration: ConfigurationResource, store: StoreResource
    ) -> Iterator[dg.AssetCheckResult]:
        selected: dict[str, list[str]] = {}
        for check, table in pairs:
            if dg.AssetCheckKey(provenance.key(table), check.name) in context.selected_asset_check_keys:
                selected.setdefault(table, []).append(check.name)
        with mistakes():
            loaded, opened = configuration.load(), store.open()
            for table, names in selected.items():
                snapshot = context.partition_key if context.has_partition_key else newest(opened, table)
                if table.startswith(f"{INDEX}/") and not opened.versions_of(table, snapshot):
                    yield from (_nothing(name, table, snapshot) for name in names)
                    continue
                resolved = relations.resolve(loaded, opened, snapshot)
                for check, result in checks.results(resolved, opened, snapshot, table, names):
                    yield as_result(check, table, snapshot, result)

    return [run_checks]


def _nothing(name: str, table: str, snapshot: str) -> dg.AssetCheckResult:
    """Return the result of a check of a table that its stage has left out."""
    note = "no index was made, so there is nothing to check"
    return dg.AssetCheckResult(
        passed=True, asset_key=provenance.key(table), check_name=name, metadata={"snapshot": snapshot, "note": note}
    )


def newest(store: Store, table: str) -> str:
    """Return the newest snapshot of a table: what a check looks at that is executed by itself, from its page.

    Raises:
        UserError: There is none.
    """
    found = store.snapshots_made(table)
    if not found:
        raise UserError(f"there is no table {table} to check; materialize it first")
    return found[-1]


def as_result(check: checks.Check, table: str, snapshot: str, result: checks.CheckResult) -> dg.AssetCheckResult:
    """Return what Dagster shows: on failure the offending rows, and what was measured."""
    shown = {"snapshot": snapshot, **result.metadata}
    for name, rows in (("offending", result.offending), ("measured", result.measured)):
        if rows is not None and rows.num_rows:
            shown[name] = metadata.rows_of(rows, SHOWN)
    return dg.AssetCheckResult(
        passed=result.passed,
        asset_key=provenance.key(table),
        check_name=check.name,
        severity=SEVERITY[check.severity],
        metadata=shown,
        description=None if result.passed else f"{check.finding(result)}. {check.description}",
    )
