"""The read API for many ids: what it answers for one id after the other, whatever the ids come in."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import small_store
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import DIM, NUM, SNAPSHOT, Small

from twhin_pipeline.errors import UserError
from twhin_pipeline.model.comparators import COMPARATORS
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.vectors.retrieval import IndexSearch

USERS, ITEMS = small_store.ids("user"), small_store.ids("item")


def make(folder: Any, **model: Any) -> tuple[Small, TwhinEmbeddings]:
    """Write a small store with `raw_edges`, and open it."""
    small = small_store.make(folder, config=small_store.config(model=model))
    export(small.config, small.store, SNAPSHOT)
    write_raw_edges(small)
    return small, load_model(small.store.root)


def write_raw_edges(small: Small) -> None:
    """Write the edges of all splits by id, sorted by relation and head; and edges of ids that have no vector."""
    names = list(small_store.RELATIONS)
    rows = [("u-gone", "likes", str(ITEMS[0])), (USERS[0], "likes", "999")]
    for lhs, relation, rhs in np.concatenate(list(small.edges.values())).tolist():
        tail = USERS[rhs] if names[relation] == "follows" else str(ITEMS[rhs])
        rows.append((USERS[lhs], names[relation], tail))
    rows.sort(key=lambda row: (names.index(row[1]), row[0], row[2]))
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    with small.store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table(columns, names=["lhs", "rel", "rhs"]))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Small, TwhinEmbeddings]:
    return make(tmp_path_factory.mktemp("many"))


@pytest.fixture
def model(store: tuple[Small, TwhinEmbeddings]) -> TwhinEmbeddings:
    return store[1]


def known(small: Small, relation: int, head: int) -> set[int]:
    edges = np.concatenate(list(small.edges.values()))
    return set(edges[(edges[:, 0] == head) & (edges[:, 1] == relation), 2].tolist())


def answers(reader: pa.RecordBatchReader) -> dict[Any, list[tuple[Any, float]]]:
    """Return what a stream holds as what single calls return; ranks count from 1 without gaps."""
    found: dict[Any, list[tuple[Any, float]]] = {}
    for row in reader.read_all().to_pylist():
        query, other, rank, score = list(row.values())[:4]
        found.setdefault(query, []).append((other, score))
        assert len(found[query]) == rank
    return found


def assert_same(found: dict[Any, list[tuple[Any, float]]], expected: dict[Any, list[tuple[Any, float]]]) -> None:
    assert list(found) == list(expected)
    for one, pairs in expected.items():
        assert [tail for tail, _ in found[one]] == [tail for tail, _ in pairs]


class Plain:
    """A searcher that can leave nothing out, as an index."""

    def __init__(self, exact: Any) -> None:
        self.exact = exact

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found: tuple[np.ndarray, np.ndarray] = self.exact.search(queries, k)
        return found


def of_ids(ids: list[Any]) -> Iterator[Any]:
    """The same ids in everything that they may come in."""
    yield from (ids, tuple(ids), np.array(ids), pd.Series(ids, index=range(5, 5 + len(ids))), pa.array(ids))
    yield pa.chunked_array([ids[:1], ids[1:]])
    yield pa.array(ids).dictionary_encode()
    yield np.array(ids, object)


@pytest.mark.parametrize("entity", list(NUM))
def test_ids_may_come_in_anything_that_holds_ids(store, entity):
    small, model = store
    ids = small_store.ids(entity)
    for given_ids in of_ids([ids[7], ids[2], ids[7]]):
        found = model.get_embedding(entity, given_ids)
        assert np.array_equal(found, small.vectors[entity][[7, 2, 7]])
        near = model.neighbors(entity, given_ids, 3).read_all()
        assert near.column("id").to_pylist() == [ids[row] for row in (7, 7, 7, 2, 2, 2, 7, 7, 7)]
    assert np.array_equal(model.get_embedding("item", pa.array(["120"])), model.get_embedding("item", [120]))
    for empty in ([], np.zeros(0), pa.array([]), pd.Series([], dtype=object)):
        assert model.get_embedding(entity, empty).shape == (0, DIM)
        assert model.neighbors(entity, empty).read_all().num_rows == 0
    with pytest.raises(KeyError, match=r"no user has the id 'u100'; nearest: 'u10'"):
        model.recommend("likes", pd.Series([USERS[0], "u100"], index=[8, 9]))


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one operator", "reciprocal"])
@pytest.mark.parametrize("comparator", list(COMPARATORS))
def test_recommendations_of_all_heads_are_those_of_a_loop_over_the_models_scores(tmp_path, comparator, reciprocal):
    small, model = make(tmp_path, comparator=comparator, temperature=0.7, reciprocal=reciprocal)
    trained = np.asarray(model.tables["item"].trained)
    found = answers(model.recommend("likes", k=6))
    heads = np.flatnonzero(model.tables["user"].trained)
    assert list(found) == [USERS[row] for row in heads]
    for head in heads.tolist():
        plain = {row: small_store.score(small, 0, head, row) for row in np.flatnonzero(trained).tolist()}
        new = [row for row in plain if row not in known(small, 0, head)]
        expected = sorted(new, key=lambda row: (-plain[row], row))[:6]
        assert [tail for tail, _ in found[USERS[head]]] == [ITEMS[row] for row in expected]
        assert [score for _, score in found[USERS[head]]] == pytest.approx([plain[row] for row in expected], abs=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    heads=st.lists(st.sampled_from(USERS), max_size=8),
    relation=st.sampled_from(list(small_store.RELATIONS)),
    k=st.sampled_from([1, 5, 1000]),
    exclude_known=st.sampled_from([True, False, "any"]),
    untrained=st.booleans(),
)
def test_many_heads_get_what_each_of_them_gets_alone(store, heads, relation, k, exclude_known, untrained):
    model = store[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heads without training edges
        found = model.recommend(relation, heads, k, exclude_known, untrained=untrained).read_all()
        model._known._lists.clear()  # so that a single head's edges are read as those of a single head
        alone = [model.recommend(relation, head, k, exclude_known, untrained=untrained) for head in heads]
    rows = [(head, tail, rank + 1) for head, of_head in zip(heads, alone, strict=True) for rank, (tail, _) in enumerate(of_head)]  # fmt: skip # noqa: E501
    assert list(zip(*(found.column(name).to_pylist() for name in ("lhs", "rhs", "rank")), strict=True)) == rows
    scores = [score for of_head in alone for _, score in of_head]
    assert found.column("score").to_pylist() == pytest.approx(scores, abs=1e-5)


def test_batches_are_small_where_the_answers_are_many_and_hold_the_same(model, monkeypatch):
    whole = model.recommend("likes", k=7).read_all()
    monkeypatch.setattr("twhin_pipeline.vectors.answers.ROWS_AT_ONCE", 30)
    batches = list(model.recommend("likes", k=7))
    assert len(batches) > 5 and max(len(batch) for batch in batches) <= 30
    together = pa.Table.from_batches(batches)
    assert together.drop_columns("score").equals(whole.drop_columns("score"))
    np.testing.assert_allclose(together.column("score"), whole.column("score"), rtol=1e-5)
    assert whole.schema.names == ["lhs", "rhs", "rank", "score", "probability"]
    frame = model.recommend("likes", k=7).read_pandas()
    assert frame["rhs"].tolist() == whole.column("rhs").to_pylist()


def test_tails_that_are_excluded_for_all_or_for_one_head_are_left_out(model):
    heads = USERS[:3]
    before = answers(model.recommend("likes", heads, 1000))
    best = {head: found[0][0] for head, found in before.items()}
    everyone = answers(model.recommend("likes", heads, 1000, exclude=[*best.values(), 999_999]))
    for head in heads:
        assert everyone[head] == [pair for pair in before[head] if pair[0] not in best.values()]
    one = answers(model.recommend("likes", heads, 1000, exclude={heads[1]: pa.array([best[heads[1]]]), "nobody": [10]}))
    assert one == before | {heads[1]: before[heads[1]][1:]}
    # An index cannot bar rows, so it is asked for more.
    exact = model._searchers.get(model.tables["item"], False, "exact")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model._searchers, "get", lambda *_: IndexSearch(Plain(exact), exact, 10_000))
        assert_same(answers(model.recommend("likes", heads, 1000, exclude=[*best.values(), 999_999])), everyone)
        assert_same(answers(model.recommend("likes", heads, 1000)), before)
    few, one_each = {best[heads[0]], best[heads[1]]}, {head: best[head] for head in heads}
    for several in (few, dict.fromkeys(few).keys()):
        assert answers(model.recommend("likes", heads, 1000, exclude=several)) == answers(
            model.recommend("likes", heads, 1000, exclude=sorted(few))
        )
    each = {head: before[head][1:] for head in heads}
    for form in (one_each, {head: str(tail) for head, tail in one_each.items()}, {h: {t} for h, t in one_each.items()}):
        assert answers(model.recommend("likes", heads, 1000, exclude=form)) == each
    alone = model.recommend("likes", heads[0], 1, exclude=best[heads[0]])
    assert [tail for tail, _ in alone] == [tail for tail, _ in before[heads[0]][1:2]]


def test_more_than_there_are_may_be_asked_for_without_the_memory_that_they_would_take(model):
    most, heads = 10**13, USERS[:2]
    assert answers(model.recommend("likes", heads, most)) == answers(model.recommend("likes", heads, 1000))
    assert answers(model.neighbors("user", heads, most)) == answers(model.neighbors("user", heads, 1000))
    for one in (
        partial(model.recommend, "likes"),
        partial(model.candidates, "likes"),
        partial(model.neighbors, "user"),
    ):
        assert one(heads[0], most) == one(heads[0], 1000)


def test_the_edges_are_read_once_for_all_calls_with_several_heads(model, monkeypatch):
    model._known._lists.clear()
    first = model.recommend("likes", k=3).read_all()

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("raw_edges was read again")

    monkeypatch.setattr("twhin_pipeline.store.Store.dataset", read)
    assert model.recommend("likes", k=3).read_all().equals(first)
    assert len(model.recommend("likes", USERS[0], 3)) == 3  # nor for one


@pytest.mark.parametrize("ids", [None, USERS[3:9]], ids=["all", "some"])
def test_neighbors_of_many_are_those_of_each(model, ids):
    found = answers(model.neighbors("user", ids, 4))
    assert list(found) == (ids or [USERS[row] for row in np.flatnonzero(model.tables["user"].trained)])
    for one, pairs in found.items():
        alone = model.neighbors("user", one, 4)
        assert [name for name, _ in pairs] == [name for name, _ in alone]
        assert [value for _, value in pairs] == pytest.approx([value for _, value in alone], abs=1e-6)
    assert model.neighbors("user", USERS[3], 0) == [] and model.neighbors("user", k=0).read_all().num_rows == 0


# --- ids that the model does not have ---


def test_skipped_ids_are_told_by_a_mask(store):
    small, model = store
    vectors, found = model.get_embedding("item", [ITEMS[4], 7, "vim", ITEMS[1]], missing="skip")
    assert found.tolist() == [True, False, False, True]
    assert np.array_equal(vectors, small.vectors["item"][[4, 1]])
    assert list(answers(model.recommend("likes", ["nobody", USERS[0]], 2, missing="skip"))) == [USERS[0]]
    with pytest.raises(UserError, match="ask `has` for one"):
        model.get_embedding("item", 7, missing="skip")
    with pytest.raises(UserError, match="`batches` streams all vectors"):
        model.get_embedding("item", None)
    with pytest.raises(UserError, match="missing must be 'error', 'skip' or 'infer', got 'drop'"):
        model.get_embedding("item", [7], missing="drop")  # type: ignore[call-overload]


@pytest.mark.parametrize("comparator", ["dot", "l2"])
def test_a_vector_is_inferred_as_the_mean_of_what_its_edges_want(tmp_path, comparator):
    small, model = make(tmp_path, comparator=comparator)
    rows = {name: row.numpy() for name, row in small.scorer.state_rows().items()}
    users, items = small.vectors["user"], small.vectors["item"]
    # A head of two edges: the translation of `likes` is subtracted, and `rates` is the identity.
    head = ((items[3] - rows["likes"]) + items[5]) / 2
    tail = users[2] + rows["likes"]
    if comparator == "dot":  # means are shorter than what they are the means of
        lengths = {name: np.linalg.norm(v, axis=1)[model.tables[name].trained].mean() for name, v in small.vectors.items()}  # fmt: skip # noqa: E501
        head, tail = head / np.linalg.norm(head) * lengths["user"], tail / np.linalg.norm(tail) * lengths["item"]
    edges = {"new": [("likes", ITEMS[3]), ("rates", str(ITEMS[5])), ("rates", 999)]}
    found = model.get_embedding("user", [USERS[1], "new"], missing="infer", edges=edges)
    np.testing.assert_allclose(found, np.stack([users[1], head]), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model.get_embedding("user", "new", "infer", edges), head, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        model.get_embedding("item", 5, "infer", {5: [("likes", USERS[2])]}), tail, rtol=1e-4, atol=1e-6
    )
    pairs = {"new": np.array([("likes", str(ITEMS[3])), ("rates", str(ITEMS[5]))])}  # a pair may be an array
    np.testing.assert_allclose(model.get_embedding("user", "new", "infer", pairs), head, rtol=1e-4, atol=1e-6)
    twice = model.get_embedding("user", ["new", USERS[1], "new"], missing="infer", edges=edges)
    assert np.array_equal(twice, found[[1, 0, 1]])
    columns = {"lhs": ["new", "new", USERS[2]], "rel": ["likes", "rates", "likes"]}
    table = pa.table({**columns, "rhs": [str(ITEMS[3]), str(ITEMS[5]), "5"]})
    for given_edges in (table, table.to_pandas()):
        np.testing.assert_allclose(model.get_embedding("user", "new", "infer", given_edges), head, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.get_embedding("item", 5, "infer", given_edges), tail, rtol=1e-4, atol=1e-6)
        twice = model.get_embedding("item", [5, "5"], "infer", given_edges)
        np.testing.assert_allclose(twice, [tail, tail], rtol=1e-4, atol=1e-6)


def test_a_new_head_is_recommended_what_its_vector_scores_highest_without_what_it_has(model):
    edges = {"new": [("likes", ITEMS[3]), ("rates", ITEMS[5])], USERS[0]: [("likes", ITEMS[0])]}
    vector = model.get_embedding("user", "new", "infer", edges)
    expected = [pair for pair in model.candidates("likes", vector, 100) if pair[0] != ITEMS[3]]
    alone = model.recommend("likes", "new", 100, missing="infer", edges=edges)
    found = answers(model.recommend("likes", [USERS[0], "new"], 100, missing="infer", edges=edges))
    assert list(found) == [USERS[0], "new"]
    for pairs in (alone, found["new"]):
        assert [tail for tail, _ in pairs] == [tail for tail, _ in expected]
    assert [tail for tail, _ in found[USERS[0]]] == [tail for tail, _ in model.recommend("likes", USERS[0], 100)]
    twice = model.recommend("likes", ["new", "new"], 100, missing="infer", edges=edges).read_all()
    assert twice.column("rhs").to_pylist() == [tail for tail, _ in expected] * 2  # what it has is left out both times
    both = {tail for tail, _ in model.recommend("likes", "new", 100, "any", missing="infer", edges=edges)}
    assert both == {tail for tail, _ in expected} - {ITEMS[5]}
    excluded = answers(model.recommend("likes", ["new"], 1, exclude={"new": [expected[0][0]]}, missing="infer", edges=edges))  # fmt: skip # noqa: E501
    assert excluded["new"][0][0] == expected[1][0]
    near = model.neighbors("user", "new", 3, missing="infer", edges=edges)
    assert len(near) == 3 and near[0][1] >= near[1][1]


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (None, r"missing='infer' needs edges= of the user without a vector, such as 'new': a mapping \{id:"),
        ({}, r"edges= has no edge of user 'new' to an id that the model has \(1 such ids\)"),
        ({"new": [("likes", 999)]}, "edges= has no edge of user 'new' to an id that the model has"),
        ({"new": ["likes"]}, r"edges of 'new': 'likes' is no pair \(relation, known id\)"),
        ({"new": [5]}, r"edges of 'new': 5 is no pair \(relation, known id\)"),
        ({"new": None}, r"edges of 'new': None is no pair \(relation, known id\)"),
        ({"new": [{"likes", 10}]}, r"edges of 'new': \{.*\} is no pair \(relation, known id\)"),
        ({"new": [("like", 10)]}, "edges of user 'new': unknown relation 'like'; did you mean 'likes'"),
        (pa.table({"lhs": ["new"]}), r"edges= must be a mapping .* with the columns lhs, rel and rhs, got Table"),
        (7, r"edges= must be .*, got int"),
    ],
)
def test_edges_that_do_not_lead_to_a_vector_are_refused_with_what_to_give(model, edges, message):
    with pytest.raises(UserError, match=message):
        model.get_embedding("user", [USERS[0], "new"], missing="infer", edges=edges)


def test_an_edge_whose_relation_does_not_have_the_type_is_refused(model):
    with pytest.raises(UserError, match="edges of item 5: relation follows goes from user to user; give relations of"):
        model.get_embedding("item", 5, "infer", {5: [("follows", USERS[0])]})


@pytest.mark.parametrize("new", ["abc", 2**70])
def test_a_new_id_of_another_type_than_the_tables_is_answered_alone_and_refused_among_several(model, new):
    edges = {new: [("likes", USERS[0])]}
    assert len(model.neighbors("item", new, 3, missing="infer", edges=edges)) == 3
    with pytest.raises(UserError, match=f"ids of item are integers, so answers for several have no place for '{new}'"):
        model.neighbors("item", [ITEMS[0], new], 3, missing="infer", edges=edges).read_all()


@pytest.mark.filterwarnings("ignore:probabilities of likes are not calibrated")
def test_no_ids_have_no_probabilities(model):
    for lhs, rhs in (([], []), (USERS[0], []), (np.zeros((0, DIM)), [])):
        assert model.predict_relation(lhs, rhs, "likes").shape == (0,)
    with pytest.raises(UserError, match="pairs lhs and rhs one to one, got 0 and 2"):
        model.predict_relation([], ITEMS[:2], "likes")
