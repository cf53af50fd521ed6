"""Scores for the read API, on arrays, by the scorer that training used. Only this part of reading needs torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.relation_scores import to_tensor
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.vectors.retrieval import ExactSearch
from twhin_pipeline.words import Side


class EdgeScores:
    """Scores edges of a trained model from its entities' vectors."""

    def __init__(self, model_config: TwhinModelConfig, rows: Mapping[str, torch.Tensor]) -> None:
        """Take each relation's operator parameters `[P]`. Raises UserError where `Scorer.load_rows` does."""
        self.scorer = Scorer.from_rows(model_config, rows).eval()

    def of_pairs(self, lhs: np.ndarray, relation: int, rhs: np.ndarray) -> np.ndarray:
        """Return the scores, float32 `[n]`, of edges from `lhs` to `rhs`, both `[n, D]`; either may be one row."""
        with torch.inference_mode():
            return self.scorer.score(to_tensor(lhs), relation, to_tensor(rhs)).numpy()

    def queries(self, relation: int, heads: np.ndarray) -> np.ndarray:
        """Return what finds the tails of `heads` `[Q, D]` in a search: the operator applied, prepared: `[Q, D]`."""
        with torch.inference_mode():
            return self.scorer.queries("rhs", to_tensor(heads).unsqueeze(0), torch.tensor([relation]))[0].numpy()

    def exact(self, vectors: np.ndarray, allowed: np.ndarray | None) -> ExactSearch:
        """Return the search of `vectors` `[N, D]` by the model's comparator; `allowed` as in `ExactSearch`."""
        return ExactSearch(self.scorer.comparator, vectors, allowed)

    def wanted(self, side: Side, relation: int, neighbors: np.ndarray) -> np.ndarray:
        """Return the vectors that edges to `neighbors` `[n, D]` want at `side`, as `Scorer.wanted` does: `[n, D]`."""
        with torch.inference_mode():
            x = to_tensor(neighbors).unsqueeze(0)
            return self.scorer.wanted(side, x, torch.tensor([relation]))[0].numpy()
