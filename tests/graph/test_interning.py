"""Ids get codes as a dictionary would give them, in the order in which they come."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from edge_files import SNAPSHOT, make_config, store_at, write

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import interning, raw_edges
from twhin_pipeline.graph.interning import Interner, LookedUp
from twhin_pipeline.prefetch import in_order


def by_dictionary(ids, known):
    return [known.setdefault(one, len(known)) for one in ids]


def texts(count, seed):
    generator = np.random.default_rng(seed)
    words = ["", "a", "ü" * 3, "12345678", "123456789", "user_" + "9" * 40, "日本", " a"]
    return [
        words[n] if n < len(words) else f"id-{n ** int(generator.integers(1, 4))}"
        for n in generator.integers(count, size=count)
    ]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_texts_are_numbered_as_by_a_dictionary_while_the_table_grows(monkeypatch, kind):
    monkeypatch.setattr(interning, "FIRST_SLOTS", 4)
    monkeypatch.setattr(interning, "FIRST_WORDS", 1)
    interner, known = Interner(texts=True), {}
    for seed in range(6):
        ids = texts(10 ** (seed % 4 + 1), seed)
        # A part of an array, as batches are.
        given = pa.array(["before", *ids, "after"], kind).slice(1, len(ids))
        assert interner.codes(interner.look_up(given)).tolist() == by_dictionary(ids, known)
    assert interner.count == len(known)
    assert interner.ids().to_pylist() == list(known)


def test_integers_are_numbered_as_by_a_dictionary_while_the_table_grows(monkeypatch):
    monkeypatch.setattr(interning, "FIRST_SLOTS", 4)
    interner, known = Interner(texts=False), {}
    least = np.iinfo(np.int64).min
    for seed in range(4):
        ids = [*np.random.default_rng(seed).integers(-500, 500, size=1000).tolist(), 0, least, -1 - least]
        assert interner.codes(interner.look_up(pa.array(ids))).tolist() == by_dictionary(ids, known)
    assert interner.ids().to_pylist() == list(known)


@pytest.mark.parametrize("named", [True, False])
def test_ids_of_one_hash_keep_their_own_numbers(named):
    interner, known = Interner(named), {}
    ids = texts(300, 0) if named else list(range(300)) + list(range(200, 400))
    looked = interner.look_up(pa.array(ids))
    for _ in range(2):
        same = np.full(len(ids), 2**63 + 5, np.uint64)
        given = LookedUp(looked.cuts, looked.data, same, np.full(len(ids), -1))
        assert interner.codes(given).tolist() == by_dictionary(ids, known)


@pytest.mark.parametrize("named", [True, False])
def test_threads_that_look_up_while_ids_are_added_find_nothing_wrong(monkeypatch, named):
    monkeypatch.setattr(interning, "FIRST_SLOTS", 4)
    monkeypatch.setattr(interning, "FIRST_WORDS", 1)
    interner = Interner(named)
    generator = np.random.default_rng(0)
    given = [generator.integers(40_000, size=2_000) for _ in range(150)]
    arrays = [pa.array([f"entity-{n}" for n in some]) if named else pa.array(some) for some in given]
    with ThreadPoolExecutor(3) as pool:
        found = [interner.codes(looked) for looked in in_order(pool, interner.look_up, ((a,) for a in arrays), 6)]
    met = {}
    for some, numbers in zip(given, found, strict=True):
        assert numbers.tolist() == by_dictionary(some.tolist(), met)


def test_no_ids_are_no_numbers():
    for named, kind in ((True, pa.string()), (False, pa.int64())):
        interner = Interner(named)
        assert interner.codes(interner.look_up(pa.array([], kind))).tolist() == []
        assert interner.ids().to_pylist() == []


def test_ids_that_do_not_fit_into_memory_are_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("Unable to allocate 64.0 GiB")

    monkeypatch.setattr(Interner, "_grow", full)
    config = make_config(write(tmp_path / "e.parquet", [("a", "fav", "b")]))
    with pytest.raises(UserError, match=r"source.path: out of memory \(Unable to allocate 64.0 GiB\); .* more memory"):
        raw_edges.ingest(config, store_at(tmp_path), SNAPSHOT)
    assert store_at(tmp_path).assets() == []


def test_more_ids_than_numbers_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(interning, "MOST_IDS", 3)
    interner = Interner(texts=True)
    with pytest.raises(UserError, match="the source has 3 different ids or more; divide it into smaller graphs"):
        interner.codes(interner.look_up(pa.array(["a", "b", "c"])))
