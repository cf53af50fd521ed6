"""Evaluation by plain loops, and baselines by plain calls of their library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
import small_store
from small_store import NUM, RELATIONS, SNAPSHOT, Small

from twhin_pipeline.evaluation import baselines
from twhin_pipeline.training_set.known_edges import KnownEdges

OPTIONS = {"hits_at": [1, 5], "recall_at": [3, 10], "auc_negatives": 4}


def make(tmp_path, splits=None, model=None, **options) -> Small:
    config = small_store.config(evaluation={**OPTIONS, **options}, model=model or {})
    return small_store.make(tmp_path, config=config, splits=splits)


def table(small: Small) -> dict[tuple[str, str, str], dict]:
    rows = small.store.read("evaluation", SNAPSHOT).to_pylist()
    return {(row["relation"], row["side"], row["metric"]): row for row in rows}


def loop(small: Small, score: Callable[[int, int, int], float]) -> dict[tuple[str, str], list[float]]:
    """Return the filtered and raw rank of each test edge by (relation, side), one candidate at a time."""
    known = {tuple(edge) for rows in small.edges.values() for edge in rows.tolist()}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for lhs, relation, rhs in small.edges["test"].tolist():
        name = list(RELATIONS)[relation]
        for side in ("lhs", "rhs"):
            entities = range(NUM[RELATIONS[name][0 if side == "lhs" else 1]])
            edges = [(e, relation, rhs) if side == "lhs" else (lhs, relation, e) for e in entities]
            true = score(lhs, relation, rhs)
            ranks = []
            for filtered in (True, False):
                rivals = [score(*e) for e in edges if e != (lhs, relation, rhs) and not (filtered and e in known)]
                ranks.append(1 + sum(s > true for s in rivals) + sum(s == true for s in rivals) / 2)
            found.setdefault((name, side), []).append(tuple(ranks))
    return found


def pairs_of(known: KnownEdges) -> list[tuple[int, int]]:
    """Return (entity, neighbor) of each known edge, in order."""
    entities = np.repeat(known.entities, np.diff(known.start))
    return list(zip(entities.tolist(), known.neighbors.tolist(), strict=True))


def plain_similarity(weights: np.ndarray) -> np.ndarray:
    """Return the cosines between columns of the binary matrix, one pair at a time; 0 on the diagonal."""
    known = weights > 0
    found = np.zeros((known.shape[1], known.shape[1]))
    for i in range(len(found)):
        for j in range(len(found)):
            if i != j and known[:, i].any() and known[:, j].any():
                both = (known[:, i] & known[:, j]).sum()
                found[i, j] = both / np.sqrt(known[:, i].sum() * known[:, j].sum())
    return found


def als_by_the_library(weights: np.ndarray, factors: int, seed: int, setting) -> np.ndarray:
    """Return the scores of a fit of all iterations at once."""
    from implicit.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(
        factors, setting.regularization, setting.alpha, use_gpu=False, iterations=baselines.ITERATIONS,
        num_threads=1, random_state=seed,
    )  # fmt: skip
    mean = weights[weights > 0].mean()
    model.fit(sp.csr_matrix(weights / mean, dtype=np.float32), show_progress=False)
    return model.user_factors @ model.item_factors.T
