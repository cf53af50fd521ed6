"""What a release must show before consumers get it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from twhin_pipeline.config.base import Section

Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=0, le=1_000)]


class DriftConfig(Section):
    """How far a release's vectors may be from those of the current one. Each limit is a number for every entity type,
    or a mapping such as `{user: 0.3}` for some; left empty, there is none."""

    largest_departed: Share | dict[str, Share] | None = 0.5
    """The share of the current release's trained ids that may be without a training edge in the new one."""
    largest_new: Share | dict[str, Share] | None = 0.5
    """The share of the new release's trained ids that may be new. Raise it for types that come and go each day, such as
    news."""
    largest_consumer_loss: Loss | dict[str, Loss] | None = 0.5
    """By how much the log loss of a small model that was trained on the current vectors may rise when it gets the new
    ones through the published map: a share of its loss on the current ones."""
    least_neighbors: Share | dict[str, Share] | None = None
    """The share of an id's ten nearest that must be among its nearest again."""
    least_cosine: Annotated[float, Field(ge=-1, le=1)] | dict[str, float] | None = None
    """The mean cosine between an id's two vectors; of use with warm starts, as a training from random vectors turns the
    axes."""


class PromotionConfig(Section):
    """When a new release becomes the current one. It is compared with the one that is current; what it fails is
    recorded, and `twhin promote` can decide otherwise."""

    automatic: bool = True
    """Make a release current where it passes every gate. `false`: it waits for `twhin promote`."""
    metric: Annotated[str, Field(pattern=r"^(auto|filtered_mrr|hits@[1-9]\d*)$")] = "auto"
    """What is compared on the same held-out edges: `filtered_mrr`, or `hits@20` (the share of tails among the first
    20). `auto`: Hits at the k of `training.selection_metric`, where that has one, else `filtered_mrr`."""
    largest_loss: float = Field(0.05, ge=0, lt=1)
    """The share of the current model's figure by which the new one may be worse on the same held-out edges.
    A release is held back where it is worse than that beyond chance: the whole confidence interval is below."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of that interval, by paired bootstrap over edges."""
    compared_edges: int = Field(20_000, ge=1)
    """Held-out edges that both models rank at most, drawn by `evaluation.seed`."""
    drift: DriftConfig = DriftConfig()
    """How far the vectors may be from those of the current release."""
