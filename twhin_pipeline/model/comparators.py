"""Comparators: how alike two sides' vectors are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twhin_pipeline.registry import Registry

# The root's slope grows without bound towards 0; squared distances below this count as this, without gradient.
SMALLEST = 1e-12


class Comparator:
    """Prepares either side's vectors once, then compares many pairs by one matrix product.

    What `compare` and `pairs` return are logits: already divided by the temperature.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `compare` and `pairs` take, `[..., D]`, of the vectors `x [..., D]`."""
        return x

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """Return the logits of pairs by their inner products (dot, cosine) or squared distances (l2, squared_l2)."""
        raise NotImplementedError

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare each of `a [..., P, D]` with each of `b [..., N, D]`: `[..., P, N]`. Both are prepared."""
        raise NotImplementedError

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare `a [..., D]` with `b [..., D]`, one to one: `[...]`. Both are prepared."""
        raise NotImplementedError


COMPARATORS: Registry[Comparator] = Registry("comparator")


@COMPARATORS.register_as("dot")
class Dot(Comparator):
    """The dot product."""

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """Return `a . b` in units of the temperature. Any shape."""
        return values if self.temperature == 1 else values / self.temperature

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `a . b` of every pair. Shapes as in `Comparator.compare`."""
        scaled = a if self.temperature == 1 else a / self.temperature
        return scaled @ b.transpose(-1, -2)

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `a . b`. Shapes as in `Comparator.pairs`."""
        return self.logits((a * b).sum(-1))


@COMPARATORS.register_as("cosine")
class Cosine(Dot):
    """The cosine of the angle, in [-1, 1]; a zero vector is at right angles to all."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Scale `x [..., D]` to length 1; lengths below 1e-8 count as 1e-8, so that gradients stay finite."""
        return F.normalize(x, dim=-1, eps=1e-8)


@COMPARATORS.register_as("l2")
class Distance(Comparator):
    """The negative Euclidean distance: never above 0."""

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|` of `|a - b|^2`. Any shape."""
        return values.mul(self.temperature**-2).clamp_min(SMALLEST).sqrt().neg()

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|` of every pair, to within 1e-3 of the longer vector's length, of float32 vectors.

        Shapes as in `Comparator.compare`.
        """
        return _squared_distances(a, b, self.temperature**-2).clamp_min(SMALLEST).sqrt().neg()

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|`. Shapes as in `Comparator.pairs`."""
        return self.logits((a - b).square().sum(-1))


@COMPARATORS.register_as("squared_l2")
class SquaredDistance(Comparator):
    """The negative squared Euclidean distance: never above 0."""

    def logits(self, values: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|^2` of `|a - b|^2`. Any shape."""
        return values.div(self.temperature).neg()

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|^2` of every pair. Shapes as in `Comparator.compare`."""
        return _squared_distances(a, b, 1 / self.temperature).clamp_min(0).neg()

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `-|a - b|^2`. Shapes as in `Comparator.pairs`."""
        return self.logits((a - b).square().sum(-1))


def _squared_distances(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `scale * (|a|^2 - 2 a.b + |b|^2)`, `[..., P, N]`, by one matrix product; rounding may take it below 0."""
    with torch.autocast(a.device.type, enabled=False):
        # The terms are large and their sum may be small, so 16 bits are not enough for them.
        if a.dtype != torch.float64:
            a, b = a.float(), b.float()
        product = (-2 * scale * a) @ b.transpose(-1, -2)
        own, others = (x.square().sum(-1).mul(scale) for x in (a, b))
        return product.add_(own.unsqueeze(-1)).add_(others.unsqueeze(-2))
