"""Operators and comparators of one vector at a time, number by number: what the vectorised ones must equal."""

from __future__ import annotations

import cmath
import math


def operate(name: str, x: list[float], row: list[float]) -> list[float]:
    """Apply an operator with parameters `row` to one vector, number by number."""
    dim = len(x)
    if name == "identity":
        return x
    if name == "translation":
        return [a + r for a, r in zip(x, row, strict=True)]
    if name == "diagonal":
        return [a * r for a, r in zip(x, row, strict=True)]
    if name in ("linear", "affine"):
        shift = row[dim * dim :] or [0.0] * dim
        return [sum(row[i * dim + j] * x[j] for j in range(dim)) + shift[i] for i in range(dim)]
    half = dim // 2
    numbers = [complex(x[i], x[half + i]) for i in range(half)]
    if name == "rotation":
        turned = [z * cmath.exp(1j * angle) for z, angle in zip(numbers, row, strict=True)]
    else:
        turned = [z * complex(row[i], row[half + i]) for i, z in enumerate(numbers)]
    return [z.real for z in turned] + [z.imag for z in turned]


def compare(name: str, a: list[float], b: list[float]) -> float:
    """Compare two vectors number by number."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return {
        "dot": dot,
        "cosine": dot / (math.hypot(*a) * math.hypot(*b)),
        "l2": -math.dist(a, b),
        "squared_l2": -(math.dist(a, b) ** 2),
    }[name]
