"""Feed the vectors to a ranking model, and see what they add to features that know no ids.

    twhin run -c shop.yaml --home store --set training.refit=false
    python examples/ranking/rank.py --home store --relation view

The labels are the relation's test edges and, for each of them, tails that the head does not have, drawn by popularity.
DuckDB joins them with counts of the training edges and with the vectors; LightGBM is trained on half of the heads and
measured on the others. `training.refit=false` matters: a refitted model has seen the test edges.
"""

from __future__ import annotations

import argparse

import duckdb
import lightgbm
import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

from twhin_pipeline import load_model
from twhin_pipeline.errors import UserError

LABELS = """
CREATE TEMP TABLE known AS
    SELECT DISTINCT lhs, rhs FROM (
        SELECT lhs, rhs, rel FROM training_set_positives UNION ALL BY NAME
        SELECT lhs, rhs, rel FROM held_out_validation UNION ALL BY NAME
        SELECT lhs, rhs, rel FROM held_out_test
    ) WHERE rel = $number;
CREATE TEMP TABLE drawn AS
    SELECT rhs, row_number() OVER () AS place FROM
        (SELECT rhs FROM training_set_positives WHERE rel = $number ORDER BY hash(rhs, lhs, $seed));
CREATE TEMP TABLE labels AS
    SELECT lhs, rhs, 1 AS label FROM held_out_test WHERE rel = $number
    UNION ALL
    SELECT e.lhs, d.rhs, 0 FROM (SELECT lhs, rhs FROM held_out_test WHERE rel = $number) e
    CROSS JOIN range($negatives) r(n)
    JOIN drawn d ON d.place = 1 + hash(e.lhs, e.rhs, n, $seed) % (SELECT count(*) FROM drawn)
    ANTI JOIN known k ON k.lhs = e.lhs AND k.rhs = d.rhs;
"""
FEATURES = """
SELECT l.label, l.lhs, h.id AS head, t.id AS tail,
       coalesce(hc.edges, 0) AS head_edges, coalesce(tc.edges, 0) AS tail_edges,
       h.trained_edges AS head_trained, t.trained_edges AS tail_trained,
       h.embedding AS head_vector, t.embedding AS tail_vector,
       list_cosine_similarity(h.embedding, t.embedding) AS cosine
FROM labels l
JOIN {lhs} h ON h.row = l.lhs
JOIN {rhs} t ON t.row = l.rhs
LEFT JOIN (SELECT lhs, count(*) AS edges FROM training_set_positives WHERE rel = $number GROUP BY lhs) hc USING (lhs)
LEFT JOIN (SELECT rhs, count(*) AS edges FROM training_set_positives WHERE rel = $number GROUP BY rhs) tc
       ON tc.rhs = l.rhs
ORDER BY l.lhs, l.rhs, l.label
"""
COUNTS = ["head_edges", "tail_edges", "head_trained", "tail_trained"]
PARAMETERS = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 31, "verbose": -1, "num_threads": 2}


def main() -> None:
    """Print the AUC and the log loss of both rankers."""
    parser = argparse.ArgumentParser(description="Compare a ranking model without and with the vectors.")
    parser.add_argument("--home", required=True, help="the store")
    parser.add_argument("--relation", required=True, help="whose test edges are the labels")
    parser.add_argument("--negatives", type=int, default=4, help="for each edge")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model = load_model(options.home)
    store, snapshot = model.store, model.snapshot
    if store is None or "refit/twhin_model" in store.manifest("embeddings/relations", snapshot).parents:
        raise UserError("these vectors have seen the test edges; run the chain with --set training.refit=false")
    relation = next(one for one in model.config.relations if one.name == options.relation)
    number = model.relations.index(relation.name)

    with duckdb.connect() as con:
        for view in ("training_set/positives", "held_out/validation", "held_out/test"):
            files = store.files(view, snapshot)
            con.execute(f"CREATE VIEW {view.replace('/', '_')} AS SELECT * FROM read_parquet({files})")
        tables = {
            side: f"read_parquet({store.files(f'embeddings/{getattr(relation, side)}', snapshot)})"
            for side in ("lhs", "rhs")
        }
        numbers = {"number": number, "negatives": options.negatives, "seed": options.seed}
        for statement in LABELS.split(";\n")[:-1]:
            used = {name: value for name, value in numbers.items() if f"${name}" in statement}
            con.execute(statement, used)
        joined = con.execute(FEATURES.format(**tables), {"number": number}).df()

    joined["score"] = model.predict_relation(joined["head"].tolist(), joined["tail"].tolist(), relation.name)
    head, tail = (np.stack(joined[name].to_numpy()) for name in ("head_vector", "tail_vector"))
    counts = joined[COUNTS].to_numpy(np.float64)
    features = {
        "counts": counts,
        "counts and score": np.column_stack([counts, joined["score"], joined["cosine"]]),
        "counts, score and vectors": np.column_stack([counts, joined["score"], joined["cosine"], head, tail]),
    }
    labels, part = joined["label"].to_numpy(), joined["lhs"].to_numpy() % 4
    train, stop, test = part < 2, part == 2, part == 3
    print(f"{len(labels):,} labels of {relation.name}, {labels.mean():.1%} of them edges; test on {test.sum():,}")
    print(f"{'features':<28}{'AUC':>8}{'log loss':>10}{'trees':>8}")
    for name, columns in features.items():
        sets = [lightgbm.Dataset(columns[rows], labels[rows]) for rows in (train, stop)]
        ranker = lightgbm.train(
            PARAMETERS | {"seed": options.seed}, sets[0], 500, [sets[1]],
            callbacks=[lightgbm.early_stopping(30, verbose=False)],
        )  # fmt: skip
        said = ranker.predict(columns[test])
        area, loss = roc_auc_score(labels[test], said), log_loss(labels[test], said)
        print(f"{name:<28}{area:>8.4f}{loss:>10.4f}{ranker.best_iteration:>8}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"rank.py: {error}") from error
