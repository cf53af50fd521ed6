"""Losses: how wrong an edge's score is beside its candidates' scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twhin_pipeline.registry import Registry
from twhin_pipeline.sections.training import LossConfig


class Loss:
    """The loss of each edge on one side. Masked candidates have logit -inf, and neither value nor gradient."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return the loss of each edge.

        Args:
            positive: `[..., C]` logits of the edges, finite.
            negative: `[..., C, N]` logits of their candidates, finite or -inf; N may be 0.

        Returns:
            `[..., C]`, finite.
        """
        raise NotImplementedError


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register_as("bce")
class WeightedBinaryCrossEntropy(Loss):
    """Binary cross-entropy: the positive has weight 1, its unmasked negatives together `negative_weight`."""

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """`softplus(-positive) + negative_weight * mean over unmasked candidates of softplus(negative)`."""
        count = torch.isfinite(negative).sum(-1).clamp(min=1)
        # softplus(-inf) is 0, and so is its gradient.
        false = F.softplus(negative).sum(-1) / count
        return F.softplus(-positive) + self.config.negative_weight * false


@LOSSES.register_as("softmax")
class Softmax(Loss):
    """Cross-entropy of the edge among itself and its unmasked candidates; 0 where all of them are masked."""

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """`log(exp(positive) + sum over unmasked candidates of exp(negative)) - positive`."""
        if negative.shape[-1] == 0:
            return positive * 0
        # The maximum takes in the positive, so it is finite where every candidate is masked; logsumexp is not.
        top = torch.maximum(positive, negative.amax(-1)).detach()
        total = (positive - top).exp() + (negative - top.unsqueeze(-1)).exp().sum(-1)
        return total.log() + (top - positive)
