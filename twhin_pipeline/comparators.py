"""Comparators: how alike two sides' vectors are."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twhin_pipeline.registry import Registry


class Comparator:
    """Prepares either side's vectors once, then compares many pairs by one matrix product."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return what `compare` and `pairs` take, `[..., D]`, of the vectors `x [..., D]`."""
        raise NotImplementedError

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare each of `a [..., P, D]` with each of `b [..., N, D]`: `[..., P, N]`. Both are prepared."""
        return a @ b.transpose(-1, -2)

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Compare `a [..., D]` with `b [..., D]`, one to one: `[...]`. Both are prepared."""
        return (a * b).sum(-1)


COMPARATORS: Registry[Comparator] = Registry("comparator")


@COMPARATORS.register_as("dot")
class Dot(Comparator):
    """The dot product."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x [..., D]`."""
        return x


@COMPARATORS.register_as("cosine")
class Cosine(Comparator):
    """The cosine of the angle, in [-1, 1]; a zero vector is at right angles to all."""

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Scale `x [..., D]` to length 1; lengths below 1e-8 count as 1e-8, so that gradients stay finite."""
        return F.normalize(x, dim=-1, eps=1e-8)
