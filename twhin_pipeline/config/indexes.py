"""Which entity types get an index for approximate search, and how well it must find."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from twhin_pipeline.config.base import Section, Seed


class IndexesConfig(Section):
    """Indexes for approximate search: one for each entity type that a relation leads to. `recommend` and `neighbors`
    use it where there is one, and compare with every vector elsewhere."""

    kind: Literal["auto", "none", "flat", "hnsw", "ivf_pq"] = "auto"
    """`auto`: none for a type with fewer entities than `exact_rows`; else `hnsw` (a graph of neighbours beside the
    vectors), and `ivf_pq` (lists of compressed vectors) where a graph would be larger than `largest_gib`, or does not
    reach `recall`. `flat` holds the vectors and compares with all of them. Any but `none` needs the extra `index`;
    `auto` makes do without."""
    recall: float = Field(0.95, gt=0, le=1)
    """The share of the best tails that a search must find, for each k of `recall_at` and each relation. How hard
    searches look is chosen by it, and the check on the index fails below."""
    recall_at: list[Annotated[int, Field(ge=1, le=1_000)]] = Field(default=[10, 30, 100], min_length=1)
    """The k. A search for another number looks as hard as the next larger k needs it."""
    exact_rows: int = Field(200_000, ge=0)
    """For `auto`: of a smaller type one exact search takes about as long as a web page's other work."""
    largest_gib: float = Field(16.0, gt=0)
    """For `auto`: what an index may take, on disk and in memory while it is built and searched."""
    queries: int = Field(1_000, ge=10, le=1_000_000)
    """Heads, drawn from the training edges of all relations that lead to the type, by which recall is measured."""
    seed: Seed = 0
    """Of the heads that are drawn, and of what `ivf_pq` learns."""

    @field_validator("recall_at")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        return sorted(set(value))
