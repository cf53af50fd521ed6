"""The quality benchmarks: their figures are evaluation's, their splits are as published, and mistakes are told."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twhin_pipeline import pipeline
from twhin_pipeline.config import TwhinConfig, as_override, load_config, recipes, relations
from twhin_pipeline.config.recipes import Counts
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import quality

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
QUICK = (
    "training.num_epochs=2",
    "train_data.per_replica_batch_size=256",
    "train_data.global_negatives=16",
    "train_data.sampled_per_step=null",
    "negatives.chunk_size=64",
    "launch.device=cpu",
    "launch.data_threads=1",
)


def write(path: Path, edges: list[tuple], names: tuple[str, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [list(column) for column in zip(*sorted(edges), strict=True)]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)


def flickr(folder: Path) -> None:
    """Write users who follow and favorite, in the format of the real ones; some have one favorite only."""
    rng = np.random.default_rng(0)
    follows = {(int(a), "follows", int(b)) for a, b in rng.integers(0, 60, (300, 2)) if a != b}
    favorites = {(int(a), "favorites", 1000 + int(b)) for a, b in rng.integers(0, 40, (400, 2))}
    favorites |= {(40 + i, "favorites", 1000 + int(rng.integers(0, 40))) for i in range(20)}
    write(folder / "flickr" / "edges.parquet", list(follows | favorites), ("lhs", "rel", "rhs"))


def gowalla(folder: Path) -> None:
    """Write visits in the format of the real ones."""
    rng = np.random.default_rng(0)
    pairs = sorted({(int(u), int(p)) for u, p in rng.integers(0, 40, (900, 2))})
    splits = np.where(rng.random(len(pairs)) < 0.2, "test", "train").tolist()
    edges = [(u, "visits", p, split) for (u, p), split in zip(pairs, splits, strict=True)]
    write(folder / "gowalla" / "edges.parquet", edges, ("lhs", "rel", "rhs", "split"))


def sampled(name: str, data: Path, home: Path, *overrides: str) -> tuple[Store, TwhinConfig]:
    """Run the data stages of a benchmark."""
    benchmark = quality.BENCHMARKS[name]
    path = str(ROOT / "configs" / benchmark.config)
    given = [as_override("source.path", str(data / benchmark.source)), *QUICK, *overrides]
    run = pipeline.Run(load_config(path, given), path, given, Store(str(home)), benchmark.snapshot)
    for stage in ("ingest", "vocabulary", "sample"):
        pipeline.run_stage(run, pipeline.STAGES[stage], lambda line: None)
    return run.store, run.config


@pytest.mark.parametrize("name", quality.BENCHMARKS)
def test_every_benchmark_has_a_configuration_that_measures_its_figures(name):
    benchmark = quality.BENCHMARKS[name]
    config = relations.with_found(load_config(str(ROOT / "configs" / benchmark.config)), ["r"])
    model = config.model
    counts = Counts(dict.fromkeys(model.relation_names, 1000), dict.fromkeys(model.table_names, 100))
    config = recipes.apply(config, counts).config
    options = config.evaluation
    known = {"filtered_mrr", *(f"filtered_hits@{k}" for k in options.hits_at)}
    known |= {f"{kind}@{k}" for k in options.recall_at for kind in ("recall", "ndcg")}
    assert set(benchmark.metrics) <= known
    assert all(set(figures) <= set(benchmark.metrics) for figures in benchmark.published.values())
    assert config.source.snapshots == [benchmark.snapshot]
    # Chosen on validation edges as the test is measured, and trained to the end of the epochs.
    assert config.training.selection_metric in benchmark.metrics


def test_figures_are_those_of_the_evaluation(tmp_path):
    benchmark = quality.BENCHMARKS["debian-temporal"]
    store = Store(str(tmp_path))
    rows = [
        {"relation": relation, "side": side, "metric": metric, "value": value}
        for relation, value in (("depends", 0.25), ("all", 0.5))
        for side in ("lhs", "rhs", "both")
        for metric in ("filtered_mrr", "raw_mrr")
    ]
    with store.replace("evaluation", benchmark.snapshot, config_hash="c") as draft:
        draft.write(pa.Table.from_pylist(rows))
        metrics = {"filtered_mrr": 0.5, "filtered_hits@10": 0.75, "raw_mrr": 0.1}
        draft.details = {"metrics": metrics, "baseline": {"filtered_mrr": 0.01}}
    ours, baseline, relations = quality.figures_of(store, benchmark)
    assert ours == {"filtered_mrr": 0.5, "filtered_hits@10": 0.75} and baseline == {"filtered_mrr": 0.01}
    assert relations == {"depends": {"filtered_mrr": 0.25}}
    with pytest.raises(UserError, match=r"no recall@20, ndcg@20; name its k"):
        quality.figures_of(store, replace(benchmark, metrics=quality.RETRIEVAL))


def test_one_relation_by_itself_has_the_same_test_edges_as_with_the_others(tmp_path):
    """By itself a user's only favorite would stay in training; beside `follows` it can be in the test."""
    flickr(tmp_path)
    snapshot = quality.BENCHMARKS["flickr"].snapshot
    store, config = sampled("flickr", tmp_path, tmp_path / "whole", "split.test=0.3")
    file = tmp_path / "favorites.parquet"
    quality.write_only(store, config, snapshot, "favorites", file)
    written = pq.read_table(file).to_pylist()
    source = pq.read_table(tmp_path / "flickr" / "edges.parquet").to_pylist()
    assert sorted((e["lhs"], e["rhs"]) for e in written) == [
        (e["lhs"], e["rhs"]) for e in source if e["rel"] == "favorites"
    ]
    alone, less = sampled(
        "flickr", tmp_path, tmp_path / "alone", "split.test=0.3", *quality.only(config, "favorites", file)
    )
    assert less.model.relation_names == ["favorites"]
    assert quality.same_edges((store, alone), (config, less), snapshot, "favorites")
    for asset in ("held_out/validation", "held_out/test"):
        assert alone.manifest(asset, snapshot).rows == store.manifest(asset, snapshot).rows > 0
    assert alone.manifest("vocabulary/photo", snapshot).rows == store.manifest("vocabulary/photo", snapshot).rows
    # What would come of the random split is another test set: the comparison can tell.
    random = as_override("source.path", str(only_favorites(tmp_path)))
    one = [*quality.only(config, "favorites", file)[2:], "split.test=0.3"]
    other, fewer = sampled("flickr", tmp_path, tmp_path / "random", random, *one)
    assert not quality.same_edges((store, other), (config, fewer), snapshot, "favorites")


def only_favorites(folder: Path) -> Path:
    edges = pq.read_table(folder / "flickr" / "edges.parquet").to_pylist()
    names = ("lhs", "rel", "rhs")
    write(folder / "random.parquet", [tuple(e[n] for n in names) for e in edges if e["rel"] == "favorites"], names)
    return folder / "random.parquet"


@pytest.mark.long
def test_a_benchmark_is_trained_refit_and_printed_from_the_front_door(tmp_path, capsys):
    """The refit trains on every edge that is published for training, for the epochs that validation chose."""
    gowalla(tmp_path)
    file = tmp_path / "figures.json"
    arguments = ["gowalla", "--data", str(tmp_path), "--home", str(tmp_path / "home"), "--json", str(file), "--refit"]
    for override in QUICK:
        arguments += ["--set", override]
    assert quality.main([*arguments, "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report["seed"] == 3 and report["config"]["training"]["seed"] == 3 and report["cores"] >= 1
    snapshot = quality.BENCHMARKS["gowalla"].snapshot
    stores = [Store(result["home"]) for result in report["results"]]
    edges = pq.read_table(tmp_path / "gowalla" / "edges.parquet")["split"].to_pylist()
    sizes = [
        [store.manifest(t, snapshot).rows for t in ("training_set/positives", "held_out/validation", "held_out/test")]
        for store in stores
    ]
    assert sizes[1] == [edges.count("train"), 0, edges.count("test")]
    assert sizes[0][1] > 0 and sizes[0][0] + sizes[0][1] == edges.count("train") and sizes[0][2] == sizes[1][2]
    first, again = report["results"]
    assert again["chosen_epoch"] == first["chosen_epoch"]
    for result, store in zip(report["results"], stores, strict=True):
        measured = store.manifest("evaluation", snapshot).details["metrics"]
        assert result["figures"] == {name: measured[name] for name in quality.RETRIEVAL}
        assert f"| {result['what']} | {result['figures']['recall@20']:.4f} |" in shown
    assert "| LightGCN | 0.1820 | 0.1547 |" in shown and "seed 3, commit" in shown


def test_absent_data_is_told_with_exit_code_2(tmp_path, capsys):
    for name in quality.BENCHMARKS:
        assert quality.main([name, "--data", str(tmp_path), "--home", str(tmp_path / "home")]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"quality: {tmp_path}: has no ") and told.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_a_home_in_use_and_a_refit_without_need_are_refused(tmp_path):
    (tmp_path / "fb15k-237").mkdir()
    (tmp_path / "fb15k-237" / "edges.parquet").touch()
    with pytest.raises(UserError, match="is not empty"):
        quality.run("fb15k-237", data=tmp_path, home=tmp_path)
    with pytest.raises(UserError, match="comes with its own validation edges"):
        quality.run("fb15k-237", data=tmp_path, home=tmp_path / "home", refit=True)


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("fb15k-237", {"train": 272_115, "validation": 17_535, "test": 20_466}),
        ("wn18rr", {"train": 86_835, "validation": 3_034, "test": 3_134}),
        ("gowalla", {"train": 810_128, "test": 217_242}),
    ],
)
def test_the_real_data_have_the_published_split(name, counts):
    file = DATA / quality.BENCHMARKS[name].source
    if not file.exists():
        pytest.skip(f"{file} is not there")
    found = duckdb.sql(f"SELECT split, count(*) FROM read_parquet('{file}') GROUP BY split").fetchall()
    assert dict(found) == counts
