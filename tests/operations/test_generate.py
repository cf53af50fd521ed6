"""Generated graphs: seeded, of the size, types, communities and degrees asked for, and ready to run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from twhin_pipeline.config import load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, source, vocabulary
from twhin_pipeline.operations import generate
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import negatives, positives

SMALL = {"users": 400, "items": 200, "edges": 5000, "communities": 10}
TWITTER = Path(__file__).resolve().parents[2] / "configs" / "twitter.yaml"


def numbers(table, side):
    """Return the entity type and the number of each id."""
    parts = [value.rpartition("_") for value in table[side].to_pylist()]
    return [kind for kind, _, _ in parts], np.array([int(number) for _, _, number in parts])


def test_the_graph_has_the_types_and_the_size_asked_for(tmp_path):
    path = f"{tmp_path}/g.parquet"
    generate.generate(path, **SMALL)
    table = pq.read_table(path)
    assert table.num_rows == 5000
    heads, lhs = numbers(table, "lhs")
    tails, rhs = numbers(table, "rhs")
    assert set(heads) == {"user"} and lhs.max() < 400
    by_relation = {}
    for rel, tail in zip(table["rel"].to_pylist(), tails, strict=True):
        by_relation.setdefault(rel, set()).add(tail)
    assert by_relation == {"follows": {"user"}, "fav": {"item"}, "reply": {"item"}, "retweet": {"item"}}
    assert rhs[np.array(tails) == "item"].max() < 200
    assert not any(a == b for a, b in zip(table["lhs"].to_pylist(), table["rhs"].to_pylist(), strict=True))


@pytest.mark.parametrize("within", [0.0, 0.5, 1.0])
def test_communities_are_planted_with_the_probability_asked_for(tmp_path, within):
    path = f"{tmp_path}/g.parquet"
    generate.generate(path, **{**SMALL, "edges": 20_000, "communities": 10}, within=within, exponent=0.0)
    table = pq.read_table(path)
    same = (numbers(table, "lhs")[1] % 10 == numbers(table, "rhs")[1] % 10).mean()
    # Beside the planted ones, a tenth of the rest meets by chance.
    assert same == pytest.approx(within + (1 - within) / 10, abs=0.02)


def test_degrees_follow_the_power_law_asked_for(tmp_path):
    path = f"{tmp_path}/g.parquet"
    generate.generate(path, users=1000, items=1000, edges=200_000, communities=1, exponent=0.8)
    count = np.bincount(numbers(pq.read_table(path), "lhs")[1], minlength=1000)
    ranks = np.arange(10, 1000)
    slope = np.polyfit(np.log(ranks + 1), np.log(count[10:]), 1)[0]
    assert slope == pytest.approx(-0.8, abs=0.05)


def test_a_seed_gives_the_same_file_and_blocks_do_not_repeat(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "BLOCK", 1000)
    paths = [f"{tmp_path}/{name}.parquet" for name in "abc"]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        generate.generate(path, **SMALL, seed=seed)
    first, again, other = (pq.read_table(path) for path in paths)
    assert first.equals(again) and not first.equals(other)
    assert not first.slice(0, 1000).equals(first.slice(1000, 1000))
    assert pq.ParquetFile(paths[0]).num_row_groups == 5


@pytest.mark.parametrize("ids", ["string", "integer", "indexed"])
def test_the_configuration_beside_it_runs_as_it_is(tmp_path, ids):
    config = load_config(generate.generate(f"{tmp_path}/g.parquet", **SMALL, ids=ids), ["negatives.epochs=1"])
    store = Store(f"{tmp_path}/home")
    (snapshot,) = source.find_snapshots(config)
    assert raw_edges.ingest(config, store, snapshot).details["rejected"] == 0
    vocabulary.build(config, store, snapshot)
    positives.build_positives(config, store, snapshot)
    found = negatives.build(config, store, snapshot)
    assert found["training_set/negatives"].rows > 0


def test_the_published_configuration_runs_on_generated_edges(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(str(TWITTER), ["training.num_epochs=1"])
    assert generate.generate_like(config) == "examples/twitter/part-00000.parquet"
    store = Store(f"{tmp_path}/home")
    (snapshot,) = source.find_snapshots(config)
    raw_edges.ingest(config, store, snapshot)
    sizes = {name: manifest.rows for name, manifest in vocabulary.build(config, store, snapshot).items()}
    assert sizes == {"user": 424_241, "tweet": 72_543}
    manifests = positives.build_positives(config, store, snapshot)
    merged = store.manifest("raw_edges", snapshot).details["duplicates_merged"]
    assert sum(manifest.rows for manifest in manifests.values()) == 10_000 - merged
    assert 0 < manifests["held_out/validation"].rows <= 10
    found = negatives.build(config, store, snapshot)["training_set/negatives"]
    assert found.details["pool"] == 0 and found.details["in_batch"] == 10


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"edges": 0}, "edges must be at least 1, got 0"),
        ({"users": 1}, "at least 2 entities"),
        ({"within": 1.5}, "within must be between 0 and 1, got 1.5"),
        ({"communities": 0}, "communities must be at least 1"),
        ({"exponent": -1.0}, "exponent must be between 0 and 3"),
        ({"ids": "uuid"}, "ids must be string, integer or indexed, got 'uuid'"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_a_number_out_of_range_is_one_clear_error(tmp_path, wrong, told):
    with pytest.raises(UserError, match=told):
        generate.generate(f"{tmp_path}/g.parquet", **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_parquet_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"must be a local path that ends in \.parquet"):
        generate.generate(f"{tmp_path}/g.csv", **SMALL)
