"""Every registered operator keeps the contract, and the registry helps with a wrong name."""

import math

import plain_scores
import pytest
import torch

from twhin_pipeline.config.model import OPERATOR_NAMES
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.operators import OPERATORS, Identity, Operator, penalty
from twhin_pipeline.registry import Registry

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]], [[0.0, 1.0], [1.0, 0.0]]])
RELATION = torch.tensor([1, 0, 1])
PARAMETERS = {
    "translation": 4,
    "identity": 4,
    "diagonal": 4,
    "linear": 16,
    "affine": 20,
    "complex_diagonal": 4,
    "rotation": 2,
}


def random_operator(name: str, num_relations: int, dim: int) -> Operator:
    operator = OPERATORS[name](num_relations, dim)
    torch.manual_seed(0)
    for parameter in operator.parameters():
        torch.nn.init.normal_(parameter)
    return operator


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

    def test_it_equals_a_plain_loop(self, name):
        operator = random_operator(name, 3, 4)
        x, relation = torch.randn(5, 2, 4), torch.tensor([2, 0, 1, 1, 2])
        rows = operator.rows().tolist()
        expected = [
            [plain_scores.operate(name, v.tolist(), rows[r]) for v in chunk]
            for chunk, r in zip(x, relation, strict=True)
        ]
        torch.testing.assert_close(operator(x, relation), torch.tensor(expected))

    def test_its_rows_have_the_length_that_is_documented(self, name):
        assert OPERATORS[name](3, 4).rows().shape == (3, PARAMETERS[name])

    def test_every_parameter_gets_gradient_through_its_relation_and_no_other(self, name):
        operator = random_operator(name, 3, 2)
        (operator(X.clone().requires_grad_(), RELATION) * torch.tensor([1.0, 3.0])).sum().backward()
        for parameter in operator.parameters():
            assert (parameter.grad[:2] != 0).all() and (parameter.grad[2] == 0).all()

    def test_zero_vectors_have_finite_gradients(self, name):
        operator = OPERATORS[name](2, 2)
        x = torch.zeros(3, 2, 2, requires_grad=True)
        operator(x, RELATION).sum().backward()
        assert all(t.grad.isfinite().all() for t in (x, *operator.parameters()))

    def test_gradients_are_those_of_finite_differences(self, name):
        operator = random_operator(name, 2, 4).double()
        x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, *_: operator(x, RELATION), (x, *operator.parameters()))

    def test_what_is_penalized_gets_gradient(self, name):
        operator = random_operator(name, 2, 4)
        penalized = operator.penalized()
        assert (penalized is None) == (name in ("identity", "rotation"))
        if penalized is not None:
            penalty(penalized, "n3", operator.complex).sum().backward()
            assert all((parameter.grad != 0).any(1).all() for parameter in operator.parameters())

    def test_it_takes_no_chunks_at_all(self, name):
        assert OPERATORS[name](2, 2)(X[:0], RELATION[:0]).shape == (0, 2, 2)


LITERAL = [
    ("translation", [[10.0, 20.0], [1.0, -1.0]], [[[2.0, 1.0], [4.0, 3.0]], [[15.0, 26.0]]]),
    ("diagonal", [[10.0, 20.0], [2.0, -1.0]], [[[2.0, -2.0], [6.0, -4.0]], [[50.0, 120.0]]]),
    ("linear", [[0.0, 1.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0]], [[[5.0, 11.0], [11.0, 25.0]], [[6.0, 5.0]]]),
    (
        "affine",
        [[0.0, 1.0, 1.0, 0.0, 100.0, 200.0], [1.0, 2.0, 3.0, 4.0, -5.0, -11.0]],
        [[[0.0, 0.0], [6.0, 14.0]], [[106.0, 205.0]]],
    ),
    # (1 + 2i)(2 + i) = 5i; (3 + 4i)(2 + i) = 2 + 11i; (5 + 6i)(i) = -6 + 5i.
    ("complex_diagonal", [[0.0, 1.0], [2.0, 1.0]], [[[0.0, 5.0], [2.0, 11.0]], [[-6.0, 5.0]]]),
    # By a right angle x + iy becomes -y + ix; by two, -x - iy.
    ("rotation", [[torch.pi / 2], [torch.pi]], [[[-1.0, -2.0], [-3.0, -4.0]], [[-6.0, 5.0]]]),
]


@pytest.mark.parametrize(("name", "rows", "expected"), LITERAL, ids=[case[0] for case in LITERAL])
def test_operators_give_what_was_worked_out_by_hand(name, rows, expected):
    operator = OPERATORS[name](2, 2)
    operator.load_rows(torch.tensor(rows))
    for chunk, relation, vectors in ((X[:1], [1], expected[0]), (X[1:2, :1], [0], expected[1])):
        torch.testing.assert_close(operator(chunk, torch.tensor(relation)), torch.tensor([vectors]))


def test_penalties_are_cubed_moduli_or_squares():
    """|3 + 4i| = 5, and 5 cubed is 125."""
    x = torch.tensor([[3.0, 1.0, 4.0, 0.0]])
    assert penalty(x, "n3", complex=True).item() == pytest.approx(125 + 1)
    assert penalty(x, "n3", complex=False).item() == pytest.approx(27 + 1 + 64)
    assert penalty(x, "l2", complex=True).item() == penalty(x, "l2", complex=False).item() == pytest.approx(26)
    zero = torch.zeros(4, requires_grad=True)
    penalty(zero, "n3", complex=True).backward()
    assert zero.grad.tolist() == [0.0] * 4


def test_identity_has_no_parameters_and_its_rows_are_zeros_of_the_dimension():
    operator = Identity(3, 5)
    assert not list(operator.parameters())
    assert torch.equal(operator.rows(), torch.zeros(3, 5))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown operator 'translatoin'.*known: affine, .*, translation"):
        OPERATORS["translatoin"]


def test_a_name_is_registered_once():
    registry = Registry("thing")
    registry.register_as("a")(int)
    with pytest.raises(ValueError, match="'a' is registered already, by int"):
        registry.register_as("a")(float)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_random_start_is_not_the_identity_and_follows_the_seed(name: str) -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        operator = OPERATORS[name](3, 8)
        operator.randomize(0.1)
        return operator.rows()

    assert torch.equal(made(1), made(1))
    if name != "identity":
        assert not torch.equal(made(1), made(2))
        assert not torch.equal(made(1), OPERATORS[name](3, 8).rows())
        assert (made(1)[0] != made(1)[1]).all(), "relations start unlike each other"


def test_random_starts_have_the_size_they_are_said_to_have() -> None:
    torch.manual_seed(0)
    drawn = {}
    for name in ("translation", "diagonal", "complex_diagonal", "rotation", "linear", "affine"):
        operator = OPERATORS[name](2000, 8)
        operator.randomize(0.25)
        drawn[name] = operator.rows()
    for name in ("translation", "diagonal", "complex_diagonal"):
        assert drawn[name].std().item() == pytest.approx(0.25, rel=0.03)
    assert drawn["linear"].std().item() == pytest.approx(8**-0.5, rel=0.03)
    assert drawn["affine"][:, :64].std().item() == pytest.approx(8**-0.5, rel=0.03)
    assert drawn["affine"][:, 64:].std().item() == pytest.approx(0.25, rel=0.03)
    angles = drawn["rotation"]
    assert angles.abs().max() <= math.pi
    assert angles.std().item() == pytest.approx(math.pi / 3**0.5, rel=0.03)
