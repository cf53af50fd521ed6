"""What compressed vectors cost on a trained model: recommendations, held-out edges, and a model that reads the vectors.

    python benchmarks/compression.py STORE [--relation visits] [--heads 2000] [--json figures.json]

For each data type of `twhin vectors`, both sides' vectors are encoded and decoded. `same@10` is the share of the ten
best tails that are the ten best again (exact search), `recall@20` that of held-out tails among the 20 best
that are no training edges, and AUC that of logistic regressions (`lifecycle/consumer.py`): fitted to the vectors
themselves and read with the decoded ones, on ids that they were not fitted to. The store is only read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from twhin_pipeline import load_model
from twhin_pipeline.lifecycle import consumer
from twhin_pipeline.store import database, releases
from twhin_pipeline.vectors import compression
from twhin_pipeline.vectors.compatibility import Shared
from twhin_pipeline.vectors.compression import Codec
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.vectors.row_pairs import RowPairs

SAMPLE = 65_536
READ = 20_000
"""Ids that the regressions see at most."""


def decoded(codec: Codec, vectors: np.ndarray) -> np.ndarray:
    """Return vectors as who reads the files gets them."""
    return codec.decode(codec.encode(np.array(vectors)))


def edges(model: TwhinEmbeddings, table: str, number: int) -> np.ndarray:
    """Return the rows of the heads and tails of a relation's edges, int64 `[E, 2]`."""
    assert model.store is not None
    read = model.store.read(table, model.snapshot, ["lhs", "rhs", "rel"])
    own = read["rel"].to_numpy() == number
    return np.stack([read["lhs"].to_numpy()[own], read["rhs"].to_numpy()[own]], axis=1)


def best(model: TwhinEmbeddings, number: int, heads: np.ndarray, tails: np.ndarray, k: int, known: Any) -> np.ndarray:
    """Return the k best tails of heads, `[Q, k]`, of vectors `[Q, D]` and `[N, D]`."""
    trained = model.tables[model.config.relations[number].rhs].trained
    exact = model._scores.exact(tails, None if trained is None else np.asarray(trained))
    return exact.search(model._scores.queries(number, heads), k, known)[0]


def share(found: np.ndarray, wanted: list[set[int]], k: int) -> float:
    """Return the mean share of wanted rows that are found, at most k of them being wanted."""
    parts = [len(own & set(rows)) / min(len(own), k) for own, rows in zip(wanted, found.tolist(), strict=True) if own]
    return float(np.mean(parts))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--relation")
    parser.add_argument("--heads", type=int, default=2_000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.store)
    assert model.store is not None
    number = model.relations.index(options.relation or model.relations[0])
    relation, rng = model.config.relations[number], np.random.default_rng(0)
    train, test = edges(model, "training_set/positives", number), edges(model, "held_out/test", number)
    asked = np.sort(rng.permutation(np.unique(test[:, 0]))[: options.heads])
    place = np.searchsorted(asked, train[:, 0])
    own = (place < len(asked)) & (asked[np.minimum(place, len(asked) - 1)] == train[:, 0])
    known = RowPairs.joined([RowPairs(place[own], train[own, 1])])
    wanted = [set(test[test[:, 0] == head, 1].tolist()) for head in asked.tolist()]
    heads, tails = model.tables[relation.lhs], model.tables[relation.rhs]
    release = releases.current(model.store.seen_as(None))
    assert release is not None
    rows = rng.permutation(len(heads) if heads.trained is None else np.flatnonzero(heads.trained))[:READ]
    with database.connect(None, model.store) as con:
        labels = consumer.labels(con, model.store, release, relation.lhs, rows)
    first = [set(one) for one in best(model, number, heads.vectors[asked], tails.vectors, 10, None).tolist()]
    torch.manual_seed(0)
    figures: list[dict[str, Any]] = []
    for data_type in compression.DATA_TYPES:
        codecs = {
            name: compression.codec(data_type, rng.permutation(np.array(table.vectors))[:SAMPLE], name)
            for name, table in ((relation.lhs, heads), (relation.rhs, tails))
        }
        left, right = decoded(codecs[relation.lhs], heads.vectors), decoded(codecs[relation.rhs], tails.vectors)
        both = Shared(len(rows), 0, 0, heads.vectors[rows], left[rows], rows)
        read = consumer.measured(both, labels, "none")
        figures.append(
            {
                "data_type": data_type,
                "bytes": sum(array.nbytes for array in codecs[relation.rhs].encode(tails.vectors[:1]).values()),
                "same@10": share(best(model, number, left[asked], right, 10, None), first, 10),
                "recall@20": share(best(model, number, left[asked], right, 20, known), wanted, 20),
                "auc": None if read is None else read.auc_new,
            }
        )
    print(f"{options.store}: {relation.name}, {len(asked):,} heads, {len(tails):,} tails, dimension {model.dim}")
    print("| data type | bytes a vector | same@10 | recall@20 | AUC |")
    print("|---|---|---|---|---|")
    for one in figures:
        area = "" if one["auc"] is None else f"{one['auc']:.4f}"
        print(f"| {one['data_type']} | {one['bytes']} | {one['same@10']:.4f} | {one['recall@20']:.4f} | {area} |")
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
