"""What the columns of each table mean, for pages and documentation."""

from __future__ import annotations

from twhin_pipeline.words import CALIBRATION, DRIFT, PROMOTION, PUBLISHED

_EDGES = {
    "chunk": "Number of the edge's chunk, from 0. A chunk has edges of one relation, which share sampled negatives.",
    "lhs": "Row of the head in the embedding table of its entity type.",
    "rhs": "Row of the tail in the embedding table of its entity type.",
    "rel": "Number of the relation, from 0, in the order of the configuration.",
    "weight": "The edge's weight in the loss, before that of its relation.",
}
_NEGATIVES = {
    "epoch": "The epoch that uses these negatives, from 0.",
    "chunk": "The chunk of edges that they are for.",
    "side": "The side that they replace: 0 the head, 1 the tail.",
    "row": "The sampled entities, as rows of the embedding table.",
    "mask_position": "Of each masked pair, the edge's position in the chunk. A masked pair is a true edge.",
    "mask_candidate": "Of each masked pair, the candidate's position, in-batch candidates first.",
    "log_q": "Log of the expected number of times that each candidate is drawn, in-batch candidates first.",
}

DESCRIPTIONS: dict[str, dict[str, str]] = {
    "raw_edges": {
        "lhs": "Id of the head.",
        "rel": "Name of the relation.",
        "rhs": "Id of the tail.",
        "time": "When the edge last happened (UTC).",
        "first_time": "When the edge first happened (UTC).",
        "weight": "The edge's weight, by its repeats, its age and its column, as the source is configured.",
        "split": "The part that the source gave the edge: train, validation or test.",
    },
    "raw_edges_rejected": {
        "lhs": "The head, as the source has it.",
        "rel": "The relation, as the source has it.",
        "rhs": "The tail, as the source has it.",
        "reason": "Why the row is no edge.",
        "column": "The column to blame.",
        "value": "What that column holds.",
        "file": "The source's file.",
        "row": "The row in that file.",
        "source": "The configuration's name of the source.",
    },
    "vocabulary/*": {
        "id": "The entity's id, as the source has it.",
        "row": "The entity's row in its embedding table. A known id keeps its row from snapshot to snapshot.",
        "degree": "Edges of the entity in this snapshot.",
        "first_snapshot": "The first snapshot that had the entity.",
        "last_snapshot": "The newest snapshot in which the entity had an edge; null where it never had one.",
        "evicted": "Whether the entity has no vector: it had no edge for longer than `vocabulary.keep_departed`.",
        "row_before": "The row that the entity had in the snapshot before. Only a compacted vocabulary has it.",
    },
    "training_set/positives": _EDGES,
    "held_out/validation": _EDGES,
    "held_out/test": _EDGES,
    "held_out/repeats": _EDGES,
    "training_set/negatives": _NEGATIVES,
    "held_out/validation_negatives": _NEGATIVES,
    "twhin_model": {
        "row": "The entity's row, as in its vocabulary.",
        "embedding": "The entity's vector.",
    },
    "evaluation": {
        "relation": "Name of the relation; `all`: the mean over the edges of all relations.",
        "side": "The side that was searched for: `lhs`, `rhs`, or `both` for the mean of the two.",
        "metric": "What was measured; docs/reference/metrics.md defines each.",
        "value": "The model's figure.",
        "baseline": "The most-popular baseline's figure.",
        "edges": "Held-out edges behind the figures.",
        "item_knn": "Item-kNN's figure, on `compared_edges`.",
        "als": "ALS's figure, on `compared_edges`.",
        "compared": "The model's figure, on `compared_edges`.",
        "compared_edges": "Held-out edges that item-kNN and ALS ranked: a sample of `edges`, or all of them.",
    },
    CALIBRATION: {
        "relation": "Name of the relation.",
        "method": "`platt` (one line), `piecewise`, `pooled` (fitted to all relations together), or `none`.",
        "edges": "Validation edges of the relation.",
        "negatives": "Sampled pairs for each edge: the base rate is 1 in 1 + `negatives`.",
        "scores": "Scores at which the map from scores to log-odds has its knots.",
        "log_odds": "Log-odds at these knots. The map is linear between knots, and goes on beyond them.",
    },
    "embeddings/*": {
        "id": "The entity's id, as the source has it.",
        "row": "The entity's row in its embedding table.",
        "embedding": "The entity's vector.",
        "trained_edges": "Training edges of the entity. With 0, its vector was never trained.",
    },
    "embeddings/relations": {
        "relation": "Name of the relation.",
        "lhs": "Entity type of its heads.",
        "rhs": "Entity type of its tails.",
        "operator": "What is applied to the head's vector before it is compared with the tail's.",
        "embedding": "The operator's parameters.",
    },
    "index/*": {
        "relation": "Name of the relation whose heads asked; null: entities of the type asked for their neighbors.",
        "k": "How many they asked for.",
        "recall": "The share of the k best that the index found, of those that a comparison with all finds.",
        "wanted_recall": "The share that `indexes.recall` wants.",
        "queries": "Entities that asked.",
        "latency_ms": "Median milliseconds of one search by the index, in one thread.",
        "exact_ms": "Median milliseconds of a search of every vector, for the smallest k, by all of torch's threads.",
        "kind": "`flat`, `hnsw` or `ivf_pq`.",
        "parameters": "How hard the search looks.",
        "rows": "Vectors in the index: those of entities with a training edge.",
        "bytes": "Size of the index's file.",
        "build_s": "Seconds that building took.",
    },
    "map/*": {
        "id": "The entity's id, as the source has it.",
        "row": "The entity's row in its embedding table.",
        "x": "Where the entity is on the map, from left to right.",
        "y": "Where it is from the bottom to the top. Which points are near one another means something, no more.",
        "cluster": "Number of the point's cluster, from 0, the largest first.",
        "cluster_name": "Neighbors in the graph that set the cluster apart; else `around` its most trained members.",
        "trained_edges": "Training edges of the entity.",
    },
    DRIFT: {
        "kind": "`entity` for an entity type, `relation` for a relation.",
        "name": "The entity type or relation; `all`: the edges of all relations together.",
        "metric": "What was measured; docs/reference/metrics.md defines each.",
        "value": "The figure.",
        "low": "Where its confidence interval begins, of figures that have one.",
        "high": "Where it ends.",
    },
    PROMOTION: {
        "gate": "What was looked at.",
        "about": "The entity type or relation; empty for the release as a whole.",
        "passed": "Whether the gate was passed.",
        "value": "The figure, of gates that have one.",
        "limit": "The configuration's limit.",
        "text": "What was found, in words.",
    },
    PUBLISHED: {
        "entity": "The entity type.",
        "ids": "How many ids of both releases the map was fitted to.",
        "rows": "Dimension of the new vectors.",
        "columns": "Dimension of the earlier ones.",
        "matrix": "The map, row after row: `vector @ matrix` is in the space of the release before.",
        "distance_before": "Mean distance of an id's new vector to its earlier one, in mean earlier lengths.",
        "distance": "The same with a map that was fitted to half of the ids, measured on the others.",
    },
    "seen_edges": {
        "edge": "The edge's number: the lower half of the MD5 of its relation, entity types and ids.",
        "trained": "The last snapshot at which a model was trained on it.",
    },
}
DESCRIPTIONS["refit/twhin_model"] = DESCRIPTIONS["twhin_model"]


def described(table: str) -> dict[str, str]:
    """Return a table's columns, each with what it means; nothing for a table that has none described."""
    return DESCRIPTIONS.get(table) or DESCRIPTIONS.get(f"{table.partition('/')[0]}/*", {})
