"""What ranks say: MRR, mean rank, Hits@k, and Recall@k and NDCG@k by query (docs/metrics.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def rank_metrics(kind: str, ranks: np.ndarray, hits_at: Sequence[int]) -> dict[str, float]:
    """Return `<kind>_mrr`, `<kind>_mean_rank` and `<kind>_hits@k` of ranks `[E]` (from 1, halves where tied), E ≥ 1."""
    found = {f"{kind}_mrr": float((1 / ranks).mean()), f"{kind}_mean_rank": float(ranks.mean())}
    return found | {f"{kind}_hits@{k}": float((ranks <= k).mean()) for k in hits_at}


def retrieval_metrics(query: np.ndarray, ranks: np.ndarray, recall_at: Sequence[int]) -> dict[str, float]:
    """Return `recall@k` and `ndcg@k`, each the mean over queries (LightGCN's protocol; He et al., 2020).

    `query` int64 `[E]` numbers the query that each relevant item belongs to, and `ranks` `[E]` is the item's rank in
    that query's list. Gains are 1, discounts 1 / log2(1 + rank); the ideal list has the relevant items first.
    """
    _, number = np.unique(query, return_inverse=True)
    relevant = np.bincount(number)
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, relevant.max() + 2)))])
    found = {}
    for k in recall_at:
        hit = ranks <= k
        found[f"recall@{k}"] = float((np.bincount(number, hit) / relevant).mean())
        gained = np.bincount(number, hit / np.log2(1 + ranks))
        found[f"ndcg@{k}"] = float((gained / ideal[np.minimum(relevant, k)]).mean())
    return found
