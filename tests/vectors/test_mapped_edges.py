"""Known edges in mapped files: the same as a plain scan of `raw_edges`, whatever the ids and however often opened."""

from __future__ import annotations

from pathlib import Path

import days
import numpy as np
import pytest
import small_store
from small_store import NUM, RELATIONS

from twhin_pipeline import Interests
from twhin_pipeline.store import Store
from twhin_pipeline.vectors.known_tails import known_tails
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings


@pytest.fixture
def model(tmp_path: Path) -> TwhinEmbeddings:
    store = Store(str(tmp_path / "home"))
    days.make(store, 0)
    return load_model(store.root)


def test_they_are_those_of_the_table_for_every_head_and_relation(model: TwhinEmbeddings) -> None:
    model.map_known_edges()
    assert model._known._mapped is not None and model.store is not None
    heads = np.array([-1, *range(NUM["user"]), 3])
    for names in (["likes"], ["rates"], ["likes", "rates"], ["follows"]):
        lhs, rhs = RELATIONS[names[0]]
        found = model._known._mapped[lhs, rhs].pairs(heads, [list(RELATIONS).index(name) for name in names])
        assert (np.diff(found.queries) >= 0).all()
        for query, head in enumerate(heads.tolist()):
            mine = {str(id) for id in model.tables[rhs].ids(found.rows[found.queries == query])}
            plain = known_tails(model.store, model.snapshot, names, small_store.ids(lhs)[head]) if head >= 0 else set()
            assert mine == {str(one) for one in plain or ()}


@pytest.mark.parametrize("known", [True, "any"])
def test_recommendations_are_the_same_and_the_table_is_not_read(
    model: TwhinEmbeddings, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    users = small_store.ids("user")
    plain = {relation: [model.recommend(relation, id, 5, known) for id in users] for relation in RELATIONS}
    model.map_known_edges()
    monkeypatch.setattr(Store, "dataset", lambda *_: pytest.fail("raw_edges was read"))
    for relation, expected in plain.items():
        assert [model.recommend(relation, id, 5, known) for id in users] == expected
        table = model.recommend(relation, users, 5, known).read_all()
        assert table["rhs"].to_pylist() == [tail for best in expected for tail, _ in best]


def test_interests_too_come_from_them(model: TwhinEmbeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.store is not None
    options = {"k": 5, "interests": Interests(clusters=4, neighbors=3)}
    plain = model.recommend("likes", **options).read_all()
    other = load_model(model.store.root)
    other.map_known_edges()
    monkeypatch.setattr(Store, "dataset", lambda *_: pytest.fail("raw_edges was read"))
    assert plain.num_rows and other.recommend("likes", **options).read_all().equals(plain)


def test_the_files_are_made_once_and_mapped_read_only(model: TwhinEmbeddings, monkeypatch: pytest.MonkeyPatch) -> None:
    model.map_known_edges()
    assert model.store is not None
    monkeypatch.setattr(Store, "dataset", lambda *_: pytest.fail("raw_edges was read again"))
    other = load_model(model.store.root)
    other.map_known_edges()
    assert other._known._mapped is not None
    for edges in other._known._mapped.values():
        for part in (edges.start, edges.tail, edges.relation):
            assert not part.flags.writeable and not part.flags.owndata
