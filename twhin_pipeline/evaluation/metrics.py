"""Metrics of probabilities: accumulated over batches, summed over ranks, in constant memory."""

from __future__ import annotations

import torch
from torchmetrics import Metric, MetricCollection

# The AUC's histogram is over logits, clipped here; sigmoid(20) is 2e-9 below 1.
MAX_LOGIT = 20.0
NUM_BINS = 16_384


class _WeightedMetric(Metric):
    """Takes probabilities, labels and weights of one shape; its states are sums, so ranks are combined exactly."""

    full_state_update = False
    is_differentiable = False

    @staticmethod
    def _flat(
        probabilities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = probabilities.detach().reshape(-1).double()
        w = torch.ones_like(p) if weights is None else weights.detach().reshape(-1).double()
        return p, labels.detach().reshape(-1).double(), w


class Auc(_WeightedMetric):
    """Area under the ROC curve: the chance that a positive's probability is above a negative's, ties counting half.

    Probabilities are binned by their logit (bins of 40 / 16,384 over [-20, 20]), and those of a bin count as tied. NaN
    where there are no positives or no negatives.
    """

    higher_is_better = True
    positive: torch.Tensor
    negative: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("positive", "negative"):
            self.add_state(name, torch.zeros(NUM_BINS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add examples.

        Args:
            probabilities: In [0, 1], any shape.
            labels: 0 or 1, of that shape.
            weights: Not negative, of that shape; left out, 1.
        """
        p, y, w = self._flat(probabilities, labels, weights)
        logit = torch.logit(p).clamp(-MAX_LOGIT, MAX_LOGIT)
        bins = ((logit + MAX_LOGIT) * (NUM_BINS / (2 * MAX_LOGIT))).long().clamp(max=NUM_BINS - 1)
        self.positive.index_add_(0, bins, w * y)
        self.negative.index_add_(0, bins, w * (1 - y))

    def compute(self) -> torch.Tensor:
        """Return the area, a scalar in [0, 1] or NaN."""
        below = self.negative.cumsum(0) - self.negative
        area = (self.positive * (below + 0.5 * self.negative)).sum()
        return area / (self.positive.sum() * self.negative.sum())


class LogLoss(_WeightedMetric):
    """Weighted mean of the binary cross-entropy in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""

    higher_is_better = False
    entropy: torch.Tensor
    weight: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("entropy", "weight"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add examples; shapes as in `Auc.update`."""
        p, y, w = self._flat(probabilities, labels, weights)
        self.entropy += (w * _cross_entropy(p, y)).sum()
        self.weight += w.sum()

    def compute(self) -> torch.Tensor:
        """Return the mean, a scalar; NaN where there were no examples."""
        return self.entropy / self.weight


class RelativeCrossEntropy(LogLoss):
    """Relative cross-entropy in percent, `100 * (1 - CE / CE of always predicting the share of positives)`.

    As in Twitter's heavy ranker (He et al., 2014, call CE over that baseline "normalized entropy"): 0 is no better than
    the base rate, 100 is perfect, below 0 is worse. NaN where there are no positives or no negatives.
    """

    higher_is_better = True
    label: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("label", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, probabilities: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add examples; shapes as in `Auc.update`."""
        super().update(probabilities, labels, weights)
        _, y, w = self._flat(probabilities, labels, weights)
        self.label += (w * y).sum()

    def compute(self) -> torch.Tensor:
        """Return the percentage, a scalar or NaN."""
        rate = self.label / self.weight
        baseline = -(torch.xlogy(rate, rate) + torch.xlogy(1 - rate, 1 - rate))
        mixed = (self.label > 0) & (self.label < self.weight)
        return torch.where(mixed, 100 * (1 - self.entropy / self.weight / baseline), torch.nan)


def create_metrics(device: torch.device | str) -> MetricCollection:
    """Return the metrics `auc`, `rce` and `log_loss`, on `device`.

    `update(probabilities, labels, weights)` adds examples; `compute()` sums over the ranks of the process group, so
    every rank must call it; `reset()` starts anew.
    """
    metrics = MetricCollection(
        {"auc": Auc(), "rce": RelativeCrossEntropy(), "log_loss": LogLoss()}, compute_groups=False
    )
    return metrics.to(device)


def _cross_entropy(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    p = p.clamp(1e-7, 1 - 1e-7)
    return -(y * p.log() + (1 - y) * (1 - p).log())
