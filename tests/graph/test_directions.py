"""Directions: the groups that edges keep to are counted, and what the degrees make by chance is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edge_files import SNAPSHOT, make_config, pass_checks, store_at, write

from twhin_pipeline.config import TwhinConfig, parse_config, recipes, relations
from twhin_pipeline.graph import directions, raw_edges, vocabulary
from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]
DAYS = ("2025-01-01", "2025-01-02", "2025-01-03")


def planted(groups: int, *, heads: int = 1_500, tails: int = 600, edges: int = 30_000, seed: int = 0) -> list[Array]:
    """Draw edges, most of which stay in their head's group; tails are popular unequally."""
    rng = np.random.default_rng(seed)
    popular = rng.permutation(1 / np.arange(1, tails + 1) ** 0.7)
    head = rng.integers(heads, size=edges)
    tail = rng.choice(tails, size=edges, p=popular / popular.sum())
    if groups:
        inside = rng.random(edges) < 0.8
        # The tail of the head's group that is nearest: groups are residues.
        tail[inside] = (tail[inside] // groups) * groups + head[inside] % groups
    return [head, np.minimum(tail, tails - 1)]


def plain(heads: Array, tails: Array, most: int) -> int:
    """Count directions with dense matrices, and loops over the edges."""
    edges = sorted(set(zip(heads.tolist(), tails.tolist(), strict=True)))
    names = [{name: place for place, name in enumerate(sorted({edge[side] for edge in edges}))} for side in (0, 1)]

    def values(ends: list[tuple[int, int]]) -> Array:
        matrix = np.zeros((len(names[0]), len(names[1])))
        for head, tail in ends:
            matrix[head, tail] = 1
        degrees = [matrix.sum(1), matrix.sum(0)]
        for side, degree in enumerate(degrees):
            scale = 1 / np.sqrt(degree + degree.mean())
            matrix = matrix * (scale[:, None] if side == 0 else scale[None, :])
        return np.linalg.svd(matrix, compute_uv=False)

    pairs = [(names[0][head], names[1][tail]) for head, tail in edges]
    anew = np.random.default_rng(0).permutation([tail for _, tail in pairs])
    chance = values([(head, int(tail)) for (head, _), tail in zip(pairs, anew, strict=True)])[1]
    return int((values(pairs)[:most] > chance).sum())


@pytest.mark.parametrize("groups", [2, 5, 12, 40])
def test_planted_groups_are_counted(groups: int) -> None:
    assert directions.of_edges(*planted(groups)) == groups


def test_edges_that_are_drawn_by_degree_alone_have_no_direction_but_that_of_degrees() -> None:
    assert directions.of_edges(*planted(0)) == 1


def test_counting_stops_where_there_are_enough() -> None:
    many = planted(100, edges=60_000)
    assert directions.of_edges(*many) == directions.MOST == 65
    assert directions.of_edges(*many, most=10) == 10


@pytest.mark.parametrize("groups", [0, 3, 7])
def test_the_count_is_that_of_dense_matrices(groups: int) -> None:
    heads, tails = planted(groups, heads=120, tails=80, edges=1_500, seed=groups)
    assert directions.of_edges(heads, tails, most=20) == plain(heads, tails, most=20)


def test_names_order_and_repeats_of_edges_do_not_matter() -> None:
    heads, tails = planted(5, heads=200, tails=100, edges=4_000)
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(heads)), 2))
    assert directions.of_edges(3 * heads[order] + 7, tails[order] + 10**9) == 5


def test_few_entities_have_none() -> None:
    assert directions.of_edges(*planted(5, heads=1_000, tails=60)) == 0
    assert directions.of_edges(np.zeros(0, np.int64), np.zeros(0, np.int64)) == 0


def rows(groups: int, relation: str = "fav", **more: Any) -> list[tuple[str, ...]]:
    heads, tails = planted(groups, **more)
    letter = "u" if relation == "follows" else "i"
    return [(f"u{head}", relation, f"{letter}{tail}") for head, tail in zip(heads, tails, strict=True)]


def build(config: TwhinConfig, store: Store, snapshot: str = SNAPSHOT) -> Any:
    raw_edges.ingest(config, store, snapshot)
    made = vocabulary.build(config, store, snapshot)
    pass_checks(store, snapshot)
    return {name: manifest.details["first"] for name, manifest in made.items()}


def test_vocabularies_say_how_many_directions_the_edges_of_two_types_have(tmp_path: Path) -> None:
    # Two relations that say half of it each.
    one, other = planted(6, edges=20_000), planted(6, edges=20_000, seed=1)
    edges = [(f"u{h}", "fav", f"i{t}") for h, t in zip(*one, strict=True)]
    edges += [(f"u{h}", "reply", f"i{t}") for h, t in zip(*other, strict=True)]
    edges += rows(3, "follows", tails=900)
    first = build(make_config(write(tmp_path / "e.parquet", edges)), store_at(tmp_path))
    assert first["user"] == first["item"]
    assert first["user"]["directions"] == {"user": {"user": 3, "item": 6}}
    assert first["user"]["edges"] == len(set(edges))


def test_edges_that_the_source_holds_out_are_not_counted(tmp_path: Path) -> None:
    edges = [(*row, "test" if number % 3 == 0 else "train") for number, row in enumerate(rows(6))]
    kept = [row[:3] for row in edges if row[3] == "train"]
    held = make_config(
        write(tmp_path / "e.parquet", edges, ("lhs", "rel", "rhs", "split")),
        source={"columns": {"split": "split"}}, split={"strategy": "given"},
    )  # fmt: skip
    first = build(held, Store(str(tmp_path / "a")))["user"]
    alone = build(make_config(write(tmp_path / "k.parquet", kept)), Store(str(tmp_path / "b")))["user"]
    assert first["directions"] == alone["directions"] and first["edges"] > alone["edges"]


def test_a_graph_that_the_recipe_would_not_train_in_more_dimensions_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = make_config(write(tmp_path / "s.parquet", rows(6, edges=3_000)))  # fewer than ten edges an entity
    assert build(sparse, Store(str(tmp_path / "a")))["user"]["directions"] == {}
    monkeypatch.setattr(recipes, "WORK", 10_000)
    large = make_config(write(tmp_path / "l.parquet", rows(6)))
    assert build(large, Store(str(tmp_path / "b")))["user"]["directions"] == {}


def test_what_the_graph_was_at_first_is_handed_on_from_day_to_day(tmp_path: Path) -> None:
    store, config = store_at(tmp_path), make_config(f"{tmp_path}/{{snapshot}}.parquet")
    for number, day in enumerate(DAYS):
        write(tmp_path / f"{day}.parquet", rows(4 + 3 * number, seed=number))
    found = [build(config, store, day)["user"] for day in DAYS]
    assert found[0]["directions"] == {"user": {"item": 4}}
    assert found[0] == found[1] == found[2]
    assert recipes.Counts.read(config, store, DAYS[2]).first == recipes.AtFirst(**found[0])  # type: ignore[union-attr]


@pytest.mark.parametrize(("groups", "dim"), [(100, 128), (20, 64)])
def test_what_is_counted_decides_the_dimension_and_the_explanation_says_why(
    tmp_path: Path, groups: int, dim: int
) -> None:
    path = write(tmp_path / "e.parquet", rows(groups, "view", edges=60_000))
    config = parse_config(
        {
            "sources": [{"path": str(path)}],
            "model": {
                "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
                "relations": [{"name": "view", "lhs": "user", "rhs": "item"}],
            },
            "launch": {"data_threads": 2, "duckdb_memory_limit": "1GB"},
        }
    )
    store = store_at(tmp_path)
    build(config, store)
    recipe = relations.recipe(config, store, SNAPSHOT)
    assert recipe.config.model.embedding_dim == dim
    (line,) = (line for line in recipe.explanation().splitlines() if ".embedding_dim=" in line)
    assert ("more than 64 directions stand out of its edges" in line) == (groups == 100)


def test_vocabularies_that_grow_from_those_of_an_earlier_version_are_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = store_at(tmp_path), make_config(f"{tmp_path}/{{snapshot}}.parquet")
    for day in DAYS[:2]:
        write(tmp_path / f"{day}.parquet", rows(4))
    with monkeypatch.context() as earlier:
        earlier.setattr(directions, "at_first", lambda *_: None)
        build(config, store, DAYS[0])
    assert build(config, store, DAYS[1]) == {"user": None, "item": None}
    counts = recipes.Counts.read(config, store, DAYS[1])
    assert counts is not None and counts.first is None
