"""Telling true edges from sampled ones: AUC and RCE."""

from __future__ import annotations

import numpy as np
import torch

from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.training_set.known_edges import KnownEdges
from twhin_pipeline.words import Side

REDRAWS = 10


def sample_negatives(
    num_entities: int, queries: np.ndarray, known: KnownEdges, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` entities uniformly for each of `queries` `[E]`; those that make a true edge are drawn again.

    Returns:
        Entities int64 `[E, size]`, and bool `[E, size]` that is False where, after some redraws, only a true edge was
        found (a query that is connected to nearly all entities).
    """
    drawn = rng.integers(num_entities, size=(len(queries), size))
    repeated = np.broadcast_to(queries[:, None], drawn.shape)
    true = known.contains(repeated.ravel(), drawn.ravel()).reshape(drawn.shape)
    for _ in range(REDRAWS):
        if not true.any():
            break
        drawn[true] = rng.integers(num_entities, size=int(true.sum()))
        true[true] = known.contains(repeated[true], drawn[true])
    return drawn, ~true


@torch.inference_mode()
def score_sampled(
    scores: RelationScores, side: Side, queries: np.ndarray, targets: np.ndarray, drawn: np.ndarray, block_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Score E edges (`queries`, `targets`: int64 `[E]`) and `drawn` `[E, S]` in the targets' place: `[E]`, `[E, S]`."""
    found = np.empty((len(queries), 1 + drawn.shape[1]), np.float32)
    for start in range(0, len(queries), block_size):
        part = slice(start, start + block_size)
        entities = np.concatenate([targets[part, None], drawn[part]], axis=1)
        encoded = scores.encode_candidates(side, entities.ravel()).reshape(*entities.shape, -1)
        query = scores.encode_queries(side, queries[part])[:, None]
        found[part] = scores.compare(query, encoded)[:, 0].float().cpu().numpy()
    return found[:, 0], found[:, 1:]


def auc(true: np.ndarray, false: np.ndarray) -> float | None:
    """Area under the ROC curve: the chance that a true edge's score is above a false one's, a tie counting half.

    None where there is nothing on one side.
    """
    if not len(true) or not len(false):
        return None
    ordered = np.sort(false)
    below = np.searchsorted(ordered, true, "left") + np.searchsorted(ordered, true, "right")
    return float(below.mean() / 2 / len(false))


def rce(true: np.ndarray, false: np.ndarray) -> float | None:
    """Relative cross entropy in percent: how much lower the log loss of sigmoid(score) is than that of the base rate.

    0 is as good as always answering the share of true edges; 100 is perfect; below 0 is worse. As in the published
    system and the RecSys Challenge 2020. None where there is nothing on one side.
    """
    if not len(true) or not len(false):
        return None
    share = len(true) / (len(true) + len(false))
    straw = -share * np.log(share) - (1 - share) * np.log(1 - share)
    losses = np.logaddexp(0, -true.astype(float)).sum() + np.logaddexp(0, false.astype(float)).sum()
    return float(100 * (1 - losses / (len(true) + len(false)) / straw))
