"""The scorer: vectorised scores equal a plain loop, for every comparator and a mixture of operators."""

import math

import pytest
import torch
from tiny import DIM, config

from twhin_pipeline.comparators import COMPARATORS
from twhin_pipeline.errors import UserError
from twhin_pipeline.scorer import Scorer


def scorer(**model) -> Scorer:
    made = Scorer(config(**model).model)
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def plain_score(made: Scorer, lhs: torch.Tensor, relation: int, rhs: torch.Tensor) -> float:
    """One edge's score, number by number: relations 0 and 2 translate, relation 1 does not."""
    vector = made.state_rows()[made.relations[relation]]
    left = [float(x) + float(r) for x, r in zip(lhs, vector, strict=True)]
    right = [float(x) for x in rhs]
    value = sum(x * y for x, y in zip(left, right, strict=True))
    if type(made.comparator).__name__ == "Cosine":
        value /= math.sqrt(sum(x * x for x in left)) * math.sqrt(sum(y * y for y in right))
    return value / made.temperature


@pytest.mark.parametrize("comparator", list(COMPARATORS))
def test_vectorised_scores_equal_a_plain_loop(comparator):
    made = scorer(comparator=comparator, temperature=0.25)
    relation = torch.tensor([2, 1, 0, 1])
    lhs, rhs = torch.randn(4, 5, DIM), torch.randn(4, 7, DIM)
    scores = made.compare(made.transform(lhs, relation), made.prepare(rhs))
    for g in range(4):
        for i in range(5):
            for j in range(7):
                expected = plain_score(made, lhs[g, i], int(relation[g]), rhs[g, j])
                assert scores[g, i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("comparator", list(COMPARATORS))
def test_score_is_transform_prepare_and_pairs_at_once(comparator):
    made = scorer(comparator=comparator, temperature=0.5)
    lhs, rhs, relation = torch.randn(6, DIM), torch.randn(6, DIM), torch.tensor([0, 1, 2, 2, 1, 0])
    scores = made.score(lhs, relation, rhs)
    expected = [plain_score(made, lhs[i], int(relation[i]), rhs[i]) for i in range(6)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    torch.testing.assert_close(
        made.score(lhs[0], 1, rhs), made.score(lhs[:1].expand(6, DIM), torch.ones(6).long(), rhs)
    )


def test_a_scorer_from_anothers_rows_scores_alike():
    made = scorer()
    rows = made.state_rows()
    again = Scorer.from_rows(config().model, rows)
    lhs, rhs, relation = torch.randn(3, DIM), torch.randn(3, DIM), torch.tensor([0, 1, 2])
    assert torch.equal(made.score(lhs, relation, rhs), again.score(lhs, relation, rhs))
    assert list(rows) == ["likes", "resembles", "hides"]
    assert torch.equal(rows["resembles"], torch.zeros(DIM))


def test_rows_without_one_of_the_relations_are_refused():
    rows = scorer().state_rows()
    del rows["hides"]
    with pytest.raises(UserError, match="no operator parameters for hides"):
        Scorer.from_rows(config().model, rows)
