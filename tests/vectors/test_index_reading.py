"""The read API by index: the answers of exact search, and every row where the index cannot answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import small_store
from small_store import NUM, RELATIONS, SNAPSHOT, Small

from twhin_pipeline import load_model
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.reader import TwhinEmbeddings
from twhin_pipeline.vectors.retrieval import ExactSearch
from twhin_pipeline.vectors.vector_index import VectorIndex


def write_raw_edges(small: Small) -> None:
    """Write all edges by id, sorted by relation and head."""
    names = {entity: [str(one) for one in small_store.ids(entity)] for entity in NUM}
    rows = sorted(
        (list(RELATIONS)[relation], names[RELATIONS[list(RELATIONS)[relation]][0]][lhs],
         names[RELATIONS[list(RELATIONS)[relation]][1]][rhs])
        for part in small.edges.values()
        for lhs, relation, rhs in part.tolist()
    )  # fmt: skip
    rel, lhs, rhs = (list(column) for column in zip(*rows, strict=True))
    with small.store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table({"lhs": lhs, "rel": rel, "rhs": rhs}))


def make(folder: Path, comparator: str = "dot", kind: str = "flat") -> TwhinEmbeddings:
    """Write a small store with its indexes, and open it."""
    config = small_store.config(
        model={"comparator": comparator, "temperature": 0.5},
        indexes={"kind": kind, "recall_at": [5, 20]},
        training={"refit": False},
    )
    small = small_store.make(folder, config=config)
    export(config, small.store, SNAPSHOT)
    write_raw_edges(small)
    chain.run_stage(Run(config, "unused", [], small.store, SNAPSHOT), chain.STAGES["index"], lambda line: None)
    return load_model(small.store.root)


@pytest.fixture(scope="module", params=["dot", "cosine", "l2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TwhinEmbeddings:
    return make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many queries the index and the exact search got, call by call."""
    counts: dict[str, list[int]] = {"index": [], "exact": []}
    for name, searcher in (("index", VectorIndex), ("exact", ExactSearch)):

        def search(self, queries, k, *more, name=name, own=searcher.search):
            counts[name].append(len(queries))
            return own(self, queries, k, *more)

        monkeypatch.setattr(searcher, "search", search)
    return counts


def same(one: pa.Table, other: pa.Table) -> None:
    """Assert that two answers are the same, to the rounding of their last column."""
    names = one.column_names
    assert one.select(names[:3]).equals(other.select(names[:3])) and one.num_rows
    np.testing.assert_allclose(one[names[3]], other[names[3]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [True, False, "any"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_all_heads_get_what_exact_search_finds(
    model: TwhinEmbeddings, asked: dict[str, list[int]], relation: str, known: bool | str
) -> None:
    exact = model.recommend(relation, None, 5, known, search="exact").read_all()  # type: ignore[arg-type]
    assert not asked["index"]
    asked["exact"].clear()
    found = model.recommend(relation, None, 5, known).read_all()  # type: ignore[arg-type]
    same(found, exact)
    assert sum(asked["index"]) > 20 and not asked["exact"]


def test_one_head_gets_what_exact_search_finds(model: TwhinEmbeddings, asked: dict[str, list[int]]) -> None:
    head = small_store.ids("user")[3]
    for search in (model.recommend, model.candidates):
        found, exact = search("likes", head, 5), search("likes", head, 5, search="exact")  # type: ignore[operator]
        assert [name for name, _ in found] == [name for name, _ in exact] and len(found) == 5
        np.testing.assert_allclose([s for _, s in found], [s for _, s in exact], rtol=1e-4, atol=1e-4)
    assert asked == {"index": [1, 1], "exact": [1, 1]}


def test_tails_that_are_excluded_for_all_or_for_one_are_not_found(model: TwhinEmbeddings) -> None:
    heads, items = small_store.ids("user")[:4], small_store.ids("item")
    for exclude in (items[:6], {heads[1]: items[:9], heads[3]: items[20:]}, items[2]):
        arguments = ("likes", heads, 5, True, exclude)
        same(model.recommend(*arguments).read_all(), model.recommend(*arguments, search="exact").read_all())


def test_where_the_index_finds_too_few_every_row_is_compared(
    model: TwhinEmbeddings, asked: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = VectorIndex.search

    def forgetful(self, queries, k, effort=None):
        rows, scores = counted(self, queries, k, effort)
        rows[::2, 3:], scores[::2, 3:] = -1, -np.inf  # as a graph whose walk ends early
        return rows, scores

    heads = small_store.ids("user")[:10]
    exact = model.recommend("rates", heads, 5, False, search="exact").read_all()
    asked["exact"].clear()
    monkeypatch.setattr(VectorIndex, "search", forgetful)
    same(model.recommend("rates", heads, 5, False).read_all(), exact)
    assert asked["exact"] == [5]
    monkeypatch.setattr(VectorIndex, "search", counted)
    asked["exact"].clear()
    monkeypatch.setattr(VectorIndex, "most", 4)
    same(model.recommend("rates", heads, 5, False).read_all(), exact)
    assert asked["exact"] == [10]  # the index is not asked for more rows than it finds faster


def test_neighbors_of_a_small_type_are_found_by_the_index_where_it_finds_by_the_cosine(
    model: TwhinEmbeddings, asked: dict[str, list[int]]
) -> None:
    item = small_store.ids("item")[7]
    exact, every = model.neighbors("item", item, 5, search="exact"), model.neighbors("item", k=5, search="exact")
    every = every.read_all()
    same(model.neighbors("item", k=5).read_all(), every)
    found = model.neighbors("item", item, 5)
    assert [name for name, _ in found] == [name for name, _ in exact]
    np.testing.assert_allclose([s for _, s in found], [s for _, s in exact], rtol=1e-4)
    assert bool(asked["index"]) == (model.config.comparator == "cosine")
    if model.config.comparator != "cosine":
        with pytest.raises(UserError, match="no index of item for neighbors, which of fewer than 9,984"):
            model.neighbors("item", item, 5, search="index")


def test_what_leaves_rows_out_is_made_once_and_not_for_each_call(
    model: TwhinEmbeddings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes time and memory for each row of the table."""
    item, head = small_store.ids("item")[7], small_store.ids("user")[3]
    expected = model.neighbors("item", item, 5), model.recommend("likes", head, 5), model.candidates("likes", head, 5)
    monkeypatch.setattr(ExactSearch, "__init__", lambda *_: pytest.fail("made again"))
    found = model.neighbors("item", item, 5), model.recommend("likes", head, 5), model.candidates("likes", head, 5)
    assert found == expected


def test_what_the_index_lacks_is_found_by_comparing_all_or_refused(
    model: TwhinEmbeddings, asked: dict[str, list[int]]
) -> None:
    head = small_store.ids("user")[3]
    model.recommend("likes", head, 5, untrained=True)
    assert not asked["index"]
    with pytest.raises(UserError, match="an index has trained entities only"):
        model.recommend("likes", head, 5, untrained=True, search="index")
    with pytest.raises(UserError, match="search must be 'auto', 'exact' or 'index', got 'fast'"):
        model.recommend("likes", head, 5, search="fast")  # type: ignore[call-overload]
    with pytest.raises(UserError, match="search must be 'auto'"):
        model.neighbors("item", small_store.ids("item")[0], 5, search="fast")  # type: ignore[call-overload]


def test_without_the_library_auto_compares_all_and_an_index_that_is_asked_for_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, list[int]]
) -> None:
    model = make(tmp_path)
    asked["index"].clear()
    monkeypatch.setattr("twhin_pipeline.extras.find_spec", lambda name: None if name == "faiss" else object())
    head = small_store.ids("user")[3]
    assert len(model.recommend("likes", head, 5)) == 5 and not asked["index"]
    with pytest.raises(UserError, match=r"twhin-pipeline\[index\]"):
        model.recommend("likes", head, 5, search="index")


def test_vectors_without_an_index_of_their_own_are_compared(tmp_path: Path, asked: dict[str, list[int]]) -> None:
    model = make(tmp_path)
    assert model.store is not None
    export(small_store.config(training={"refit": False}), model.store.seen_as(None), SNAPSHOT)
    newer = load_model(model.store.root)
    head = small_store.ids("user")[3]
    asked["index"].clear()
    assert len(newer.recommend("likes", head, 5)) == 5 and not asked["index"]
    with pytest.raises(UserError, match=r"has no index of item.*twhin index"):
        newer.recommend("likes", head, 5, search="index")
    model.recommend("likes", head, 5, search="index")  # who opened the earlier vectors keeps their index
    assert asked["index"]
