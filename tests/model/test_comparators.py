"""Comparators: literal values, and one to one equal to many to many."""

import plain_scores
import pytest
import torch

from twhin_pipeline.config.model import COMPARATOR_NAMES
from twhin_pipeline.model.comparators import COMPARATORS, Cosine, Distance, Dot, SquaredDistance

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


@pytest.mark.parametrize("name", list(COMPARATORS))
class TestEveryComparator:
    def test_it_equals_a_plain_loop_divided_by_the_temperature(self, name):
        comparator = COMPARATORS[name](0.25)
        torch.manual_seed(0)
        a, b = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
        found = comparator.compare(comparator.prepare(a), comparator.prepare(b))
        expected = [
            [[plain_scores.compare(name, x, y) / 0.25 for y in b[g].tolist()] for x in a[g].tolist()] for g in range(3)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)

    def test_gradients_are_those_of_finite_differences(self, name):
        comparator = COMPARATORS[name](0.5)
        torch.manual_seed(0)
        a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        b = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        for method in (comparator.compare, comparator.pairs):
            assert torch.autograd.gradcheck(
                lambda a, b, m=method: m(comparator.prepare(a), comparator.prepare(b)), (a, b)
            )

    @pytest.mark.parametrize("length", [0.0, 1e-20, 1e-6, 3.0, 1e4])
    def test_equal_vectors_of_any_length_have_finite_scores_and_gradients(self, name, length):
        comparator = COMPARATORS[name]()
        torch.manual_seed(0)
        x = (length * torch.randn(4, 8)).requires_grad_()
        for method in (comparator.compare, comparator.pairs):
            x.grad = None
            scores = method(comparator.prepare(x), comparator.prepare(x.detach()))
            scores.sum().backward()
            assert scores.isfinite().all() and x.grad.isfinite().all()

    def test_scores_in_autocast_are_close_to_those_of_whole_precision(self, name):
        comparator = COMPARATORS[name]()
        torch.manual_seed(0)
        a = torch.randn(5, 8)
        b = a + 0.1 * torch.randn(5, 8)
        whole = comparator.compare(comparator.prepare(a), comparator.prepare(b))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = comparator.compare(comparator.prepare(a), comparator.prepare(b))
        torch.testing.assert_close(half.float(), whole, rtol=2e-2, atol=5e-2)

    def test_no_candidates_and_no_queries_are_taken(self, name):
        comparator = COMPARATORS[name]()
        assert comparator.compare(torch.zeros(2, 0, 4), torch.zeros(2, 3, 4)).shape == (2, 0, 3)
        assert comparator.compare(torch.zeros(2, 3, 4), torch.zeros(2, 0, 4)).shape == (2, 3, 0)

    def test_one_set_of_candidates_serves_every_chunk(self, name):
        comparator = COMPARATORS[name]()
        a, b = torch.randn(3, 5, 8), torch.randn(7, 8)
        torch.testing.assert_close(comparator.compare(a, b), comparator.compare(a, b.expand(3, 7, 8)))


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


def test_distances_are_those_of_the_plane():
    """From (3, 4) to (4, 3), (0, 2), (-3, -4); and from (1, 0)."""
    squared = torch.tensor([[2.0, 13.0, 100.0], [18.0, 5.0, 32.0]])
    torch.testing.assert_close(SquaredDistance(2.0).compare(A, B), -squared / 2)
    torch.testing.assert_close(Distance(2.0).compare(A, B), -squared.sqrt() / 2)


@pytest.mark.parametrize("comparator", [Distance(), SquaredDistance()])
def test_distances_are_never_above_0_however_the_terms_round(comparator):
    torch.manual_seed(0)
    x = 100 * torch.randn(50, 64)
    scores = comparator.compare(x, x)
    assert (scores <= 0).all()
    assert torch.equal(scores.argmax(1), torch.arange(50)), "each is nearest to itself"
