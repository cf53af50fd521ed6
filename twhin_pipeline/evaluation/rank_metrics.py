"""Metrics of ranks: MRR, mean rank, Hits@k, and Recall@k and NDCG@k by query (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from twhin_pipeline.evaluation.ranking import Counts


def rank_metrics(kind: str, ranks: np.ndarray, hits_at: Sequence[int]) -> dict[str, float]:
    """Return `<kind>_mrr`, `<kind>_mean_rank` and `<kind>_hits@k` of ranks `[E]` (from 1, halves where tied), E ≥ 1."""
    metrics = {f"{kind}_mrr": float((1 / ranks).mean()), f"{kind}_mean_rank": float(ranks.mean())}
    return metrics | {f"{kind}_hits@{k}": float((ranks <= k).mean()) for k in hits_at}


def retrieval_metrics(query: np.ndarray, counts: Counts, recall_at: Sequence[int]) -> dict[str, float]:
    """Return `recall@k` and `ndcg@k`, each the mean over queries (LightGCN's protocol; He et al., 2020).

    `query` int64 `[E]` is the query of each relevant item, and `counts` `[E]` says where the item is in that query's
    list. Gains are 1, discounts 1 / log2(1 + rank); the ideal list has the relevant items first. Where
    items are tied, it is the expectation over their orders (McSherry and Najork, 2008).
    """
    _, index = np.unique(query, return_inverse=True)
    relevant = np.bincount(index)
    longest = max(*recall_at, 1)
    # gained[n]: the sum of the discounts of the first n ranks.
    gained = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, longest + 2)))])
    metrics = {}
    for k in recall_at:
        first = np.minimum(counts.above, k).astype(np.int64)
        last = np.minimum(counts.above + 1 + counts.tied, k).astype(np.int64)
        hit = (last - first) / (1 + counts.tied)
        gain = (gained[last] - gained[first]) / (1 + counts.tied)
        metrics[f"recall@{k}"] = float((np.bincount(index, hit) / relevant).mean())
        # Rounding must not lift a perfect list above 1.
        share = np.bincount(index, gain) / gained[np.minimum(relevant, k)]
        metrics[f"ndcg@{k}"] = float(np.minimum(share, 1).mean())
    return metrics


def joined(counts: list[Counts]) -> Counts:
    """Concatenate the counts of several relations or sides."""
    return Counts(np.concatenate([c.above for c in counts]), np.concatenate([c.tied for c in counts]))


def distinct(groups: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate queries of several relations so that the same entity is another query in another relation."""
    indices, offset = [], 0
    for query in groups:
        names, index = np.unique(query, return_inverse=True)
        indices.append(index + offset)
        offset += len(names)
    return np.concatenate(indices)
