"""Raw edges encoded: ends as rows of their entity types' vocabularies, and each edge's hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from twhin_pipeline.graph.edge_file import IndexedEdges
from twhin_pipeline.kernels import edge_kernels
from twhin_pipeline.store import database
from twhin_pipeline.training_set.mapped_array import mapped_zeros
from twhin_pipeline.training_set.shuffle import Edges

if TYPE_CHECKING:
    import duckdb

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Encoded:
    """Edges of one relation: rows `lhs` and `rhs`, hashes `h`, and columns, `[n]`.

    A row is -1 where the entity is in no vocabulary; `lost` edges have such an end.
    """

    rel: int
    lhs: Array
    rhs: Array
    h: Array
    columns: dict[str, Array]
    lost: int

    def where(self, which: Array) -> Encoded:
        """Return some of them, all with rows: `which` is bool `[n]`, or their positions."""
        columns = {name: values[which] for name, values in self.columns.items()}
        return Encoded(self.rel, self.lhs[which], self.rhs[which], self.h[which], columns, 0)

    def edges(self) -> Edges:
        """Return them with their weights."""
        return Edges(self.rel, self.lhs, self.rhs, self.columns["weight"], self.h)


def hash_of(text: str) -> str:
    """Return the SQL of a text's hash (UBIGINT). MD5, not DuckDB's `hash`, which another release may change."""
    return f"md5_number_lower({text})"


def relation_hashes(con: duckdb.DuckDBPyConnection, config: TwhinConfig) -> list[np.uint64]:
    """Return the hash of each relation, which the split's seed changes."""
    seeded = hash_of(f"concat_ws('/', {config.split.seed}, $1::VARCHAR)")
    return [
        np.uint64(con.execute(f"SELECT {seeded}", [relation.name]).fetchall()[0][0])
        for relation in config.model.relations
    ]


class Encoder:
    """Encodes the raw edges of a snapshot by the vocabularies of the same one, or of an earlier one."""

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, of: str, folder: str) -> None:
        """Find the rows of all ids.

        Args:
            config: Names entity types and relations; has the split's seed.
            store: Where the tables are.
            snapshot: The vocabularies'.
            of: The raw edges' snapshot.
            folder: For temporary files: 8 bytes an id, and 4 or 8 for each type.
        """
        names = config.model.table_names
        self.relations = config.model.relations
        self.types = {name: number for number, name in enumerate(names)}
        self.raw = IndexedEdges(store, of)
        self.sizes = [store.manifest(f"vocabulary/{name}", snapshot).rows for name in names]
        """Rows by type."""
        self.rows = np.int32 if max(self.sizes) < 2**31 else np.int64
        with database.connect(config, store) as con:
            hashed = hash_of("CAST(id AS VARCHAR)")
            self.hashes = mapped_zeros(f"{folder}/{of}.hashes", self.raw.size, np.uint64)
            reader = con.sql(f"SELECT {hashed} FROM {self.raw.ids}").to_arrow_reader()
            done = 0
            for batch in reader:
                self.hashes[done : done + len(batch)] = batch.column(0).to_numpy()
                done += len(batch)
            self.relation_hashes = relation_hashes(con, config)
            self.row_of = [
                self._rows(con, database.scan(store, f"vocabulary/{name}", snapshot), f"{folder}/{of}.{number}")
                for number, name in enumerate(names)
            ]

    def _rows(self, con: duckdb.DuckDBPyConnection, vocabulary: str, path: str) -> Array:
        """Return each id's row, or -1; `[ids]`."""
        rows = mapped_zeros(path, self.raw.size, self.rows)
        rows[:] = -1
        described = con.execute(f"DESCRIBE SELECT id FROM {vocabulary}").fetchall()
        # A vocabulary that once had a text id is of text; integers are then compared as they are written.
        alike = (str(described[0][1]) == "VARCHAR") == self.raw.texts
        ids = "i.id = v.id" if alike else "CAST(i.id AS VARCHAR) = CAST(v.id AS VARCHAR)"
        query = f"SELECT i.file_row_number, v.row FROM {self.raw.ids} i JOIN {vocabulary} v ON {ids}"
        for batch in con.sql(query).to_arrow_reader():
            rows[batch.column(0).to_numpy()] = batch.column(1).to_numpy()
        return rows

    @property
    def counts(self) -> Array:
        """How many raw edges each relation has, int64 `[R]`."""
        return np.array([self.raw.counts.get(relation.name, 0) for relation in self.relations], np.int64)

    def pieces(self, columns: Sequence[str] = (), before: int | None = None) -> Iterator[Encoded]:
        """Yield all edges of the model's relations in the order of `raw_edges`, with weights and these columns.

        `before`: weights are as they were before that time; see `IndexedEdges.pieces`.
        """
        rel_of = {relation.name: rel for rel, relation in enumerate(self.relations)}
        for piece in self.raw.pieces(["weight", *columns], before):
            rel = rel_of.get(piece.relation)
            if rel is None:
                continue
            size = len(piece.lhs)
            rows = np.empty(size, self.rows), np.empty(size, self.rows)
            h = np.empty(size, np.uint64)
            left, right = (self.row_of[self.types[kind]] for kind in (self.relations[rel].lhs, self.relations[rel].rhs))
            lost = edge_kernels.encode(
                piece.lhs, piece.rhs, self.relation_hashes[rel], self.hashes, left, right, rows, h
            )
            yield Encoded(rel, *rows, h, piece.columns, lost)
