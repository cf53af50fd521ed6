"""The results of the table `evaluation`: each relation's rows, and the model beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from twhin_pipeline.words import BOTH

ALL, RHS = "all", "rhs"
SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("side", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("baseline", pa.float64()),
        ("edges", pa.int64()),
        ("item_knn", pa.float64()),
        ("als", pa.float64()),
        ("compared", pa.float64()),
        ("compared_edges", pa.int64()),
    ]
)
"""The table's columns. Tables of earlier versions end with `edges`."""
OF_TAILS = ("recall@", "ndcg@", "calibrated_rce", "ece")
"""How metrics begin that are of tails always, whichever sides are corrupted."""
BASELINES = {"popularity": "baseline", "item_knn": "item_knn", "als": "als"}
"""The table's column of each baseline, by the name that the configuration has for it."""
TITLES = {"popularity": "popular", "item_knn": "item-kNN", "als": "ALS"}
MOST_FACTORS = 64
"""Of ALS, which has otherwise as many as the model has dimensions."""
LEAST_EDGES, LEAST_DIFFERENCE = 200, 0.02
"""A relation with fewer test edges, or a smaller relative difference, does not say who is better."""


@dataclass(frozen=True)
class Comparison:
    """One relation's figure in one metric, beside those of the baselines.

    `value` is the model's of all `edges`, like popularity's. `compared` is the model's of the `compared_edges` that
    item-kNN and ALS ranked. `baselines` has those that were measured, by the configuration's names.
    """

    relation: str
    metric: str
    value: float
    edges: int
    baselines: dict[str, float]
    compared: float | None = None
    compared_edges: int | None = None

    def model(self, baseline: str) -> float:
        """Return the model's figure of the same edges as a baseline's."""
        return self.value if baseline == "popularity" or self.compared is None else self.compared

    @property
    def sampled(self) -> bool:
        """Whether item-kNN and ALS ranked some of the edges only."""
        return self.compared_edges is not None and self.compared_edges < self.edges

    @property
    def better(self) -> dict[str, float]:
        """Baselines that are better than the model by more than noise, the best one first.

        Noise is a share of the figure, and its standard error: that of a mean of n numbers in [0, 1] which is p is at
        most sqrt(p (1 - p) / n).
        """
        better = {}
        for name, figure in sorted(self.baselines.items(), key=lambda item: -item[1]):
            edges = self.edges if name == "popularity" else self.compared_edges or self.edges
            error = math.sqrt(max(figure * (1 - figure), 0) / max(edges, 1))
            if edges >= LEAST_EDGES and figure - self.model(name) > max(LEAST_DIFFERENCE * self.model(name), error):
                better[name] = figure
        return better

    @property
    def best(self) -> str:
        """The baseline that is better than the model, if only by a little, and than the others; else `model`."""
        name = max(self.baselines, key=lambda n: self.baselines[n], default="")
        return name if name and self.baselines[name] > self.model(name) else "model"


def current(evaluation: pa.Table) -> pa.Table:
    """Return the rows with the columns of `SCHEMA`; those that an earlier version did not have are null."""
    missing = [field for field in SCHEMA if field.name not in evaluation.column_names]
    for field in missing:
        evaluation = evaluation.append_column(field, pa.nulls(evaluation.num_rows, field.type))
    return evaluation.select(SCHEMA.names)


def chief_rows(evaluation: pa.Table, details: Mapping[str, Any]) -> pa.Table:
    """Return one row for each relation and metric: that of the sides that the relation corrupts.

    Retrieval is of tails always. The rows of all relations together are the overall metrics of `details`, in which each
    relation counts by its own sides.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details: `sides`, `metrics`, `edges`, and by column `baseline`, `item_knn`, `als`,
            `compared`.

    Returns:
        A table of the columns of `SCHEMA`, relations in the table's order.
    """
    sides = details.get("sides", BOTH)
    rows = []
    of_relations = [row for row in current(evaluation).to_pylist() if row["relation"] != ALL]
    sided = {(row["relation"], row["metric"]) for row in of_relations if row["side"] == BOTH}
    for row in of_relations:
        mine = sides if isinstance(sides, str) else sides.get(row["relation"], BOTH)
        if row["side"] == (mine if (row["relation"], row["metric"]) in sided else RHS):
            rows.append(row)
    columns = (*BASELINES.values(), "compared")
    for metric, value in details.get("metrics", {}).items():
        side = RHS if metric.startswith(OF_TAILS) else sides if isinstance(sides, str) else "corrupted"
        row = {"relation": ALL, "side": side, "metric": metric, "value": value, "edges": details.get("edges")}
        row |= {column: details.get(column, {}).get(metric) for column in columns}
        if row["compared"] is not None:
            row["compared_edges"] = details.get("compared_edges")
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def chief_metric(metrics: Sequence[str]) -> str:
    """Return the metric that the model is compared by: Recall at the largest k of those that were measured, else
    `filtered_mrr`.
    """
    depths = [int(name.removeprefix("recall@")) for name in metrics if name.startswith("recall@")]
    return f"recall@{max(depths)}" if depths else "filtered_mrr"


def comparisons(evaluation: pa.Table, details: Mapping[str, Any], metric: str | None = None) -> list[Comparison]:
    """Return the model beside the baselines for each relation, the largest first, and last for all together.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details, as `chief_rows` takes them.
        metric: Which metric; left out, the chief one.
    """
    rows = chief_rows(evaluation, details).to_pylist()
    metric = metric or chief_metric([row["metric"] for row in rows])
    compared = [
        Comparison(
            relation=row["relation"],
            metric=metric,
            value=row["value"],
            edges=row["edges"] or 0,
            baselines={name: row[column] for name, column in BASELINES.items() if _known(row[column])},
            compared=row["compared"] if _known(row["compared"]) else None,
            compared_edges=row["compared_edges"],
        )
        for row in rows
        if row["metric"] == metric and _known(row["value"])
    ]
    return sorted(compared, key=lambda one: (one.relation == ALL, -one.edges))


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def sides_title(details: Mapping[str, Any]) -> str:
    """Return for a heading which sides of the held-out edges were predicted."""
    sides = details.get("sides", BOTH)
    words = {BOTH: "both sides", "lhs": "heads predicted", RHS: "tails predicted"}
    return words[sides] if isinstance(sides, str) else "each relation's corrupted sides"
