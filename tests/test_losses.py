"""Losses: literal values, gradients by finite differences, and no trace of masked candidates."""

import math

import pytest
import torch

from twhin_pipeline.losses import LOSSES
from twhin_pipeline.sections.model import LOSS_NAMES
from twhin_pipeline.sections.training import LossConfig

INF = float("inf")


def loss_of(name: str, **options: float):
    return LOSSES[name](LossConfig(name=name, **options))


def test_the_configuration_knows_exactly_the_registered_losses():
    assert tuple(LOSSES) == LOSS_NAMES


@pytest.mark.parametrize("name", list(LOSSES))
class TestEveryLoss:
    def test_gradients_are_those_of_finite_differences(self, name):
        torch.manual_seed(0)
        positive = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        negative = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        masked = torch.zeros(2, 3, 4, dtype=torch.bool)
        masked[0, 1, 2] = masked[1, 2, :] = True
        loss = loss_of(name)
        assert torch.autograd.gradcheck(lambda p, n: loss(p, n.masked_fill(masked, -INF)), (positive, negative))

    def test_a_masked_candidate_counts_for_nothing(self, name):
        loss = loss_of(name, negative_weight=3.0)
        positive = torch.tensor([0.3, -1.0])
        whole = torch.tensor([[0.5, -2.0, -INF], [-INF, 1.0, 0.25]])
        short = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
        torch.testing.assert_close(loss(positive, whole), loss(positive, short))

    def test_masked_candidates_have_no_gradient_and_others_do(self, name):
        positive = torch.zeros(2, requires_grad=True)
        negative = torch.tensor([[0.5, -INF], [-INF, -INF]], requires_grad=True)
        loss_of(name)(positive, negative).sum().backward()
        assert torch.isfinite(positive.grad).all()
        assert negative.grad[0, 0] > 0
        assert negative.grad.flatten()[1:].tolist() == [0.0, 0.0, 0.0]

    def test_a_better_positive_and_worse_negatives_lower_it(self, name):
        loss = loss_of(name)
        negative = torch.tensor([[0.0, 0.0]])
        assert loss(torch.tensor([1.0]), negative) < loss(torch.tensor([0.0]), negative)
        assert loss(torch.tensor([0.0]), negative - 1) < loss(torch.tensor([0.0]), negative)

    def test_extreme_logits_stay_finite(self, name):
        positive = torch.tensor([1e4, -1e4], requires_grad=True)
        negative = torch.tensor([[-1e4, 1e4], [1e4, 1e4]], requires_grad=True)
        value = loss_of(name)(positive, negative)
        value.sum().backward()
        assert all(torch.isfinite(t).all() for t in (value, positive.grad, negative.grad))

    @pytest.mark.parametrize("shape", [(2, 3, 0), (0, 3, 2), (0, 0, 0)])
    def test_no_candidates_and_no_edges_are_taken(self, name, shape):
        positive = torch.zeros(shape[:2], requires_grad=True)
        value = loss_of(name)(positive, torch.zeros(shape))
        assert value.shape == shape[:2]
        value.sum().backward()
        assert torch.isfinite(positive.grad).all()


def test_bce_weighs_a_positive_by_1_and_its_negatives_together_by_negative_weight():
    value = loss_of("bce", negative_weight=2.0)(torch.tensor([0.7]), torch.tensor([[0.1, -0.4, -INF]]))
    expected = math.log1p(math.exp(-0.7)) + 2.0 * (math.log1p(math.exp(0.1)) + math.log1p(math.exp(-0.4))) / 2
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_softmax_is_the_cross_entropy_of_the_edge_among_its_candidates():
    value = loss_of("softmax")(torch.tensor([0.7]), torch.tensor([[0.1, -0.4, -INF]]))
    expected = math.log(math.exp(0.7) + math.exp(0.1) + math.exp(-0.4)) - 0.7
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_softmax_of_an_edge_with_all_candidates_masked_is_0_without_gradient():
    positive = torch.tensor([1.5], requires_grad=True)
    value = loss_of("softmax")(positive, torch.tensor([[-INF, -INF]]))
    value.backward()
    assert value.item() == 0
    assert positive.grad.item() == 0
