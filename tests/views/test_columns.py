"""Every column of a table says what it means, and no column is described that a table does not have."""

from __future__ import annotations

import pytest
import small_store
from small_store import SNAPSHOT

from twhin_pipeline.evaluation import results, seen_edges
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.training_set import negatives, positives
from twhin_pipeline.vectors import calibration, compatibility
from twhin_pipeline.vectors.export import export
from twhin_pipeline.views.columns import DESCRIPTIONS, described

SCHEMAS = {
    "raw_edges_rejected": raw_edges.REJECTED.names,
    "training_set/positives": positives.SCHEMA.names,
    "held_out/test": positives.SCHEMA.names,
    "training_set/negatives": negatives.SCHEMA.names,
    "evaluation": results.SCHEMA.names,
    "calibration": calibration.SCHEMA.names,
    "published": compatibility.SCHEMA.names,
    "seen_edges": seen_edges.SCHEMA.names,
}


@pytest.mark.parametrize("table", SCHEMAS)
def test_the_columns_of_a_table_are_those_that_are_described(table):
    assert set(described(table)) == set(SCHEMAS[table])


def test_the_columns_of_vocabularies_models_and_vectors_are_those_that_are_described(tmp_path):
    small = small_store.make(tmp_path, config=small_store.config(training={"refit": False}))
    export(small.config, small.store, SNAPSHOT)
    for table in ("vocabulary/user", "twhin_model", "embeddings/user", "embeddings/relations"):
        sometimes = {"row_before"} if table.startswith("vocabulary") else set()  # of a compacted one
        assert set(described(table)) - sometimes == set(small.store.manifest(table, SNAPSHOT).schema), table


def test_a_description_is_a_sentence():
    texts = [text for columns in DESCRIPTIONS.values() for text in columns.values()]
    assert all(text.endswith(".") and len(text) > 10 for text in texts)
