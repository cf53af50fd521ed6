"""A stage refuses a table that was made under other values than it is asked for now."""

from __future__ import annotations

from pathlib import Path

import pytest
from edge_files import SNAPSHOT, make_config, store_at, write

from twhin_pipeline.config import stage_settings
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages.chain import STAGES, _refuse_other_settings, run_stage
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


@pytest.mark.parametrize("limit", ["max_rejected_share", "min_kept_share", "max_growth", "max_top_gain"])
def test_another_limit_of_a_check_refuses_no_edges(folder, limit):
    run(folder, until="ingest", source={limit: 1})
    one(folder, "vocabulary")


def test_a_limit_that_an_earlier_version_did_not_have_refuses_no_edges(folder):
    config = make_config(folder / "e.parquet", recipe="none")
    values = stage_settings.settings(config, "ingest")
    del values["source.max_top_gain"]
    with store_at(folder).replace("raw_edges", SNAPSHOT, config_hash="c", settings=values):
        pass
    _refuse_other_settings(Run(config, "unused", [], store_at(folder), SNAPSHOT), ["raw_edges"])


def test_relations_in_another_order_are_refused(folder):
    """Edges of the training set name their relation by its position."""
    run(folder, until="sample")
    config = make_config(folder / "e.parquet", recipe="none")
    turned = [relation.model_dump(exclude_unset=True) for relation in reversed(config.model.relations)]
    with pytest.raises(UserError, match=r"model\.relation_order was"):
        one(folder, "train", model={"relations": turned})


def trained(folder: Path, **sections) -> None:
    """Write a model as training with these sections would name it."""
    config = make_config(folder / "e.parquet", recipe="none", **sections)
    store = store_at(folder)
    with store.replace("twhin_model", SNAPSHOT, config_hash="c", settings=stage_settings.settings(config, "train")):
        pass


def test_who_reads_a_model_does_not_mind_how_it_was_trained(folder):
    trained(folder, training={"num_epochs": 7})
    optimizer = {"adagrad": {"lr": 0.3}}
    tables = [{"name": name, "embedding_dim": 4, "optimizer": optimizer} for name in ("user", "item")]
    config = make_config(folder / "e.parquet", recipe="none", model={"embeddings": {"tables": tables}})
    _refuse_other_settings(Run(config, "unused", [], store_at(folder), SNAPSHOT), ["twhin_model"])


@pytest.mark.parametrize("model", [{"comparator": "cosine"}, {"temperature": 0.5}, {"reciprocal": True}])
def test_who_reads_a_model_minds_how_it_scores(folder, model):
    trained(folder)
    config = make_config(folder / "e.parquet", recipe="none", model=model)
    with pytest.raises(
        UserError, match=rf"twhin_model of .* was made with other values: model.{next(iter(model))} was"
    ):
        _refuse_other_settings(Run(config, "unused", [], store_at(folder), SNAPSHOT), ["twhin_model"])
