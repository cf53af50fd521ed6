"""Compares recommendations by many interests with those by one vector: Recall@k on edges that were held out.

    python benchmarks/interests.py --store STORE --relation visits [--heads 3000] [--json figures.json]

The store's model must have been trained without its test edges (`training.refit: false`). Heads engaged with what their
training edges say; training and validation edges are left out of all answers. A head's recall is the share of its test
tails that are among its k answers; the mean is over the heads that have test edges, or a sample of them. `+-` is the
standard error of the difference to one vector. Coverage is the share of all tails that anyone gets at k = 20.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from twhin_pipeline.store import Store
from twhin_pipeline.vectors.interests import Interests
from twhin_pipeline.vectors.mixture import Mixture
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.retrieval import best_rows
from twhin_pipeline.vectors.row_pairs import RowLists, RowPairs

KS = (10, 20, 50)
VARIANTS: dict[str, Interests | None] = {
    "one vector": None,
    "mixture (TwHIN)": Interests(smoothing=0, own=0),
    "smoothed (kNN-Embed)": Interests(own=0),
    "with own vector (default)": Interests(),
    "own 0.7": Interests(own=0.7),
}


def edges_of(store: Store, asset: str, snapshot: str, relation: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the heads and tails of a relation's edges as rows."""
    table = store.read(asset, snapshot, ["lhs", "rhs", "rel"])
    here = table.column("rel").to_numpy() == relation
    return table.column("lhs").to_numpy()[here], table.column("rhs").to_numpy()[here]


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True)
    parser.add_argument("--relation", required=True)
    parser.add_argument("--heads", type=int, default=3000)
    parser.add_argument("--json", help="write the figures here, too")
    options = parser.parse_args()
    model = load_model(options.store)
    store, snapshot = model.store, model.snapshot
    number, left, right = model._relation(options.relation)
    heads, tails = model.tables[left], model.tables[right]
    for entity in {left, right}:
        assert store.manifest(f"vocabulary/{entity}", snapshot).rows == len(model.tables[entity]), "rows are no longer"
    parts = {
        name: edges_of(store, asset, snapshot, number)
        for name, asset in (
            ("train", "training_set/positives"),
            ("validation", "held_out/validation"),
            ("test", "held_out/test"),
        )
    }
    lists = {name: RowLists.of_pairs(*part, len(heads)) for name, part in parts.items()}
    trained = np.diff(lists["train"].start) > 0
    asked = np.intersect1d(np.unique(parts["test"][0]), np.flatnonzero(trained))
    if len(asked) > options.heads:
        asked = np.sort(np.random.default_rng(0).permutation(asked)[: options.heads])
    left_out = RowPairs.joined([lists[name].pairs(asked) for name in ("train", "validation")])
    test = lists["test"].pairs(asked)
    count = np.bincount(test.queries, minlength=len(asked))
    vectors = np.array(heads.vectors[asked])
    searcher = model._searchers.get(model.tables[right], False, "exact")
    size = int(np.asarray(tails.trained).sum())
    print(f"{options.relation}: {len(asked):,} heads, {count.sum():,} test edges, {size:,} tails with training edges")
    print(f"{'':26}" + "".join(f"{f'recall@{k}':>11}{'+-':>8}" for k in KS) + f"{'coverage':>10}{'seconds':>9}")
    figures: dict[str, Any] = {}
    base: dict[int, np.ndarray] = {}
    for name, interests in VARIANTS.items():
        started = time.perf_counter()
        mixture = None
        if interests is not None:
            mixture = Mixture(interests, model._scores, number, heads, tails, lists["train"].pairs)
        row, found = f"{name:26}", {}
        for k in KS:
            if mixture is None:
                rows, _ = best_rows(searcher, model._scores.queries(number, vectors), k, left_out)
            else:
                own = RowPairs(np.arange(len(asked)), asked)
                rows, _ = mixture.search(searcher, vectors, own, lists["train"].pairs(asked), k, left_out)
            hits = test.contain(np.arange(len(asked)), rows).sum(1)
            recall = hits / count
            base.setdefault(k, recall)
            error = float((recall - base[k]).std() / len(asked) ** 0.5)
            row += f"{recall.mean():11.4f}{error:8.4f}"
            found[f"recall@{k}"], found[f"error@{k}"] = float(recall.mean()), error
            if k == 20:
                found["coverage"] = len(np.unique(rows[rows >= 0])) / size
        found["seconds"] = time.perf_counter() - started
        figures[name] = found
        print(row + f"{found['coverage']:10.3f}{found['seconds']:9.1f}", flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
