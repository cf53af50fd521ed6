"""Comparators: literal values, and one to one equal to many to many."""

import pytest
import torch

from twhin_pipeline.comparators import COMPARATORS, Cosine, Dot
from twhin_pipeline.sections.model import COMPARATOR_NAMES

A = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
B = torch.tensor([[4.0, 3.0], [0.0, 2.0], [-3.0, -4.0]])


def test_the_configuration_knows_exactly_the_registered_comparators():
    assert tuple(COMPARATORS) == COMPARATOR_NAMES


@pytest.mark.parametrize("name", list(COMPARATORS))
def test_one_to_one_equals_the_diagonal_of_many_to_many(name):
    comparator = COMPARATORS[name]()
    torch.manual_seed(0)
    a, b = comparator.prepare(torch.randn(4, 5, 8)), comparator.prepare(torch.randn(4, 5, 8))
    torch.testing.assert_close(comparator.compare(a, b).diagonal(dim1=1, dim2=2), comparator.pairs(a, b))


def test_dot_is_the_matrix_product():
    dot = Dot()
    expected = torch.tensor([[24.0, 8.0, -25.0], [4.0, 0.0, -3.0]])
    assert torch.equal(dot.compare(dot.prepare(A), dot.prepare(B)), expected)


def test_cosine_is_the_cosine_of_the_angle():
    cosine = Cosine()
    expected = torch.tensor([[0.96, 0.8, -1.0], [0.8, 0.0, -0.6]])
    torch.testing.assert_close(cosine.compare(cosine.prepare(A), cosine.prepare(B)), expected)


def test_cosine_of_a_zero_vector_has_a_finite_gradient():
    cosine = Cosine()
    x = torch.zeros(1, 2, requires_grad=True)
    cosine.compare(cosine.prepare(x), cosine.prepare(B)).sum().backward()
    assert torch.isfinite(x.grad).all()
