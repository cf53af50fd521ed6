"""Ranks by blocked matrix products are those of a plain loop over candidates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from twhin_pipeline.config import parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import ranking
from twhin_pipeline.evaluation.ranking import CandidateSet, rank_edges
from twhin_pipeline.model.comparators import COMPARATORS
from twhin_pipeline.model.operators import OPERATORS
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.training_set.known_edges import KnownEdges
from twhin_pipeline.words import SIDES, other

NUM = {"lhs": 23, "rhs": 31}
DIM = 8
RELATION = torch.tensor([1])


def relation_scores(
    comparator: str = "dot",
    vectors: dict[str, torch.Tensor] | None = None,
    operator: str = "translation",
    reciprocal: bool = False,
) -> RelationScores:
    model = {
        "embeddings": {"tables": [{"name": "a", "embedding_dim": DIM}, {"name": "b", "embedding_dim": DIM}]},
        "relations": [{"name": n, "lhs": "a", "rhs": "b", "operator": operator} for n in ("first", "second")],
        "comparator": comparator,
        "temperature": 0.5,
        "reciprocal": reciprocal,
    }
    config = parse_config({"source": {"path": "x"}, "model": model}).model
    torch.manual_seed(3)
    length = len(Scorer(config).state_rows()["first"])
    moved = {"first": torch.zeros(length), "second": torch.randint(-2, 3, (length,)).float()}
    vectors = vectors or {side: torch.randn(n, DIM) for side, n in NUM.items()}
    return RelationScores(Scorer.from_rows(config, moved), 1, vectors["lhs"], vectors["rhs"])


def tied_vectors() -> dict[str, torch.Tensor]:
    """Small integers: their dot products are exact, and many are equal."""
    torch.manual_seed(4)
    return {side: torch.randint(-1, 2, (n, DIM)).float() for side, n in NUM.items()}


def random_edges(size: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {side: rng.integers(0, n, size) for side, n in NUM.items()}


def loop(
    scores: RelationScores, side: str, edges: dict, candidates: list[int], known: set[tuple[int, int]]
) -> list[float]:
    """Rank each edge by a plain loop; `known` (query, answer) are not counted but for the edge itself."""
    found = []
    for query, target in zip(edges[other(side)], edges[side], strict=True):

        def score(entity: int, query: int = query) -> float:
            x, y = scores.tables[other(side)][query], scores.tables[side][entity]
            with torch.no_grad():
                one = scores.scorer.queries(side, x[None, None], RELATION)
                return round(
                    float(scores.scorer.pairs(one, scores.scorer.candidates(side, y[None, None], RELATION))), 4
                )

        true = score(target)
        rivals = [score(e) for e in candidates if e != target and (query, e) not in known]
        above, tied = sum(s > true for s in rivals), sum(s == true for s in rivals)
        found.append(((1 + above) + (1 + above + tied)) / 2)
    return found


@pytest.fixture(params=[True, False], ids=["compiled", "as on a GPU"])
def either_way(request, monkeypatch):
    """Count by the compiled loops, and by torch, as on a GPU."""
    if not request.param:
        monkeypatch.setattr(ranking, "_compiled", lambda matrix: False)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("comparator", ["dot", "cosine"])
@pytest.mark.parametrize("tied", [False, True])
def test_raw_and_filtered_ranks_equal_a_plain_loop_with_and_without_ties(side, comparator, tied):
    scores = relation_scores(comparator, tied_vectors() if tied else None)
    edges, extra = random_edges(40), random_edges(200, seed=1)
    pairs = {s: np.concatenate([edges[s], extra[s]]) for s in SIDES}
    known = KnownEdges.from_pairs(pairs[other(side)], pairs[side])
    everything = CandidateSet(NUM[side])
    raw, filtered = rank_edges(scores, side, edges[other(side)], edges[side], everything, [known], 512)
    true = set(zip(pairs[other(side)].tolist(), pairs[side].tolist(), strict=True))
    if comparator == "dot" or not tied:  # the cosine of equal directions differs in its last bits
        assert raw.ranks.tolist() == loop(scores, side, edges, range(NUM[side]), set())
        assert filtered.ranks.tolist() == loop(scores, side, edges, range(NUM[side]), true)
    assert (filtered.ranks <= raw.ranks).all()
    assert (filtered.ranks < raw.ranks).any()


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one operator", "reciprocal"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("comparator", list(COMPARATORS))
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_ranks_equal_a_plain_loop_for_every_operator_and_comparator(operator, comparator, side, reciprocal):
    scores = relation_scores(comparator, operator=operator, reciprocal=reciprocal)
    edges = random_edges(8)
    chosen = CandidateSet.sample(NUM[side], 9, np.random.default_rng(0))
    for candidates, rows in ((CandidateSet(NUM[side]), range(NUM[side])), (chosen, chosen.rows.tolist())):
        (raw,) = rank_edges(scores, side, edges[other(side)], edges[side], candidates, [], 5)
        assert raw.ranks.tolist() == loop(scores, side, edges, rows, set())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("candidates", [None, 9])
def test_blocks_of_any_size_give_the_same_ranks(side, candidates):
    scores = relation_scores(vectors=tied_vectors())
    edges, extra = random_edges(40), random_edges(200, seed=1)
    known = KnownEdges.from_pairs(extra[other(side)], extra[side])
    chosen = CandidateSet.sample(NUM[side], candidates, np.random.default_rng(0))
    found = [
        [c.ranks.tolist() for c in rank_edges(scores, side, edges[other(side)], edges[side], chosen, [known], size)]
        for size in (1, 7, 1000)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("side", SIDES)
def test_sampled_candidates_rank_against_the_sample_and_the_edge_itself(side):
    scores = relation_scores(vectors=tied_vectors())
    edges, extra = random_edges(60), random_edges(200, seed=1)
    known = KnownEdges.from_pairs(extra[other(side)], extra[side])
    chosen = CandidateSet.sample(NUM[side], 9, np.random.default_rng(0))
    assert chosen.rows is not None and len(set(chosen.rows.tolist())) == 9
    raw, filtered = rank_edges(scores, side, edges[other(side)], edges[side], chosen, [known], 512)
    true = set(zip(extra[other(side)].tolist(), extra[side].tolist(), strict=True))
    assert raw.ranks.tolist() == loop(scores, side, edges, chosen.rows.tolist(), set())
    assert filtered.ranks.tolist() == loop(scores, side, edges, chosen.rows.tolist(), true)


def test_a_sample_as_large_as_the_type_is_all_of_it():
    assert CandidateSet.sample(5, 5, np.random.default_rng(0)).rows is None


def test_a_model_that_scores_everything_alike_gets_the_middle_rank():
    vectors = {side: torch.ones(n, DIM) for side, n in NUM.items()}
    edges = random_edges(40)
    (raw,) = rank_edges(
        relation_scores(vectors=vectors), "rhs", edges["lhs"], edges["rhs"], CandidateSet(NUM["rhs"]), [], 512
    )
    assert set(raw.ranks.tolist()) == {(NUM["rhs"] + 1) / 2}


def test_a_score_that_is_not_a_number_is_refused():
    vectors = tied_vectors()
    vectors["rhs"][5, 0] = float("nan")
    edges = random_edges(10)
    with pytest.raises(UserError, match="not finite"):
        rank_edges(
            relation_scores(vectors=vectors), "rhs", edges["lhs"], edges["rhs"], CandidateSet(NUM["rhs"]), [], 512
        )
