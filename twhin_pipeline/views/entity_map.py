"""The map of an entity type: its vectors as points of a plane, in clusters that are named by what they are linked with.

Points are laid out by UMAP (McInnes, Healy and Melville, "UMAP: Uniform Manifold Approximation and Projection for
Dimension Reduction", 2018) on cosines, from principal components on, and grouped by k-means on the plane: clusters are
regions of the map, and each point is in one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twhin_pipeline import extras
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store, database
from twhin_pipeline.vectors.model_files import vectors_of

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

Array = np.ndarray[Any, Any]
RAW_EDGES = "raw_edges"
NAMES = 2
"""Neighbors in a cluster's name."""
COMMON = 0.05
"""Share of a cluster's members that a neighbor in its name is linked with, at least; and at least two are."""
LEAST = 16
"""UMAP looks at 15 neighbors of a point. Types with fewer points than this are laid out by principal components."""


def asset(entity: str) -> str:
    """Return the name of an entity type's map."""
    return f"map/{entity}"


def build(config: TwhinConfig, store: Store, snapshot: str) -> None:
    """Make the map of each entity type in `maps.entities`.

    Raises:
        UserError: The extra `map` is missing, or an entity type has no vector with a training edge.
    """
    extras.need("umap", "a map", "map")
    for entity in config.maps.entities:
        _build(config, store, snapshot, entity)


def _build(config: TwhinConfig, store: Store, snapshot: str, entity: str) -> None:
    vectors = store.manifest(f"embeddings/{entity}", snapshot)
    parents = store.versions(snapshot, [vectors.asset, RAW_EDGES])
    started = time.perf_counter()
    with database.connect(config, store) as con:
        chosen, total = _chosen(con, store, vectors, config.maps.points)
        if not len(chosen):
            raise UserError(
                f"{vectors.asset} of {snapshot}: no {entity} has a training edge, so there is nothing to map"
            )
        method = config.maps.method if len(chosen) >= LEAST else "pca"
        points = laid_out(vectors_of(chosen["embedding"]), method, config.maps.seed)
        cluster = clusters(points, config.maps.seed)
        names = named(con, config, store, snapshot, entity, chosen["id"], cluster)
    table = pa.table(
        {
            "id": chosen["id"],
            "row": chosen["row"],
            "x": pa.array(points[:, 0], pa.float32()),
            "y": pa.array(points[:, 1], pa.float32()),
            "cluster": pa.array(cluster, pa.int32()),
            "cluster_name": pa.array([names[number] for number in cluster]),
            "trained_edges": chosen["trained_edges"],
        }
    )
    with store.replace(asset(entity), snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.write(table)
        draft.details = {
            "method": method,
            "entities": total,
            "clusters": names,
            "seconds": round(time.perf_counter() - started, 1),
        }


def current(store: Store, snapshot: str, entities: Iterable[str]) -> list[str]:
    """Return the maps of some entity types that were made of their present vectors."""
    found = []
    for name in map(asset, entities):
        if store.exists(name, snapshot) and not store.stale(name, snapshot):
            found.append(name)
    return found


def read(store: Store, manifest: Manifest) -> tuple[Array, list[str]]:
    """Return a map's points, float `[N, 2]`, and the name of each one's cluster."""
    table = store.pinned(manifest).read(manifest.asset, manifest.snapshot, ["x", "y", "cluster_name"])
    points = np.stack([table[name].to_numpy() for name in ("x", "y")], axis=1)
    return points, table["cluster_name"].to_pylist()


def _chosen(con: Any, store: Store, manifest: Manifest, count: int) -> tuple[pa.Table, int]:
    """Return the most trained entities, best first, with their vectors, and how many there are in all."""
    table = database.parquet(store.files_of(manifest))
    with database.explained(f"{store.root}, {manifest.asset}"):
        chosen = con.sql(
            f"SELECT id, row, trained_edges, embedding FROM {table} WHERE trained_edges > 0 "
            f"ORDER BY trained_edges DESC, row LIMIT {count:d}"
        ).to_arrow_table()
    return chosen, manifest.rows


def laid_out(vectors: Array, method: str, seed: int) -> Array:
    """Lay vectors out on a plane.

    Args:
        vectors: float32 `[N, D]`.
        method: `umap`, or `pca`.
        seed: Of UMAP's random numbers.

    Returns:
        float32 `[N, 2]`.
    """
    from sklearn.decomposition import PCA

    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if method == "pca":
        size = min(2, *unit.shape)
        points = PCA(size, random_state=seed).fit_transform(unit)
        return np.pad(points, ((0, 0), (0, 2 - size))).astype(np.float32)
    from umap import UMAP

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on seeds and sparse graphs
        layout = UMAP(metric="cosine", init="pca", random_state=seed, n_jobs=1)
        return np.asarray(layout.fit_transform(unit), np.float32)


def clusters(points: Array, seed: int) -> Array:
    """Group points of a plane, float `[N, 2]`, into about sqrt(N) / 5 regions: int `[N]`, the largest region first."""
    from sklearn.cluster import KMeans

    count = min(max(round(sqrt(len(points)) / 5), 1), len(np.unique(points, axis=0)))
    member = KMeans(count, n_init=1, random_state=seed).fit_predict(points)
    order = np.argsort(-np.bincount(member, minlength=count), kind="stable")
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    return place[member]


def named(
    con: Any, config: TwhinConfig, store: Store, snapshot: str, entity: str, ids: Any, cluster: Array
) -> list[str]:
    """Name each cluster by the neighbors in the graph that set it apart from the rest of the map.

    A neighbor counts by its term of the divergence between the cluster and the map: n log(p / q), where n members of
    the cluster are linked with it, the share p of them, and the share q of all points (Kullback and Leibler, 1951). A
    cluster that has no common neighbor, `COMMON`, is named by its own most trained members.

    Args:
        con: A connection that can read the store.
        config: The configuration.
        store: The store.
        snapshot: The snapshot.
        entity: The entity type.
        ids: Ids of the points, the most trained first.
        cluster: int `[N]`.

    Returns:
        A name for each cluster.
    """
    edges = database.scan(store, RAW_EDGES, snapshot)
    sides = [
        f"SELECT {mine} AS id, {database.literal(theirs)} AS entity, {other}::VARCHAR AS neighbor FROM {edges} "
        f"WHERE rel = {database.literal(relation.name)}"
        for relation in config.model.relations
        for mine, other, here, theirs in (
            ("lhs", "rhs", relation.lhs, relation.rhs),
            ("rhs", "lhs", relation.rhs, relation.lhs),
        )
        if here == entity
    ]
    found = _apart(con, store, snapshot, sides, ids, cluster) if sides else []
    names: list[list[str]] = [[] for _ in range(int(cluster.max()) + 1)]
    for number, neighbor in found:
        if neighbor not in names[number] and len(names[number]) < NAMES:  # two types may have an id in common
            names[number].append(neighbor)
    for number, one in enumerate(names):
        if not one:
            members = ids.take(pa.array(np.flatnonzero(cluster == number)[:NAMES])).to_pylist()
            names[number] = [f"around {members[0]}", *map(str, members[1:])]
    return [", ".join(one) for one in names]


def _apart(con: Any, store: Store, snapshot: str, sides: list[str], ids: Any, cluster: Array) -> list[tuple[int, str]]:
    """Return each cluster's neighbors that set it apart, best first; `sides` select `id`, `entity` and `neighbor`."""
    con.register("points", pa.table({"id": ids, "cluster": cluster}))
    with database.explained(f"{store.root}, {RAW_EDGES} of {snapshot}"):
        return con.execute(
            "WITH near AS (SELECT DISTINCT cluster, points.id, entity, neighbor "
            f"FROM ({' UNION ALL '.join(sides)}) edges JOIN points ON points.id::VARCHAR = edges.id::VARCHAR), "
            "counted AS (SELECT cluster, entity, neighbor, count(*) AS n, "
            "sum(count(*)) OVER (PARTITION BY entity, neighbor) AS everywhere "
            "FROM near GROUP BY cluster, entity, neighbor), "
            "sizes AS (SELECT cluster, count(*) AS size, sum(count(*)) OVER () AS total FROM points GROUP BY cluster), "
            "scored AS (SELECT cluster, entity, neighbor, n * ln((n / size) / (everywhere / total)) AS score, "
            f"n >= greatest(2, {COMMON} * size) AS common "
            "FROM counted JOIN sizes USING (cluster)) "
            "SELECT cluster, neighbor FROM scored WHERE score > 0 AND common "
            "QUALIFY row_number() OVER (PARTITION BY cluster ORDER BY score DESC, entity, neighbor) <= ? "
            "ORDER BY cluster, score DESC, entity, neighbor",
            [2 * NAMES],
        ).fetchall()
