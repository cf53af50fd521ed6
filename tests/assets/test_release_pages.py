"""The pages of `drift` and `promotion`: what failed comes first, and tables are as narrow as Dagster's column."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from twhin_pipeline._dagster.assets import releases
from twhin_pipeline.lifecycle import comparison, promotion
from twhin_pipeline.store import Store
from twhin_pipeline.words import DRIFT, PROMOTION

DAY = "2025-01-01"
DRIFT_ROWS = [
    ("relation", "all", "edges", 1_234.0, None, None),
    ("relation", "all", "filtered_mrr", 0.22, None, None),
    ("relation", "all", "filtered_mrr_current", 0.2, None, None),
    ("relation", "all", "filtered_mrr_change", 0.1, -0.05, 0.25),
    ("relation", "likes", "edges", 0.0, None, None),
    *[
        ("entity", name, metric, value, None, None)
        for name, kept in (("user", 12_345_678.0), ("item", 60.0))
        for metric, value in (("kept", kept), ("cosine", 0.5), ("neighbors@10", 0.25))
    ],
]
GATES = [
    ("automatic", "", True, None, None, "releases are promoted by their gates"),
    ("new", "user", True, 0.1, 0.5, "user: 10.0% of its ids are new"),
    ("new", "item", False, 0.6, 0.5, "item: 60.0% of its ids are new"),
]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def page(store: Store, asset: str, schema: pa.Schema, rows: list[tuple[Any, ...]], **details: Any) -> dict[str, Any]:
    with store.replace(asset, DAY, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema))
        draft.details = details
    of = {DRIFT: releases.drift_page, PROMOTION: releases.promotion_page}[asset]
    return of(SimpleNamespace(store=store), store.manifest(asset, DAY))  # type: ignore[arg-type]


def records(value: dg.MetadataValue) -> list[dict[str, Any]]:
    assert isinstance(value, dg.TableMetadataValue)
    return [dict(record.data) for record in value.records]


def test_drift_has_a_row_for_each_figure_and_a_column_for_each_entity_type(store: Store) -> None:
    shown = page(store, DRIFT, comparison.SCHEMA, DRIFT_ROWS, compared_with="2024-12-31-x")
    assert records(shown["entity_types"]) == [
        {"figure": "kept", "user": "12,345,678", "item": "60"},
        {"figure": "cosine", "user": "0.5", "item": "0.5"},
        {"figure": "neighbors@10", "user": "0.25", "item": "0.25"},
    ]
    assert records(shown["relations"]) == [
        {"relation": "all", "edges": "1,234", "MRR": "0.22", "current": "0.2", "change": "+10.0% (-5% to +25%)"},
        {"relation": "likes", "edges": "0", "MRR": "", "current": "", "change": ""},
    ]
    assert shown["filtered_mrr_change"] == 0.1 and shown["neighbors@10 of item"] == 0.25
    assert "![Drift by entity type](" in shown["picture"].value


def test_a_first_release_has_a_page_too(store: Store) -> None:
    shown = page(store, DRIFT, comparison.SCHEMA, [], compared_with=None)
    assert shown["compared_with"].startswith("nothing") and "picture" not in shown and "relations" not in shown


def test_a_promotion_says_what_was_decided_and_the_gate_that_failed_comes_first(store: Store) -> None:
    details = {"release": "r", "decision": "held", "reason": "why", "current_before": None, "by": "me"}
    shown = page(store, PROMOTION, promotion.SCHEMA, GATES, **details)
    assert records(shown["gates"]) == [
        {"gate": "new item", "passed": "no", "limit": "0.5", "found": "item: 60.0% of its ids are new"},
        {"gate": "automatic", "passed": "yes", "limit": "", "found": "releases are promoted by their gates"},
        {"gate": "new user", "passed": "yes", "limit": "0.5", "found": "user: 10.0% of its ids are new"},
    ]
    assert (shown["decision"], shown["reason"], shown["held"]) == ("held", "why", 1)
    assert shown["current_before"] == "nothing"
