"""How many directions a graph's edges have: the groups of entities that its spectrum tells from chance.

The adjacency matrix of two entity types, each edge over the roots of its ends' degrees, has a large singular value for
each group that edges keep to. Degrees get their mean added (Chaudhuri, Chung and Tsiatas, 2012; Qin and Rohe, 2013),
without which entities of few edges make large values of their own. A value counts where it is above what the same
degrees make by chance: the edges' ends are paired anew at random (parallel analysis; Horn, 1965).
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import svds

from twhin_pipeline.config import recipes
from twhin_pipeline.graph.edge_file import Array, IndexedEdges
from twhin_pipeline.words import TRAIN

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig
    from twhin_pipeline.store import Store

MOST = recipes.DIMENSION + 1
"""So many are counted at most: whether there are more than the recipe's dimension is the question."""
FIRST = "first"
"""The detail of a vocabulary's manifest that `at_first` returns."""


def at_first(config: TwhinConfig, store: Store, snapshot: str) -> dict[str, Any] | None:
    """Return what the graph was when the vocabularies of a snapshot began, as JSON values of `recipes.AtFirst`.

    Earlier vocabularies, from which these grow, hand theirs on. Where they are of an earlier version of this package,
    which did not count, it is None, and the dimension stays that of such a version.
    """
    earlier = [store.latest_before(f"vocabulary/{name}", snapshot) for name in config.model.table_names]
    if any(manifest is not None for manifest in earlier):
        details = (manifest.details.get(FIRST) for manifest in earlier if manifest is not None)
        return next((one for one in details if one is not None), None)
    edges = store.manifest("raw_edges", snapshot).details["edges_per_relation"]
    total = sum(edges.get(name, 0) for name in config.model.relation_names)
    found = count(config, store, snapshot, total) if recipes.may_need_more(total) else {}
    return {"edges": total, "directions": found}


def count(config: TwhinConfig, store: Store, snapshot: str, total: int) -> dict[str, dict[str, int]]:
    """Count the directions of the edges between two types, up to `MOST`, by type of heads and then of tails.

    Edges that the source holds out are left out. A random split or one by time comes later: of these all edges count,
    as in a recipe's other counts. Where no recipe goes by it, nothing is counted.
    """
    edges = IndexedEdges(store, snapshot)
    if not recipes.may_need_more(total, edges.size):
        return {}
    ends = {relation.name: (relation.lhs, relation.rhs) for relation in config.model.relations}
    pieces: dict[tuple[str, str], list[Array]] = defaultdict(list)
    columns = ["split"] if "split" in store.manifest("raw_edges", snapshot).schema else []
    for piece in edges.pieces(columns):
        if piece.relation in ends:
            trained = piece.columns["split"] == TRAIN if columns else slice(None)
            pieces[ends[piece.relation]].append(np.stack([piece.lhs[trained], piece.rhs[trained]]))
    result: dict[str, dict[str, int]] = defaultdict(dict)
    for (lhs, rhs), parts in pieces.items():
        result[lhs][rhs] = of_edges(*np.concatenate(parts, axis=1))
    return dict(result)


def of_edges(heads: Array, tails: Array, most: int = MOST, seed: int = 0) -> int:
    """Count the directions of edges, up to `most`: singular values above the second largest of random pairs.

    Args:
        heads: Any integers that name the heads, `[E]`.
        tails: Likewise the tails, `[E]`; an edge that comes twice counts once.
        most: Where to stop.
        seed: Of the random pairs.

    Returns:
        The number; 0 where one of the types has no more than `most` entities with an edge.
    """
    if not len(heads):
        return 0
    pairs = np.unique(np.stack([np.unique(ends, return_inverse=True)[1] for ends in (heads, tails)], axis=1), axis=0)
    if min(pairs.max(0)) < most:
        return 0
    by_chance = np.random.default_rng(seed).permutation(pairs[:, 1])
    chance = _singular_values(pairs[:, 0], by_chance, 2)
    # The first is that of the degrees, of which both have the same.
    return int((_singular_values(pairs[:, 0], pairs[:, 1], most) > chance.min()).sum())


def _singular_values(heads: Array, tails: Array, number: int) -> Array:
    """Return the largest singular values of the normalized adjacency matrix, `[number]`."""
    matrix = sp.csr_array((np.ones(len(heads)), (heads, tails)))
    matrix.data[:] = 1  # random pairs may come twice
    by_row, by_column = (np.asarray(matrix.sum(axis)).ravel() for axis in (1, 0))
    left, right = (sp.diags_array((degree + degree.mean()) ** -0.5) for degree in (by_row, by_column))
    normalized = (left @ matrix @ right).tocsr()
    start = np.ones(min(normalized.shape))  # else a random one
    return np.asarray(svds(normalized, k=number, return_singular_vectors=False, v0=start))
