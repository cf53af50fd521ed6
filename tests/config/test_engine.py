"""The section `engine`: what Spark does not do is refused when the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest
from edge_files import make_config

from twhin_pipeline.config import stage_settings
from twhin_pipeline.errors import UserError

SPARK = {"name": "spark", "master": "local[2]"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"source": {"path": None, "sql": "SELECT 1"}}, "source: is a query"),
        ({"source": {"path": "edges.sql"}}, "source: is a query"),
        ({"source": {"ids": "indexed"}}, "source.ids: indexed ids"),
        ({"source": {"path": "https://there/e.parquet"}}, "source.path: https://there/e.parquet would be read"),
        ({"split": {"strategy": "temporal", "later_snapshot": "2025-02-01"}}, "split.later_snapshot: is not"),
        ({"train_data": {"limit": 5}}, "train_data.limit: edges are not counted off"),
        ({"validation_data": {"offset": 5}}, "validation_data.offset: edges are not counted off"),
        ({"source": None, "train_data": {"data_root": "e.parquet"}}, "train_data.data_root: Spark reads source"),
    ],
)  # fmt: skip
def test_what_spark_does_not_do_is_refused_with_the_field_and_a_remedy(sections: dict[str, Any], said: str) -> None:
    make_config("e.parquet", **sections)
    with pytest.raises(UserError) as error:
        make_config("e.parquet", engine=SPARK, **sections)
    assert said in str(error.value) and "set engine.name to embedded" in str(error.value)


def test_what_is_sparks_alone_is_refused_without_it() -> None:
    for field in ({"master": "local[2]"}, {"conf": {"spark.executor.memory": "1g"}}):
        with pytest.raises(UserError, match=r"engine\.\w+: is for name: spark"):
            make_config("e.parquet", engine=field)


def test_the_engine_is_no_part_of_what_was_made() -> None:
    """Either engine goes on with the other's tables: neither a table's settings nor the hash name it."""
    one, other = make_config("e.parquet"), make_config("e.parquet", engine=SPARK)
    assert one.hash() == other.hash()
    for stage in stage_settings.STAGES:
        assert stage_settings.settings(one, stage) == stage_settings.settings(other, stage)


def test_properties_of_spark_may_be_numbers_and_truth_values_as_yaml_has_them() -> None:
    conf = {"spark.executor.cores": 4, "spark.memory.fraction": 0.5, "spark.eventLog.enabled": True, "spark.x": "8g"}
    made = make_config("e.parquet", engine={"name": "spark", "conf": conf})
    assert list(made.engine.conf.values()) == ["4", "0.5", "true", "8g"]
