"""Maps keep what is near together, name clusters by the graph, and are the same again."""

from __future__ import annotations

from collections import Counter
from math import log

import days
import numpy as np
import pytest
import small_store

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.views import entity_map
from twhin_pipeline.views.columns import described

SNAPSHOT = days.name(0)


def config(**maps) -> TwhinConfig:
    return TwhinConfig.model_validate(days.CONFIG.model_dump() | {"maps": {"entities": ["user", "item"], **maps}})


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    made = Store(f"{tmp_path_factory.mktemp('mapped')}/home")
    days.make(made, 0)
    run = Run(config(method="pca"), "c.yaml", [], made, SNAPSHOT)
    chain.make(run, chain.STAGES["map"], lambda line: None)
    return made


def test_a_map_has_every_trained_entity_the_most_trained_first(store):
    for entity in ("user", "item"):
        rows = store.read(f"map/{entity}", SNAPSHOT).to_pylist()
        vectors = {row["id"]: row for row in store.read(f"embeddings/{entity}", SNAPSHOT).to_pylist()}
        assert {row["id"] for row in rows} == {id for id, row in vectors.items() if row["trained_edges"] > 0}
        degrees = [row["trained_edges"] for row in rows]
        assert degrees == sorted(degrees, reverse=True)
        assert all(row["row"] == vectors[row["id"]]["row"] for row in rows)
        assert set(described(f"map/{entity}")) == set(rows[0])
        sizes = Counter(row["cluster"] for row in rows)
        assert [sizes[number] for number in sorted(sizes)] == sorted(sizes.values(), reverse=True)
        names = store.manifest(f"map/{entity}", SNAPSHOT).details["clusters"]
        assert all(row["cluster_name"] == names[row["cluster"]] for row in rows)


def test_a_map_of_fewer_points_has_the_most_trained_ones(store, tmp_path):
    entity_map.build(config(method="pca", points=10, entities=["item"]), store, SNAPSHOT)
    few = store.read("map/item", SNAPSHOT)["id"].to_pylist()
    vectors = store.read("embeddings/item", SNAPSHOT).to_pylist()
    expected = sorted(vectors, key=lambda row: (-row["trained_edges"], row["row"]))[:10]
    assert few == [row["id"] for row in expected]


def test_clusters_are_named_by_the_neighbors_that_set_them_apart(store):
    rows = store.read("map/user", SNAPSHOT).to_pylist()
    edges = store.read("raw_edges", SNAPSHOT).to_pylist()
    rng = np.random.default_rng(3)
    cluster = rng.integers(0, 3, len(rows))
    member = {row["id"]: int(number) for row, number in zip(rows, cluster, strict=True)}
    near = set()
    for edge in edges:
        lhs, rhs = small_store.RELATIONS[edge["rel"]]
        for mine, here, other, there in ((edge["lhs"], lhs, edge["rhs"], rhs), (edge["rhs"], rhs, edge["lhs"], lhs)):
            if here == "user" and mine in member:
                near.add((mine, there, other))
    everywhere = Counter((there, other) for _, there, other in near)
    sizes = Counter(member.values())
    expected = []
    for number in range(3):
        counted = Counter((there, other) for mine, there, other in near if member[mine] == number)
        scores = {
            end: n * log((n / sizes[number]) / (everywhere[end] / len(rows)))
            for end, n in counted.items()
            if n >= max(2, 0.05 * sizes[number])
        }
        best = sorted((end for end in scores if scores[end] > 0), key=lambda end: (-scores[end], *end))
        expected.append(", ".join(other for _, other in best[:2]))
    with entity_map.database.connect(store=store) as con:
        ids = store.read("map/user", SNAPSHOT)["id"]
        assert entity_map.named(con, days.CONFIG, store, SNAPSHOT, "user", ids, cluster) == expected


def test_a_cluster_without_common_neighbors_is_named_by_its_members(store):
    ids = store.read("map/user", SNAPSHOT)["id"]
    alone = np.arange(len(ids))
    with entity_map.database.connect(store=store) as con:
        named = entity_map.named(con, days.CONFIG, store, SNAPSHOT, "user", ids, alone)
    assert named == [f"around {one}" for one in ids.to_pylist()]


def test_principal_components_are_those_of_the_singular_values():
    vectors = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    points = entity_map.laid_out(vectors, "pca", 0)
    assert np.allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), atol=1e-4)
    assert entity_map.laid_out(vectors[:, :1], "pca", 0).shape == (50, 2)


@pytest.mark.long
def test_umap_keeps_what_is_near_together_and_gives_the_same_map_again():
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 500)
    vectors = (rng.normal(size=(5, 16))[group] + 0.2 * rng.normal(size=(500, 16))).astype(np.float32)
    points = entity_map.laid_out(vectors, "umap", 0)
    assert np.array_equal(points, entity_map.laid_out(vectors, "umap", 0))
    away = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(away, np.inf)
    nearest = np.argsort(away, axis=1)[:, :10]
    assert np.mean(group[nearest] == group[:, None]) > 0.99


def test_an_unknown_type_is_refused_when_the_configuration_is_read():
    with pytest.raises(UserError, match=r"maps.entities: unknown entity type 'usr'; did you mean 'user'"):
        parse_config({**days.CONFIG.model_dump(mode="json", exclude_defaults=True), "maps": {"entities": ["usr"]}})


def test_without_its_extra_a_map_says_which_one_it_needs(store, monkeypatch):
    monkeypatch.setattr("twhin_pipeline.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a map needs umap: pip install \"twhin-pipeline\[map\]\""):
        entity_map.build(config(), store, SNAPSHOT)


def test_by_default_there_is_no_map(store):
    assert chain.STAGES["map"].tables(days.CONFIG) == []
    said: list[str] = []
    assert chain.make(Run(days.CONFIG, "c.yaml", [], store, SNAPSHOT), chain.STAGES["map"], said.append) == {}
    assert "left out: maps.entities names no entity type" in said[0]
