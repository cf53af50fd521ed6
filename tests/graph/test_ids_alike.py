"""Ids that differ by letter case, spaces at their ends or Unicode form alone are counted, and made one where asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_files import SNAPSHOT, make_config, store_at, triples, write

from twhin_pipeline.checks import checks
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.store import Store

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
ROWS = [
    ("u", "fav", COMPOSED), ("v", "fav", DECOMPOSED),
    ("u", "fav", "x"), ("v", "fav", " x"), ("w", "fav", "X "),
    ("u", "fav", "Y"), ("u", "fav", "ß"), ("u", "fav", "other"),
]  # fmt: skip


def ingested(tmp_path: Path, forms: list[str]) -> tuple[TwhinConfig, Store]:
    config = make_config(write(tmp_path / "e.parquet", ROWS), source={"normalize_ids": forms})
    store = store_at(tmp_path / "-".join(forms))
    raw_edges.ingest(config, store, SNAPSHOT)
    vocabulary.build(config, store, SNAPSHOT)
    return config, store


def test_ids_that_are_alike_are_counted_and_shown(tmp_path):
    config, store = ingested(tmp_path, [])
    result = checks.run("ids_alike", config, store, SNAPSHOT, "vocabulary/item")
    assert result.offending is not None
    assert result.offending.to_pylist() == [
        {"entity": "item", "ids": 3, "first_ids": [" x", "X ", "x"], "problem": "item: ' x', 'X ', 'x'"},
        {
            "entity": "item",
            "ids": 2,
            "first_ids": [DECOMPOSED, COMPOSED],
            "problem": f"item: '{DECOMPOSED}', '{COMPOSED}'",
        },
    ]
    assert checks.run("ids_alike", config, store, SNAPSHOT, "vocabulary/user").passed
    assert not checks.CHECKS["ids_alike"].blocking


@pytest.mark.parametrize(
    ("forms", "items"),
    [
        ([], {COMPOSED, DECOMPOSED, "x", " x", "X ", "Y", "ß", "other"}),
        (["nfc"], {COMPOSED, "x", " x", "X ", "Y", "ß", "other"}),
        (["trim"], {COMPOSED, DECOMPOSED, "x", "X", "Y", "ß", "other"}),
        (["lower"], {COMPOSED, DECOMPOSED, "x", " x", "x ", "y", "ß", "other"}),
        (["lower", "trim", "nfc"], {COMPOSED, "x", "y", "ß", "other"}),
    ],
)
def test_ids_are_normalized_as_asked(tmp_path, forms, items):
    config, store = ingested(tmp_path, forms)
    assert {rhs for *_, rhs in triples(store)} == items
    alike = checks.run("ids_alike", config, store, SNAPSHOT, "vocabulary/item")
    assert alike.passed is (len(forms) == 3)


def test_integers_are_no_text_to_normalize(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", [(1, "fav", 7)]), source={"normalize_ids": ["trim", "lower"]})
    store = store_at(tmp_path)
    assert raw_edges.ingest(config, store, SNAPSHOT).schema["lhs"] == "int64"
