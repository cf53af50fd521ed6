"""Many interests: clusters get places in proportion, and a head of two tastes gets both."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import small_store
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import DIM, SNAPSHOT

from twhin_pipeline import Interests
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.vectors import mixture
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings

USERS, ITEMS = small_store.ids("user"), small_store.ids("item")
TASTES = 4
"""Items i, i + 4, i + 8 … point in nearly the same direction, of its own."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TwhinEmbeddings:
    """User 0 likes 6 items of taste 0 and 2 of taste 1; user 1 likes nothing, and is near to user 0; others taste 2."""
    folder = tmp_path_factory.mktemp("tastes")
    small = small_store.make(folder, config=small_store.config(model={"comparator": "cosine"}))
    rng = np.random.default_rng(0)
    items = np.eye(DIM)[np.arange(45) % TASTES] * 3 + rng.normal(0, 0.05, (45, DIM))
    users = np.eye(DIM)[np.full(30, 2)] + rng.normal(0, 0.05, (30, DIM))
    users[:2] = np.eye(DIM)[0] + rng.normal(0, 0.01, (2, DIM))
    vectors = {"user": users.astype(np.float32), "item": items.astype(np.float32)}
    still = {name: torch.zeros(DIM) for name in small_store.RELATIONS}
    small_store.write_model(small.store, small.config, vectors, Scorer.from_rows(small.config.model, still))
    export(small.config, small.store, SNAPSHOT)
    liked = [(0, taste + TASTES * i) for taste, count in ((0, 6), (1, 2)) for i in range(count)]
    liked += [(user, 2 + TASTES * (user % 5)) for user in range(2, 30)]
    rows = sorted((USERS[user], "likes", str(ITEMS[item])) for user, item in liked)
    with small.store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table([pa.array(column) for column in zip(*rows, strict=True)], names=["lhs", "rel", "rhs"]))
    return load_model(small.store.root)


def tastes(found: list[tuple[int, float]]) -> Counter[int]:
    return Counter(ITEMS.index(tail) % TASTES for tail, _ in found)


ALONE = Interests(clusters=TASTES, smoothing=0, own=0)


def test_a_head_of_two_tastes_gets_both_in_proportion_where_its_own_vector_has_one(model):
    assert tastes(model.recommend("likes", USERS[0], 4, untrained=True)) == {0: 4}
    found = model.recommend("likes", USERS[0], 4, untrained=True, interests=ALONE)
    assert tastes(found) == {0: 3, 1: 1}
    known = {ITEMS[taste + TASTES * i] for taste, count in ((0, 6), (1, 2)) for i in range(count)}
    assert known.isdisjoint(tail for tail, _ in found)
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)
    scores = dict(model.candidates("likes", USERS[0], 100, untrained=True))
    assert [score for _, score in found] == pytest.approx([scores[tail] for tail, _ in found], abs=1e-6)
    strongest = Interests(clusters=TASTES, smoothing=0, own=0, top=1)
    assert tastes(model.recommend("likes", USERS[0], 4, untrained=True, interests=strongest)) == {0: 4}
    excluded = [tail for tail, _ in found]
    others = model.recommend("likes", USERS[0], 4, exclude=excluded, untrained=True, interests=ALONE)
    assert len(others) == 4 and tastes(others)[0] == 1, "10 of taste 0 less 6 known and 3 excluded are 1"


def test_the_heads_own_vector_is_mixed_into_what_it_is_searched_by(model):
    some = Interests(clusters=TASTES, smoothing=0, own=0.3)
    assert tastes(model.recommend("likes", USERS[0], 4, untrained=True, interests=some)) == {0: 3, 1: 1}
    nothing_else = Interests(clusters=TASTES, smoothing=0, own=1)
    found = model.recommend("likes", USERS[0], 7, untrained=True, interests=nothing_else)
    assert [tail for tail, _ in found] == [tail for tail, _ in model.recommend("likes", USERS[0], 7, untrained=True)]


def test_a_head_that_engaged_with_nothing_is_searched_by_its_own_vector_or_its_neighbors_interests(model):
    own = model.recommend("likes", USERS[1], 4, untrained=True)
    alone = model.recommend("likes", USERS[1], 4, untrained=True, interests=ALONE)
    assert [tail for tail, _ in alone] == [tail for tail, _ in own]
    nearest = Interests(clusters=TASTES, smoothing=0.5, neighbors=1, own=0)
    assert tastes(model.recommend("likes", USERS[1], 4, untrained=True, interests=nearest)) == {0: 3, 1: 1}


def test_smoothing_mixes_in_what_similar_heads_engaged_with(model):
    """The neighbor of user 0 likes nothing; those of the others like taste 2 as they do."""
    for share, expected in ((0.2, {2: 4}), (0.9, {2: 4})):
        interests = Interests(clusters=TASTES, smoothing=share, neighbors=3, own=0)
        assert tastes(model.recommend("likes", USERS[5], 4, untrained=True, interests=interests)) == expected
    all_of_them = Interests(clusters=TASTES, smoothing=0.5, neighbors=29, own=0)
    assert tastes(model.recommend("likes", USERS[0], 8, untrained=True, interests=all_of_them)) == {0: 3, 1: 1, 2: 4}


def test_many_heads_get_what_each_gets_alone_and_new_ones_by_their_edges(model):
    edges = {"new": [("likes", ITEMS[1]), ("likes", ITEMS[3])]}
    heads = [USERS[5], "new", USERS[0], USERS[1]]
    options = {"untrained": True, "interests": Interests(clusters=TASTES, own=0), "missing": "infer", "edges": edges}
    table = model.recommend("likes", heads, 4, **options).read_all().to_pydict()
    for head in heads:
        found = [tail for lhs, tail in zip(table["lhs"], table["rhs"], strict=True) if lhs == head]
        assert found == [tail for tail, _ in model.recommend("likes", head, 4, **options)]
        if head == "new":
            assert Counter(ITEMS.index(tail) % TASTES for tail in found) >= Counter({1: 1, 3: 1})
            assert not {ITEMS[1], ITEMS[3]} & set(found)


def test_interests_out_of_range_or_without_edges_are_refused(model, tmp_path):
    for wrong in ({"top": 0}, {"clusters": 0}, {"neighbors": 0}):
        with pytest.raises(UserError, match="must be 1 or more"):
            Interests(**wrong)
    with pytest.raises(UserError, match="smoothing must be from 0 to below 1, got 1"):
        Interests(smoothing=1)
    with pytest.raises(UserError, match=r"own must be from 0 to 1, got 1\.5"):
        Interests(own=1.5)
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    with (
        pytest.raises(UserError, match="there is no table raw_edges of 2024-05-01; make it with `twhin ingest"),
        pytest.warns(UserWarning, match="known edges are not left out"),
    ):
        load_model(small.store.root).recommend("likes", USERS[0], interests=ALONE)


def plain_mixture(weights: list[float], lists: list[list[int]], k: int) -> list[int]:
    """The rule by a loop over one head's clusters."""
    total = sum(weights)
    exact = [k * weight / total for weight in weights]
    places = [int(one) for one in exact]
    by_remainder = sorted(range(len(weights)), key=lambda c: (-(exact[c] - places[c]), -weights[c], c))
    for c in by_remainder[: k - sum(places)]:
        places[c] += 1
    strongest = sorted(range(len(weights)), key=lambda c: (-weights[c], c))
    taken: list[int] = []
    for limits in (places, [k] * len(weights)):
        for c in strongest:
            new = [row for row in lists[c] if row >= 0 and row not in taken]
            taken += new[: min(limits[c], k - len(taken))]
    return taken


@settings(max_examples=150, deadline=None)
@given(data=st.data(), k=st.integers(1, 9), heads=st.integers(1, 4))
def test_places_are_shared_out_as_a_loop_over_one_heads_clusters_does(data, k, heads):
    head, weight, found = [], [], []
    for one in range(heads):
        for _ in range(data.draw(st.integers(1, 4))):
            head.append(one)
            weight.append(data.draw(st.sampled_from([0.125, 0.25, 0.5, 1.0])))
            rows = data.draw(st.lists(st.integers(0, 11), max_size=k, unique=True))
            found.append(rows + [-1] * (k - len(rows)))
    result = mixture._shared_out(np.array(head), np.array(weight), np.array(found), k, heads)
    for one in range(heads):
        mine = [i for i, of in enumerate(head) if of == one]
        expected = plain_mixture([weight[i] for i in mine], [found[i] for i in mine], k)
        assert result[one].tolist() == expected + [-1] * (k - len(expected))
