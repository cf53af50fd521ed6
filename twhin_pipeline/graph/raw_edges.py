"""Raw edges: read from the source, typed, cleaned, merged and sorted; rows that cannot be edges are kept apart.

It is SQL over Parquet, which DuckDB streams once. Ids get codes as they come (`interning`), edges are sorted by
their ids out of memory (`edge_sort`) and written as they come (`edge_file`), so the graph may be larger than
memory; its ids must fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline import scratch
from twhin_pipeline.config import relations
from twhin_pipeline.config.model import Relation, names_relation
from twhin_pipeline.config.stage_settings import settings
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.graph import edge_file, file_facts, id_order, log_rows, source
from twhin_pipeline.graph.edge_sort import EdgeSorter
from twhin_pipeline.graph.interning import Interner, LookedUp
from twhin_pipeline.graph.scan import (
    BAD_TIME,
    FIELDS,
    OUTSIDE_WINDOW,
    SIDES,
    Reason,
    Rows,
    Scan,
    open_input,
    parquet,
    time_unit,
    window,
)
from twhin_pipeline.prefetch import Prefetcher, in_order
from twhin_pipeline.store import database
from twhin_pipeline.store.database import explained, literal, name
from twhin_pipeline.words import PARTS

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.graph.source import Input
    from twhin_pipeline.store import Manifest, Store

Array = np.ndarray[Any, Any]

MOST_RELATIONS = 100_000
"""With `"*"` in model.relations, more names than this are taken for a mistake: an id's column for the relations'."""
ROWS_AT_ONCE, BATCHES_AHEAD = 1 << 17, 4
REJECTED = pa.schema(
    [(column, pa.string()) for column in ("lhs", "rel", "rhs", "reason", "column", "value", "file")]
    + [("row", pa.int64()), ("source", pa.string())]
)


def ingest(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Write `raw_edges` and `raw_edges_rejected` of a snapshot, and return the manifest of `raw_edges`.

    Its details: rows `read`, edges `kept`, `rejected`, `rejected_share`, `rejected_by_reason`, `duplicates_merged`,
    `outside_window`, `undated`, `self_loops`, `edges_per_relation`, `relations` (names, by index), the `files`,
    `source_files` (see `file_facts`), `source_fingerprint` (see `source.fingerprint`), of event logs `log_state`
    (see `source.log_state`) and `log_rows` (see `log_rows.digest`), `sources` (see
    `Counted.details`), and `notes` for the user. A row whose time is not before the end of the snapshot's day (UTC), or
    before the window, is left out and counted; it is no rejected row. Duplicates (equal lhs, rel and rhs) become one
    edge: its weight by `repeat_weight`, the earliest split, the latest time, and the earliest as
    `first_time` (null where one of them has none). Where `model.relations` has a `"*"`,
    each relation that has an edge is one of the model's.

    Raises:
        UserError: Files or columns are missing or of a wrong type, a field names a relation that is not found, or the
            memory limit is too low; names the remedy.
    """
    with (
        store.writing(snapshot, ["raw_edges", "raw_edges_rejected"]),
        database.connect(config, store) as con,
        scratch.folder("ingest") as folder,
    ):
        inputs = source.inputs(config, snapshot)
        # Now: of one that changes while it is read, the time of the change is later than this.
        files = file_facts.facts(dict.fromkeys(file for one in inputs for file in one.files))
        fingerprint, log_state = source.fingerprint(config, snapshot), source.log_state(config, snapshot)
        known = set(config.model.relation_names) if config.model.every_other is None else None
        scans = [
            scan
            for number, one in enumerate(inputs)
            for scan in open_input(con, one, number, f"{folder}/{number}", known)
        ]
        possible = relations.with_found(config, _names(con, config, scans))
        check_names(inputs, possible.model.relation_names)
        create_relations(con, possible, possible.model.relations)
        rows = Rows(scans, config, len(inputs), all(scan.integers for scan in scans))
        what = ", ".join(one.field for one in inputs)
        with explained(what), EdgeSorter(folder, edge_columns(inputs)) as sorter:
            interner = Interner(texts=not all(scan.integers for scan in scans))
            number = len(possible.model.relations)
            counted = _read_edges(con, rows, sorter, interner, number, database.threads(config))
            counted.malformed = create_malformed(con, scans)
            edges_of = counted.edges.sum(0)
            good = int(edges_of.sum())
            if good:
                config = _settle(con, config, possible, np.flatnonzero(edges_of).tolist())
            _write_rejected(con, config, store, snapshot, rows, scans, counted)
            if good == 0:
                raise UserError(nothing(what, inputs, store, snapshot, counted))
            weigh = repeat_weights(inputs, counted.edges, possible.model.relation_names)
            by_code = interner.ids()
            del interner
            ids, ranks = _ranked(by_code)
            del by_code
            kept = _write_kept(config, store, snapshot, sorter, possible, ids, ranks, weigh)
        kept.details |= details(store, snapshot, inputs, scans, counted, possible.model.relation_names, kept.details)
        kept.details |= {"source_files": files, "source_fingerprint": fingerprint}
        if log_state:
            kept.details |= {"log_state": log_state, "log_rows": log_rows.of_scans(con, scans)}
        kept.commit(config_hash=config.hash(), parents={}, settings=settings(config, "ingest"))
    return store.manifest("raw_edges", snapshot)


def details(
    store: Store,
    snapshot: str,
    inputs: list[Input],
    scans: list[Scan],
    counted: Counted,
    names: Sequence[str],
    kept: dict[str, Any],
) -> dict[str, Any]:
    """Return what the manifest of `raw_edges` says of the rows that were read; `names` are those of `counted`."""
    rejected = counted.rejected()
    good = int(counted.edges.sum())
    read = good + counted.outside + sum(rejected.values())
    return {
        "read": read,
        "rejected": sum(rejected.values()),
        "rejected_share": sum(rejected.values()) / max(read, 1),
        "rejected_by_reason": rejected,
        "duplicates_merged": good - kept["kept"],
        "outside_window": counted.outside,
        "undated": int(counted.undated.sum()) if any(one.columns.time is not None for one in inputs) else 0,
        "files": [file for one in inputs for file in one.files],
        "sources": [counted.details(number, one, names) for number, one in enumerate(inputs)],
        "notes": _notes(scans, inputs, counted) + _time_notes(inputs, store, snapshot, counted),
    }


class Counted:
    """Counts of the rows that are read, by source."""

    def __init__(self, reasons: list[Reason], sources: int, relations: int) -> None:
        """Begin with zeros."""
        self.reasons = reasons
        self.fates = np.zeros(sources + len(reasons), np.int64)
        """Rows by fate, an index of `scan.Rows`."""
        self.edges = np.zeros((sources, relations), np.int64)
        """Rows that are edges."""
        self.undated = np.zeros(sources, np.int64)
        """Those of them without a time."""
        self.times = np.full((sources, 2), [2**63 - 1, edge_file.NO_TIME], np.int64)
        """The others' earliest and latest time, microseconds."""
        self.malformed: list[Counter[str]] = [Counter() for _ in range(sources)]
        """Lines of text files that are no rows, by source and reason."""

    def add(self, which: Array, rel: Array, time: Array | None) -> None:
        """Count edges `[n]`: their sources, relations and times."""
        sources, relations = self.edges.shape
        self.edges += np.bincount(which * relations + rel, minlength=self.edges.size).reshape(self.edges.shape)
        if time is None:
            return
        for number in np.unique(which).tolist() if sources > 1 else [0]:
            mine = time[which == number] if sources > 1 else time
            dated = mine[mine != edge_file.NO_TIME]
            self.undated[number] += len(mine) - len(dated)
            if len(dated):
                first, last = self.times[number]
                self.times[number] = min(first, dated.min()), max(last, dated.max())

    @property
    def outside(self) -> int:
        """Rows that do not count for the snapshot."""
        return sum(rows for reason, rows in self._by_reason() if reason.text == OUTSIDE_WINDOW)

    def rejected(self, source: int | None = None) -> dict[str, int]:
        """Return the rejected rows by reason, of one source or of all."""
        counts: Counter[str] = Counter()
        for reason, rows in self._by_reason():
            if reason.text != OUTSIDE_WINDOW and source in (None, reason.source):
                counts[reason.text] += rows
        return dict(sorted(counts.items())) | dict(sorted(self._malformed(source).items()))

    def by_column(self, source: int | None = None) -> list[tuple[str, str | None, int]]:
        """Return reason, column and rows of what is rejected, the most frequent first."""
        counts: Counter[tuple[str, str | None]] = Counter()
        for reason, rows in self._by_reason():
            if reason.text != OUTSIDE_WINDOW and source in (None, reason.source):
                counts[reason.text, reason.column] += rows
        for text, lines in self._malformed(source).items():
            counts[text, None] = lines
        return [(text, column, rows) for (text, column), rows in counts.most_common()]

    def details(self, source: int, spec: Input, relations: Sequence[str]) -> dict[str, Any]:
        """Return a source's part of the manifest's details.

        Its `source` (path in the configuration), `files`, rows `read`, rows that are `edges`, `edges_per_relation`,
        `rejected` and `rejected_by` (reason, column, rows), `outside_window`, `undated` edges, and the `time_range` of
        the others, the earliest and latest (ISO, UTC; null where there is none).
        """
        edges = {name: int(n) for name, n in zip(relations, self.edges[source], strict=True) if n}
        rejected = self.by_column(source)
        outside = sum(n for reason, n in self._by_reason() if reason.text == OUTSIDE_WINDOW and reason.source == source)
        total = sum(rows for *_, rows in rejected)
        first, last = self.times[source].tolist()
        return {
            "source": spec.section,
            "files": spec.files,
            "read": sum(edges.values()) + outside + total,
            "edges": sum(edges.values()),
            "edges_per_relation": edges,
            "rejected": total,
            "rejected_by": [{"reason": text, "column": column, "rows": rows} for text, column, rows in rejected],
            "outside_window": outside,
            "undated": int(self.undated[source]) if spec.columns.time is not None else sum(edges.values()),
            "time_range": [_iso(first), _iso(last)] if first <= last else None,
        }

    def _malformed(self, source: int | None) -> Counter[str]:
        return sum(self.malformed, Counter()) if source is None else self.malformed[source]

    def _by_reason(self) -> Iterator[tuple[Reason, int]]:
        rows = self.fates[len(self.edges) :]
        return ((self.reasons[n], int(rows[n])) for n in np.flatnonzero(rows).tolist())


def _iso(microseconds: int) -> str:
    return str(np.datetime64(microseconds, "us").astype("datetime64[s]"))


def nothing(what: str, inputs: list[Input], store: Store, snapshot: str, counted: Counted) -> str:
    """Return a message that says why no row is an edge."""
    rejected, outside = counted.by_column(), counted.outside
    if not rejected and not outside:
        return f"{what}: no edge for snapshot {snapshot}: the files have no rows; correct the path"
    causes = [f"{reason}{_in(column)} {count:,}" for reason, column, count in rejected]
    remedies = []
    if outside:
        dated = next(one for one in inputs if one.columns.time is not None)
        start, end = window(dated)
        since = "" if start is None else f"from {start:%Y-%m-%d %H:%M} "
        causes.append(f"{OUTSIDE_WINDOW} ({since}before {end:%Y-%m-%d}) {outside:,}")
        remedies.append(f"choose another snapshot or a longer {dated.section}.window")
    if rejected:
        first = _first_rejected(store, snapshot, rejected[0][0])
        causes.append(f"the first is row {first['row']} of {first['file']}, {first['reason']}")
        sections = " or ".join(f"{one.section}.columns" for one in inputs if one.split is None)
        remedies.append(f"correct {sections or 'the columns'}, model.relations or the file")
    remedies = _time_notes(inputs, store, snapshot, counted) or remedies
    return f"{what}: no edge for snapshot {snapshot}: {', '.join(causes)}; {', or '.join(remedies)}"


def _time_notes(inputs: list[Input], store: Store, snapshot: str, counted: Counted) -> list[str]:
    """Say by which unit bad times would be times."""
    notes = []
    for number, one in enumerate(inputs):
        if BAD_TIME not in counted.rejected(number):
            continue
        value = str(_first_rejected(store, snapshot, BAD_TIME, one.section)["value"])
        if unit := time_unit(value, one.columns.time_unit):
            notes.append(
                f"{one.section}: {value} in column {one.columns.time!r} is a time in {unit}: set "
                f"{one.section}.columns.time_unit: {unit}"
            )
    return notes


def _first_rejected(store: Store, snapshot: str, reason: str, section: str | None = None) -> dict[str, Any]:
    """Return the first row that was rejected for a reason, of one source or of all."""
    wanted = pc.field("reason") == reason
    if section is not None:
        wanted &= pc.field("source") == section
    row: dict[str, Any] = store.dataset("raw_edges_rejected", snapshot).head(1, filter=wanted).to_pylist()[0]
    return row


def _in(column: str | None) -> str:
    return "" if column is None else f" in column {column!r}"


def _notes(scans: list[Scan], inputs: list[Input], counted: Counted) -> list[str]:
    """Return what a user should know although nothing is wrong."""
    notes = []
    for scan in scans:
        if scan.named_by_file:
            origins = [origin for part in scan.staged for origin, _ in part.origins]
            files = ", ".join(origins[:3]) + (", …" if len(origins) > 3 else "")
            notes.append(f"{files}: no relation column, so all rows are of relation {scan.relation!r}, the file's name")
    for number, one in enumerate(inputs):
        if not counted.edges[number].any():
            notes.append(f"{one.section}: none of its rows is an edge")
    return notes


def check_names(inputs: list[Input], names: Sequence[str]) -> None:
    """Raise UserError where a source names a relation that is neither in the model nor, with `"*"`, in a source."""
    for one in inputs:
        if one.source.relation is not None and one.source.relation not in names:
            raise UserError(f"{one.section}.relation: {unknown('relation', one.source.relation, names)}")
        for name_ in one.source.weights or ():
            if name_ not in names:
                raise UserError(
                    f"{one.section}.weights: {unknown('relation', name_, names)} (a relation that a snapshot may lack "
                    "has to be listed in model.relations)"
                )


def repeat_weights(inputs: list[Input], edges: Array, names: Sequence[str]) -> Array:
    """Return how many times the largest an edge's rows weigh at most, by relation: 1, inf for their sum; float64 `[R]`.

    Args:
        inputs: The inputs.
        edges: Rows that are edges, by source and relation, `[S, R]`.
        names: The relations' names.

    Raises:
        UserError: Two sources of one relation differ.
    """
    named = {"largest": 1.0, "sum": np.inf}
    most = [named[w] if isinstance(w := one.source.repeat_weight, str) else w for one in inputs]
    weigh = np.ones(len(names))
    for rel in np.flatnonzero(edges.any(0)).tolist():
        sources = np.flatnonzero(edges[:, rel])
        weigh[rel] = most[sources[0]]
        for other in sources[1:]:
            if most[other] != weigh[rel]:
                first, second = inputs[sources[0]].section, inputs[other].section
                raise UserError(
                    f"{first}.repeat_weight and {second}.repeat_weight differ, and both have edges of relation "
                    f"{names[rel]!r}, which are merged; give them the same"
                )
    return weigh


def _names(con: duckdb.DuckDBPyConnection, config: TwhinConfig, scans: list[Scan]) -> list[str]:
    """Return the source's names of relations, those that can be one, where `model.relations` has a `"*"`."""
    if config.model.every_other is None:
        return []
    names: set[str] = set()
    for scan in scans:
        if scan.rel is None:
            names.add(scan.relation or "")
            continue
        with explained(scan.input.field):
            rows = con.execute(
                f"SELECT DISTINCT CAST({name(scan.rel)} AS VARCHAR) FROM {parquet(scan.files)} "
                f"WHERE {name(scan.rel)} IS NOT NULL LIMIT {MOST_RELATIONS + 1}"
            ).fetchall()
        if len(rows) > MOST_RELATIONS:
            raise UserError(
                f"{scan.input.field}: column {scan.rel!r} has more than {MOST_RELATIONS:,} different values, too many "
                f"to be names of relations; set {scan.input.section}.columns.rel to the relations' column, or list "
                "relations without '*'"
            )
        names |= {str(row[0]) for row in rows}
    return [text for text in names if names_relation(text)]


def create_relations(con: duckdb.DuckDBPyConnection, config: TwhinConfig, ordered: list[Relation]) -> None:
    """Create the table `relations`: index, name, and the number of rows of each side's table where it is given."""
    table_of = {table.name: table for table in config.model.embeddings.tables}
    rows_of = [[table_of[getattr(r, side)].num_embeddings for r in ordered] for side in SIDES]
    relations_found = pa.table(  # noqa: F841 (DuckDB reads it by its name)
        {
            "index": pa.array(range(len(ordered)), pa.int64()),
            "name": pa.array([r.name for r in ordered], pa.string()),
            "lhs_rows": pa.array(rows_of[0], pa.int64()),
            "rhs_rows": pa.array(rows_of[1], pa.int64()),
        }
    )
    con.execute("CREATE OR REPLACE TABLE relations AS SELECT * FROM relations_found")


def _settle(con: duckdb.DuckDBPyConnection, config: TwhinConfig, possible: TwhinConfig, used: list[int]) -> TwhinConfig:
    """Return the configuration with the relations that have an edge (`used`: indices in `possible`), indexed anew.

    Names that occur in rejected rows or outside the window alone come last in the table, so that their rows keep the
    reason that they had.
    """
    names = possible.model.relation_names
    settled = relations.with_found(config, [names[rel] for rel in used])
    kept = set(settled.model.relation_names)
    rest = [relation for relation in possible.model.relations if relation.name not in kept]
    create_relations(con, settled, [*settled.model.relations, *rest])
    return settled


def create_malformed(con: duckdb.DuckDBPyConnection, scans: list[Scan]) -> list[Counter[str]]:
    """Create the tables `malformed` (lines that are no rows), `origins` (the files that staged ones stand for, from a
    line of the text that was read on) and `shifts` (what comes before rows besides other rows).

    Returns:
        How many lines are malformed, by source and reason.
    """
    counts: list[Counter[str]] = [Counter() for _ in range(max(scan.source for scan in scans) + 1)]
    origins, malformed, shifts = [], [], []
    for number, scan in enumerate(scans):
        delimited = scan.input.format == "csv"
        for part in scan.staged:
            origins += [(number, part.path, origin, first, delimited) for origin, first in part.origins]
            for one in part.malformed:
                malformed.append((number, scan.source, one.origin, one.line, one.lines, one.text, one.reason))
                counts[scan.source][one.reason] += one.lines
            rows, extra = part.shifts
            shifts += [(number, part.path, row, more) for row, more in zip(rows.tolist(), extra.tolist(), strict=True)]
    text, integer = pa.string(), pa.int64()
    kinds = {"scan": integer, "path": text, "origin": text, "first_line": integer, "delimited": pa.bool_()}
    _create(con, "origins", kinds, origins)
    kinds = {
        "scan": integer,
        "source": integer,
        "origin": text,
        "line": integer,
        "lines": integer,
        "text": text,
        "reason": text,
    }
    _create(con, "malformed", kinds, malformed)
    _create(con, "shifts", {"scan": integer, "path": text, "from_row": integer, "extra": integer}, shifts)
    return counts


def _create(
    con: duckdb.DuckDBPyConnection, table: str, kinds: dict[str, pa.DataType], rows: list[tuple[Any, ...]]
) -> None:
    """Create a table of rows, with columns of these types."""
    columns = list(zip(*rows, strict=True)) or [()] * len(kinds)
    rows_found = pa.table(  # noqa: F841 (DuckDB reads it by its name)
        {name_: pa.array(column, kind) for (name_, kind), column in zip(kinds.items(), columns, strict=True)}
    )
    con.execute(f"CREATE OR REPLACE TABLE {table} AS SELECT * FROM rows_found")


def _write_rejected(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    rows: Rows,
    scans: list[Scan],
    counted: Counted,
) -> None:
    """Write what was rejected, by file and row: Parquet rows from 1, delimited ones by their line in the file."""
    parts = [
        (number, scan, part)
        for number, (scan, part) in enumerate(zip(scans, rows.parts, strict=True))
        if counted.fates[_fates(rows.reasons, rows.sources, scan.source)].any()
    ]
    sections = {scan.source: scan.input.section for scan in scans}
    query = rejected_rows(con, parts, rows.reasons, rows.sources, sections)
    order = {name: number for number, name in enumerate(dict.fromkeys(sections.values()))}
    place = " ".join(f"WHEN {literal(name)} THEN {number}" for name, number in order.items())
    with (
        store.replace("raw_edges_rejected", snapshot, config_hash=config.hash()) as draft,
        draft.local_file("part-00000.parquet") as path,
    ):
        con.execute(
            f"COPY (SELECT * FROM ({query}) "
            f"ORDER BY CASE source {place} END, file, row) TO {literal(path)} (FORMAT parquet, COMPRESSION zstd)"
        )


def rejected_rows(
    con: duckdb.DuckDBPyConnection,
    parts: Sequence[tuple[int, Scan, str]],
    reasons: Sequence[Reason],
    sources: int,
    sections: dict[int, str],
) -> str:
    """Return the SQL of what was rejected (`REJECTED`), in no order.

    Args:
        con: Has the tables of `create_malformed`.
        parts: Scans with such rows: each one's number there, and the SQL of its typed rows.
        reasons: Why rows are no edges.
        sources: How many sources there are.
        sections: Each source's path in the configuration.
    """
    _create(
        con,
        "reasons_found",
        {"fate": pa.int64(), "reason": pa.string(), "field": pa.string(), "column": pa.string()},
        [(sources + number, reason.text, reason.field, reason.column) for number, reason in enumerate(reasons)],
    )
    _create(con, "sections_found", {"source": pa.int64(), "section": pa.string()}, list(sections.items()))
    # Each line that is lost is a row, with the line where what swallowed it begins.
    queries = [
        "SELECT NULL AS lhs, NULL AS rel, CASE n WHEN 0 THEN text END AS rhs, reason, NULL AS column_, "
        "CASE WHEN lines > 1 THEN format('lines {} to {}', line, line + lines - 1) END AS value_, origin AS file, "
        "line + n AS row, section AS source "
        "FROM (SELECT *, unnest(range(lines)) AS n FROM malformed) JOIN sections_found USING (source)"
    ]
    value = " ".join(f"WHEN {literal(field)} THEN raw_{field}" for field in FIELDS)
    for number, scan, part in parts:
        queries.append(
            f"SELECT raw_lhs, raw_rel, raw_rhs, r.reason, r.column, CASE r.field {value} END, o.origin, "
            "CASE WHEN o.delimited THEN x.line - o.first_line + 2 ELSE x.row + 1 END, "
            f"{literal(scan.input.section)} "
            f"FROM (SELECT p.*, p.row + 2 + coalesce(s.extra, 0) AS line FROM ({part}) p ASOF LEFT JOIN "
            f"(FROM shifts WHERE scan = {number}) s ON s.path = p.file AND p.row >= s.from_row) x "
            "JOIN reasons_found r ON r.fate = x.fate "
            f"ASOF JOIN (FROM origins WHERE scan = {number}) o ON o.path = x.file AND x.line >= o.first_line "
            f"WHERE r.reason <> {literal(OUTSIDE_WINDOW)}"
        )
    names = {field.name: f"{field.name}_" if field.name in ("column", "value") else field.name for field in REJECTED}
    columns = ", ".join(
        f"CAST({names[f.name]} AS {'BIGINT' if f.name == 'row' else 'VARCHAR'}) AS {name(f.name)}" for f in REJECTED
    )
    return f"SELECT {columns} FROM ({' UNION ALL '.join(queries)})"


def _fates(reasons: Sequence[Reason], sources: int, source: int) -> list[int]:
    """Return the fates of a source's rejected rows."""
    return [sources + n for n, r in enumerate(reasons) if r.source == source and r.text != OUTSIDE_WINDOW]


def edge_columns(inputs: list[Input]) -> list[str]:
    """Return what edges have besides their relation and ends."""
    taken = []
    if any(one.columns.time is not None for one in inputs):
        taken.append("time")
    if any(one.columns.weight is not None or one.source.weights or one.source.half_life is not None for one in inputs):
        taken.append("weight")
    if any(one.columns.split is not None or one.split is not None for one in inputs):
        taken.append("split")
    return taken


def _read_edges(
    con: duckdb.DuckDBPyConnection, rows: Rows, sorter: EdgeSorter, interner: Interner, relations: int, threads: int
) -> Counted:
    """Read all rows once, give codes to the ids of edges, add these to `sorter`, and count."""
    counted = Counted(rows.reasons, rows.sources, relations)
    names = ["rel", "lhs", "rhs", "fate", *sorter.columns]
    reader = con.sql(rows.all(names)).to_arrow_reader(ROWS_AT_ONCE)

    def batches() -> Iterator[tuple[pa.RecordBatch]]:
        for batch in reader:
            fate = batch.column("fate").to_numpy()
            counted.fates[:] += np.bincount(fate, minlength=len(counted.fates))
            edge = fate < rows.sources
            if not edge.all():
                batch = batch.filter(pa.array(edge))
            if len(batch):
                yield (batch,)

    def looked_up(batch: pa.RecordBatch) -> tuple[pa.RecordBatch, LookedUp, LookedUp]:
        return batch, interner.look_up(batch.column("lhs")), interner.look_up(batch.column("rhs"))

    # While rows are read, threads look their ids up; new ids get codes in one thread.
    with Prefetcher(batches(), BATCHES_AHEAD) as ahead, ThreadPoolExecutor(threads) as pool:
        for batch, lhs, rhs in in_order(pool, looked_up, ahead, threads + 1):
            columns = {"rel": batch.column("rel").to_numpy(), "lhs": interner.codes(lhs), "rhs": interner.codes(rhs)}
            if "time" in sorter.columns:
                time = batch.column("time").cast(pa.timestamp("us")).cast(pa.int64())
                columns["time"] = pc.fill_null(time, edge_file.NO_TIME).to_numpy()
            if "weight" in sorter.columns:
                columns["weight"] = batch.column("weight").to_numpy()
            if "split" in sorter.columns:
                columns["split"] = pc.fill_null(batch.column("split"), 1).to_numpy()
            counted.add(batch.column("fate").to_numpy(), columns["rel"], columns.get("time"))
            sorter.add(columns)
    return counted


def _ranked(by_code: pa.Array) -> tuple[edge_file.Ids, Array]:
    """Return the ids in order, and the rank of each code's id among them, uint32."""
    order = id_order.order(by_code)
    ranks = np.empty(len(by_code), np.uint32)
    ranks[order] = np.arange(len(by_code), dtype=np.uint32)
    return edge_file.Ids(by_code.take(pa.array(order))), ranks


def _write_kept(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    sorter: EdgeSorter,
    possible: TwhinConfig,
    ids: edge_file.Ids,
    ranks: Array,
    weigh: Array,
) -> Any:
    """Write the edges to a draft of `raw_edges`, and return it with what can be counted there in its details."""
    names = config.model.relation_names
    number = {name: rel for rel, name in enumerate(names)}
    relations_now = np.array([number.get(name, -1) for name in possible.model.relation_names], np.int32)
    most = np.ones(len(names))
    most[relations_now[relations_now >= 0]] = weigh[relations_now >= 0]
    draft = store.begin("raw_edges", snapshot)
    try:
        pieces = sorter.pieces(relations_now, ranks, most, database.threads(config))
        with draft.local_file("part-00000.parquet") as path, draft.local_file(edge_file.ENDS) as ends:
            counts = edge_file.write(path, ends, pieces, names, ids, PARTS, database.threads(config))
        with draft.local_file(edge_file.IDS) as path:
            ids.write(path)
    except BaseException:
        draft.discard()
        raise
    same_type = [relation.lhs == relation.rhs for relation in config.model.relations]
    draft.details = {
        "kept": int(counts.edges.sum()),
        "edges_per_relation": dict(zip(names, counts.edges.tolist(), strict=True)),
        "relations": names,
        "self_loops": int(counts.loops[same_type].sum()),
    }
    return draft
