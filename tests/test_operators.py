"""Every registered operator keeps the contract, and the registry helps with a wrong name."""

import pytest
import torch

from twhin_pipeline.errors import UserError
from twhin_pipeline.operators import OPERATORS, Identity, Translation
from twhin_pipeline.registry import Registry
from twhin_pipeline.sections.model import OPERATOR_NAMES

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[0.0, 1.0], [1.0, 0.0]]])
RELATION = torch.tensor([1, 0, 1])


def test_the_configuration_knows_exactly_the_registered_operators():
    assert tuple(OPERATORS) == OPERATOR_NAMES


@pytest.mark.parametrize("name", list(OPERATORS))
class TestEveryOperator:
    def test_fresh_it_leaves_vectors_as_they_are(self, name):
        assert torch.equal(OPERATORS[name](2, 2)(X, RELATION), X)

    def test_its_rows_go_out_and_in(self, name):
        first, second = OPERATORS[name](2, 2), OPERATORS[name](2, 2)
        for parameter in first.parameters():
            torch.nn.init.normal_(parameter)
        assert first.rows().shape[0] == 2
        second.load_rows(first.rows())
        assert torch.equal(first(X, RELATION), second(X, RELATION))

    def test_every_parameter_gets_gradient_through_its_relation(self, name):
        operator = OPERATORS[name](2, 2)
        operator(X.clone().requires_grad_(), RELATION).square().sum().backward()
        for parameter in operator.parameters():
            assert (parameter.grad.flatten(1).norm(dim=1) > 0).all()

    def test_gradients_are_those_of_finite_differences(self, name):
        operator = OPERATORS[name](2, 2).double()
        x = X.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, *_: operator(x, RELATION), (x, *operator.parameters()))

    def test_it_takes_no_chunks_at_all(self, name):
        assert OPERATORS[name](2, 2)(X[:0], RELATION[:0]).shape == (0, 2, 2)


def test_translation_adds_its_relations_vector():
    operator = Translation(2, 2)
    operator.load_rows(torch.tensor([[10.0, 20.0], [1.0, -1.0]]))
    expected = [[[2.0, 1.0], [4.0, 3.0]], [[15.0, 26.0], [17.0, 28.0]], [[1.0, 0.0], [2.0, -1.0]]]
    assert torch.equal(operator(X, RELATION), torch.tensor(expected))


def test_identity_has_no_parameters_and_its_rows_are_zeros_of_the_dimension():
    operator = Identity(3, 5)
    assert not list(operator.parameters())
    assert torch.equal(operator.rows(), torch.zeros(3, 5))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown operator 'translatoin'.*known: identity, translation"):
        OPERATORS["translatoin"]


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register_as("a")(int)
    with pytest.raises(ValueError, match="'a' is registered already, by int"):
        registry.register_as("a")(float)
