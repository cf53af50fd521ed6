"""One entity's vector from release to release, and two releases side by side."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import results
from twhin_pipeline.lifecycle import drift
from twhin_pipeline.lifecycle.drift import Drift
from twhin_pipeline.serving.explorer.opened import Explorer, Opened
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors import compatibility

K = 10
"""Neighbors of an id that drift compares."""
RELEASES = 12
"""Releases that a history goes back at most: each needs a pass over its vectors."""


@dataclass(frozen=True)
class Then:
    """An entity in one release of the history. What cannot be known is None."""

    release: str
    snapshot: str
    created: str
    trained: bool | None
    """None where the release does not have the entity."""
    norm: float | None
    """Length of the vector."""
    cosine: float | None
    """Cosine between this vector and that of the release one looks from, as they are."""
    mapped: float | None
    """The same after the later vector was mapped into the earlier release's space."""
    why_unmapped: str | None
    """Why there is no map."""
    neighbors: list[tuple[str, float]]
    """Nearest entities of the type, with their cosines."""
    kept: float | None
    """Share of these that are nearest in the release one looks from too."""


def history(explorer: Explorer, opened: Opened, entity: str, id: str, k: int) -> list[Then]:
    """Follow an entity's vector through the releases whose vectors are still there, the newest `RELEASES` of them.

    Args:
        explorer: The store.
        opened: The release one looks from.
        entity: The entity type.
        id: Its id, as text.
        k: Nearest entities of each release.

    Raises:
        KeyError: The release one looks from has no such entity type or id.
    """
    row = opened.row(entity, id)
    here = np.array(opened.model.tables[entity].vectors[row])
    near = {str(one) for one, _ in opened.model.neighbors(entity, id, k)}
    result = []
    for release in explorer.with_vectors(entity)[-RELEASES:]:
        then = explorer.opened(release.name)
        shown = (release.name, release.snapshot, release.created)
        if not then.model.has(entity, id):
            result.append(Then(*shown, None, None, None, None, None, [], None))
            continue
        table = then.model.tables[entity]
        row = then.row(entity, id)
        vector = np.array(table.vectors[row])
        itself = opened.name == release.name
        mapped, why = (1.0, None) if itself else _mapped(explorer, opened, release, entity, here, vector)
        neighbors = [(str(one), cosine) for one, cosine in then.model.neighbors(entity, id, k)]
        same = [one for one, _ in neighbors if one in near]
        result.append(
            Then(
                *shown,
                True if table.trained is None else bool(table.trained[row]),
                float(np.linalg.norm(vector)),
                _cosine(here, vector),
                mapped,
                why,
                neighbors,
                len(same) / len(neighbors) if neighbors else None,
            )
        )
    return result


def _mapped(
    explorer: Explorer, opened: Opened, other: Release, entity: str, here: np.ndarray, there: np.ndarray
) -> tuple[float | None, str | None]:
    """Return the cosine between two vectors in the earlier release's space, or why there is none."""
    if opened.release is None:
        return None, "the newest vectors are in no release"
    forward = (opened.release.created, opened.release.name) > (other.created, other.name)
    later, earlier = (opened.release, other) if forward else (other, opened.release)
    try:
        maps = compatibility.maps_into(explorer.store, later, earlier.name)
    except UserError as error:
        return None, str(error).removeprefix(f"{explorer.store.root}: ")
    if entity not in maps:
        return None, f"no map of {entity}: too few of its ids are in both releases"
    moved, fixed = (here, there) if forward else (there, here)
    return _cosine(moved @ maps[entity], fixed), None


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) != len(b):
        return None
    lengths = float(np.linalg.norm(a.astype(np.float64)) * np.linalg.norm(b.astype(np.float64)))
    return float(a.astype(np.float64) @ b.astype(np.float64)) / max(lengths, 1e-30)


def metrics(opened: Opened) -> list[dict[str, Any]]:
    """Return what evaluation measured of a release: a row for each relation and metric, with the baselines' figures.

    The rows are those of `results.chief_rows`; empty where the release has no evaluation.
    """
    manifest = opened.table("evaluation")
    if manifest is None:
        return []
    table = opened.store.seen_as(None).pinned(manifest).read("evaluation", opened.snapshot)
    rows: list[dict[str, Any]] = results.chief_rows(table, manifest.details).to_pylist()
    return rows


def compared(explorer: Explorer, before: Opened, after: Opened) -> list[dict[str, Any]]:
    """Return how far the vectors of two releases are apart, by entity type, as `twhin drift` measures it.

    Small models of consumers are left out, as they take too long for a page. The result of a pair is kept.

    Raises:
        UserError: One of the two is no release.
    """
    if before.release is None or after.release is None:
        raise UserError("two releases are compared, and this store has none; `twhin publish` makes one")
    found = _drift(explorer, before.release.name, after.release.name)
    return [asdict(one) | {"new": one.new, "gone": one.gone} for one in found]


@lru_cache(maxsize=64)
def _drift(explorer: Explorer, before: str, after: str) -> tuple[Drift, ...]:
    earlier, later = (explorer.opened(name).release for name in (before, after))
    assert earlier is not None and later is not None
    con, found = explorer.cursor(), []
    for entity in compatibility.entities(later):
        if f"embeddings/{entity}" in earlier.tables:
            both = compatibility.shared(con, explorer.store, earlier, later, entity, drift.SAMPLE)
            found.append(drift.compared(entity, both, K))
    return tuple(found)
