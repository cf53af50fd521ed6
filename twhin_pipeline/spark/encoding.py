"""Raw edges encoded on Spark: ends as rows of their vocabularies, by two joins, and each edge's hash.

A hash is `training_set.encoding`'s, kept as an int64 whose order is that of the unsigned number (`signed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import edge_file
from twhin_pipeline.kernels import edge_kernels
from twhin_pipeline.spark import tables
from twhin_pipeline.store import Store, database
from twhin_pipeline.training_set.encoding import hash_of, relation_hashes

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Manifest

Array = np.ndarray[Any, Any]
_TOP = np.uint64(1 << 63)
KINDS = {
    "weight": "float", "time": "bigint", "first_time": "bigint", "split": "tinyint",
    "file": "int", "bucket": "int", "position": "bigint", "part": "tinyint",
}  # fmt: skip
ARROW = {"float": pa.float32(), "int": pa.int32(), "bigint": pa.int64(), "tinyint": pa.int8()}
"""Arrow's type of each of these."""
Add = Callable[[int, Array, dict[str, Array]], dict[str, Array]]
"""Returns what a relation's edges get besides, by their relation, hashes and columns."""


def signed(h: Array) -> Array:
    """Return hashes, uint64, as int64 in the same order."""
    return (h ^ _TOP).view(np.int64)


def unsigned(h: Array) -> Array:
    """Return what `signed` was given."""
    return np.ascontiguousarray(h).view(np.uint64) ^ _TOP


def encoded(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    columns: Sequence[str],
    before: int | None,
    add: Add,
    added: Sequence[str],
) -> DataFrame:
    """Return the edges of the model's relations: `rel`, `ltype`, `rtype`, `lhs`, `rhs`, `h`, columns and `added` ones.

    A row is -1 where the entity is in no vocabulary. Of the columns `weight` is always there. What is added, tasks
    compute where they read edges, so that edges need not go to Python once more.

    Args:
        spark: The session.
        config: The configuration.
        store: Where the tables are.
        snapshot: The snapshot.
        columns: Further ones, as `IndexedEdges.pieces` has them.
        before: Weights are as they were before that time (microseconds).
        add: Returns the columns `added`.
        added: Their names, of `KINDS`.
    """
    from pyspark.sql import functions as f

    manifest = store.manifest("raw_edges", snapshot)
    wanted = list(dict.fromkeys(["weight", *columns]))
    if missing := [name for name in wanted if name not in manifest.schema]:
        raise UserError(
            f"raw_edges of snapshot {snapshot} has no column {missing[0]!r}: it was made by an earlier version or "
            f"configuration; make it again with `twhin ingest --snapshot {snapshot}`"
        )
    raw = _hashed(spark, config, store, snapshot, wanted, before, add, added)
    text = tables.sql_type(manifest.schema["lhs"]) == "string"
    rows = None
    for number, name in enumerate(config.model.table_names):
        vocabulary = store.manifest(f"vocabulary/{name}", snapshot)
        kind = tables.sql_type(vocabulary.schema["id"])
        here = tables.read(spark, store, tables.written(store, vocabulary), ["id", "row"], f"id {kind}, row bigint")
        # A vocabulary that once had a text id is of text; integers are then compared as they are written.
        here = here.select(f.lit(number).alias("type"), f.col("id").cast("string").alias("id"), "row")
        rows = here if rows is None else rows.unionAll(here)
    assert rows is not None
    if not text:
        raw = raw.withColumns({side: f.col(side).cast("string") for side in ("lhs", "rhs")})
    for side in ("l", "r"):
        named = rows.select(
            f.col("type").alias(f"{side}type"), f.col("id").alias(f"{side}hs"), f.col("row").alias(f"{side}row")
        )
        raw = raw.join(named, [f"{side}type", f"{side}hs"], "left").drop(f"{side}hs")
    ends = [f.coalesce(f"{side}row", f.lit(-1)).cast("bigint").alias(f"{side}hs") for side in ("l", "r")]
    return raw.select("rel", "ltype", "rtype", *ends, "h", *wanted, *added)


def _hashed(
    spark: SparkSession,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    wanted: list[str],
    before: int | None,
    add: Add,
    added: Sequence[str],
) -> DataFrame:
    """Return edges with ids, hashes, and what is added."""
    manifest = store.manifest("raw_edges", snapshot)
    types = {name: number for number, name in enumerate(config.model.table_names)}
    numbers = {one.name: rel for rel, one in enumerate(config.model.relations)}
    ends = np.array([(types[one.lhs], types[one.rhs]) for one in config.model.relations], np.int32)
    with database.connect(config) as con:
        seeded = relation_hashes(con, config)
    steps = steps_of(store, manifest) if before is not None else {}
    base = store.path("raw_edges", snapshot, manifest.version)
    root = store.root
    text = tables.sql_type(manifest.schema["lhs"]) == "string"
    schema = pa.schema(
        [(name, pa.int32()) for name in ("rel", "ltype", "rtype")]
        + [(side, pa.string() if text else pa.int64()) for side in ("lhs", "rhs")]
        + [("h", pa.int64()), *((name, ARROW[KINDS[name]]) for name in (*wanted, *added))]
    )

    def read(item: tuple[str, list[int]]) -> tables.Batches:
        path, groups = item
        own_steps = steps.get(path.rpartition("/")[2])
        here = Store(root)
        with database.connect(config) as con, here.parquet(path) as file:
            con.execute("SET threads = 1")
            for group in groups:
                columns = edge_file.columns_of(file, group, wanted)
                if before is not None and own_steps is not None:
                    with here.parquet(f"{base}/{own_steps}") as grown:
                        columns["weight"] = edge_file.known_weight(
                            grown, group, columns["weight"], columns["first_time"], before
                        )
                table = file.read_row_group(group, columns=["lhs", "rel", "rhs"])
                for rel, start, stop in _runs(table["rel"], numbers):
                    part = table.slice(start, stop - start)
                    h = _hashes(con, part, seeded[rel])
                    made = [np.full(stop - start, value, np.int32) for value in (rel, *ends[rel])]
                    arrays = [*map(pa.array, made), *(_plain(part[side], text) for side in ("lhs", "rhs"))]
                    mine = {name: columns[name][start:stop] for name in wanted}
                    mine |= add(rel, h, mine)
                    arrays += [pa.array(signed(h)), *(pa.array(mine[name]) for name in (*wanted, *added))]
                    cast = [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)]
                    yield pa.RecordBatch.from_arrays(cast, schema=schema)

    ids = "string" if text else "bigint"
    more = "".join(f", {name} {KINDS[name]}" for name in (*wanted, *added))
    ddl = f"rel int, ltype int, rtype int, lhs {ids}, rhs {ids}, h bigint{more}"
    return tables.each(spark, tables.row_groups(store, tables.written(store, manifest)), read, ddl)


def steps_of(store: Store, manifest: Manifest) -> dict[str, str]:
    """Return, by the names of the files of `raw_edges`, those that say how their edges' weights grew."""
    paths = [file["path"] for file in manifest.files]
    folder = f"{edge_file.STEPS_FOLDER}/"
    found = {path.removeprefix(folder): path for path in paths if path.startswith(folder)}
    if edge_file.ENDS in paths:  # of the embedded engine
        with store.parquet(store.path("raw_edges", manifest.snapshot, manifest.version, edge_file.ENDS)) as file:
            grown = "step_time" in file.schema_arrow.names
        found |= {path: edge_file.ENDS for path in paths if grown and not path.startswith("_")}
    return found


def _runs(names: pa.ChunkedArray, numbers: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Yield each run of one relation of the model: its number, and where it begins and ends."""
    coded = names.combine_chunks().dictionary_encode()
    code = coded.indices.to_numpy(zero_copy_only=False)
    cuts = np.flatnonzero(np.diff(code, prepend=-1, append=-1))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        rel = numbers.get(coded.dictionary[int(code[start])].as_py())
        if rel is not None:
            yield rel, start, stop


def _plain(column: pa.ChunkedArray, text: bool) -> pa.Array:
    return column.combine_chunks().cast(pa.string() if text else pa.int64())


def _hashes(con: Any, edges: pa.Table, relation: Any) -> Array:
    """Return the hashes of edges of one relation, uint64 `[n]`."""
    codes, hashes, first = [], [], 0
    for side in ("lhs", "rhs"):
        coded = edges[side].combine_chunks().dictionary_encode()
        ids = pa.table({"id": coded.dictionary})  # noqa: F841 (DuckDB reads it by its name)
        found = con.sql(f"SELECT {hash_of('CAST(id AS VARCHAR)')} AS h FROM ids").to_arrow_table()
        hashes.append(found["h"].to_numpy())
        codes.append(coded.indices.to_numpy(zero_copy_only=False).astype(np.uint32) + np.uint32(first))
        first += len(hashes[-1])
    nobody = np.zeros(first, np.int64)
    rows = np.empty(len(edges), np.int64), np.empty(len(edges), np.int64)
    h = np.empty(len(edges), np.uint64)
    left, right = codes
    edge_kernels.encode(left, right, relation, np.concatenate(hashes), nobody, nobody, rows, h)
    return h
