"""Two releases side by side: the ids that both have, and the map from one space into the other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.made_releases import DAYS, D, publish, release_of, rotation, vectors
from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, database
from twhin_pipeline.vectors import compatibility


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "home"))


def test_ids_are_matched_and_counted_whatever_their_order_and_untrained_ones_are_no_ids(store: Store) -> None:
    first, second = vectors(), vectors(seed=1)
    second["new"], second["idle"] = np.ones(D), np.ones(D)
    del second["u0"]
    before = release_of(store, DAYS[0], first)
    after = release_of(store, DAYS[1], second, untrained=("idle", "u1"))
    with database.connect(store=store) as con:
        both = compatibility.shared(con, store, before, after, "user", 1000)
        few = compatibility.shared(con, store, before, after, "user", 10)
    assert (both.kept, both.added, both.departed) == (38, 1, 2)
    pairs = {tuple(np.float32(first[one])): tuple(np.float32(second[one])) for one in first if one in second}
    assert len(both.before) == 38
    for row, other in zip(both.before, both.after, strict=True):
        assert pairs[tuple(row)] == tuple(other)
    np.testing.assert_array_equal(few.before, both.before[:10])
    assert (few.kept, few.added, few.departed) == (38, 1, 2)


def test_an_orthogonal_map_undoes_a_rotation_and_keeps_lengths() -> None:
    old = np.random.default_rng(0).normal(size=(50, D))
    matrix = compatibility.orthogonal(old, old @ rotation(1))
    np.testing.assert_allclose(old @ rotation(1) @ matrix, old, atol=1e-10)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(D), atol=1e-10)


def test_a_linear_map_is_the_ridge_regression_also_into_another_dimension() -> None:
    rng = np.random.default_rng(0)
    new, old = rng.normal(size=(50, D)), rng.normal(size=(50, D - 2))
    penalty = 1e-3 * np.square(new).sum() / D
    stacked = np.vstack([new, np.sqrt(penalty) * np.eye(D)])
    expected, *_ = np.linalg.lstsq(stacked, np.vstack([old, np.zeros((D, D - 2))]), rcond=None)
    np.testing.assert_allclose(compatibility.linear(old, new), expected, atol=1e-8)


@pytest.mark.parametrize("kind", ["orthogonal", "linear"])
def test_maps_of_consecutive_releases_lead_back_to_the_first(store: Store, kind: str) -> None:
    old = vectors()
    turned = {one: row @ rotation(1) for one, row in old.items()}
    again = {one: row @ rotation(2) for one, row in turned.items()}
    first, second, third = (
        publish(store, day, rows, kind) for day, rows in zip(DAYS, (old, turned, again), strict=True)
    )
    rows = np.array(list(again.values()))
    for release, expected in ((first, old), (second, turned)):
        matrix = compatibility.maps_into(store, third, release.name)["user"]
        np.testing.assert_allclose(rows @ matrix, np.array(list(expected.values())), atol=2e-2)
    assert compatibility.maps_into(store, third, third.name) == {}


def test_what_the_map_repairs_is_recorded(store: Store) -> None:
    old = vectors()
    publish(store, DAYS[0], old)
    publish(store, DAYS[1], {one: row @ rotation(1) for one, row in old.items()})
    [row] = store.read("published", DAYS[1]).to_pylist()
    assert (row["entity"], row["ids"], row["rows"], row["columns"]) == ("user", 40, D, D)
    assert row["distance_before"] > 0.5 and row["distance"] < 1e-5


def test_a_type_with_fewer_kept_ids_than_dimensions_has_no_map(store: Store) -> None:
    publish(store, DAYS[0], vectors(D))
    publish(store, DAYS[1], vectors(D))
    assert store.read("published", DAYS[1]).num_rows == 0


def test_a_release_that_no_map_leads_to_is_named_with_those_that_one_does(store: Store) -> None:
    first, second, third = (publish(store, day, vectors(seed=seed)) for seed, day in enumerate(DAYS))
    with pytest.raises(UserError, match=rf"no map leads from release {second.name} to {third.name}.*into {first.name}"):
        compatibility.maps_into(store, second, third.name)
    with pytest.raises(UserError, match=f"unknown release 'none'.*{first.name}"):
        compatibility.maps_into(store, second, "none")
