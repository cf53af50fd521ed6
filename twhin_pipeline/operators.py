"""Operators: what a relation does to its left-hand side's vector before the two sides are compared."""

from __future__ import annotations

import torch
from torch import nn

from twhin_pipeline.registry import Registry


class Operator(nn.Module):
    """One operator with the parameters of the R relations that use it.

    A fresh operator leaves every vector as it is.
    """

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__()
        self.num_relations = num_relations
        self.dim = dim

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Apply relation `relation[g]` of this operator to the vectors `x[g]`.

        Args:
            x: `[G, N, D]`.
            relation: `int64 [G]`, below R.

        Returns:
            `[G, N, D]`.
        """
        raise NotImplementedError

    def rows(self) -> torch.Tensor:
        """Return every relation's parameters, `[R, P]`, detached."""
        raise NotImplementedError

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take every relation's parameters, `[R, P]`, as `rows` gave them."""
        raise NotImplementedError


OPERATORS: Registry[Operator] = Registry("operator")


@OPERATORS.register_as("translation")
class Translation(Operator):
    """`x + r` (TransE, Bordes et al., 2013; TwHIN, El-Kishky et al., 2022); r starts at 0."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim)
        self.weight = nn.Parameter(torch.zeros(num_relations, dim))

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Add the relation's vector. Shapes as in `Operator.forward`."""
        return x + self.weight[relation].unsqueeze(1)

    def rows(self) -> torch.Tensor:
        """Return the vectors r, `[R, D]`."""
        return self.weight.detach().clone()

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take the vectors r, `[R, D]`."""
        with torch.no_grad():
            self.weight.copy_(rows)


@OPERATORS.register_as("identity")
class Identity(Operator):
    """`x`: relations differ only in their edges. It has no parameters; its rows are zeros."""

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def rows(self) -> torch.Tensor:
        """Return zeros, `[R, D]`."""
        return torch.zeros(self.num_relations, self.dim)

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take nothing: there are no parameters."""
