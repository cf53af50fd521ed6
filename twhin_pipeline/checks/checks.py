"""Checks of the store's tables: what must hold, in DuckDB SQL, one file a check in `sql/`.

A check's query returns what is wrong. Where its result has a column `ok`, it returns what it measured, and the rows
whose `ok` is not true are wrong. The comment at the head of the file is the check's description.
Every query sees the same views, made here: see `check_views.prepare`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.words import REPEATS

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

SHOWN_ROWS = 1_000
"""At most so many offending rows are returned; all are counted."""


@dataclass(frozen=True)
class Check:
    """One check. `tables` are asset names; `vocabulary/*` and `embeddings/*` stand for one table an entity type."""

    name: str
    tables: tuple[str, ...]
    blocking: bool = True
    severity: Literal["ERROR", "WARN"] = "ERROR"

    @property
    def sql(self) -> str:
        """The query."""
        return (resources.files("twhin_pipeline.checks") / "sql" / f"{self.name}.sql").read_text()

    @property
    def description(self) -> str:
        """The comment at the head of the query."""
        lines = []
        for line in self.sql.splitlines():
            if not line.startswith("--"):
                break
            lines.append(line.removeprefix("--").strip())
        return " ".join(lines)

    def tables_of(self, config: TwhinConfig) -> list[str]:
        """Return the tables it is about, entity types spelled out."""
        names = []
        for table in self.tables:
            if table == REPEATS and not config.split.repeats:
                continue
            stem, star, _ = table.partition("*")
            names += [stem + entity for entity in config.model.table_names] if star else [table]
        return names


@dataclass(frozen=True)
class CheckResult:
    """What a check found. `offending` has the first rows that are wrong, `measured` all rows of a measuring check."""

    passed: bool
    metadata: dict[str, Any] = field(default_factory=dict)
    offending: pa.Table | None = None
    measured: pa.Table | None = None


_EDGES = ("raw_edges",)
_VOCABULARY = ("vocabulary/*",)
_HELD_OUT = ("held_out/validation", "held_out/test")
_NEGATIVES = ("training_set/negatives", "held_out/validation_negatives")
_EMBEDDINGS = ("embeddings/*",)

_NOTHING_SAMPLED = (
    "train_data.global_negatives is all: every entity of the type is a candidate, or in each step a sample that "
    "training draws (sampled_per_step), so there is nothing to audit but that the table is empty; what is masked "
    "follows from the training edges themselves"
)

CHECKS: dict[str, Check] = {
    check.name: check
    for check in (
        Check("edges_present", _EDGES),
        Check("edges_not_null", _EDGES),
        Check("edges_known_relations", _EDGES),
        Check("edges_unique", _EDGES),
        Check("edges_rejected_share", _EDGES),
        Check("edges_relations_kept", _EDGES),
        Check("edges_relations_present", _EDGES, blocking=False, severity="WARN"),
        Check("edges_self_loops", _EDGES, blocking=False, severity="WARN"),
        Check("ids_unique", _VOCABULARY),
        Check("rows_contiguous", _VOCABULARY),
        Check("ids_cover_edges", _VOCABULARY),
        Check("rows_kept", _VOCABULARY),
        Check("edges_in_range", ("training_set/positives", *_HELD_OUT, REPEATS)),
        Check("chunks_sound", ("training_set/positives", *_HELD_OUT, REPEATS)),
        # A later snapshot's test edges are none of this one's.
        Check("edges_traced", ("training_set/positives", "held_out/validation")),
        Check("held_out_unseen", ("training_set/positives",)),
        Check("held_out_later", _HELD_OUT),
        Check("repeats_trained", (REPEATS,)),
        Check("held_out_trained", _HELD_OUT, blocking=False, severity="WARN"),
        Check("held_out_present", ("held_out/test",), blocking=False, severity="WARN"),
        Check("negatives_typed", _NEGATIVES),
        Check("negatives_complete", _NEGATIVES),
        Check("negatives_masked", _NEGATIVES),
        Check("masks_true", _NEGATIVES, blocking=False),
        Check("negatives_distributed", ("training_set/negatives",)),
        Check("negatives_log_q", _NEGATIVES),
        Check("loss_finite", ("twhin_model",)),
        Check("model_complete", ("twhin_model",)),
        Check("loss_fell", ("twhin_model",), blocking=False),
        Check("metrics_sound", ("evaluation",)),
        Check("floors_reached", ("evaluation",)),
        Check("beats_baselines", ("evaluation",)),
        Check("beats_popular", ("evaluation",), blocking=False),
        Check("vectors_match_vocabulary", _EMBEDDINGS),
        Check("vectors_finite", _EMBEDDINGS),
        Check("norms_sound", _EMBEDDINGS),
        Check("vectors_spread", _EMBEDDINGS),
        Check("entities_trained", _EMBEDDINGS, blocking=False, severity="WARN"),
        Check("relations_match_model", ("embeddings/relations",)),
    )
}


def of_tables(config: TwhinConfig, tables: Iterable[str]) -> list[tuple[Check, str]]:
    """Return each (check, table) pair that is about one of `tables`, in the registry's order."""
    wanted = list(tables)
    return [(check, table) for check in CHECKS.values() for table in check.tables_of(config) if table in wanted]


def results(
    config: TwhinConfig, store: Store, snapshot: str, table: str, names: Collection[str] | None = None
) -> Iterator[tuple[Check, CheckResult]]:
    """Run a table's checks, or those of `names`, on views that are made once for all of them.

    Once all blocking checks have run, or one has failed, the store notes it with the version (`Store.has_passed`).

    Raises:
        UserError: The table, or one that a check reads, is missing, or the memory limit is too low.
    """
    from twhin_pipeline.checks import check_views
    from twhin_pipeline.store.database import explained

    of_table = [check for check, _ in of_tables(config, [table])]
    wanted = [check for check in of_table if names is None or check.name in names]
    if not wanted:
        return
    manifest = store.manifest(table, snapshot)
    failed = []
    with explained(f"checks of {table}"), check_views.prepare(config, store, snapshot, table) as con:
        for check in wanted:
            with explained(f"check {check.name} of {table}"):
                result = _run(con, check, config, table, time.perf_counter())
            if check.blocking and not result.passed:
                failed.append(check.name)
                store.note_checks(manifest, failed)
            yield check, result
    if {check.name for check in of_table if check.blocking} <= {check.name for check in wanted}:
        store.note_checks(manifest, failed)


def run(name: str, config: TwhinConfig, store: Store, snapshot: str, table: str | None = None) -> CheckResult:
    """Run a check on one of its tables or, without `table`, on all of them.

    Raises:
        UserError: There is no such check, it is not about `table`, a table that it reads is missing, or the memory
            limit is too low.
    """
    if name not in CHECKS:
        raise UserError(unknown("check", name, CHECKS))
    tables = CHECKS[name].tables_of(config)
    if table is not None and table not in tables:
        raise UserError(f"check {name}: {unknown('table', table, tables)}")
    asked = [table] if table is not None else tables
    found = [result for one in asked for _, result in results(config, store, snapshot, one, [name])]
    return found[0] if len(found) == 1 else _combine(found, tables)


def run_blocking(config: TwhinConfig, store: Store, snapshot: str, tables: Iterable[str]) -> list[str]:
    """Run every check of `tables`. Returns the lines of failed ones that do not block.

    Raises:
        UserError: A blocking check failed; the message shows the first offending rows.
    """
    notes = []
    for table in tables:
        for check, result in results(config, store, snapshot, table):
            if result.passed:
                continue
            line = f"check {check.name} of {table} ({snapshot}) failed: {check.description}"
            if check.blocking:
                raise UserError(f"{line}\n{rows_as_markdown(result.offending, 5)}\nMend the cause and run it again.")
            notes.append(f"{line} {_first(result.offending)}".rstrip())
    return notes


def require_passed(config: TwhinConfig, store: Store, snapshot: str, tables: Iterable[str]) -> None:
    """Run the checks of those of `tables` whose present version is not known to have passed them.

    Raises:
        UserError: A blocking check failed, or a table is missing.
    """
    run_blocking(config, store, snapshot, [t for t in tables if not store.has_passed(store.manifest(t, snapshot))])


def _run(con: duckdb.DuckDBPyConnection, check: Check, config: TwhinConfig, table: str, started: float) -> CheckResult:
    """Run a check of a table for which `con` is prepared."""
    result = _judge(con.sql(check.sql).to_arrow_table(), started)
    if "JOIN audited" in check.sql:
        audited, pools = con.sql(
            "SELECT (SELECT count(*) FROM pools SEMI JOIN audited USING (epoch, chunk)), count(*) FROM pools"
        ).fetchall()[0]
        result.metadata.update(audited_pools=audited, pools=pools)
    if table == "training_set/negatives" and config.train_data.global_negatives == "all":
        result.metadata["note"] = _NOTHING_SAMPLED
    return result


def rows_as_markdown(table: pa.Table | None, limit: int = 20, width: int = 80) -> str:
    """Return the first rows as a Markdown table; values longer than `width` are cut."""
    if table is None or table.num_columns == 0:
        return ""
    lines = ["| " + " | ".join(table.column_names) + " |", "|" + " --- |" * table.num_columns]
    for row in table.slice(0, limit).to_pylist():
        lines.append("| " + " | ".join(_cell(value, width) for value in row.values()) + " |")
    if table.num_rows > limit:
        lines.append(f"\n… and {table.num_rows - limit:,} more")
    return "\n".join(lines)


def _first(offending: pa.Table | None) -> str:
    """Say what the first offending row is, and how many more there are."""
    if offending is None or not offending.num_rows:
        return ""
    row = ", ".join(
        f"{name} {_cell(value, 40)}" for name, value in offending.slice(0, 1).to_pylist()[0].items() if name != "ok"
    )
    return f"First: {row}" + (f"; {offending.num_rows - 1:,} more" if offending.num_rows > 1 else "")


def _cell(value: Any, width: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, (list, tuple)) and len(value) > 4:
        text = "[" + ", ".join(_cell(v, width) for v in value[:4]) + f", … {len(value)} in all]"
    else:
        text = str(value)
    text = text if len(text) <= width else text[: width - 1] + "…"
    return text.replace("|", "\\|").replace("\n", " ")


def _judge(found: pa.Table, started: float) -> CheckResult:
    measured = None
    offending = found
    if "ok" in found.column_names:
        import pyarrow.compute as pc

        measured = found
        offending = found.filter(pc.invert(pc.fill_null(found["ok"], False)))
    return CheckResult(
        passed=offending.num_rows == 0,
        metadata={"offending_rows": offending.num_rows, "seconds": round(time.perf_counter() - started, 3)},
        offending=offending.slice(0, SHOWN_ROWS) if offending.num_rows else None,
        measured=measured,
    )


def _combine(results: list[CheckResult], tables: list[str]) -> CheckResult:
    import pyarrow as pa

    def together(parts: list[tuple[str, pa.Table | None]]) -> pa.Table | None:
        named = [part.add_column(0, "table", pa.array([name] * part.num_rows)) for name, part in parts if part]
        return pa.concat_tables(named, promote_options="permissive") if named else None

    notes = {result.metadata["note"] for result in results if "note" in result.metadata}
    return CheckResult(
        passed=all(result.passed for result in results),
        metadata={
            **({"note": "; ".join(sorted(notes))} if notes else {}),
            "offending_rows": sum(result.metadata["offending_rows"] for result in results),
            "seconds": round(sum(result.metadata["seconds"] for result in results), 3),
        },
        offending=together([(t, r.offending) for t, r in zip(tables, results, strict=True)]),
        measured=together([(t, r.measured) for t, r in zip(tables, results, strict=True)]),
    )
