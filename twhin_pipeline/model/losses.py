"""Losses: how wrong an edge's score is beside its candidates' scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.kernels import parallel
from twhin_pipeline.registry import Registry

# Fewer are not worth a second thread.
ROWS_A_THREAD = 250


@dataclass(frozen=True)
class SumOfExponentials:
    """An edge's loss that is `log(sum of exp(negative / tn)) - positive / tp`, the candidates' temperature being tn."""

    positive_temperature: float = 1.0
    candidate_temperature: float = 1.0
    own: bool = False
    """Whether the edge is in the sum too; both temperatures are then 1. If it is not, the loss is 0 where all are
    masked."""


class Loss:
    """The loss of each edge on one side, in two steps, so that edges that share a query share its candidates' part.

    Masked candidates have logit -inf, and neither value nor gradient.
    """

    candidate_temperature = 1.0
    """What this loss divides candidates' logits by before it sums their exponentials; a logarithm of how often a
    candidate is expected that is to count as it is must be multiplied by it."""

    by_sum: SumOfExponentials | None = None
    """What this loss is, if it is one of those."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config

    def __call__(self, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """Return the loss of each edge, each being its own query.

        Args:
            positive: `[..., C]` logits of the edges, finite.
            negative: `[..., C, N]` logits of their candidates, finite or -inf; N may be 0.

        Returns:
            `[..., C]`, finite.
        """
        return self.edge(positive, self.pool(negative))

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """Return what a query's candidates give to the loss of each of its edges.

        Args:
            negative: `[..., Q, N]` logits, finite or -inf; N may be 0.

        Returns:
            `[..., Q]`; or `[..., Q, N]` where the loss looks at every candidate beside the edge.
        """
        raise NotImplementedError

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """Return the loss of each edge.

        Args:
            positive: `[..., C]` logits of the edges, finite.
            pooled: `[..., C]` or `[..., C, N]`: what `pool` gave for each edge's query.

        Returns:
            `[..., C]`, finite.
        """
        raise NotImplementedError


LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register_as("bce")
class WeightedBinaryCrossEntropy(Loss):
    """Binary cross-entropy: the positive has weight 1, its unmasked negatives together `negative_weight`."""

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """`mean over unmasked candidates of softplus(negative)`; 0 where there are none."""
        # softplus(-inf) is 0, and so is its gradient.
        return F.softplus(negative).sum(-1) / _count(negative)

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`softplus(-positive) + negative_weight * pooled`."""
        return F.softplus(-positive) + self.config.negative_weight * pooled


@LOSSES.register_as("softmax")
class Softmax(Loss):
    """Cross-entropy of the edge among itself and its unmasked candidates; 0 where all of them are masked."""

    by_sum = SumOfExponentials(own=True)

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """`log(sum over unmasked candidates of exp(negative))`; -inf where there are none."""
        return _logsumexp(negative)

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`log(exp(positive) + exp(pooled)) - positive`."""
        return F.softplus(pooled - positive)


@LOSSES.register_as("margin")
class Margin(Loss):
    """Margin ranking (TransE, Bordes et al., 2013, equation 1), the mean over unmasked candidates.

    0 where all of them are masked.
    """

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """Return `negative`: each candidate is compared with each edge."""
        return negative

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`mean over unmasked candidates of max(0, margin - positive + pooled)`."""
        return F.relu(self.config.margin - positive.unsqueeze(-1) + pooled).sum(-1) / _count(pooled)


@LOSSES.register_as("self_adversarial")
class SelfAdversarial(Loss):
    """Self-adversarial negative sampling (RotatE, Sun et al., 2019, equations 4 and 5), scores being `-distance`.

    Harder candidates weigh more: `softmax(adversarial_temperature * negative)`, taken for a constant. Without
    candidates the edge's own term is left.
    """

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """`-sum over unmasked candidates of weight * log(sigmoid(-negative - margin))`; 0 where there are none."""
        masked = torch.isneginf(negative)
        # A temperature of 0 times -inf is not a number, and neither is the softmax of nothing but -inf.
        scaled = (self.config.adversarial_temperature * negative.detach()).masked_fill(masked, float("-inf"))
        weight = scaled.softmax(-1).masked_fill(masked, 0)
        return (weight * F.softplus(negative + self.config.margin)).sum(-1)

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`-log(sigmoid(margin + positive)) + pooled`."""
        return F.softplus(-positive - self.config.margin) + pooled


@LOSSES.register_as("bsl")
class BilateralSoftmax(Loss):
    """Bilateral softmax (BSL, Wu et al., 2023): a temperature tp for positives, another, tn, for candidates.

    `-positive / tp + log(sum of exp(negative / tn))`, without the edge itself in the sum; 0 where all candidates are
    masked. Multiplied by tp / tn it is what the authors' program (mode `reweight`) minimizes, with their t1 = tn and
    t2 = tp / tn. (The paper's positive temperature is a factor of a logarithm of a mean over a user's positives; of an
    edge by itself it would only scale the loss.)
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__(config)
        self.candidate_temperature = config.negative_temperature
        self.by_sum = SumOfExponentials(config.positive_temperature, config.negative_temperature)

    def pool(self, negative: torch.Tensor) -> torch.Tensor:
        """`log(sum over unmasked candidates of exp(negative / tn))`; -inf where there are none."""
        return _logsumexp(negative / self.candidate_temperature)

    def edge(self, positive: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`pooled - positive / tp`."""
        return (pooled - positive / self.config.positive_temperature).masked_fill(torch.isneginf(pooled), 0)


def _count(negative: torch.Tensor) -> torch.Tensor:
    """Return how many of `negative [..., N]` are not masked, at least 1: `[...]`."""
    return negative.isfinite().sum(-1).clamp(min=1)


def _logsumexp(negative: torch.Tensor) -> torch.Tensor:
    """Return `log(sum of exp(negative))`, `[..., N]` to `[...]`; without gradient where all are -inf.

    torch's own gradient is not a number there.
    """
    if negative.shape[-1] == 0:
        return negative.new_full(negative.shape[:-1], float("-inf"))
    total: torch.Tensor = _LogSumExp.apply(negative)
    return total


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, negative: torch.Tensor) -> torch.Tensor:
        if negative.device.type == "cpu" and negative.dtype == torch.float32:
            # One pass over a row in place of torch's five.
            rows = negative.detach().contiguous().view(-1, negative.shape[-1])
            share, total = torch.empty_like(rows), rows.new_empty(len(rows))
            parallel.softmax(len(rows), ROWS_A_THREAD, rows.numpy(), share.numpy(), total.numpy())
            share, total = share.view_as(negative), total.view(negative.shape[:-1])
        else:
            total = negative.logsumexp(-1)
            share = negative.softmax(-1).masked_fill_(torch.isneginf(total).unsqueeze(-1), 0)
        ctx.save_for_backward(share)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (share,) = ctx.saved_tensors
        scaled: torch.Tensor = share * gradient.unsqueeze(-1)
        return scaled
