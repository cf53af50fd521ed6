"""Ids are put in the order of their bytes, as Python sorts them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from twhin_pipeline.graph import id_order


def drawn(seed: int, count: int, most: int, letters: str, before: str) -> list[str]:
    generator = np.random.default_rng(seed)
    found = {before + "".join(generator.choice(list(letters), size=generator.integers(most + 1))) for _ in range(count)}
    return list(found)


@pytest.mark.parametrize("before", ["", "u", "https://example.org/items/"])
@pytest.mark.parametrize(("most", "letters"), [(3, "ab\0"), (20, "a\0"), (9, "abcdefgh0123"), (30, "zü日 \x7f")])
def test_texts_are_sorted_by_their_bytes_whatever_they_begin_and_end_with(before, most, letters):
    for seed, count in enumerate((1, 2, 50, 3000)):
        ids = drawn(seed, count, most, letters, before)
        order = id_order.order(pa.array(["left", *ids, "out"], pa.large_string()).slice(1, len(ids)))
        assert order.dtype == np.uint32
        assert [ids[i] for i in order] == sorted(ids, key=str.encode)


def test_integers_are_sorted_from_the_least_to_the_largest():
    limits = np.iinfo(np.int64)
    ids = np.unique(np.random.default_rng(0).integers(limits.min, limits.max, 5000))
    ids = np.random.default_rng(1).permutation(np.concatenate([ids, [limits.min, -1, 0, 1, limits.max]]))
    assert ids[id_order.order(pa.array(ids))].tolist() == sorted(ids.tolist())


@pytest.mark.parametrize("kind", [pa.large_string(), pa.int64()])
def test_no_ids_have_an_order(kind):
    assert id_order.order(pa.array([], kind)).tolist() == []
