"""Checks run by hand, of any tables of a snapshot: `twhin check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError, unknown

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store


VIEW = "refit"
REFITTED = ("training_set/positives", "training_set/negatives", "twhin_model")
"""Tables of the view `refit` that have checks."""


@dataclass(frozen=True)
class Outcome:
    """What one check of one table found."""

    table: str
    check: str
    status: Literal["passed", "failed", "warning"]
    """`failed`: it blocks, and holds back what follows; `warning`: it did not pass, and holds back nothing."""
    finding: str
    """What was found, with how many; empty where it passed."""
    offending_rows: int
    seconds: float
    description: str
    offending: list[dict[str, Any]]
    """The first offending rows."""


def outcomes(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    patterns: Sequence[str] = (),
    rows: int = 20,
    refit: TwhinConfig | None = None,
) -> list[Outcome]:
    """Run every check of the tables that `patterns` name, such as `vocabulary/*`; without patterns of all tables.

    Args:
        config: The configuration, with the relations found in the source.
        store: Where the tables are.
        snapshot: Which one.
        patterns: Names of tables, or patterns of the shell.
        rows: Offending rows to return of each check.
        refit: The configuration of the refit, whose tables are below `refit/`; None where there is none.

    Raises:
        UserError: No table with checks fits a pattern, a table that was named is not there, or none is there at all.
    """
    of_view = {} if refit is None else {f"{VIEW}/{table}": table for table in REFITTED}
    known = list(dict.fromkeys(table for check in checks.CHECKS.values() for table in check.tables_of(config)))
    known += of_view
    wanted = []
    for pattern in patterns:
        fitting = [table for table in known if fnmatchcase(table, pattern)]
        if not fitting:
            raise UserError(f"check: {unknown('table', pattern, known)}")
        wanted += fitting
    tables = list(dict.fromkeys(wanted)) or [table for table in known if store.versions_of(table, snapshot)]
    if not tables:
        raise UserError(f"{store.root}: no table of snapshot {snapshot} to check; make them with `twhin run`")
    found = []
    for table in tables:
        if table in of_view and refit is not None:
            results = checks.results(refit, store.seen_as(VIEW), snapshot, of_view[table])
        else:
            results = checks.results(config, store, snapshot, table)
        found += [_outcome(table, check, result, rows) for check, result in results]
    return found


def _outcome(table: str, check: checks.Check, result: checks.CheckResult, rows: int) -> Outcome:
    failed: Literal["failed", "warning"] = "failed" if check.blocking else "warning"
    return Outcome(
        table=table,
        check=check.name,
        status="passed" if result.passed else failed,
        finding="" if result.passed else check.finding(result),
        offending_rows=result.metadata["offending_rows"],
        seconds=result.metadata["seconds"],
        description=check.description,
        offending=result.offending.slice(0, rows).to_pylist() if result.offending is not None else [],
    )
