"""Distinct numbers by a radix sort are numpy's."""

from __future__ import annotations

import numpy as np
import pytest

from twhin_pipeline.kernels import radix


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


@pytest.mark.parametrize("size", [0, 1, 2, 1000, 70_000])
@pytest.mark.parametrize("bound", [1, 2, 255, 256, 257, 1_200_000, 2**40, 2**63 - 1])
def test_sort_is_numpys(size, bound):
    values = np.random.default_rng(size).integers(bound, size=size)
    values[: size // 2] = values[size - size // 2 :]
    expected = np.sort(values)
    radix.sort(values, np.empty_like(values))
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("kind", [np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("bits", [1, 11, 12, 31])
def test_in_order_keeps_equal_keys_as_they_are(kind, bits):
    keys = np.random.default_rng(bits).integers(2**bits, size=5000).astype(kind) % 700
    # One with the same low digit everywhere, which needs no pass.
    for given in (keys, keys << kind(11)):
        found, order = radix.in_order(given.copy(), np.arange(len(given), dtype=np.uint32))
        np.testing.assert_array_equal(order, np.argsort(given, kind="stable"))
        np.testing.assert_array_equal(found, np.sort(given))


@pytest.mark.parametrize("size", [0, 1, 5, 3000])
@pytest.mark.parametrize("bound", [1, 2, 300, 2**40, 2**63 - 1])
@pytest.mark.parametrize("scratch", [1, 7, 1000, 10_000])
def test_sorting_within_little_memory_is_numpys(size, bound, scratch):
    values = np.random.default_rng(size).integers(bound, size=size)
    expected = np.sort(values)
    radix.sort_within(values, np.empty(scratch, np.int64))
    np.testing.assert_array_equal(values, expected)
