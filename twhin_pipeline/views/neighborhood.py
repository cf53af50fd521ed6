"""What surrounds entities in the graph, for people who look at their vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.store import Manifest, Store, database

SAMPLE = 4_000
FEW = 300
"""An entity type with at most so many members can colour a map: a section, a country."""


@dataclass(frozen=True)
class Sample:
    """Some entities of a type, spread over the table: their rows (int [N]) and vectors (float32 [N, D])."""

    rows: np.ndarray
    vectors: np.ndarray


def sample(store: Store, manifest: Manifest, size: int = SAMPLE) -> Sample:
    """Take about `size` vectors of an embedding table, from at most eight evenly spaced row groups."""
    groups: list[tuple[str, int]] = []
    for path in store.files_of(manifest):
        with store.parquet(path) as file:
            groups += [(path, i) for i in range(file.num_row_groups)]
    chosen = [groups[i] for i in np.unique(np.linspace(0, len(groups) - 1, min(8, len(groups))).astype(int))]
    tables = []
    for path, group in chosen:
        with store.parquet(path) as file:
            tables.append(file.read_row_group(group, columns=["row", "embedding"]))
    table = pa.concat_tables(tables)
    table = table.take(np.unique(np.linspace(0, len(table) - 1, min(size, len(table))).astype(np.int64)))
    vectors = table["embedding"].combine_chunks()
    flat = pc.cast(vectors.flatten(), pa.float32()).to_numpy(zero_copy_only=False)
    return Sample(table["row"].to_numpy(), flat.reshape(len(table), -1))


def norms(vectors: np.ndarray) -> np.ndarray:
    """Return the lengths of vectors (float [N, D] to float64 [N])."""
    return np.linalg.norm(vectors.astype(np.float64), axis=1)


def best_known(store: Store, entity: str, snapshot: str, count: int = 8) -> list[int | str]:
    """Return the ids with the most edges."""
    table = store.read(f"vocabulary/{entity}", snapshot, ["id", "degree"])
    most = pc.select_k_unstable(table, k=min(count, len(table)), sort_keys=[("degree", "descending")])
    return list(table["id"].take(most).to_pylist())


def commonest(config: TwhinConfig, store: Store, snapshot: str, entity: str, rows: np.ndarray) -> dict[str, list[str]]:
    """Name for each of `rows` of an entity type what it is linked with most often among the training edges.

    Returns:
        Lists in the order of `rows`, an empty name where there is no edge: by `commonest neighbour type` the entity
        type of the other ends; and, where an entity type of few members is among them, by `commonest <type>` its
        member.
    """
    names = config.model.table_names
    ends = [(i, r.lhs, r.rhs, "lhs", "rhs") for i, r in enumerate(config.model.relations)]
    ends += [(i, r.rhs, r.lhs, "rhs", "lhs") for i, r in enumerate(config.model.relations)]
    edges = database.scan(store, "training_set/positives", snapshot)
    queries = [
        f"SELECT {mine} AS row, {database.literal(theirs)} AS entity, {other} AS neighbour "
        f"FROM {edges} WHERE rel = {rel}"
        for rel, ours, theirs, mine, other in ends
        if ours == entity
    ]
    sizes = {
        theirs: store.manifest(f"vocabulary/{theirs}", snapshot).rows
        for _, ours, theirs, _, _ in ends
        if ours == entity
    }
    few = [name for name in names if name != entity and 1 < sizes.get(name, 0) <= FEW]
    wanted = pa.table({"row": rows, "place": np.arange(len(rows))})
    columns: dict[str, list[str]] = {}
    with database.connect(config, store) as con:
        con.register("wanted", wanted)
        con.execute(
            "CREATE TEMP TABLE near AS SELECT place, entity, neighbour "
            f"FROM ({' UNION ALL '.join(queries)}) JOIN wanted USING (row)"
        )

        def most(query: str) -> list[str]:
            counted = f"SELECT place, name, count(*) AS edges FROM ({query}) GROUP BY place, name"
            picked = con.sql(f"SELECT place, arg_max(name, (edges, name)) FROM ({counted}) GROUP BY place").fetchall()
            by_place = dict(picked)
            return [by_place.get(place, "") for place in range(len(rows))]

        columns["commonest neighbour type"] = most("SELECT place, entity AS name FROM near")
        if few:
            smallest = min(few, key=lambda name: sizes[name])
            vocabulary = database.scan(store, f"vocabulary/{smallest}", snapshot)
            columns[f"commonest {smallest}"] = most(
                f"SELECT place, CAST(v.id AS VARCHAR) AS name FROM near JOIN {vocabulary} v ON near.neighbour = v.row "
                f"WHERE entity = {database.literal(smallest)}"
            )
    return columns
