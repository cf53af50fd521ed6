"""Distinct numbers by a radix sort are numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from twhin_pipeline import radix


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 70_000])
@pytest.mark.parametrize("bound", [1, 2, 2047, 2048, 2049, 1_200_000, 2**40, 2**62])
def test_unique_is_numpys_with_the_first_place_of_each_value(size, bound):
    values = np.random.default_rng(size).integers(bound, size=size)
    given = values.copy()
    expected = np.unique(values, return_index=True, return_inverse=True)
    for found, array in zip(radix.unique(values), expected, strict=True):
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, array)
    np.testing.assert_array_equal(values, given)


def test_unique_of_the_largest_number():
    most = np.iinfo(np.int64).max
    found, first, number = radix.unique(np.array([most, 0, most], np.int64))
    assert found.tolist() == [0, most]
    assert first.tolist() == [1, 0]
    assert number.tolist() == [1, 0, 1]
