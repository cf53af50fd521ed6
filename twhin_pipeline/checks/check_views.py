"""The views that the checks' SQL reads.

`relation(rel, name, lhs, rhs, operator, side, sides, divided)` (side: which is corrupted, `lhs`, `rhs` or `both`;
sides: the same as numbers, 0 lhs, 1 rhs; divided: its edges may be held out), `entity(entity, size, asked)` (asked: the
check is about this entity type), `floors(metric, least)`, `must_beat(baseline)`, `detail(key, value)` (numbers of the
checked table's manifest), and from the store `raw_edges`, `dated_edges(lhs, rel, rhs, first_time)` (none, unless the
split goes by time), `raw_edges_rejected`, `previous_edges(compared, rel, lhs, rhs)` (ends as hashes), `source(source,
read, max_rejected_share)`, `kept_share(rel, share, growth, top_gain)`, `vocabulary` and `previous_vocabulary`
(`entity`, `id` as text, `row`), `positives`, `held_out(split, …)`, `losses`, `model_row`, `model_relation`,
`evaluation`, `calibration`, `embeddings(entity, id, row, embedding, trained_edges)`, `embedding_relation`, `search` (an
index's figures).

What a check of the training set is about is the same query for training and held-out tables: `chunks` (the checked
edges, each with its `position` in its chunk), `chunk_size(chunk, rel, edges)`, `pools` (the checked negatives),
`audited(epoch, chunk)` (those of them that costly checks look at), `audited_chunks` (their `chunks`) and `truth` (edges
that are true for them). Settings are DuckDB variables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from twhin_pipeline.config.data import SourceConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.results import LEAST_EDGES
from twhin_pipeline.store import database
from twhin_pipeline.training_set.split import splittable
from twhin_pipeline.vectors.calibration import RELIABILITY, THRESHOLDS
from twhin_pipeline.words import CALIBRATION, INDEX, SIDES, sides_word

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest, Store

AUDITED_POOLS, AUDITED_PAIRS = 500, 6_000_000
"""Pools, and masked pairs, that the costliest checks look at; of larger sets every n-th of a relation's pools."""

_EDGE_COLUMNS = "0 AS chunk, 0 AS position, 0 AS lhs, 0 AS rhs, 0 AS rel, 1.0 AS weight, '' AS filename"


@contextmanager
def prepare(config: TwhinConfig, store: Store, snapshot: str, table: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """Yield a connection with the views for checks of `table`.

    Raises:
        UserError: `table` is not finished for this snapshot, or an earlier version sampled it.
    """
    store.manifest(table, snapshot)
    con = database.connect(config, store)
    if table.endswith("negatives"):
        # Joins are built on their right-hand tables, as they are written: DuckDB 2.0.0 fails where it turns about one
        # whose many rows `unnest` has made (100 million edges, "global dictionary column 0 changed identity").
        con.execute("SET disabled_optimizers = 'build_side_probe_side'")
    try:
        _Views(con, config, store, snapshot, table).make()
        yield con
    finally:
        con.close()


class _Views:
    def __init__(
        self, con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str, table: str
    ) -> None:
        self.con, self.config, self.store, self.snapshot, self.table = con, config, store, snapshot, table

    def make(self) -> None:
        self._config_tables()
        self._details()
        self._edges()
        self._vocabularies()
        self._training_set()
        self._model()
        self._results()

    def _view(self, name: str, query: str) -> None:
        self.con.execute(f"CREATE OR REPLACE TEMP VIEW {name} AS {query}")

    def _table(self, name: str, query: str) -> None:
        self.con.execute(f"CREATE OR REPLACE TEMP TABLE {name} AS {query}")

    def _variable(self, name: str, value: str) -> None:
        self.con.execute(f"SET VARIABLE {name} = {value}")

    def _manifest(self, asset: str) -> Manifest | None:
        return self.store.manifest(asset, self.snapshot) if self.store.exists(asset, self.snapshot) else None

    def _files(self, asset: str) -> list[str]:
        return self.store.files(asset, self.snapshot) if self.store.exists(asset, self.snapshot) else []

    def _scan(self, files: list[str], empty: str) -> str:
        """A FROM clause over Parquet files, or over no row with the columns of `empty`."""
        if not files:
            return f"(SELECT {empty} WHERE false)"
        return f"read_parquet([{', '.join(_text(f) for f in files)}], filename = true)"

    def _config_tables(self) -> None:
        model = self.config.model
        divided = splittable(self.config).tolist()
        corrupted = self.config.corrupted_sides
        rows = []
        for rel, (relation, is_divided) in enumerate(zip(model.relations, divided, strict=True)):
            sides = corrupted[relation.name]
            numbers = [SIDES.index(side) for side in sides]
            texts = map(_text, (relation.name, relation.lhs, relation.rhs, relation.operator, sides_word(sides)))
            rows.append(f"({rel}, {', '.join(texts)}, {numbers}::TINYINT[], {is_divided})")
        names = "rel, name, lhs, rhs, operator, side, sides, divided"
        self._table("relation", f"SELECT * FROM (VALUES {', '.join(rows)}) t({names})")
        floors = [f"({_text(metric)}, {least!r}::DOUBLE)" for metric, least in self.config.evaluation.floors.items()]
        self._table("floors", f"SELECT * FROM (VALUES {', '.join([*floors, '(NULL, NULL)'])}) t(metric, least) "
                              "WHERE metric IS NOT NULL")  # fmt: skip
        evaluation = self.config.evaluation
        wanted = [f"({_text(name)})" for name in evaluation.must_beat]
        self._table("must_beat", f"SELECT * FROM (VALUES {', '.join([*wanted, '(NULL)'])}) t(baseline) "
                                 "WHERE baseline IS NOT NULL")  # fmt: skip
        self._variable("must_beat_tolerance", f"{evaluation.must_beat_tolerance!r}::DOUBLE")
        self._variable("chief_metric", _text(evaluation.chief_metric))
        self._variable("least_edges", str(LEAST_EDGES))
        of_any = {side for sides in corrupted.values() for side in sides}
        self._variable("overall_side", _text(sides_word(of_any)))
        data = self.config.train_data if self.table.startswith("training_set") else self.config.validation_data
        pool = 0 if data.global_negatives == "all" else data.global_negatives
        by_degree = round(pool * self.config.negatives.degree_share)
        self._variable("min_count", str(self.config.vocabulary.min_count))
        self._variable("chunk_size", str(self.config.negatives.chunk_size))
        self._variable("in_batch", str(data.in_batch_negatives))
        self._variable("every_entity", str(data.global_negatives == "all"))
        self._variable("pool_size", str(pool))
        self._variable("uniform_size", str(pool - by_degree))
        self._variable("log_q", str(self.config.loss.log_q))
        own = self.config.negatives.mask == "own" and self.table.startswith("training_set")
        self._variable("own_edges", str(own))
        self._variable("alpha", f"{self.config.negatives.alpha!r}::DOUBLE")
        self._variable("embedding_dim", str(model.embedding_dim))
        split = self.config.split
        self._variable("held_out_share", f"{(split.test if split.strategy != 'given' else 0.0)!r}::DOUBLE")

    def _details(self) -> None:
        details = self.store.manifest(self.table, self.snapshot).details
        self._variable("warm", str(bool(details.get("started_from"))))
        numbers = {k: v for k, v in details.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        rows = [f"({_text(key)}, {float(value)!r}::DOUBLE)" for key, value in numbers.items()]
        self._table("detail", f"SELECT * FROM (VALUES {', '.join([*rows, '(NULL, NULL)'])}) t(key, value) "
                              "WHERE key IS NOT NULL")  # fmt: skip

    def _edges(self) -> None:
        edge = "'' AS lhs, '' AS rel, '' AS rhs"
        self._view("raw_edges", f"SELECT * FROM {self._scan(self._files('raw_edges'), edge + ', 1.0 AS weight')}")
        self._dated_edges()
        empty = edge + ", '' AS reason, '' AS \"column\", '' AS value, '' AS file, 0 AS row, '' AS source"
        rejected = self._scan(self._files("raw_edges_rejected"), empty)
        self._view("raw_edges_rejected", f"SELECT * FROM {rejected}")
        # A snapshot that is made again is compared with what it was, too.
        now = self._manifest("raw_edges")
        earlier = [
            self.store.latest_before("raw_edges", self.snapshot),
            self.store.last_accepted("raw_edges", self.snapshot, now.version if now else None),
        ]
        before = [one for one in earlier if one is not None]
        scans = [
            f"SELECT {_text(f'{one.snapshot} {one.version}')} AS compared, rel, hash(lhs) AS lhs, hash(rhs) AS rhs "
            f"FROM {self._scan(self.store.files_of(one), edge)}"
            for one in before
        ]
        nothing = "SELECT '' AS compared, '' AS rel, hash(0) AS lhs, hash(0) AS rhs WHERE false"
        self._view("previous_edges", " UNION ALL ".join(scans or [nothing]))
        self._sources([*([now] if now else []), *before])

    def _dated_edges(self) -> None:
        """Make `dated_edges`: raw edges with the time when they first happened, where the split goes by it."""
        split = self.config.split
        by_time = split.strategy == "temporal" and split.later_snapshot is None and bool(self.config.all_sources)
        self._variable("by_time", str(by_time))
        files = self._files("raw_edges") if by_time else []
        empty = "'' AS lhs, '' AS rel, '' AS rhs, NULL::TIMESTAMP AS first_time"
        self._view("dated_edges", f"SELECT lhs, rel, rhs, first_time FROM {self._scan(files, empty)}")

    def _sources(self, manifests: list[Manifest]) -> None:
        """Make `source` and `kept_share`: what each source may lose, and what a relation may lose and gain."""
        sources = dict(self.config.named_sources)
        published = SourceConfig(path="published") if not sources else None
        rows: list[str] = []
        shares: dict[str, tuple[float, float, float]] = {}
        for number, manifest in enumerate(manifests):
            for one in manifest.details.get("sources", []):
                source = sources.get(one["source"], published)
                if source is None:
                    continue
                if number == 0 and manifest.snapshot == self.snapshot:
                    rows.append(f"({_text(one['source'])}, {one['read']}, {source.max_rejected_share!r}::DOUBLE)")
                for rel in one["edges_per_relation"]:
                    share, growth, gain = shares.get(rel, (0.0, 1.0, 0.0))
                    shares[rel] = (
                        max(share, source.min_kept_share),
                        max(growth, source.max_growth),
                        max(gain, source.max_top_gain),
                    )
        values = ", ".join([*rows, "(NULL::VARCHAR, NULL::BIGINT, NULL::DOUBLE)"])
        names = "t(source, read, max_rejected_share)"
        self._table("source", f"SELECT * FROM (VALUES {values}) {names} WHERE source IS NOT NULL")
        kept = [f"({_text(rel)}, {', '.join(f'{one!r}::DOUBLE' for one in limits)})" for rel, limits in shares.items()]
        values = ", ".join([*kept, "(NULL::VARCHAR, NULL::DOUBLE, NULL::DOUBLE, NULL::DOUBLE)"])
        names = "t(rel, share, growth, top_gain)"
        self._table("kept_share", f"SELECT * FROM (VALUES {values}) {names} WHERE rel IS NOT NULL")
        every = [published] if published is not None else list(sources.values())
        self._variable("max_rejected_share", f"{min(one.max_rejected_share for one in every)!r}::DOUBLE")
        self._variable("max_top_gain", f"{max(one.max_top_gain for one in every)!r}::DOUBLE")
        self._variable("max_growth", f"{max(one.max_growth for one in every)!r}::DOUBLE")
        self._variable("min_kept_share", f"{max(one.min_kept_share for one in every)!r}::DOUBLE")

    def _vocabularies(self) -> None:
        requested = self.table.partition("/")[2]
        entities = self.config.model.table_names
        kind = self.table.partition("/")[0]
        queries, before_queries, sizes = [], [], []
        for entity in entities:
            table = f"vocabulary/{entity}"
            is_asked = kind not in ("vocabulary", "embeddings") or entity == requested
            size = self.store.manifest(table, self.snapshot).rows if self.store.exists(table, self.snapshot) else 0
            sizes.append(f"({_text(entity)}, {size}, {is_asked})")
            if kind == "vocabulary" and not is_asked:
                continue
            empty = "'' AS id, 0 AS row, 0 AS degree, '' AS first_snapshot"
            columns = f"{_text(entity)} AS entity, CAST(id AS VARCHAR) AS id, row"
            # Only a vocabulary's own checks compare it with the one before, which retention may have removed since.
            files, before_files = self._files(table), self._files_grown_from(table) if kind == "vocabulary" else []
            queries.append(
                f"SELECT {columns}, degree, first_snapshot, {self._or_else(files, 'evicted', 'false')}, "
                f"{self._or_else(files, 'row_before', 'row')} FROM {self._scan(files, empty)}"
            )
            before_queries.append(
                f"SELECT {columns}, {self._or_else(before_files, 'evicted', 'false')} "
                f"FROM {self._scan(before_files, empty)}"
            )
        self._table("entity", f"SELECT * FROM (VALUES {', '.join(sizes)}) t(entity, size, asked)")
        self._view("vocabulary", " UNION ALL ".join(queries))
        self._view("previous_vocabulary", " UNION ALL ".join(before_queries))
        now = self._manifest(self.table) if kind == "vocabulary" else None
        self._variable("compacted", str(now is not None and now.details.get("compacted") == self.snapshot))

    def _or_else(self, files: list[str], column: str, value: str) -> str:
        """Return the SQL of a column, or of `value` in tables without it: of an earlier version, or not compacted."""
        if files:
            with self.store.parquet(files[0]) as file:
                if column in file.schema_arrow.names:
                    return column
        return f"{value} AS {column}"

    def _files_grown_from(self, table: str) -> list[str]:
        """Return the files of the earlier vocabulary that this one says it was grown from; none where it is gone."""
        now = self._manifest(table)
        for parent, version in now.parents.items() if now else ():
            name, _, at = parent.partition("@")
            if name == table and at and version in self.store.versions_of(table, at):
                return self.store.files_of(self.store.manifest(table, at, version))
        return []

    def _chunks(self, asset: str) -> None:
        """Make `chunks` and `chunk_size`. A position counts from the chunk's first row in the file."""
        files = self._files(asset)
        if files:
            paths = ", ".join(_text(f) for f in files)
            scanned = f"read_parquet([{paths}], filename = true, file_row_number = true)"
        else:
            scanned = f"(SELECT {_EDGE_COLUMNS}, 0 AS file_row_number WHERE false)"
        self._table(
            "chunk_start",
            "SELECT filename, chunk, min(file_row_number) AS start, any_value(rel) AS rel, count(*) AS edges "
            f"FROM {scanned} GROUP BY filename, chunk",
        )
        self._view(
            "chunks",
            "SELECT e.chunk, e.file_row_number - s.start AS position, e.lhs, e.rhs, e.rel, e.weight, e.filename "
            f"FROM {scanned} e JOIN chunk_start s "
            "ON e.filename IS NOT DISTINCT FROM s.filename AND e.chunk IS NOT DISTINCT FROM s.chunk",
        )
        self._table(
            "chunk_size",
            "SELECT chunk, any_value(rel) AS rel, CAST(sum(edges) AS BIGINT) AS edges FROM chunk_start GROUP BY chunk",
        )

    def _training_set(self) -> None:
        if self.table.partition("/")[0] not in ("training_set", "held_out"):
            return
        parts = {"validation": "held_out/validation", "test": "held_out/test"}
        held_out = [f"SELECT {_text(s)} AS split, * FROM {self._scan(self._files(a), _EDGE_COLUMNS)}"
                    for s, a in parts.items()]  # fmt: skip
        self._view("held_out", " UNION ALL BY NAME ".join(held_out))
        self._view("positives", f"SELECT * FROM {self._scan(self._files('training_set/positives'), _EDGE_COLUMNS)}")
        edges = {
            "training_set/negatives": "training_set/positives",
            "held_out/validation_negatives": "held_out/validation",
        }
        self._chunks(edges.get(self.table, self.table))
        truth = "SELECT rel, lhs, rhs FROM positives"
        if self.table.startswith("held_out"):
            truth += " UNION ALL SELECT rel, lhs, rhs FROM held_out"
        self._view("truth", truth)
        negatives = self._scan(
            self._files(self.table) if self.table in edges else [],
            "0 AS epoch, 0 AS chunk, 0 AS side, [0] AS row, [0] AS mask_position, [0] AS mask_candidate, "
            "[0.0] AS log_q",
        )
        manifest = self.store.manifest(self.table, self.snapshot)
        if self.table in edges and manifest.rows and "log_q" not in manifest.schema:
            raise UserError(
                f"{self.table} of {self.snapshot} was sampled by an earlier version and lacks the column log_q; make "
                f"it anew with `twhin sample --snapshot {self.snapshot}`"
            )
        self._view("pools", f"SELECT * FROM {negatives}")
        in_training = self.table.startswith("training_set")
        self._variable("epochs", str(self.config.epochs_of_negatives if in_training else 1))
        pairs = float(manifest.details.get("masked", 0))
        every = max(1, math.ceil(manifest.rows / AUDITED_POOLS), math.ceil(pairs / AUDITED_PAIRS))
        # Every relation has one at least, also where it has fewer than are skipped.
        self._table(
            "audited",
            "SELECT epoch, chunk FROM (SELECT epoch.range AS epoch, chunk, "
            "row_number() OVER (PARTITION BY rel ORDER BY hash(epoch.range, chunk)) AS i "
            f"FROM chunk_size, range(getvariable('epochs')) epoch) WHERE (i - 1) % {every} = 0",
        )
        looked_at = "chunk IN (SELECT chunk FROM audited)" if self.table in edges else "false"
        self._table("audited_chunks", f"SELECT * FROM chunks WHERE {looked_at}")

    def _model(self) -> None:
        if self.table != "twhin_model":
            return
        manifest = self.store.manifest("twhin_model", self.snapshot)
        files, parts = self.store.files_of(manifest), self.store.part_files(manifest)

        def part(name: str, empty: str) -> str:
            return self._scan([parts[name]] if name in parts else [], empty)

        self._view("losses", f"SELECT * FROM {part('losses', '0 AS step, 0 AS epoch, 0.0 AS loss')}")
        self._view("model_relation", f"SELECT relation FROM {part('relations', chr(39) * 2 + ' AS relation')}")
        base = self.store.path("twhin_model", self.snapshot, manifest.version)
        rows = []
        for entity in self.config.model.table_names:
            own = [path for path in files if path.startswith(f"{base}/tables/{entity}/")]
            rows.append(f"SELECT {_text(entity)} AS entity, row FROM {self._scan(own, '0 AS row')}")
        self._view("model_row", " UNION ALL ".join(rows))

    def _results(self) -> None:
        empty = "'' AS relation, '' AS side, '' AS metric, 0.0 AS value, 0.0 AS baseline, 0 AS edges"
        later = "0.0 AS item_knn, 0.0 AS als, 0.0 AS compared, 0 AS compared_edges"
        # By name: a table of an earlier version lacks the later columns.
        self._view(
            "evaluation",
            f"SELECT * FROM {self._scan(self._files('evaluation'), empty)} UNION ALL BY NAME "
            f"SELECT * FROM {self._scan([], f'{empty}, {later}')}",
        )
        files = self._files(CALIBRATION) if self.table == CALIBRATION else []
        empty = "'' AS relation, '' AS method, 0 AS edges, 0 AS negatives, [0.0] AS scores, [0.0] AS log_odds"
        self._view(CALIBRATION, f"SELECT * FROM {self._scan(files, empty)}")
        shares = "'' AS relation, 0.0 AS probability, 0.0 AS precision, 0.0 AS recall, 0 AS edges, 0.0 AS predicted"
        for part in (THRESHOLDS, RELIABILITY) if files else ():
            found = self.store.part_files(self.store.manifest(CALIBRATION, self.snapshot)).get(part)
            empty = f"{shares}, 0.0 AS uncalibrated, 0.0 AS observed, 0 AS pairs"
            self._view(f"{CALIBRATION}_{part}", f"SELECT * FROM {self._scan([found] if found else [], empty)}")
        kind, _, name = self.table.partition("/")
        if kind == INDEX:
            self._view("search", f"SELECT * FROM {self._scan(self._files(self.table), '1')}")
        if kind != "embeddings":
            return
        if name == "relations":
            files = self._files("embeddings/relations")
            self._view("embedding_relation", f"SELECT * FROM {self._scan(files, '1')}")
            return
        columns = f"{_text(name)} AS entity, CAST(id AS VARCHAR) AS id, row, CAST(embedding AS FLOAT[]) AS embedding"
        # Tables of earlier versions do not have it.
        counted = "trained_edges" in self.store.manifest(self.table, self.snapshot).schema
        columns += ", trained_edges" if counted else ", NULL::BIGINT AS trained_edges"
        self._view("embeddings", f"SELECT {columns} FROM {self._scan(self._files(self.table), '1')}")


def _text(value: str) -> str:
    """A DuckDB string literal."""
    return "'" + value.replace("'", "''") + "'"
