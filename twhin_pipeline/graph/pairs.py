"""How often several relations join the same pair, as where people first view and later buy.

What is held out is then mostly known by another relation, and a model does well to keep in mind each pair, not only
what its ends' neighbours have in common.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from twhin_pipeline.config import recipes
from twhin_pipeline.graph.edge_file import NO_TIME, Array, IndexedEdges

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

PAIRS = "pairs"
"""The detail of a vocabulary's manifest that `count` returns."""
LATE = 0.1
"""The share of the edges between two types that are the latest."""


def count(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, dict[str, int]]:
    """Count the edges of pairs that several relations join, as JSON values of `recipes.Pairs`, by relation.

    Relations that alone join their two types are left out, and so is everything where no recipe goes by it. All edges
    count, those that the source or a split holds out too.
    """
    edges_of = store.manifest("raw_edges", snapshot).details["edges_per_relation"]
    total = sum(edges_of.get(name, 0) for name in config.model.relation_names)
    ends: dict[tuple[str, str], list[str]] = defaultdict(list)
    for relation in config.model.relations:
        if edges_of.get(relation.name, 0):
            ends[relation.lhs, relation.rhs].append(relation.name)
    alike = {name: types for types, names in ends.items() if len(names) > 1 for name in names}
    if not alike or not recipes.may_need_memory(total):
        return {}
    columns = ["first_time"] if "first_time" in store.manifest("raw_edges", snapshot).schema else []
    pieces: dict[tuple[str, str], list[Array]] = defaultdict(list)
    for piece in IndexedEdges(store, snapshot).pieces(columns):
        if piece.relation in alike:
            types = alike[piece.relation]
            number = np.full(len(piece.lhs), ends[types].index(piece.relation))
            time = piece.columns["first_time"] if columns else np.full(len(piece.lhs), NO_TIME)
            pieces[types].append(np.stack([number, piece.lhs, piece.rhs, time]).astype(np.int64))
    result: dict[str, dict[str, int]] = {}
    for types, parts in pieces.items():
        counted = of_edges(*np.concatenate(parts, axis=1))
        result.update(zip(ends[types], counted, strict=True))
    return result


def of_edges(relation: Array, heads: Array, tails: Array, times: Array) -> list[dict[str, int]]:
    """Count edges by relation: all, those of shared pairs, the late ones, and those of them that were known before.

    Args:
        relation: Of each edge, int64 `[E]`; a relation joins a pair once.
        heads: Integers that name the heads, int64 `[E]`, below 2^32.
        tails: Likewise the tails, `[E]`.
        times: When an edge was first seen, microseconds, int64 `[E]`; `NO_TIME` where that is not known.

    Returns:
        A count by the names of `recipes.Pairs`, for each relation up to the largest number.
    """
    _, pair = np.unique(heads.astype(np.uint64) << np.uint64(32) | tails.astype(np.uint64), return_inverse=True)
    shared = np.bincount(pair)[pair] > 1
    dated = times != NO_TIME
    late = known = np.zeros(len(times), bool)
    if dated.any():
        # Those of one moment are all late, or all before.
        start = np.quantile(times[dated], 1 - LATE, method="inverted_cdf")
        late = dated & (times > start)
        earlier = np.zeros(pair.max() + 1, bool)
        earlier[pair[~late]] = True  # a split by time leaves edges without a time in training
        known = late & earlier[pair]
    kinds = {"edges": np.ones(len(pair), bool), "shared": shared, "late": late, "known": known}
    counts = {name: np.bincount(relation[rows], minlength=relation.max() + 1) for name, rows in kinds.items()}
    return [{name: int(each[number]) for name, each in counts.items()} for number in range(relation.max() + 1)]
