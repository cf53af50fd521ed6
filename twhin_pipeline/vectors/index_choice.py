"""Which entity types get an index, and which index is of which vectors. Nothing here loads torch or FAISS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

from twhin_pipeline import extras
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.words import INDEX

Kind = Literal["flat", "hnsw", "ivf_pq"]
LINKS = 32
"""Neighbours of a node of HNSW above the lowest level (M; Malkov and Yashunin, 2020); on that it has twice as many."""
LEAST_FOR_PQ = 39 * 256
"""FAISS wants a codebook of 256 entries to be learned from 39 vectors each at least."""


def reason_against(config: TwhinConfig, store: Store, snapshot: str) -> str | None:
    """Return why a snapshot gets no index, or None where an entity type gets one."""
    if config.indexes.kind == "none":
        return "indexes.kind is none"
    sizes = {}
    for entity in config.indexed_types:
        manifest = store.manifest(f"embeddings/{entity}", snapshot)
        if manifest.details.get("normalize"):
            return "vectors were exported with export.normalize: true, so the model's scores cannot be compared"
        sizes[entity] = indexable(manifest)
    if all(kind_for(config, rows) == "none" for rows in sizes.values()):
        return f"exact search is fast enough below {config.indexes.exact_rows:,} entities (indexes.exact_rows)"
    if config.indexes.kind == "auto" and (error := extras.missing("faiss", "an index")) is not None:
        return str(error)
    return None


def indexable(manifest: Manifest) -> int:
    """Return how many rows of an embeddings table are in an index: those that were trained."""
    return manifest.rows - int(manifest.details.get("untrained", 0))


def kind_for(config: TwhinConfig, rows: int) -> Kind | Literal["none"]:
    """Return what index a type with so many trained rows gets."""
    chosen = config.indexes
    if rows == 0 or (chosen.kind == "auto" and rows < chosen.exact_rows):
        return "none"
    if chosen.kind == "auto":
        size = rows * (4 * config.model.embedding_dim + 8 * LINKS)
        return "ivf_pq" if size > chosen.largest_gib * 2**30 else "hnsw"
    if chosen.kind == "ivf_pq" and rows < LEAST_FOR_PQ:
        return "flat"
    return cast("Kind", chosen.kind)


def neighbors_apart(model: TwhinModelConfig, kind: Kind, rows: int) -> bool:
    """Tell whether a type's neighbors get an index of their own: lists of its vectors, scaled to length 1.

    They are nearest by the cosine, which an index of another comparator does not find by. `flat` compares with all, as
    searches without an index do.
    """
    return model.comparator != "cosine" and kind != "flat" and rows >= LEAST_FOR_PQ


def current(store: Store, snapshot: str, entities: Iterable[str]) -> list[str]:
    """Return the tables of indexes that were made of the present vectors of some entity types."""
    there = [name for name in entities if store.exists(f"embeddings/{name}", snapshot)]
    found = {name: manifest_of(store, store.manifest(f"embeddings/{name}", snapshot)) for name in there}
    return [f"{INDEX}/{name}" for name, manifest in found.items() if manifest is not None]


def manifest_of(store: Store, embeddings: Manifest) -> Manifest | None:
    """Return the manifest of the index of an embeddings table; None where no index was made of this version."""
    asset = embeddings.asset.replace("embeddings/", f"{INDEX}/", 1)
    if not store.exists(asset, embeddings.snapshot):
        return None
    manifest = store.manifest(asset, embeddings.snapshot)
    return manifest if manifest.parents.get(embeddings.asset) == embeddings.version else None
