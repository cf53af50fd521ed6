"""A stage refuses a table that was made under other values than it is asked for now."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_files import SNAPSHOT, make_config, store_at, write

from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run

EDGES = [
    (f"u{i % 17}", rel, ("u" if rel == "follows" else "i") + str(i % 13))
    for i in range(200)
    for rel in ("follows", "fav", "reply")
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "e.parquet", sorted(set(EDGES)))
    return tmp_path


def run(folder: Path, *, until: str, **sections) -> None:
    """Run the stages up to `until`."""
    for name in STAGES:
        one(folder, name, **sections)
        if name == until:
            return


def one(folder: Path, name: str, **sections) -> None:
    config = make_config(folder / "e.parquet", recipe="none", **sections)
    begun = Run(config, "unused", [], store_at(folder), SNAPSHOT, train=lambda _: None)
    run_stage(begun, STAGES[name], lambda _: None)


def test_training_refuses_a_training_set_that_was_sampled_under_other_values(folder):
    run(folder, until="sample", split={"test": 0.05}, negatives={"alpha": 0.75})
    with pytest.raises(
        UserError,
        match=r"was made with other values: split.test was 0.05 and is 0.4; negatives.alpha was 0.75 and is 0.0; "
        r"make it again with `twhin sample --snapshot",
    ):
        one(folder, "train", split={"test": 0.4}, negatives={"alpha": 0.0})


def test_sampling_refuses_vocabularies_of_other_types(folder):
    run(folder, until="vocabulary", vocabulary={"min_count": 1})
    with pytest.raises(UserError, match=r"vocabulary.min_count was 1 and is 2; make it again with `twhin vocabulary"):
        one(folder, "sample", vocabulary={"min_count": 2})


@pytest.mark.parametrize("other", [{"export": {"normalize": True}}, {"training": {"num_epochs": 5}}])
def test_a_field_of_another_stage_refuses_nothing(folder, other):
    run(folder, until="vocabulary")
    one(folder, "sample", **other)
