"""Vectors of two releases side by side: the ids that both have, and a map from the later space into the earlier one.

A model that consumes vectors was trained on those of one release. After retraining, coordinates mean something else,
also where the graph has hardly changed. A linear map of the new vectors into the old space repairs most of that (Hu et
al., "Learning Backward Compatible Embeddings", KDD 2022, who train it with the embeddings; here it is fitted to the ids
that both releases have, as in Schönemann, "A generalized solution of the orthogonal Procrustes problem", 1966).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, database
from twhin_pipeline.store.releases import Release, names, read
from twhin_pipeline.vectors.model_files import vectors_of
from twhin_pipeline.words import PUBLISHED

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shared:
    """One entity type in two releases."""

    kept: int
    """Ids that are trained in both."""
    added: int
    """Ids that only the later one has trained."""
    departed: int
    """Ids that only the earlier one has trained."""
    before: Array
    """float32 `[n, D]`, vectors of the earlier release, of kept ids or a sample of them, in the order of the ids."""
    after: Array
    """float32 `[n, D']`, the later release's, of the same ids."""
    rows: Array
    """int64 `[n]`, their rows in the later release."""


def shared(
    con: duckdb.DuckDBPyConnection, store: Store, before: Release, after: Release, entity: str, limit: int
) -> Shared:
    """Read what two releases have in common of an entity type; of more than `limit` kept ids a sample.

    Raises:
        UserError: A release's table is gone, or has no such entity type.
    """
    files = [_files(store, release, entity) for release in (before, after)]
    trained = [f"(SELECT id, row, embedding FROM read_parquet({names}) WHERE trained_edges > 0)" for names in files]
    with database.explained(f"{store.root}, embeddings/{entity} of {before.name} and {after.name}"):
        counts = con.execute(
            f"SELECT count(*) FILTER (a.id = b.id), count(*) FILTER (b.id IS NULL), count(*) FILTER (a.id IS NULL) "
            f"FROM {trained[0]} b FULL JOIN {trained[1]} a ON a.id = b.id"
        ).fetchall()
        kept, added, departed = (int(count) for count in counts[0])
        # A sample by a hash of the id is the same whatever the order and the threads.
        result = con.sql(
            f"SELECT b.embedding AS before, a.embedding AS after, a.row FROM {trained[0]} b JOIN {trained[1]} a "
            f"ON a.id = b.id ORDER BY hash(b.id), b.id LIMIT {int(limit)}"
        ).to_arrow_table()
    earlier, later = (vectors_of(result.column(name)) for name in ("before", "after"))
    return Shared(kept, added, departed, earlier, later, result.column("row").to_numpy())


def _files(store: Store, release: Release, entity: str) -> str:
    asset = f"embeddings/{entity}"
    version = release.tables.get(asset)
    manifest = store.seen_as(None).manifest(asset, release.snapshot, version)
    return "[" + ", ".join(database.literal(path) for path in store.files_of(manifest)) + "]"


def entities(release: Release) -> list[str]:
    """Return the entity types whose vectors a release has."""
    names = (name.removeprefix("embeddings/") for name in release.tables if name.startswith("embeddings/"))
    return [name for name in names if name != "relations"]


def orthogonal(before: Array, after: Array) -> Array:
    """Return the rotation or reflection `[D, D]` by which `after [n, D]` comes nearest to `before [n, D]`.

    It keeps lengths, and the angles between vectors. `after @ it` are vectors of the earlier space.
    """
    left, _, right = np.linalg.svd(after.astype(np.float64).T @ before.astype(np.float64), full_matrices=False)
    return left @ right


def linear(before: Array, after: Array, ridge: float = 1e-3) -> Array:
    """Return the matrix `[D', D]` by which `after [n, D']` comes nearest to `before [n, D]` in squared distance.

    Args:
        before: Vectors of the earlier release.
        after: Those of the later one, of the same ids.
        ridge: The penalty on the matrix, as a share of the mean square of `after`'s columns.
    """
    new = after.astype(np.float64)
    gram = new.T @ new
    gram[np.diag_indices_from(gram)] += ridge * np.trace(gram) / max(len(gram), 1) + 1e-12
    return np.linalg.solve(gram, new.T @ before.astype(np.float64))


FITS = {"orthogonal": orthogonal, "linear": linear}


SCHEMA = pa.schema(
    [
        pa.field("entity", pa.string()),
        pa.field("ids", pa.int64()),
        pa.field("rows", pa.int32()),
        pa.field("columns", pa.int32()),
        pa.field("matrix", pa.list_(pa.float64())),
        pa.field("distance_before", pa.float64()),
        pa.field("distance", pa.float64()),
    ]
)
"""The table of a release's maps, a row an entity type: the ids it was fitted to, the matrix row after row, and the mean
distance of the kept ids' vectors to their earlier ones, as a share of the earlier ones' mean length, without a map and
with one. That one is fitted to half of the ids and measured on the others."""
LIMIT = 200_000
"""Kept ids that a map is fitted to, at most."""


def table(
    con: duckdb.DuckDBPyConnection, store: Store, before: Release, after: Mapping[str, str], snapshot: str, kind: str
) -> pa.Table:
    """Fit the maps from a new export's vectors into an earlier release's space.

    An entity type with fewer kept ids than dimensions has none: it would be made up.

    Args:
        con: A connection that can read the store.
        store: Where both are.
        before: The earlier release.
        after: The new export's tables and their versions.
        snapshot: Their snapshot.
        kind: `linear` or `orthogonal`.

    Returns:
        A table of `SCHEMA`.

    Raises:
        UserError: A table of the earlier release is gone.
    """
    later = Release("the new export", snapshot, "", after)
    rows = []
    for entity in entities(later):
        if f"embeddings/{entity}" not in before.tables:
            continue
        both = shared(con, store, before, later, entity, LIMIT)
        if len(both.after) <= both.after.shape[1] or (kind == "orthogonal" and both.before.shape != both.after.shape):
            continue
        matrix = FITS[kind](both.before, both.after)
        size = (len(both.after), *matrix.shape)
        rows.append((entity, *size, matrix.ravel(), *_distances(both, kind)))
    columns = [pa.array([row[i] for row in rows], field.type) for i, field in enumerate(SCHEMA)]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _distances(both: Shared, kind: str) -> tuple[float | None, float | None]:
    """Return how far ids are from their earlier vectors without a map, and with one that other ids were fitted to.

    None without a map where the dimensions differ, and with one where half of the ids are too few to fit it.
    """
    apart = _distance(both.before, both.after) if both.before.shape == both.after.shape else None
    half = len(both.after) // 2
    if half <= both.after.shape[1]:
        return apart, None
    matrix = FITS[kind](both.before[:half], both.after[:half])
    return apart, _distance(both.before[half:], both.after[half:] @ matrix)


def _distance(before: Array, after: Array) -> float:
    apart = np.linalg.norm(after - before, axis=1).mean()
    return float(apart / max(np.linalg.norm(before, axis=1).mean(), 1e-12))


def maps_into(store: Store, release: Release, earlier: str) -> dict[str, Array]:
    """Return, by entity type, the matrix `[D', D]` from a release's vectors into an earlier release's space.

    Each release has the map into the one that was current before it; those in between are multiplied.

    Raises:
        UserError: The releases before this one do not lead to `earlier`, or a map is missing.
    """
    maps: dict[str, Array] | None = None
    read(store, earlier)  # says so where there is none of that name
    passed, known = [release.name], set(names(store))
    while release.name != earlier:
        manifest = store.seen_as(None).manifest(PUBLISHED, release.snapshot, release.tables.get(PUBLISHED))
        of_release = store.pinned(manifest)
        base = manifest.details.get("compatible_with")
        if base is None:
            raise UserError(
                f"{store.root}: no map leads from release {passed[0]} to {earlier}: {release.name} has none (the first "
                f"release, or export.compatibility: none); there are maps into {', '.join(passed[1:]) or 'no release'}"
            )
        step = {row["entity"]: _matrix(row) for row in of_release.read(PUBLISHED, release.snapshot).to_pylist()}
        maps = step if maps is None else {name: maps[name] @ step[name] for name in maps if name in step}
        if base not in known:
            raise UserError(
                f"{store.root}: no map leads from release {passed[0]} to {earlier}: the releases before {release.name} "
                f"were removed; there are maps into {', '.join(passed[1:]) or 'no release'}"
            )
        release = read(store, base)
        passed.append(base)
    return maps if maps is not None else {}


def _matrix(row: Mapping[str, Any]) -> Array:
    return np.array(row["matrix"], np.float64).reshape(row["rows"], row["columns"])
