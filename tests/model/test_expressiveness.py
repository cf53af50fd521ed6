"""Planted graphs that only some operators can express: those that can learn them, and those that cannot do not.

A graph is *expressed* when, of each relation, every true edge scores above every false one, all edges that are not true
being false (an entity's with itself too). The patterns are those of RotatE (Sun et al., 2019, table 2), of k copies
that are alike but for their entities.

Why some cannot, whatever the vectors (h, t) and the dimension:

- `identity` and `dot`: an edge scores as its reverse does, and 2 h.t <= h.h + t.t, so that no edge scores above
  both of its ends' with themselves.
- `identity` and `l2`: no edge scores above an entity's with itself, at distance 0.
- `diagonal` and `dot`: an edge scores as its reverse does, and only `symmetric` has both true.
- `translation` and `l2`: |h + r - t| + |t + r - h| >= |2 r|, so of an edge and its reverse one is no nearer than an
  entity is to itself, at distance |r|.
- `translation` and `dot`: that (h + r).t is above (t + r).t says h.t > t.t, the head is the longer one; but symmetric
  edges, and a relation and its inverse, have each end for a head. And (h + r).t - (h' + r).t does not depend on r, so
  c cannot have b before a for the second step of a composition, and a before b for both steps together.

Why the others can: with `l2`, b = op(a) exactly, by r (antisymmetric), -r or 1/r or a turn back (inverse), the sum or
product (composition), and a factor -1, which is a turn by pi (symmetric). With `dot`, products of matrices that are no
multiple of the identity tell edges from their reverses (ComplEx, RESCAL), a turn likewise; a factor -1 makes an
entity's score with itself negative (`diagonal`, symmetric); and translation needs heads that are longer than tails.
"""

from __future__ import annotations

import pytest
import torch

from twhin_pipeline.config import parse_config
from twhin_pipeline.model.operators import OPERATORS
from twhin_pipeline.model.scorer import Scorer

DIM = 16
COPIES = 3
# A relation's edges between the roles of one copy.
PATTERNS = {
    "symmetric": [[("a", "b"), ("b", "a")]],
    "antisymmetric": [[("a", "b")]],
    "inverse": [[("a", "b")], [("b", "a")]],
    "composition": [[("a", "b")], [("b", "c")], [("a", "c")]],
}
CANNOT = {
    ("identity", "dot"): set(PATTERNS),
    ("identity", "l2"): set(PATTERNS),
    ("diagonal", "dot"): {"antisymmetric", "inverse", "composition"},
    ("translation", "l2"): {"symmetric"},
    ("translation", "dot"): {"symmetric", "inverse", "composition"},
}


def planted(pattern: str, copies: int = COPIES) -> torch.Tensor:
    """Return which edges are true, bool `[R, N, N]` (relation, head, tail)."""
    roles = sorted({role for relation in PATTERNS[pattern] for edge in relation for role in edge})
    size = len(roles) * copies
    truth = torch.zeros(len(PATTERNS[pattern]), size, size, dtype=torch.bool)
    for number, relation in enumerate(PATTERNS[pattern]):
        for head, tail in relation:
            for copy in range(copies):
                truth[number, roles.index(head) * copies + copy, roles.index(tail) * copies + copy] = True
    return truth


def learn(operator: str, comparator: str, truth: torch.Tensor, known: torch.Tensor, steps: int) -> torch.Tensor:
    """Learn the `known` edges of `truth` by their hinge loss at a threshold a relation: scores `[R, N, N]`."""
    torch.manual_seed(0)
    relations, size, _ = truth.shape
    section = {
        "embeddings": {"tables": [{"name": "entity", "embedding_dim": DIM}]},
        "relations": [
            {"name": f"r{i}", "lhs": "entity", "rhs": "entity", "operator": operator} for i in range(relations)
        ],
        "comparator": comparator,
    }
    scorer = Scorer(parse_config({"source": {"path": "x"}, "model": section}).model)
    table = torch.nn.Parameter(torch.randn(size, DIM))
    threshold = torch.nn.Parameter(torch.zeros(relations, 1, 1))
    for parameter in scorer.parameters():
        # Turns by 0 are where gradients of turns either way cancel.
        torch.nn.init.normal_(parameter)
    optimizer = torch.optim.Adam([table, threshold, *scorer.parameters()], lr=0.05)
    number = torch.arange(relations)
    sign = truth.float() * 2 - 1
    for _ in range(steps):
        vectors = table.expand(relations, size, DIM)
        scores = scorer.compare(scorer.queries("rhs", vectors, number), scorer.candidates("rhs", vectors, number))
        loss = (1 - sign * (scores - threshold)).relu()[known].sum()
        if loss == 0:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scores.detach()


def gap(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """Return by how much the lowest true edge is above the highest false one, in the worst of the relations."""
    return min(float(s[t].min() - s[~t].max()) for s, t in zip(scores, truth, strict=True))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("comparator", ["dot", "l2"])
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_an_operator_learns_exactly_the_patterns_that_it_can_express(operator, comparator, pattern):
    truth = planted(pattern)
    able = pattern not in CANNOT.get((operator, comparator), set())
    found = gap(learn(operator, comparator, truth, torch.ones_like(truth), 1000 if able else 100), truth)
    # The loss is 0 at a gap of 2.
    assert found > 1 if able else found < 1e-4
