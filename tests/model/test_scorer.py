"""The scorer: vectorised scores equal a plain loop, for every comparator, operator and side, and mixtures of them."""

import plain_scores
import pytest
import torch
from tiny import DIM, config

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.comparators import COMPARATORS
from twhin_pipeline.model.operators import OPERATORS
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.words import SIDES, Side

MIXTURES = [
    *([name] * 3 for name in OPERATORS),
    ["translation", "identity", "translation"],
    ["rotation", "linear", "affine"],
]


def scorer(operators: list[str] | None = None, **model) -> Scorer:
    """Return a scorer of the relations likes, resembles and hides, with random parameters."""
    section = config().model.model_dump(mode="json")
    for relation, operator in zip(section["relations"], operators or MIXTURES[-2], strict=True):
        relation["operator"] = operator
    made = Scorer(config(relations=section["relations"], **model).model)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def plain_score(made: Scorer, side: Side, head: torch.Tensor, relation: int, tail: torch.Tensor) -> float:
    """One edge's score, number by number; `side` is predicted."""
    name = made.relations[relation]
    row, operator = made.state_rows()[name].tolist(), made._operator_of[relation]
    h, t = head.tolist(), tail.tolist()
    half = len(row) // 2
    if made.reciprocal and side == "lhs":
        left, right = plain_scores.operate(operator, t, row[half:]), h
    else:
        left, right = plain_scores.operate(operator, h, row[:half] if made.reciprocal else row), t
    comparator = next(name for name, cls in COMPARATORS._classes.items() if cls is type(made.comparator))
    return plain_scores.compare(comparator, left, right) / made.comparator.temperature


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one operator", "reciprocal"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("comparator", list(COMPARATORS))
@pytest.mark.parametrize("operators", MIXTURES, ids="-".join)
def test_vectorised_scores_equal_a_plain_loop(operators, comparator, side, reciprocal):
    made = scorer(operators, comparator=comparator, temperature=0.25, reciprocal=reciprocal)
    relation = torch.tensor([2, 1, 0, 1])
    queries, candidates = torch.randn(4, 2, DIM), torch.randn(4, 3, DIM)
    scores = made.compare(made.queries(side, queries, relation), made.candidates(side, candidates, relation))
    for g in range(4):
        for i in range(2):
            for j in range(3):
                ends = (queries[g, i], candidates[g, j])
                head, tail = ends if side == "rhs" else ends[::-1]
                expected = plain_score(made, side, head, int(relation[g]), tail)
                assert scores[g, i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("comparator", list(COMPARATORS))
def test_score_predicts_tails_one_to_one(comparator, reciprocal):
    made = scorer(MIXTURES[-1], comparator=comparator, temperature=0.5, reciprocal=reciprocal)
    lhs, rhs, relation = torch.randn(6, DIM), torch.randn(6, DIM), torch.tensor([0, 1, 2, 2, 1, 0])
    scores = made.score(lhs, relation, rhs)
    expected = [plain_score(made, "rhs", lhs[i], int(relation[i]), rhs[i]) for i in range(6)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    torch.testing.assert_close(
        made.score(lhs[0], 1, rhs), made.score(lhs[:1].expand(6, DIM), torch.ones(6).long(), rhs)
    )


@pytest.mark.parametrize("comparator", list(COMPARATORS))
def test_without_reciprocal_relations_both_sides_give_an_edge_the_same_score(comparator):
    made = scorer(MIXTURES[-1], comparator=comparator)
    heads, tails, relation = torch.randn(3, 5, DIM), torch.randn(3, 5, DIM), torch.arange(3)
    rhs = made.pairs(made.queries("rhs", heads, relation), made.candidates("rhs", tails, relation))
    lhs = made.pairs(made.queries("lhs", tails, relation), made.candidates("lhs", heads, relation))
    torch.testing.assert_close(lhs, rhs)


def test_only_heads_without_reciprocal_relations_depend_as_candidates_on_the_relation():
    for reciprocal in (False, True):
        made = scorer(reciprocal=reciprocal)
        assert not made.candidates_by_relation("rhs")
        assert made.candidates_by_relation("lhs") == (not reciprocal)
        whole = torch.randn(9, DIM)
        for side in SIDES:
            if not made.candidates_by_relation(side):
                assert torch.equal(made.candidates(side, whole, torch.tensor([1])), whole)


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "identity"])
def test_heads_and_tails_have_parameters_of_their_own_and_each_gets_its_own_gradient(operator):
    made = scorer([operator] * 3, reciprocal=True)
    x, relation = torch.randn(1, 4, DIM), torch.tensor([1])
    gradients = {}
    for side in SIDES:
        made.zero_grad()
        made.compare(made.queries(side, x, relation), torch.randn(1, 4, DIM)).sum().backward()
        (parameter,) = made.parameters()
        gradients[side] = parameter.grad.norm(dim=1).nonzero().flatten().tolist()
    # The first operators of likes, resembles and hides, then the second ones.
    assert gradients == {"rhs": [1], "lhs": [4]}


@pytest.mark.parametrize("operators", MIXTURES[-2:], ids="-".join)
def test_a_batch_of_one_relation_reaches_all_parameters_with_a_gradient(operators):
    """Ranks average gradients, so a parameter without one would stop them."""
    made = scorer(operators)
    made.queries("rhs", torch.randn(1, 4, DIM), torch.tensor([0])).sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


@pytest.mark.parametrize("operators", MIXTURES, ids="-".join)
def test_scores_in_autocast_are_close_to_those_of_whole_precision(operators):
    made = scorer(operators)
    x, relation = torch.randn(3, 4, DIM), torch.arange(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = made.compare(made.queries("rhs", x, relation), made.candidates("rhs", x, relation))
    whole = made.compare(made.queries("rhs", x, relation), made.candidates("rhs", x, relation))
    torch.testing.assert_close(half.float(), whole, rtol=5e-2, atol=0.3)


@pytest.mark.parametrize("norm", ["n3", "l2"])
def test_the_penalty_is_that_of_each_relations_operators(norm):
    made = scorer(["complex_diagonal", "rotation", "affine"], reciprocal=True)
    rows = made.state_rows()
    power = 3 if norm == "n3" else 2

    def plain(row: list[float], is_complex: bool) -> float:
        half = len(row) // 2
        if is_complex:
            row = [abs(complex(row[i], row[half + i])) for i in range(half)]
        return sum(abs(value) ** power for value in row)

    whole = {name: [row[: len(row) // 2].tolist(), row[len(row) // 2 :].tolist()] for name, row in rows.items()}
    expected = [
        sum(plain(row, True) for row in whole["likes"]),
        0.0,
        sum(plain(row, False) for row in whole["hides"]),
    ]
    found = made.penalty(torch.tensor([2, 0, 1, 2]), norm)
    assert found.tolist() == pytest.approx([expected[i] for i in (2, 0, 1, 2)], rel=1e-5)
    found.sum().backward()
    assert made.operators["affine"].weight.grad.norm() > 0


def test_a_scorer_without_anything_to_penalize_has_no_penalty():
    assert scorer(["rotation", "identity", "rotation"]).penalty(torch.tensor([0, 1]), "n3").tolist() == [0.0, 0.0]


def test_complex_is_told_where_any_operator_is():
    assert scorer(["identity", "rotation", "linear"]).complex
    assert not scorer(["identity", "affine", "linear"]).complex


@pytest.mark.parametrize("reciprocal", [False, True])
@pytest.mark.parametrize("operators", MIXTURES, ids="-".join)
def test_a_scorer_from_anothers_rows_scores_alike(operators, reciprocal):
    made, again = scorer(operators, reciprocal=reciprocal), scorer(operators, reciprocal=reciprocal)
    rows = made.state_rows()
    for parameter in again.parameters():
        torch.nn.init.zeros_(parameter)
    again.load_rows(rows)
    x, relation = torch.randn(3, 4, DIM), torch.tensor([0, 1, 2])
    for side in SIDES:
        assert torch.equal(made.queries(side, x, relation), again.queries(side, x, relation))
    assert list(rows) == ["likes", "resembles", "hides"]


def test_rows_are_flat_joined_where_reciprocal_and_zeros_for_identity():
    lengths = {name: len(row) for name, row in scorer(["linear", "identity", "rotation"]).state_rows().items()}
    assert lengths == {"likes": DIM * DIM, "resembles": DIM, "hides": DIM // 2}
    rows = scorer(["linear", "identity", "rotation"], reciprocal=True).state_rows()
    assert {name: len(row) for name, row in rows.items()} == {name: 2 * length for name, length in lengths.items()}
    assert torch.equal(rows["resembles"], torch.zeros(2 * DIM))


def test_rows_without_one_of_the_relations_are_refused():
    rows = scorer().state_rows()
    del rows["hides"]
    with pytest.raises(UserError, match="no operator parameters for hides"):
        Scorer.from_rows(config().model, rows)


def test_rows_of_another_operator_are_refused():
    rows = scorer(reciprocal=True).state_rows()
    with pytest.raises(UserError, match=f"likes has {DIM} operator parameters, but the model to load has {2 * DIM}"):
        Scorer.from_rows(config().model, rows)


def test_operators_start_at_random_where_the_configuration_says_so() -> None:
    def rows(init: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = TwhinModelConfig.model_validate(
            {
                "embeddings": {"tables": [{"name": "user", "embedding_dim": 8}]},
                "relations": [{"name": "follows", "lhs": "user", "rhs": "user", "operator": "complex_diagonal"}],
                "operator_init": init,
                "reciprocal": True,
            }
        )
        return Scorer(model).state_rows()["follows"]

    assert rows("identity").tolist() == [1, 1, 1, 1, 0, 0, 0, 0] * 2
    assert len(rows("random").unique()) == 16
