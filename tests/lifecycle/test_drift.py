"""Drift between two releases, entity type by entity type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.made_releases import DAYS, D, release_of, rotation, vectors
from twhin_pipeline.lifecycle.drift import compared, drift
from twhin_pipeline.store import Store, database
from twhin_pipeline.vectors import compatibility


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "home"))


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
    found = compared("user", compatibility.Shared(0, 3, 2, empty, empty, np.zeros(0, np.int64)), 5)
    assert (found.added, found.departed, found.cosine, found.neighbors) == (3, 2, None, None)
