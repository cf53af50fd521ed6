"""Checks of the store's tables: what must hold, in DuckDB SQL, one file a check in `sql/`.

A check's query returns what is wrong. Where its result has a column `ok`, it returns what it measured, and the rows
whose `ok` is not true are wrong. The comment at the head of the file is the check's description.
Every query sees the same views, made here: see `check_views.prepare`.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.store import Manifest, Verdict, releases
from twhin_pipeline.words import INDEX, REPEATS

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

FINDING = "Finding: "
TEXTS = ("string", "large_string")
PROBLEM = "problem"
"""The column of a query's result that says in words what is wrong with a row."""
MOST_NAMED = 5
"""A finding names at most so many rows, reasons or relations."""
_FORMS = re.compile(r"\[(.+?)\|(.+?)\]")
"""In a finding, words for one and words for several: `[edge is|edges are]`."""
SHOWN_ROWS = 1_000
"""At most so many offending rows are returned; all are counted."""


@dataclass(frozen=True)
class Check:
    """One check. `tables` are asset names; `vocabulary/*` and the like stand for one table an entity type."""

    name: str
    tables: tuple[str, ...]
    blocking: bool = True
    severity: Literal["ERROR", "WARN"] = "ERROR"

    @property
    def sql(self) -> str:
        """The query."""
        return (resources.files("twhin_pipeline.checks") / "sql" / f"{self.name}.sql").read_text(encoding="utf-8")

    @property
    def description(self) -> str:
        """What must hold: the comment at the head of the query, but its last line."""
        return " ".join(self._head()[:-1])

    def finding(self, result: CheckResult) -> str:
        """Say what was found where it does not hold, with how many: the last line of that comment.

        Behind it are the first rows' own words, their column `problem`. Other rows are counted by their reason or their
        relation, where there are several.
        """
        rows = result.metadata["offending_rows"]
        text = _FORMS.sub(lambda form: form[1 if rows == 1 else 2], self._head()[-1].removeprefix(FINDING))
        text = text.format(n=f"{rows:,}")
        if result.offending is not None and PROBLEM in result.offending.column_names:
            told = result.offending[PROBLEM].unique()
            number = rows if rows > len(result.offending) else len(told)
            shown = "; ".join(str(one) for one in told.slice(0, MOST_NAMED).to_pylist())
        else:
            counts: dict[str, int] = next(
                (result.metadata[by] for by in ("by_reason", "by_relation") if by in result.metadata), {}
            )
            if len(counts) < 2:
                return text
            number = len(counts)
            shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:MOST_NAMED])
        return f"{text} ({shown}{f', and {number - MOST_NAMED:,} more' if number > MOST_NAMED else ''})"

    def _head(self) -> list[str]:
        lines = itertools.takewhile(lambda line: line.startswith("--"), self.sql.splitlines())
        return [line.removeprefix("--").strip() for line in lines]

    def tables_of(self, config: TwhinConfig) -> list[str]:
        """Return the tables it is about, entity types spelled out."""
        names = []
        for table in self.tables:
            if table == REPEATS and not config.split.repeats:
                continue
            stem, star, _ = table.partition("*")
            types = config.indexed_types if stem == f"{INDEX}/" else config.model.table_names
            names += [stem + entity for entity in types] if star else [table]
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
        Check("edges_relations_grew", _EDGES),
        Check("edges_concentrated", _EDGES),
        Check("edges_relations_present", _EDGES, blocking=False, severity="WARN"),
        Check("edges_self_loops", _EDGES, blocking=False, severity="WARN"),
        Check("ids_unique", _VOCABULARY),
        Check("rows_contiguous", _VOCABULARY),
        Check("ids_cover_edges", _VOCABULARY),
        Check("rows_kept", _VOCABULARY),
        Check("new_ids_alike", _VOCABULARY),
        Check("ids_alike", _VOCABULARY, blocking=False, severity="WARN"),
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
        Check("ancestors_left_out", ("evaluation",)),
        Check("floors_reached", ("evaluation",)),
        Check("beats_baselines", ("evaluation",)),
        Check("beats_popular", ("evaluation",), blocking=False),
        Check("probabilities_hold", ("evaluation",), blocking=False, severity="WARN"),
        Check("calibration_sound", ("calibration",)),
        Check("calibration_parts_sound", ("calibration",)),
        Check("vectors_match_vocabulary", _EMBEDDINGS),
        Check("vectors_finite", _EMBEDDINGS),
        Check("norms_sound", _EMBEDDINGS),
        Check("vectors_spread", _EMBEDDINGS),
        Check("entities_trained", _EMBEDDINGS, blocking=False, severity="WARN"),
        Check("relations_match_model", ("embeddings/relations",)),
        Check("index_recall", (f"{INDEX}/*",)),
    )
}


def of_tables(config: TwhinConfig, tables: Iterable[str]) -> list[tuple[Check, str]]:
    """Return each (check, table) pair that is about one of `tables`, in the registry's order."""
    wanted = list(tables)
    return [(check, table) for check in CHECKS.values() for table in check.tables_of(config) if table in wanted]


def results(
    config: TwhinConfig, store: Store, snapshot: str, table: str, names: Collection[str] | None = None
) -> Iterator[tuple[Check, CheckResult]]:
    """Run the checks of a table's newest version, or those of `names`, on views that are made once for all of them.

    What they said is stored with the version once they have run (`record`): it decides who may read it.

    Raises:
        UserError: The table, or one that a check reads, is missing, or the memory limit is too low.
    """
    from twhin_pipeline.checks import check_views
    from twhin_pipeline.store.database import explained

    of_table = [check for check, _ in of_tables(config, [table])]
    wanted = [check for check in of_table if names is None or check.name in names]
    if not wanted:
        return
    # The newest version, also where it has failed before and readers get an older one.
    manifest = store.newest(table, snapshot) or store.manifest(table, snapshot)
    reader = store.pinned(manifest)
    records = []
    with explained(f"checks of {table}"), check_views.prepare(config, reader, snapshot, table) as con:
        for check in wanted:
            with explained(f"check {check.name} of {table}"):
                result = _run(con, check, config, table, time.perf_counter())
            finding = "" if result.passed else f"{check.finding(result)}. {_first(result.offending)}".rstrip()
            records.append(
                {"name": check.name, "passed": result.passed, "blocking": check.blocking, "finding": finding}
            )
            yield check, result
    record(store, table, manifest, records, [check.name for check in of_table if check.blocking])


def record(
    store: Store, table: str, manifest: Manifest, records: Iterable[dict[str, Any]], blocking: Sequence[str]
) -> Verdict | None:
    """Store what checks said of a version, over what the same checks said before; return the verdict.

    It has passed when every one of the `blocking` checks has; until all of them have run, there is no verdict. A
    version that someone has accepted in spite of failed checks stays accepted, unless another check fails.
    """
    before = store.verdict(table, manifest.snapshot, manifest.version)
    known = {str(one["name"]): one for one in before.checks} if before else {}
    known |= {str(one["name"]): one for one in records}
    failed = {name for name, one in known.items() if one["blocking"] and not one["passed"]}
    if not failed and not set(blocking) <= set(known):
        return None
    verdict = Verdict("failed" if failed else "passed", datetime.now(UTC).isoformat(), list(known.values()))
    if before and before.status == "overruled" and failed and failed <= set(before.failed_checks):
        verdict = replace(verdict, status="overruled", by=before.by, reason=before.reason)
    store.judge(manifest, verdict)
    return verdict


def accept(store: Store, table: str, snapshot: str, by: str, reason: str) -> Manifest:
    """Accept the newest version of a table in spite of its failed checks; who did and why is stored with it.

    Raises:
        UserError: The reason is empty, there is no version, it has not been checked, or no check of it failed.
    """
    releases.stated(reason)
    manifest = store.newest(table, snapshot) or store.manifest(table, snapshot)
    verdict = store.verdict(table, snapshot, manifest.version)
    if verdict is None:
        raise UserError(f"{table} of snapshot {snapshot} has not been checked; run `twhin check {table}` first")
    if not verdict.failed_checks:
        raise UserError(f"{table} of snapshot {snapshot} has passed its checks, so there is nothing to accept")
    store.judge(manifest, replace(verdict, status="overruled", by=by, reason=reason))
    return manifest


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
    requested = [table] if table is not None else tables
    rows = [result for one in requested for _, result in results(config, store, snapshot, one, [name])]
    return rows[0] if len(rows) == 1 else _combine(rows, tables)


def run_blocking(config: TwhinConfig, store: Store, snapshot: str, tables: Iterable[str]) -> list[str]:
    """Run every check of `tables`. Returns the lines of failed ones that do not block.

    Raises:
        UserError: A blocking check failed; the message shows the first offending rows.
    """
    notes, failed = [], []
    # Every table is checked before the first failure is told, so that each has its verdict.
    for table in tables:
        for check, result in results(config, store, snapshot, table):
            if result.passed:
                continue
            line = f"check {check.name} of {table} ({snapshot}) failed: {check.finding(result)}."
            if check.blocking:
                failed.append((f"{line} {check.description}\n{rows_as_markdown(result.offending, 5)}", table))
            else:
                notes.append(f"{line} {_first(result.offending)}".rstrip())
    if failed:
        newest = {table: store.newest(table, snapshot) for _, table in failed}
        overruled = {
            table
            for table, manifest in newest.items()
            if manifest and (verdict := store.verdict(table, snapshot, manifest.version)) and verdict.accepted
        }
        notes += [f"{text.splitlines()[0]} Accepted on the record." for text, table in failed if table in overruled]
        refused = [(text, table) for text, table in failed if table not in overruled]
        if refused:
            tables = dict.fromkeys(table for _, table in refused)
            commands = [f"`twhin accept {table} --snapshot {snapshot} --reason TEXT`" for table in tables]
            raise UserError(
                "\n".join(text for text, _ in refused)
                + "\nMend the cause and run it again, or accept it on the record with "
                + f"{' and '.join(commands)}."
            )
    return notes


def require_passed(config: TwhinConfig, store: Store, snapshot: str, tables: Iterable[str]) -> None:
    """Run the checks of those of `tables` whose present version is not known to have passed them.

    Raises:
        UserError: A blocking check failed, or a table is missing.
    """
    waiting = []
    for table in tables:
        manifest = store.newest(table, snapshot) or store.manifest(table, snapshot)
        verdict = store.verdict(table, snapshot, manifest.version)
        if verdict is None or not verdict.accepted:
            waiting.append(table)
    run_blocking(config, store, snapshot, waiting)


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
        lines.append("| " + " | ".join(cell(value, width).replace("|", "\\|") for value in row.values()) + " |")
    if table.num_rows > limit:
        lines.append(f"\n… and {table.num_rows - limit:,} more")
    return "\n".join(lines)


def _first(offending: pa.Table | None) -> str:
    """Say what the first offending row is, and how many more there are; nothing of rows that say it themselves."""
    if offending is None or not offending.num_rows or PROBLEM in offending.column_names:
        return ""
    row = ", ".join(
        f"{name} {cell(value, 40)}" for name, value in offending.slice(0, 1).to_pylist()[0].items() if name != "ok"
    )
    return f"First: {row}" + (f"; {offending.num_rows - 1:,} more" if offending.num_rows > 1 else "")


def cell(value: Any, width: int) -> str:
    """Return a value as the text of a table's cell, cut to `width` characters."""
    if value is None:
        return ""
    if isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, (list, tuple)) and len(value) > 4:
        text = "[" + ", ".join(cell(v, width) for v in value[:4]) + f", … {len(value)} in all]"
    else:
        text = str(value)
    text = text if len(text) <= width else text[: width - 1] + "…"
    return text.replace("\n", " ")


def _judge(found: pa.Table, started: float) -> CheckResult:
    measured = None
    offending = found
    if "ok" in found.column_names:
        import pyarrow.compute as pc

        measured = found.drop_columns([name for name in (PROBLEM,) if name in found.column_names])
        offending = found.filter(pc.invert(pc.fill_null(found["ok"], False)))
    return CheckResult(
        passed=offending.num_rows == 0,
        metadata={
            "offending_rows": offending.num_rows,
            "seconds": round(time.perf_counter() - started, 3),
            **_counted(offending, "by_relation", ("relation", "rel")),
            **_counted(offending, "by_reason", ("reason",)),
        },
        offending=offending.slice(0, SHOWN_ROWS) if offending.num_rows else None,
        measured=measured,
    )


def _counted(offending: pa.Table, key: str, columns: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return as `key` how many rows each value of the first of `columns` has, the most first, where rows have one."""
    named = next((name for name in columns if name in offending.column_names), None)
    if named is None or not offending.num_rows or str(offending.schema.field(named).type) not in TEXTS:
        return {}
    counts = Counter(str(name) for name in offending[named].to_pylist() if name is not None)
    return {key: dict(counts.most_common())}


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
