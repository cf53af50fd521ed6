"""Scores for the read API, on arrays, by the scorer that training used. Only this part of reading needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.relation_scores import RelationScores, to_tensor
from twhin_pipeline.model.scorer import Scorer


class EdgeScores:
    """Scores edges of a trained model from its entities' vectors."""

    def __init__(self, model_config: TwhinModelConfig, rows: Mapping[str, torch.Tensor]) -> None:
        """Take each relation's operator parameters `[P]`. Raises UserError where `Scorer.load_rows` does."""
        self.scorer = Scorer.from_rows(model_config, rows).eval()

    def of_pairs(self, lhs: np.ndarray, relation: int, rhs: np.ndarray) -> np.ndarray:
        """Return the scores, float32 `[n]`, of edges from `lhs` to `rhs`, both `[n, D]`; either may be one row."""
        with torch.inference_mode():
            return self.scorer.score(to_tensor(lhs), relation, to_tensor(rhs)).numpy()

    def of_tails(self, relation: int, head: np.ndarray, tails: np.ndarray) -> Callable[[slice], np.ndarray]:
        """Return the function that scores a block of `tails` `[N, D]` for one head `[1, D]`: float32, one a row."""
        scores = RelationScores(self.scorer, relation, to_tensor(head), to_tensor(tails))
        with torch.inference_mode():
            query = scores.encode_queries("rhs")

        def score(part: slice) -> np.ndarray:
            with torch.inference_mode():
                return scores.compare(query, scores.encode_candidates("rhs", part))[0].numpy()

        return score
