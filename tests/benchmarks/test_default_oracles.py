"""Oracles of generated shops: by the protocol of evaluation, and never better informed than they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from twhin_pipeline import pipeline
from twhin_pipeline.config import load_config
from twhin_pipeline.operations.shop import CONVERSION, OUTSIDE, Truth, oracle_scores
from twhin_pipeline.store import Store

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import default_graphs
import default_oracles
from default_graphs import ALL
from default_oracles import INFERRED, ORACLE, SHARES, Taste


def plain_recall(scores: np.ndarray, known: set, relevant: set, k: int) -> list[float]:
    """Return the expectation of Recall@k over orders of the tied, one query and relevant candidate at a time."""
    found = []
    for query, row in enumerate(scores):
        listed = [c for c in range(len(row)) if (query, c) not in known]
        hits = []
        for candidate in (c for q, c in relevant if q == query):
            above = sum(row[other] > row[candidate] for other in listed)
            tied = sum(row[other] == row[candidate] for other in listed)
            hits.append(min(1.0, max(0.0, (k - above) / tied)))
        found.append(sum(hits) / len(hits))
    return found


def test_expected_recall_is_that_of_a_plain_loop_with_ties_and_known_candidates(monkeypatch):
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (30, 40)).astype(float)
    cells = [(q, int(c)) for q in range(30) for c in rng.permutation(40)[:8]]
    # Of each query, 5 candidates are known and 3 are relevant.
    known, relevant = ({cell for at, cell in enumerate(cells) if (at % 8 < 5) is listed} for listed in (True, False))
    expected = plain_recall(scores, known, relevant, 7)
    pairs = (np.array(sorted(some)) for some in (known, relevant))
    before = scores.copy()
    monkeypatch.setattr(default_oracles, "CELLS", 200)  # a few edges at a time
    np.testing.assert_allclose(default_oracles.expected_recall(scores, *pairs, 7), expected)
    assert 0.05 < np.mean(expected) < 0.6 and len(set(expected)) > 5
    np.testing.assert_array_equal(scores, before)


def test_a_query_without_known_candidates_and_a_list_of_all_have_the_recall_of_their_list():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    none = np.empty((0, 2), np.int64)
    relevant = np.array([[0, 0], [0, 2], [1, 0]])
    assert default_oracles.expected_recall(scores, none, relevant, 1).tolist() == [0.5, 0.0]
    assert default_oracles.expected_recall(scores, none, relevant, 3).tolist() == [1.0, 1.0]


def test_edges_of_some_heads_are_numbered_by_their_place_among_them():
    edges = np.array([[9, 1], [4, 2], [7, 3], [4, 4], [1, 5]])
    assert default_oracles._of(edges, np.array([4, 9])).tolist() == [[1, 1], [0, 2], [0, 4]]


def test_the_oracle_of_a_store_is_that_of_a_plain_loop_over_its_ids(tmp_path):
    graph = default_graphs.GENERATED["flat"].make(tmp_path, 0.1)
    path = tmp_path / "twhin.yaml"
    path.write_text(yaml.safe_dump(default_graphs.configuration(graph, tmp_path, 0)))
    given = ["launch.device=cpu", "launch.data_threads=1"]
    store, snapshot = Store(str(tmp_path / "store")), "2025-02-01"
    chain = pipeline.Run(load_config(str(path), given), str(path), given, store, snapshot)
    for stage in ("ingest", "vocabulary", "sample"):
        pipeline.run_stage(chain, pipeline.STAGES[stage], lambda line: None)
    relations = [name for name, _, _ in graph.relations]
    truth = default_graphs.read_truth(tmp_path / "truth.npz")
    both = default_oracles.recalls(truth, store, snapshot, relations)
    found = both[ORACLE]
    names = {
        entity: {r["row"]: r["id"] for r in store.read(f"vocabulary/{entity}", snapshot).to_pylist()}
        for entity in ("user", "product")
    }
    users, products = (
        [ids.astype(str).tolist().index(names[entity][number]) for number in range(len(names[entity]))]
        for entity, ids in (("user", truth.user_ids), ("product", truth.product_ids))
    )
    by_relation = []
    for number, name in enumerate(relations):
        known, test = (
            {
                (edge["lhs"], edge["rhs"])
                for asset in assets
                for edge in store.read(asset, snapshot).to_pylist()
                if edge["rel"] == number
            }
            for assets in (("training_set/positives", "held_out/validation"), ("held_out/test",))
        )
        expected = []
        for user in sorted({user for user, _ in test}):
            scores = oracle_scores(truth, np.array([users[user]]), name)[:, products]
            mine = [{(0, product) for head, product in edges if head == user} for edges in (known, test)]
            expected += plain_recall(scores, *mine, 20)
        assert found[name] == pytest.approx(np.mean(expected)) and 0.05 < found[name] < 0.95
        by_relation += expected
    assert found[ALL] == pytest.approx(np.mean(by_relation))
    # It knows less, and more than nothing: of 2,000 products a tenth is there, of which 20 are listed.
    assert both[INFERRED].keys() == found.keys()
    assert 0.15 < both[INFERRED][ALL] < found[ALL]


def test_the_shop_logs_truth_gives_scores_to_what_it_sold_and_none_to_its_newcomers(tmp_path):
    rng = np.random.default_rng(0)
    products = default_graphs.SHOP_PRODUCTS + 3
    own, community, popularity = rng.integers(0, 4, (5, 2)), rng.integers(0, 4, products), rng.random(products) + 1
    np.savez(tmp_path / "truth.npz", ucom=own, icom=community, ipop=popularity)
    truth = default_graphs.read_truth(tmp_path / "truth.npz")
    assert (truth.user_ids[3], truth.product_ids[12]) == (b"u_000003", b"SKU-00012")
    scores = oracle_scores(truth, np.arange(5))
    assert scores.sum(1) == pytest.approx(1)
    assert (scores[:, -3:] == 0).all()
    for user, (first, second) in enumerate(own):
        shares = np.bincount(community, scores[user], 4)
        expected = np.full(4, 0.15 / 4)
        expected[first] += 0.85 * 5 / 7
        expected[second] += 0.85 * 2 / 7
        assert shares == pytest.approx(expected)


@pytest.fixture(scope="module")
def small() -> tuple[Truth, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """A truth with its rows in another order, and some training edges; carts are of products that were viewed."""
    rng = np.random.default_rng(5)
    users, products = rng.permutation(9), rng.permutation(24)
    one = rng.integers(0, 4, 9)
    truth = Truth(
        user_ids=np.array([f"u{n}" for n in range(9)], np.bytes_),
        product_ids=np.array([f"p{n}" for n in range(24)], np.bytes_),
        user_communities=np.stack([one, (one + rng.integers(1, 4, 9)) % 4], 1).astype(np.int32),
        mixture=rng.beta(5, 2, 9), product_community=np.r_[np.arange(4), rng.integers(0, 4, 20)].astype(np.int32),
        popularity=rng.random(24) + 0.1, background=0.2, first_event="view",
    )  # fmt: skip
    views = np.unique(rng.integers(0, (9, 24), (60, 2)), axis=0)
    follows = np.unique(rng.integers(0, 9, (20, 2)), axis=0)
    trained = {
        "view": views,
        "cart": views[rng.random(len(views)) < 0.4],
        "follows": follows[follows[:, 0] != follows[:, 1]],
    }
    return truth, trained, users, products


def likelihood(truth, trained, users, products, row: int, a: int, b: int, share: float) -> float:
    """Return how likely a user's edges are, one after another, if these were its communities."""
    community = truth.product_community
    result = 1.0
    for user, product in trained["view"]:
        if user != row:
            continue
        at = community[products[product]]
        chance = truth.background / 4 + (1 - truth.background) * (share * (at == a) + (1 - share) * (at == b))
        result *= chance * truth.popularity[products[product]] / truth.popularity[community == at].sum()
        converts = CONVERSION["cart"] * (1 if at in (a, b) else OUTSIDE)
        carted = (trained["cart"] == (user, product)).all(1).any()
        result *= converts if carted else 1 - converts
    home = truth.user_communities[:, 0]
    for one, other in trained["follows"]:
        if row in (one, other):
            of_other = home[users[other if row == one else one]]
            result *= 5 / 6 * (of_other == a) / (home == a).sum().clip(1) + 1 / 6 / len(home)
    return result


@pytest.mark.parametrize("row", range(9))
def test_what_is_inferred_is_bayes_rule_over_every_pair_of_communities_and_share(small, row):
    truth, trained, users, products = small
    weights = np.zeros((4, 4, len(SHARES)))
    for a in range(4):
        for b in range(4):
            for number, share in enumerate(SHARES):
                if a != b:
                    weights[a, b, number] = likelihood(*small, row, a, b, share)
    weights /= weights.sum()
    taste = Taste(truth, trained, users, products)
    first, second = taste.posterior(np.array([row]))
    np.testing.assert_allclose(first[0], weights.sum(1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(second[0], weights.sum(0), rtol=1e-9, atol=1e-12)
    for event in ("view", "cart"):
        expected = np.zeros(24)
        for a, b, number in np.argwhere(weights > 0):
            known = Truth(
                **{
                    **vars(truth),
                    "user_communities": np.array([[a, b]]),
                    "mixture": SHARES[number : number + 1],
                }
            )
            expected += weights[a, b, number] * oracle_scores(known, np.array([0]), event)[0]
        found = taste.scores(np.array([row]), event)[0]
        np.testing.assert_allclose(found / found.sum(), expected[products], rtol=1e-9, atol=1e-12)


def test_a_community_with_most_events_leaves_the_second_place_to_the_next(small):
    # Its terms are 1e40 times as large as those of the next, which a difference of sums would lose.
    truth, _, users, _ = small
    community = np.repeat(np.arange(4), 50)
    ids = np.array([f"p{n}" for n in range(200)], np.bytes_)
    wide = replace(truth, product_ids=ids, product_community=community, popularity=np.ones(200))
    views = np.array([(0, product) for product in [*range(45), *range(50, 70)]])
    first, second = Taste(wide, {"view": views}, users, np.arange(200)).posterior(np.array([0]))
    assert first[0, 0].sum() > 0.9 and second[0, 1].sum() > 0.9
