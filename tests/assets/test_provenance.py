"""A step refuses tables that do not fit each other, and its code version covers every module that it runs."""

from __future__ import annotations

import shutil

import pytest
from dagster_tables import SNAPSHOT, put

from twhin_pipeline._dagster.assets import provenance
from twhin_pipeline.errors import UserError


def test_fresh_tables_are_taken(store):
    store.refuse_stale(SNAPSHOT, ["training_set/positives"])


def test_a_table_made_from_a_replaced_one_is_refused_with_the_remedy(store):
    put(store, "vocabulary/user", "raw_edges")
    with pytest.raises(UserError, match=r"training_set/positives .* stale: vocabulary/user .*`twhin sample --snapshot"):
        store.refuse_stale(SNAPSHOT, ["training_set/positives"])


def test_staleness_further_up_is_found_too(store):
    put(store, "raw_edges")
    put(store, "training_set/positives", "raw_edges", "vocabulary/user")
    with pytest.raises(UserError, match=r"vocabulary/user .* stale: raw_edges .*twhin vocabulary"):
        store.refuse_stale(SNAPSHOT, ["training_set/positives"])


@pytest.fixture
def change(monkeypatch, tmp_path):
    """Return what changes a module of a copy of the engine by a function of its text."""
    shutil.copytree(provenance.ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "ENGINE", tmp_path / "engine")

    def changed(module: str, edit) -> None:
        path = tmp_path / "engine" / f"{module}.py"
        before = path.read_text()
        path.write_text(edit(before))
        assert path.read_text() != before

    return changed


STAGES = {
    "ingest": "graph.raw_edges",
    "vocabulary": "graph.vocabulary",
    "sample": "training_set.positives",
    "train": "training.train",
    "evaluate": "evaluation.evaluate",
    "export": "vectors.export",
    "index": "vectors.indexing",
}


def versions() -> dict[str, str]:
    return {stage: provenance.code(module, stage) for stage, module in STAGES.items()}


def test_a_code_version_changes_with_the_code_and_with_nothing_else():
    assert versions() == versions()
    assert len(set(versions().values())) == len(STAGES)


@pytest.mark.parametrize("far", ["model/losses", "sharding/row_optimizers", "training/warm_start", "store/store"])
def test_a_code_version_covers_every_module_that_the_stage_imports(change, far):
    before = versions()
    change(far, lambda text: text + "CHANGED = 1\n")
    after = versions()
    assert after["train"] != before["train"]
    if far.startswith("model"):
        assert after["ingest"] == before["ingest"]


@pytest.mark.parametrize("module", ["config/training", "config/data", "graph/raw_edges", "training/trainer"])
def test_comments_and_descriptions_change_no_code_version(change, module):
    before = versions()
    change(module, lambda text: text.replace('"""', '"""Changed. ', 1) + "\n# changed\n")
    assert versions() == before


def test_the_description_of_a_field_changes_no_code_version(change):
    before = versions()
    change("config/training", lambda text: text.replace("Passes over the training edges.", "Passes over the edges."))
    assert versions() == before


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("config/tune", set()),
        ("config/optimizer", {"train"}),
        ("config/training", {"sample", "train", "evaluate", "export", "index"}),
        ("config/indexes", {"index"}),
        ("config/data", set(STAGES)),
    ],
)
def test_a_section_changes_the_versions_of_the_stages_that_read_it(change, section, changed):
    before = versions()
    change(section, lambda text: text + "CHANGED = 1\n")
    after = versions()
    assert {stage for stage in STAGES if after[stage] != before[stage]} == changed
