"""Ids are numbered as a dictionary would, in the order in which they are met."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from twhin_pipeline import interning
from twhin_pipeline.errors import UserError
from twhin_pipeline.interning import Hashed, Interner


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
    monkeypatch.setattr(interning, "FIRST_BYTES", 1)
    interner, known = Interner(texts=True), {}
    for seed in range(6):
        ids = texts(10 ** (seed % 4 + 1), seed)
        # A part of an array, as batches are.
        given = pa.array(["before", *ids, "after"], kind).slice(1, len(ids))
        assert interner.numbers(interner.hashed(given)).tolist() == by_dictionary(ids, known)
    assert interner.count == len(known)
    assert interner.ids().to_pylist() == list(known)


def test_integers_are_numbered_as_by_a_dictionary_while_the_table_grows(monkeypatch):
    monkeypatch.setattr(interning, "FIRST_SLOTS", 4)
    interner, known = Interner(texts=False), {}
    least = np.iinfo(np.int64).min
    for seed in range(4):
        ids = [*np.random.default_rng(seed).integers(-500, 500, size=1000).tolist(), 0, least, -1 - least]
        assert interner.numbers(interner.hashed(pa.array(ids))).tolist() == by_dictionary(ids, known)
    assert interner.ids().to_pylist() == list(known)


@pytest.mark.parametrize("named", [True, False])
def test_ids_of_one_hash_keep_their_own_numbers(named):
    interner, known = Interner(named), {}
    ids = texts(300, 0) if named else list(range(300)) + list(range(200, 400))
    found = interner.hashed(pa.array(ids))
    same = Hashed(found.cuts, found.data, np.full(len(ids), 2**63 + 5, np.uint64))
    assert interner.numbers(same).tolist() == by_dictionary(ids, known)
    assert interner.numbers(same).tolist() == by_dictionary(ids, known)


def test_no_ids_are_no_numbers():
    for named, kind in ((True, pa.string()), (False, pa.int64())):
        interner = Interner(named)
        assert interner.numbers(interner.hashed(pa.array([], kind))).tolist() == []
        assert interner.ids().to_pylist() == []


def test_more_ids_than_numbers_are_one_clear_error(monkeypatch):
    monkeypatch.setattr(interning, "MOST_IDS", 3)
    interner = Interner(texts=True)
    with pytest.raises(UserError, match="the source has 3 different ids or more; divide it into smaller graphs"):
        interner.numbers(interner.hashed(pa.array(["a", "b", "c"])))
