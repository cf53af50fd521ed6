"""A stage is named by the fields that it reads: no other field's value makes its table or checkpoint unusable."""

from __future__ import annotations

import pytest
from edge_files import make_config
from helpers import SNAPSHOT, planted_config

from twhin_pipeline.config import stage_settings
from twhin_pipeline.store import Store
from twhin_pipeline.training.checkpoint import folder_of


@pytest.mark.parametrize(
    "sections",
    [
        {"export": {"normalize": True}},
        {"training": {"train_log_every_n": 7}},
        {"training": {"checkpoint_every_n": 3, "checkpoint_max_to_keep": 1}},
        {"training": {"refit": False}},
        {"evaluation": {"floors": {"filtered_mrr": 0.1}}},
        {"launch": {"threads_per_process": 1}},
    ],
)
def test_a_field_that_training_does_not_read_keeps_its_checkpoints(tmp_path, sections):
    store = Store(str(tmp_path))
    assert folder_of(planted_config(**sections), store, SNAPSHOT) == folder_of(planted_config(), store, SNAPSHOT)


@pytest.mark.parametrize("sections", [{"training": {"num_epochs": 9}}, {"training": {"seed": 3}}])
def test_a_field_that_training_reads_names_other_checkpoints(tmp_path, sections):
    store = Store(str(tmp_path))
    assert folder_of(planted_config(**sections), store, SNAPSHOT) != folder_of(planted_config(), store, SNAPSHOT)


def test_differences_name_the_field_and_both_values():
    before = stage_settings.settings(make_config("e.parquet", split={"test": 0.05}), "sample")
    now = stage_settings.settings(
        make_config("e.parquet", split={"test": 0.4}, negatives={"alpha": 0.0}, training={"num_epochs": 3}), "sample"
    )
    found = stage_settings.differences(before, now)
    assert found.pop("negatives.epochs", None) is not None
    assert found == {"split.test": (0.05, 0.4), "negatives.alpha": (0.75, 0.0)}


def test_settings_go_by_the_names_of_tables_and_relations():
    found = stage_settings.settings(make_config("e.parquet"), "vocabulary")
    assert found["model.relations.fav.rhs"] == "item" and found["vocabulary.min_count"] == 1
    assert all(stage_settings.settings(make_config("e.parquet"), stage) for stage in stage_settings.STAGES)


def test_which_snapshots_there_are_makes_no_table_of_one_unusable():
    """A new date in the list once made every earlier day's tables "made with other values"."""
    listed, longer, daily = (
        stage_settings.settings(
            make_config("e.parquet", source={"snapshots": snapshots, "columns": {"time": "at"}}), "ingest"
        )
        for snapshots in (["2025-01-01"], ["2025-01-01", "2025-01-02"], {"from": "2025-01-01"})
    )
    assert listed == longer == daily
    of_an_earlier_version = listed | {"source.snapshots": ["2025-01-01"], "sources.0.snapshots.from": "2025-01-01"}
    assert stage_settings.differences(of_an_earlier_version, longer) == {}
