"""Two releases side by side: the ids that both have, the map from one space into the other, and the drift."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle.drift import compared, drift
from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors import compatibility
from twhin_pipeline.vectors.model_files import vectors_array

D = 6
DAYS = ("2025-01-01", "2025-01-02", "2025-01-03")


def rotation(seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))[0]


def export(store: Store, snapshot: str, vectors: dict[str, np.ndarray], untrained: tuple[str, ...] = ()) -> str:
    ids = sorted(vectors, key=lambda one: hash(snapshot) ^ hash(one))  # another order each day
    table = pa.table(
        {
            "id": pa.array(ids),
            "embedding": vectors_array(np.array([vectors[one] for one in ids], np.float32)),
            "trained_edges": pa.array([0 if one in untrained else 3 for one in ids]),
        }
    )
    with store.replace("embeddings/user", snapshot, config_hash="c") as draft:
        draft.write(table)
    return store.manifest("embeddings/user", snapshot).version


def publish(store: Store, snapshot: str, vectors: dict[str, np.ndarray], kind: str = "orthogonal") -> Release:
    """What the stage does with its maps."""
    tables = {"embeddings/user": export(store, snapshot, vectors)}
    before = releases.current(store)
    with store.replace("published", snapshot, config_hash="c") as draft:
        if before is None:
            draft.write(compatibility.SCHEMA.empty_table())
        else:
            with database.connect(store=store) as con:
                draft.write(compatibility.table(con, store, before, tables, snapshot, kind))
            draft.details = {"compatible_with": before.name}
    tables["published"] = store.manifest("published", snapshot).version
    release = releases.make(store, snapshot, tables, {}, None)
    releases.promote(store, release.name, "me", "test")
    return release


def vectors(count: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
    drawn = np.random.default_rng(seed).normal(size=(count, D))
    return {f"u{i}": row for i, row in enumerate(drawn)}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "home"))


def release_of(store: Store, snapshot: str, rows: dict[str, np.ndarray], untrained: tuple[str, ...] = ()) -> Release:
    return releases.make(store, snapshot, {"embeddings/user": export(store, snapshot, rows, untrained)}, {}, None)


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
    first, second = publish(store, DAYS[0], vectors()), publish(store, DAYS[1], vectors(seed=1))
    with pytest.raises(UserError, match=rf"no map leads from release {second.name} to none.*into {first.name}"):
        compatibility.maps_into(store, second, "none")


def test_drift_is_that_of_a_plain_loop(store: Store) -> None:
    rng = np.random.default_rng(3)
    first = vectors()
    second = {one: row + 0.3 * rng.normal(size=D) for one, row in first.items()}
    before, after = release_of(store, DAYS[0], first), release_of(store, DAYS[1], second)
    with database.connect(store=store) as con:
        [found] = drift(con, store, before, after, k=3)
    cosines = [float(a @ second[one] / np.linalg.norm(a) / np.linalg.norm(second[one])) for one, a in first.items()]
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert found.cosine_p05 == pytest.approx(np.quantile(cosines, 0.05), abs=1e-5)
    length = np.mean([np.linalg.norm(a) for a in first.values()])
    assert found.distance == pytest.approx(
        np.mean([np.linalg.norm(second[one] - a) for one, a in first.items()]) / length, abs=1e-5
    )
    kept = []
    for one in first:
        nearest = [
            sorted(
                (other for other in rows if other != one),
                key=lambda other: (
                    -float(rows[one] @ rows[other] / np.linalg.norm(rows[one]) / np.linalg.norm(rows[other]))
                ),
            )[:3]
            for rows in (first, second)
        ]
        kept.append(len(set(nearest[0]) & set(nearest[1])) / 3)
    assert found.neighbors == pytest.approx(np.mean(kept), abs=1e-6)


def test_turned_axes_are_drift_of_vectors_and_none_of_neighbors_or_after_the_rotation(store: Store) -> None:
    first = vectors()
    before = release_of(store, DAYS[0], first)
    after = release_of(store, DAYS[1], {one: row @ rotation(1) for one, row in first.items()})
    with database.connect(store=store) as con:
        [found] = drift(con, store, before, after)
    assert found.cosine is not None and found.cosine < 0.8
    assert found.aligned_cosine == pytest.approx(1, abs=1e-5) and found.neighbors == 1
    assert found.length == pytest.approx(1, abs=1e-5)


def test_where_nothing_was_kept_there_is_nothing_to_measure() -> None:
    empty = np.zeros((0, 0), np.float32)
    found = compared("user", compatibility.Shared(0, 3, 2, empty, empty), 5)
    assert (found.added, found.departed, found.cosine, found.neighbors) == (3, 2, None, None)
