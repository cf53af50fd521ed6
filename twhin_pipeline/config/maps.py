"""Maps of entity types: each vector as a point of a plane, for people to look at."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from twhin_pipeline.config.base import Section, Seed


class MapsConfig(Section):
    """Maps for the explorer, made after the export. They need the extra `map`."""

    entities: list[str] = []
    """Entity types that get a map; none by default, as a map of 100,000 entities takes minutes."""
    points: int = Field(100_000, ge=10, le=1_000_000)
    """Entities of a type on its map at most: those with the most training edges. Time grows with them in proportion."""
    method: Literal["umap", "pca"] = "umap"
    """`umap` keeps what is near together. `pca` shows the two directions of the largest variance. It takes a
    second, and little is seen on it."""
    seed: Seed = 0
    """Of the layout and the clusters. The same vectors, seed and versions of the libraries give the same map."""
