"""Losses: literal values, gradients by finite differences, and no trace of masked candidates."""

import math

import pytest
import torch

from twhin_pipeline.config.model import LOSS_NAMES
from twhin_pipeline.config.training import LossConfig
from twhin_pipeline.model.losses import LOSSES

INF = float("inf")


def loss_of(name: str, **options: float):
    return LOSSES[name](LossConfig(name=name, **options))


# No option that a loss might leave unread is at its default.
OPTIONS = {
    "negative_weight": 3.0,
    "margin": 0.5,
    "adversarial_temperature": 2.0,
    "positive_temperature": 0.5,
    "negative_temperature": 0.25,
}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def plain(name: str, positive: float, negative: list[float]) -> float:
    """The loss of one edge under OPTIONS, from the papers' formulas."""
    found = [value for value in negative if value != -INF]
    if name == "bce":
        return softplus(-positive) + 3.0 * sum(softplus(value) for value in found) / len(found)
    if name == "softmax":
        return math.log(math.exp(positive) + sum(math.exp(value) for value in found)) - positive
    if name == "margin":
        return sum(max(0.0, 0.5 - positive + value) for value in found) / len(found)
    if name == "self_adversarial":
        weights = [math.exp(2.0 * value) for value in found]
        false = sum(w * softplus(value + 0.5) for w, value in zip(weights, found, strict=True)) / sum(weights)
        return softplus(-positive - 0.5) + false
    return -positive / 0.5 + math.log(sum(math.exp(value / 0.25) for value in found))


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
        # Weights taken for constants have no part in the gradient; at temperature 0 they are constant.
        loss = loss_of(name, adversarial_temperature=0.0, negative_temperature=0.5, positive_temperature=2.0)
        assert torch.autograd.gradcheck(lambda p, n: loss(p, n.masked_fill(masked, -INF)), (positive, negative))

    def test_it_equals_a_plain_loop(self, name):
        torch.manual_seed(0)
        positive, negative = torch.randn(4), torch.randn(4, 5)
        negative[0, 2] = negative[3, 0] = negative[3, 4] = -INF
        loss = loss_of(name, **OPTIONS)
        expected = [plain(name, p, n) for p, n in zip(positive.tolist(), negative.tolist(), strict=True)]
        assert loss(positive, negative).tolist() == pytest.approx(expected, rel=1e-5)

    def test_edges_that_share_a_query_have_the_loss_that_each_has_alone(self, name):
        torch.manual_seed(0)
        positive, negative = torch.randn(2, 5), torch.randn(2, 3, 4)
        negative[0, 1] = negative[1, 0, 2] = -INF
        query = torch.tensor([[0, 1, 1, 2, 0], [2, 2, 0, 1, 1]])
        loss, chunks = loss_of(name, **OPTIONS), torch.arange(2).unsqueeze(1)
        shared = loss.edge(positive, loss.pool(negative)[chunks, query])
        torch.testing.assert_close(shared, loss(positive, negative[chunks, query]))

    def test_a_masked_candidate_counts_for_nothing(self, name):
        loss = loss_of(name, **OPTIONS)
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


@pytest.mark.parametrize("empty", [torch.full((1, 2), -INF), torch.zeros(1, 0)], ids=["masked", "none"])
@pytest.mark.parametrize(
    ("name", "left"),
    [("bce", True), ("softmax", False), ("margin", False), ("self_adversarial", True), ("bsl", False)],
)
def test_without_candidates_only_losses_with_a_term_of_the_edges_own_draw_it_up(name, left, empty):
    positive, negative = torch.tensor([1.5], requires_grad=True), empty.clone().requires_grad_()
    value = loss_of(name)(positive, negative)
    value.sum().backward()
    assert (value.item() > 0) == (positive.grad.item() < 0) == left
    assert negative.grad is None or (negative.grad == 0).all()


def test_margin_is_the_mean_shortfall_from_the_margin():
    """Shortfalls 1 - 2 + 1.5 and 1 - 2 + 3; the third candidate is far enough."""
    value = loss_of("margin", margin=1.0)(torch.tensor([2.0]), torch.tensor([[1.5, 3.0, -4.0, -INF]]))
    assert value.item() == pytest.approx((0.5 + 2.0 + 0.0) / 3)


def test_self_adversarial_is_rotates_loss_of_distances():
    """Equation 5 of RotatE: gamma 3, distances 2 (true), 4 and 1, weights from minus the distances."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    weight = math.exp(-4) / (math.exp(-4) + math.exp(-1))
    expected = -math.log(sigmoid(3 - 2)) - weight * math.log(sigmoid(4 - 3)) - (1 - weight) * math.log(sigmoid(1 - 3))
    value = loss_of("self_adversarial", margin=3.0)(torch.tensor([-2.0]), torch.tensor([[-4.0, -1.0]]))
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_self_adversarial_takes_its_weights_for_constants():
    negative = torch.tensor([[0.3, -1.0, -INF]], requires_grad=True)
    loss_of("self_adversarial", margin=0.5, adversarial_temperature=2.0)(torch.zeros(1), negative).sum().backward()
    weight = (2.0 * negative.detach()).softmax(-1)
    torch.testing.assert_close(negative.grad, weight * (negative.detach() + 0.5).sigmoid())


def test_self_adversarial_at_temperature_0_weighs_candidates_alike():
    value = loss_of("self_adversarial", margin=0.0, adversarial_temperature=0.0)(
        torch.tensor([0.7]), torch.tensor([[0.1, -0.4, -INF]])
    )
    assert value.item() == pytest.approx(softplus(-0.7) + (softplus(0.1) + softplus(-0.4)) / 2)


def test_bsl_is_the_authors_up_to_a_factor():
    """Their program: -log(exp(p / t1) / sum(exp(n / t1)) ** t2), with positive temperature t1 * t2 here."""
    t1, t2 = 0.5, 1.2
    positive, negative = 0.7, [0.1, -0.4]
    theirs = -math.log(math.exp(positive / t1) / sum(math.exp(n / t1) for n in negative) ** t2)
    loss = loss_of("bsl", positive_temperature=t1 * t2, negative_temperature=t1)
    ours = loss(torch.tensor([positive]), torch.tensor([[*negative, -INF]]))
    assert ours.item() * t2 == pytest.approx(theirs, rel=1e-6)
