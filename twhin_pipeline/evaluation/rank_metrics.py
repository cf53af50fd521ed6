"""What ranks say: MRR, mean rank, Hits@k, and Recall@k and NDCG@k by query (docs/reference/metrics.md)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from twhin_pipeline.evaluation.ranking import Counts


def rank_metrics(kind: str, ranks: np.ndarray, hits_at: Sequence[int]) -> dict[str, float]:
    """Return `<kind>_mrr`, `<kind>_mean_rank` and `<kind>_hits@k` of ranks `[E]` (from 1, halves where tied), E ≥ 1."""
    found = {f"{kind}_mrr": float((1 / ranks).mean()), f"{kind}_mean_rank": float(ranks.mean())}
    return found | {f"{kind}_hits@{k}": float((ranks <= k).mean()) for k in hits_at}


def retrieval_metrics(query: np.ndarray, counts: Counts, recall_at: Sequence[int]) -> dict[str, float]:
    """Return `recall@k` and `ndcg@k`, each the mean over queries (LightGCN's protocol; He et al., 2020).

    `query` int64 `[E]` numbers the query that each relevant item belongs to, and `counts` `[E]` says where the item is
    in that query's list. Gains are 1, discounts 1 / log2(1 + rank); the ideal list has the relevant items first. Where
    items are tied, it is the expectation over their orders (McSherry and Najork, 2008).
    """
    _, number = np.unique(query, return_inverse=True)
    relevant = np.bincount(number)
    longest = max(*recall_at, 1)
    # gained[n]: the sum of the discounts of the first n ranks.
    gained = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, longest + 2)))])
    found = {}
    for k in recall_at:
        first = np.minimum(counts.above, k).astype(np.int64)
        last = np.minimum(counts.above + 1 + counts.tied, k).astype(np.int64)
        hit = (last - first) / (1 + counts.tied)
        gain = (gained[last] - gained[first]) / (1 + counts.tied)
        found[f"recall@{k}"] = float((np.bincount(number, hit) / relevant).mean())
        # Rounding must not lift a perfect list above 1.
        share = np.bincount(number, gain) / gained[np.minimum(relevant, k)]
        found[f"ndcg@{k}"] = float(np.minimum(share, 1).mean())
    return found


def joined(counts: list[Counts]) -> Counts:
    """Concatenate the counts of several relations or sides."""
    return Counts(np.concatenate([c.above for c in counts]), np.concatenate([c.tied for c in counts]))


def distinct(groups: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate queries of several relations so that the same entity is another query in another relation."""
    numbered, offset = [], 0
    for query in groups:
        names, number = np.unique(query, return_inverse=True)
        numbered.append(number + offset)
        offset += len(names)
    return np.concatenate(numbered)
