"""The points of a type's map, as the page reads them."""

from __future__ import annotations

import json
from functools import lru_cache

import pyarrow as pa

from twhin_pipeline.errors import UserError
from twhin_pipeline.serving.explorer.opened import Opened
from twhin_pipeline.store import Manifest
from twhin_pipeline.views import entity_map


def types(opened: Opened) -> list[str]:
    """Return the entity types that have a map of a release's vectors."""
    return [name for name in opened.model.tables if _manifest(opened, name) is not None]


def body(opened: Opened, entity: str) -> bytes:
    """Return a map as JSON: `x`, `y`, `cluster` (-1: none), `id` and `trained_edges` of its points, and `names`.

    Points come most trained first; `names` are those of the clusters. Two maps stay in memory.

    Raises:
        KeyError: There is no such entity type.
        UserError: There is no map of the type.
    """
    opened.check_type(entity)  # from here on the name may be a part of a path
    manifest = _manifest(opened, entity)
    if manifest is None:
        raise UserError(
            f"there is no map of {entity} in {opened.name or opened.snapshot}; name the type in `maps.entities` of the "
            f"configuration, then `twhin map --snapshot {opened.snapshot}` makes one"
        )
    return _body(opened, entity, manifest.version)


def _manifest(opened: Opened, entity: str) -> Manifest | None:
    """Return the release's map; where it has none, the newest one that was made of the same vectors since."""
    asset, store = entity_map.asset(entity), opened.store.seen_as(None)
    made = opened.table(asset)
    if made is not None:
        return made
    vectors = opened.table(f"embeddings/{entity}")
    for version in reversed(store.versions_of(asset, opened.snapshot)):
        manifest = store.manifest(asset, opened.snapshot, version)
        if vectors is not None and manifest.parents.get(vectors.asset) == vectors.version:
            return manifest
    return None


@lru_cache(maxsize=2)
def _body(opened: Opened, entity: str, version: str) -> bytes:
    store = opened.store.seen_as(None)
    manifest = store.manifest(entity_map.asset(entity), opened.snapshot, version)
    table = store.pinned(manifest).read(manifest.asset, manifest.snapshot)
    columns = {name: [round(value, 3) for value in table[name].to_pylist()] for name in ("x", "y")}
    columns |= {name: table[name].to_pylist() for name in ("cluster", "trained_edges")}
    columns["id"] = table["id"].cast(pa.string()).to_pylist()
    shown = {
        "method": manifest.details["method"],
        "entities": manifest.details["entities"],
        "names": manifest.details["clusters"],
    }
    return json.dumps(shown | columns, ensure_ascii=False, separators=(",", ":")).encode()
