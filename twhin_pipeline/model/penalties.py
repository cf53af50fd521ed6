"""`model.regularization`: the penalty on the vectors and the operators that a batch's edges use.

Every edge counts alike, whatever its or its relation's weight (only edges of weight 0 do not count): weights say how
much an edge is believed, not how large its vectors may be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from twhin_pipeline.config.model import Regularization
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.operators import penalty
from twhin_pipeline.model.scorer import Scorer


def entities_penalty(
    config: Regularization, scorer: Scorer, vectors: list[torch.Tensor], batch: EdgeBatch
) -> torch.Tensor:
    """Return the penalty on the vectors that the batch's edges use, a scalar.

    Args:
        config: The norm, and the penalty's weight.
        scorer: Says whether vectors are complex.
        vectors: `float32 [U_t, D]` of each table: the batch's rows.
        batch: The edges.
    """
    if not config.entities:
        return vectors[0].new_zeros(())
    every_row = torch.cat(vectors)
    real = batch.weight > 0
    index = torch.cat([batch.lhs_index[real], batch.rhs_index[real]])
    count = torch.bincount(index, minlength=len(every_row))
    rows = count.nonzero().squeeze(1)
    each = penalty(F.embedding(rows, every_row), config.norm, scorer.complex)
    return config.entities * (each * count[rows] if config.degree_weighted else each).sum()


def operators_penalty(config: Regularization, scorer: Scorer, batch: EdgeBatch) -> torch.Tensor:
    """Return the penalty on the operators that the batch's edges use, a scalar.

    Args:
        config: The norm, and the penalty's weight.
        scorer: Has the operators.
        batch: The edges.
    """
    if not config.operators:
        return batch.weight.new_zeros(())
    if config.degree_weighted:
        operators = scorer.penalty(batch.relation, config.norm) * (batch.weight > 0).sum(1)
    else:
        operators = scorer.penalty(batch.relation.unique(), config.norm)
    return config.operators * operators.sum()
