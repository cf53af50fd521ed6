"""Operators: what a relation does to one side's vector before the two sides are compared."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from twhin_pipeline.registry import Registry


class Operator(nn.Module):
    """One operator with the parameters of the R relations that use it.

    A fresh operator leaves every vector as it is, until `randomize`.
    """

    complex = False
    """Whether it takes a vector's halves, `[:D/2]` and `[D/2:]`, for real and imaginary parts."""

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

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Return the heads that tails `x[g]` want: the inverse where it is safe, else the adjoint.

        Of a matrix A the adjoint is its transpose: `A^T x` is the direction in which the product of `A head` and `x`
        grows fastest. An inverse would divide by elements, or singular values, that training may have left near 0.

        Args:
            x: `[G, N, D]`.
            relation: `int64 [G]`, below R.

        Returns:
            `[G, N, D]`.
        """
        raise NotImplementedError

    def randomize(self, deviation: float) -> None:
        """Start at random instead, elements that combine with a vector's with that standard deviation."""
        raise NotImplementedError

    def penalized(self) -> torch.Tensor | None:
        """Return the parameters that a penalty applies to, `[R, P']` with gradient, or None where there are none.

        Those of a complex operator are complex vectors, halves as above.
        """
        raise NotImplementedError

    def rows(self) -> torch.Tensor:
        """Return every relation's parameters, `[R, P]`, detached."""
        raise NotImplementedError

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take every relation's parameters, `[R, P]`, as `rows` gave them."""
        raise NotImplementedError


OPERATORS: Registry[Operator] = Registry("operator")


class Weighted(Operator):
    """An operator whose parameters are one row of `weight [R, P]` a relation, all of it penalized."""

    def __init__(self, num_relations: int, dim: int, fresh: torch.Tensor) -> None:
        """Begin every relation at `fresh [P]`."""
        super().__init__(num_relations, dim)
        self.weight = nn.Parameter(fresh.repeat(num_relations, 1))

    @torch.no_grad()
    def randomize(self, deviation: float) -> None:
        """Draw all parameters from a normal distribution around 0."""
        self.weight.normal_(std=deviation)

    def penalized(self) -> torch.Tensor | None:
        """Return all parameters, `[R, P]`."""
        return self.weight

    def rows(self) -> torch.Tensor:
        """Return the parameters, `[R, P]`."""
        return self.weight.detach().clone()

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take the parameters, `[R, P]`."""
        with torch.no_grad():
            self.weight.copy_(rows)


@OPERATORS.register_as("translation")
class Translation(Weighted):
    """`x + r` (TransE, Bordes et al., 2013; TwHIN, El-Kishky et al., 2022); r `[D]` starts at 0."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.zeros(dim))

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Add the relation's vector. Shapes as in `Operator.forward`."""
        return x + self.weight[relation].unsqueeze(1)

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Subtract the relation's vector: the inverse. Shapes as in `Operator.towards_heads`."""
        return x - self.weight[relation].unsqueeze(1)


@OPERATORS.register_as("identity")
class Identity(Operator):
    """`x`: relations differ only in their edges. It has no parameters; its rows are zeros."""

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Return `x`."""
        return x

    def randomize(self, deviation: float) -> None:
        """Do nothing: there are no parameters."""

    def penalized(self) -> torch.Tensor | None:
        """Return None."""
        return None

    def rows(self) -> torch.Tensor:
        """Return zeros, `[R, D]`."""
        return torch.zeros(self.num_relations, self.dim)

    def load_rows(self, rows: torch.Tensor) -> None:
        """Take nothing: there are no parameters."""


@OPERATORS.register_as("diagonal")
class Diagonal(Weighted):
    """`x * r`, element by element (DistMult, Yang et al., 2015, section 3.1); r `[D]` starts at 1."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.ones(dim))

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Scale by the relation's vector. Shapes as in `Operator.forward`."""
        return x * self.weight[relation].unsqueeze(1)

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Scale by the relation's vector: the adjoint. Shapes as in `Operator.towards_heads`."""
        return self(x, relation)


@OPERATORS.register_as("linear")
class Linear(Weighted):
    """`A x` (RESCAL, Nickel et al., 2011, section 4); A `[D, D]`, row by row in a relation's row, starts at I."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.eye(dim).flatten())

    @torch.no_grad()
    def randomize(self, deviation: float) -> None:
        """Draw A so that lengths keep their size (elements of standard deviation 1/sqrt(D))."""
        self.weight.normal_(std=self.dim**-0.5)

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Multiply by the relation's matrix. Shapes as in `Operator.forward`."""
        matrix = self.weight[relation].unflatten(1, (self.dim, self.dim))
        return x @ matrix.transpose(1, 2)

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Multiply by the transposed matrix: the adjoint. Shapes as in `Operator.towards_heads`."""
        return x @ self.weight[relation].unflatten(1, (self.dim, self.dim))


@OPERATORS.register_as("affine")
class Affine(Weighted):
    """`A x + b` (as in PyTorch-BigGraph, Lerer et al., 2019); A `[D, D]`, then b `[D]`; starts at I and 0."""

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.cat([torch.eye(dim).flatten(), torch.zeros(dim)]))

    @torch.no_grad()
    def randomize(self, deviation: float) -> None:
        """Draw A so that lengths keep their size (elements of standard deviation 1/sqrt(D)), and b."""
        self.weight[:, : -self.dim].normal_(std=self.dim**-0.5)
        self.weight[:, -self.dim :].normal_(std=deviation)

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Multiply by the relation's matrix and add its vector. Shapes as in `Operator.forward`."""
        row = self.weight[relation]
        matrix = row[:, : -self.dim].unflatten(1, (self.dim, self.dim))
        return x @ matrix.transpose(1, 2) + row[:, -self.dim :].unsqueeze(1)

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Subtract the vector and multiply by the transposed matrix. Shapes as in `Operator.towards_heads`."""
        row = self.weight[relation]
        matrix = row[:, : -self.dim].unflatten(1, (self.dim, self.dim))
        return (x - row[:, -self.dim :].unsqueeze(1)) @ matrix


@OPERATORS.register_as("complex_diagonal")
class ComplexDiagonal(Weighted):
    """`x * r`, element by element, of complex vectors; r, of D/2 complex elements, starts at 1.

    With `dot` this is ComplEx (Trouillon et al., 2016, equation 9): the dot product of two complex vectors' real and
    imaginary parts is the real part of the one times the other's conjugate.
    """

    complex = True

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.cat([torch.ones(dim // 2), torch.zeros(dim // 2)]))

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Multiply by the relation's complex vector. Shapes as in `Operator.forward`; D is even."""
        real, imaginary = self.weight[relation].unsqueeze(1).chunk(2, -1)
        return _complex_product(x, real, imaginary)

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Multiply by the conjugate: the adjoint. Shapes as in `Operator.towards_heads`."""
        real, imaginary = self.weight[relation].unsqueeze(1).chunk(2, -1)
        return _complex_product(x, real, -imaginary)


@OPERATORS.register_as("rotation")
class Rotation(Weighted):
    """`x * exp(i angle)`, element by element, of complex vectors (RotatE, Sun et al., 2019, section 3.2).

    A relation's parameters are D/2 angles in radians, which start at 0.
    """

    complex = True

    def __init__(self, num_relations: int, dim: int) -> None:
        super().__init__(num_relations, dim, torch.zeros(dim // 2))

    @torch.no_grad()
    def randomize(self, deviation: float) -> None:
        """Draw the angles uniformly from a full turn."""
        self.weight.uniform_(-math.pi, math.pi)

    def forward(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Turn by the relation's angles. Shapes as in `Operator.forward`; D is even."""
        angle = self.weight[relation].unsqueeze(1)
        return _complex_product(x, angle.cos(), angle.sin())

    def towards_heads(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Turn back: the inverse. Shapes as in `Operator.towards_heads`."""
        angle = self.weight[relation].unsqueeze(1)
        return _complex_product(x, angle.cos(), -angle.sin())

    def penalized(self) -> torch.Tensor | None:
        """Return None: every modulus is 1, whatever the angles."""
        return None


def penalty(x: torch.Tensor, norm: Literal["n3", "l2"], complex: bool) -> torch.Tensor:
    """Return the penalty on vectors, complex ones or not.

    Args:
        x: `[..., P]`, entities' vectors or operators' parameters.
        norm: "n3": the sum of cubed moduli (Lacroix et al., 2018, section 4.2). "l2": the sum of squares.
        complex: Whether x's halves, `[:P/2]` and `[P/2:]`, are real and imaginary parts.

    Returns:
        `[...]`.
    """
    squares = x.square()
    if norm == "l2":
        return squares.sum(-1)
    if complex:
        squares = squares.unflatten(-1, (2, -1)).sum(-2)
    return squares.pow(1.5).sum(-1)


def _complex_product(x: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor) -> torch.Tensor:
    """Multiply complex `x [G, N, D]` by `real + i imaginary`, `[G, 1, D/2]` each: `[G, N, D]`."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * real - b * imaginary, a * imaginary + b * real], dim=-1)
