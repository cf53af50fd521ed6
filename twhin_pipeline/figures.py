"""Figures: of the table `evaluation`, the rows that are each relation's figures, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

ALL, BOTH, RHS = "all", "both", "rhs"


def chief_rows(evaluation: pa.Table, details: Mapping[str, Any]) -> pa.Table:
    """Return one row for each relation and metric: that of the sides which the relation replaces.

    Retrieval is of tails always. The rows of all relations together are the overall metrics of `details`, in which each
    relation counts by its own sides.

    Args:
        evaluation: The table's rows.
        details: Its manifest's details: `sides`, `metrics`, `baseline`, `edges`.

    Returns:
        A table of the same schema, relations in the table's order.
    """
    sides = details.get("sides", BOTH)
    rows = []
    given = [row for row in evaluation.to_pylist() if row["relation"] != ALL]
    sided = {(row["relation"], row["metric"]) for row in given if row["side"] == BOTH}
    for row in given:
        mine = sides if isinstance(sides, str) else sides.get(row["relation"], BOTH)
        if row["side"] == (mine if (row["relation"], row["metric"]) in sided else RHS):
            rows.append(row)
    baseline = details.get("baseline", {})
    for metric, value in details.get("metrics", {}).items():
        retrieved = metric.startswith(("recall@", "ndcg@"))
        side = RHS if retrieved else sides if isinstance(sides, str) else "replaced"
        rows.append(
            {
                "relation": ALL,
                "side": side,
                "metric": metric,
                "value": value,
                "baseline": baseline.get(metric),
                "edges": details.get("edges"),
            }
        )
    return pa.Table.from_pylist(rows, schema=evaluation.schema)


def told_sides(details: Mapping[str, Any]) -> str:
    """Say which sides of the held-out edges were predicted, for a heading."""
    sides = details.get("sides", BOTH)
    words = {BOTH: "both sides", "lhs": "heads predicted", RHS: "tails predicted"}
    return words[sides] if isinstance(sides, str) else "each relation's replaced sides"
