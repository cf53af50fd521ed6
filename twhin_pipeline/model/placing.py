"""Where an entity that a model has not seen belongs: at the mean of what its edges to known entities want.

This is how InvTransE and InvRotatE (Dai et al., "Inductively Representing Out-of-Knowledge-Graph Entities by Optimal
Estimation Under Translational Assumptions", RepL4NLP 2021) place such an entity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twhin_pipeline.model.comparators import Comparator, Dot


def length_of(comparator: Comparator, length: float) -> float:
    """Return the length that estimates get: that of known vectors, as a mean is shorter than what it is the mean of.

    0, so that they keep their own, where the comparator is a distance, for which the length is part of the place.
    """
    return length if isinstance(comparator, Dot) else 0.0


def mean_wanted(total: torch.Tensor, weight: torch.Tensor, length: float) -> torch.Tensor:
    """Return the estimates for M new entities, `[M, D]`.

    Args:
        total: The weighted sum of the vectors that an entity's edges want (`Scorer.wanted`), `[M, D]`.
        weight: The sum of the weights, `[M]`.
        length: What `length_of` returns; 0 leaves the mean as it is.
    """
    estimate = total / weight.clamp(min=1e-30).float().unsqueeze(1)
    return F.normalize(estimate, dim=1, eps=1e-8) * length if length else estimate
