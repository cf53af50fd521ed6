"""A stage is left out only where nothing that it reads has changed since it made its tables."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from edge_files import make_config, pass_checks, write

from twhin_pipeline.config import load_config
from twhin_pipeline.graph import raw_edges
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.stages import chain, unchanged
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, Verdict, releases
from twhin_pipeline.training import train
from twhin_pipeline.training.reporting import SilentReporter

SNAPSHOT, NEXT = "2025-01-01", "2025-01-02"
OVERRIDES = (
    "training.num_epochs=1", "training.refit=false", "launch.nproc_per_node=1", "launch.device=cpu",
    "training.initial_checkpoint_dir=previous", "evaluation.baselines=[]",
)  # fmt: skip


CHAIN = {name: stage for name, stage in STAGES.items() if name not in ("refit", "index", "map")}
"""The stages that this chain has: it is not refitted, too small for an index, and names no type for a map."""


def train_in_this_process(run: Run) -> None:
    train.run(run.config, run.store, run.snapshot)


def run_of(folder: Path, *overrides: str, snapshot: str = SNAPSHOT) -> Run:
    given = (
        *OVERRIDES, f"source.path={folder}/{{snapshot}}.parquet", f"source.snapshots=[{SNAPSHOT}, {NEXT}]", *overrides
    )  # fmt: skip
    config_path = str(folder / "graph.yaml")
    store = Store(str(folder / "home"))
    return Run(load_config(config_path, given), config_path, given, store, snapshot, train_in_this_process)


def live(run: Run, *more: str) -> list[str]:
    """Run the chain, and `more` stages, as `twhin run --skip-unchanged` does; return the stages that ran."""
    ran = []
    for stage in [stage for name, stage in STAGES.items() if name in (*CHAIN, *more)]:
        if chain.made_before(run, stage, lambda line: None) is None:
            chain.run_stage(run, stage, lambda line: None)
            ran.append(stage.name)
    return ran


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One snapshot's chain, from its first stage to its last."""
    folder = tmp_path_factory.mktemp("whole")
    generate(str(folder / "graph.parquet"), users=120, items=60, edges=1_500, communities=4)
    shutil.copy(folder / "graph.parquet", folder / f"{SNAPSHOT}.parquet")
    shutil.copy(folder / "graph.parquet", folder / f"{NEXT}.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWHIN_NO_TRACKING", "1")
        patch.setattr("twhin_pipeline.training.train.make_reporter", lambda rank: SilentReporter())
        assert live(run_of(folder)) == list(CHAIN)
        yield folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder, as it is again after the test; times of files stay."""
    kept = shutil.copytree(whole, tmp_path / "kept")
    yield whole
    shutil.rmtree(whole)
    shutil.copytree(kept, whole)


def test_a_chain_of_which_nothing_changed_runs_no_stage(whole: Path) -> None:
    store = run_of(whole).store
    before = {asset: store.versions_of(asset, SNAPSHOT) for asset in store.assets()}
    assert live(run_of(whole)) == []
    assert {asset: store.versions_of(asset, SNAPSHOT) for asset in store.assets()} == before
    assert len(releases.history(store)) == 1


FROM_TRAIN = ["train", "evaluate", "export", "compare", "publish", "decide"]


@pytest.mark.parametrize(
    ("override", "ran"),
    [
        ("training.num_epochs=2", FROM_TRAIN),
        ("training.seed=5", FROM_TRAIN),
        ("negatives.degree_share=0.3", ["sample", *FROM_TRAIN]),
        ("vocabulary.min_count=2", ["vocabulary", "sample", *FROM_TRAIN]),
        ("source.max_growth=9", ["ingest", "vocabulary", "sample", *FROM_TRAIN]),
        ("export.normalize=true", ["evaluate", "export", "compare", "publish", "decide"]),
    ],
)
def test_another_value_of_a_field_runs_the_stages_that_read_it_and_those_after(
    folder: Path, override: str, ran: list[str]
) -> None:
    run = run_of(folder, override)
    found = [name for name in CHAIN if chain.made_before(run, STAGES[name], lambda line: None) is None]
    assert found[0] == ran[0]
    assert live(run) == ran


def test_a_file_of_the_source_that_changed_is_read_again(folder: Path) -> None:
    os.utime(folder / f"{SNAPSHOT}.parquet")
    assert live(run_of(folder)) == list(CHAIN)


def test_a_day_of_a_log_is_read_again_where_a_row_of_it_changed_and_not_where_the_log_grew(tmp_path: Path) -> None:
    log, names = tmp_path / "log.parquet", ("lhs", "rel", "rhs", "at")
    rows = [("a", "fav", "x", SNAPSHOT), ("b", "fav", "y", SNAPSHOT)]
    write(log, rows, names)
    config = make_config(log, source={"columns": {"time": "at"}})
    store = Store(str(tmp_path / "home"))
    raw_edges.ingest(config, store, SNAPSHOT)
    pass_checks(store, SNAPSHOT)

    def reason() -> str | None:
        return unchanged.reason_to_run(config, store, SNAPSHOT, STAGES["ingest"])

    assert reason() is None
    write(log, [("c", "fav", "x", NEXT), *reversed(rows)], names)
    assert reason() is None
    write(log, [("c", "fav", "x", NEXT), *rows, ("late", "fav", "x", SNAPSHOT)], names)
    assert reason() == "the log's rows of this snapshot changed"


def test_tables_that_a_check_refused_or_that_are_gone_are_made_anew(folder: Path) -> None:
    run = run_of(folder)
    manifest = run.store.manifest("evaluation", SNAPSHOT)
    run.store.judge(
        manifest, Verdict("failed", "now", [{"name": "x", "passed": False, "blocking": True, "finding": ""}])
    )
    ran = live(run)
    assert ran[0] == "evaluate" and "train" not in ran and ran[-1] == "decide"
    shutil.rmtree(folder / "home" / "held_out" / "test")
    assert live(run)[0] == "sample"


def test_a_chain_that_broke_off_goes_on_from_the_stage_that_did_not_end(folder: Path) -> None:
    for name in ("drift", "published", "promotion", "releases"):
        shutil.rmtree(folder / "home" / name)
    assert live(run_of(folder)) == ["compare", "publish", "decide"]


def test_a_run_that_ended_before_its_release_was_written_publishes_again(folder: Path) -> None:
    home = folder / "home"
    shutil.rmtree(home / "promotion")
    shutil.rmtree(home / "releases")
    assert live(run_of(folder)) == ["publish", "decide"]
    assert len(releases.history(Store(str(home)))) == 1


def test_a_later_day_trains_again_where_the_day_before_was_made_anew(folder: Path) -> None:
    later = run_of(folder, snapshot=NEXT)
    assert live(later) == list(CHAIN) and live(later) == []
    assert live(run_of(folder, "training.seed=5")) == FROM_TRAIN  # it is older, so it is held back
    assert live(later) == []
    releases.promote(later.store, releases.names(later.store)[1], "me", "test")
    assert live(later)[0] == "train"


def test_what_was_accepted_in_spite_of_a_check_is_gone_on_from(folder: Path) -> None:
    run = run_of(folder)
    run.store.judge(run.store.manifest("raw_edges", SNAPSHOT), Verdict("overruled", "now", by="me", reason="known"))
    for name in ("held_out", "training_set"):
        shutil.rmtree(folder / "home" / name)
    assert live(run) == ["sample", *FROM_TRAIN]


def test_an_index_is_made_anew_for_other_vectors_or_another_recall_and_the_release_with_it(folder: Path) -> None:
    flat = "indexes.kind=flat"
    assert live(run_of(folder, flat), "index") == ["index", "publish", "decide"]  # the release before has no index
    assert live(run_of(folder, flat), "index") == []
    half = "export.data_type=fp16"
    assert live(run_of(folder, flat, half), "index") == ["evaluate", "export", "index", "compare", "publish", "decide"]
    store = run_of(folder).store
    published = store.manifest("published", SNAPSHOT)
    assert published.parents["index/item"] == store.manifest("index/item", SNAPSHOT).version
    release = releases.of_published(store, SNAPSHOT, published.version)[-1]
    assert {"index/user", "index/item"} & set(release.tables) == {
        name for name in store.assets() if name.startswith("index/")
    }
    assert live(run_of(folder, flat, half, "indexes.recall=0.5"), "index") == ["index", "publish", "decide"]
    assert live(run_of(folder, half, "indexes.kind=none")) == ["publish", "decide"]
    latest = releases.latest(store)
    assert latest is not None and not any(name.startswith("index/") for name in latest.tables)


def test_a_refit_of_a_model_that_stays_is_not_trained_again(folder: Path) -> None:
    refit = "training.refit=true"
    ran = ["evaluate", "refit", "export", "compare", "publish", "decide"]
    assert live(run_of(folder, refit), "refit") == ran
    assert live(run_of(folder, refit), "refit") == []
    seed = "training.seed=5"
    assert live(run_of(folder, refit, seed), "refit") == ["train", *ran]
    later = run_of(folder, refit, seed, snapshot=NEXT)
    assert "refit" in live(later, "refit") and live(later, "refit") == []
