"""A new release beside the current one: the same edges ranked by both, gates, and the decision on the record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small_store
from small_store import NUM, SNAPSHOT

from twhin_pipeline.config.promotion import PromotionConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle import challenge, comparison, gates, promotion
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.stages.chain import STAGES, run_stage
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store, Verdict, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.export import export
from twhin_pipeline.views import release_tables

COMMUNITIES = 4


@pytest.fixture
def small(tmp_path) -> small_store.Small:
    """A graph whose edges stay within communities: an entity's is its row's remainder."""
    rng = np.random.default_rng(0)
    found = set()
    while len(found) < 700:
        relation, community = int(rng.integers(3)), int(rng.integers(COMMUNITIES))
        sizes = [NUM[entity] // COMMUNITIES for entity in list(small_store.RELATIONS.values())[relation]]
        lhs, rhs = (COMMUNITIES * int(rng.integers(size)) + community for size in sizes)
        found.add((lhs, relation, rhs))
    edges = rng.permutation(np.array(sorted(found), np.int64))
    splits = dict(zip(("train", "validation", "test"), np.split(edges, [450, 500]), strict=True))
    made = small_store.make(tmp_path, config=small_store.config(training={"refit": False}), splits=splits)
    return replace(made, scorer=Scorer.from_rows(made.config.model, Scorer(made.config.model).state_rows()))


def vectors(quality: float, seed: int) -> dict[str, np.ndarray]:
    """Communities' own directions, and noise in the place of what `quality` lacks of 1."""
    rng = np.random.default_rng(seed)
    result = {}
    for entity, size in NUM.items():
        clear = np.eye(small_store.DIM)[np.arange(size) % COMMUNITIES]
        result[entity] = (quality * clear + (1 - quality) * rng.normal(size=clear.shape)).astype(np.float32)
    return result


def train(small: small_store.Small, quality: float, seed: int = 0) -> small_store.Small:
    """Write a model and what follows it."""
    table = vectors(quality, seed)
    small_store.write_model(small.store, small.config, table, small.scorer)
    export(small.config, small.store, SNAPSHOT)
    parents = small.store.versions(SNAPSHOT, ["twhin_model"])
    with small.store.replace("evaluation", SNAPSHOT, config_hash="test", parents=parents) as draft:
        draft.write(pa.table({"relation": ["all"], "metric": ["filtered_mrr"], "value": [quality]}))
        draft.details = {"metrics": {"filtered_mrr": quality}}
    small.store.judge(small.store.manifest("evaluation", SNAPSHOT), Verdict("passed", "now"))
    return replace(small, vectors=table)


def publish(small: small_store.Small, **options: Any) -> dict[str, Any]:
    """Compare, publish and decide; return the decision."""
    config = small.config.model_copy(update={"promotion": PromotionConfig(**options)})
    for name in ("compare", "publish", "decide"):
        run_stage(Run(config, "unused", [], small.store, SNAPSHOT), STAGES[name], lambda line: None)
    return small.store.manifest("promotion", SNAPSHOT).details


def plain_ranks(small: small_store.Small) -> dict[int, list[float]]:
    """Rank each test edge on both sides by loops: filtered, among entities that have a training edge."""
    trained: dict[str, set[int]] = {entity: set() for entity in NUM}
    known = {tuple(edge) for part in small.edges.values() for edge in part.tolist()}
    for edge in small.edges["train"].tolist():
        for entity, row in zip(list(small_store.RELATIONS.values())[edge[1]], (edge[0], edge[2]), strict=True):
            trained[entity].add(row)
    result: dict[int, list[float]] = {}
    for lhs, rel, rhs in sorted(small.edges["test"].tolist(), key=lambda edge: (edge[1], edge[0], edge[2])):
        types = list(small_store.RELATIONS.values())[rel]
        if lhs not in trained[types[0]] or rhs not in trained[types[1]]:
            continue
        true = small_store.score(small, rel, lhs, rhs)
        found = []
        for place in (0, 1):
            rivals = []
            for candidate in trained[types[place]]:
                edge = (candidate, rel, rhs) if place == 0 else (lhs, rel, candidate)
                if edge != (lhs, rel, rhs) and edge not in known:
                    rivals.append(small_store.score(small, edge[1], edge[0], edge[2]))
            above, tied = sum(one > true for one in rivals), sum(one == true for one in rivals)
            found.append(1 / (1 + above + tied / 2))
        result.setdefault(rel, []).append(sum(found) / 2)
    return result


def test_both_models_ranks_are_those_of_a_plain_loop(small) -> None:
    first = train(small, 0.7, seed=1)
    publish(first)
    second = train(small, 0.6, seed=2)
    publish(second, largest_loss=0.99)
    rows = {
        (row["name"], row["metric"]): row["value"]
        for row in small.store.read("drift", SNAPSHOT).to_pylist()
        if row["kind"] == "relation"
    }
    new, before = plain_ranks(second), plain_ranks(first)
    for rel, name in enumerate(small_store.RELATIONS):
        assert rows[name, "edges"] == len(new[rel])
        assert rows[name, "filtered_mrr"] == pytest.approx(np.mean(new[rel]), abs=2e-4)
        assert rows[name, "filtered_mrr_current"] == pytest.approx(np.mean(before[rel]), abs=2e-4)
    every = [np.mean([one for of in ranks.values() for one in of]) for ranks in (new, before)]
    assert rows["all", "filtered_mrr_change"] == pytest.approx(every[0] / every[1] - 1, abs=2e-3)


def test_a_model_that_lost_beyond_chance_is_held_and_the_one_before_stays_current(small) -> None:
    train(small, 0.9)
    assert publish(small)["decision"] == "promoted"
    first = releases.current(small.store)
    train(small, 0.1)
    decision = publish(small)
    assert (decision["decision"], decision["current_before"]) == ("held", first.name)
    assert "filtered MRR" in decision["reason"] and "limit -5.0%" in decision["reason"]
    assert releases.current(small.store) == first
    listed = {row["release"]: row for row in release_tables.listed(small.store)}
    assert listed[first.name]["state"] == "current"
    assert (listed[decision["release"]]["state"], listed[decision["release"]]["reason"]) == ("held", decision["reason"])
    promotion.promote(small.store, decision["release"], "me", "I know better")
    assert releases.current(small.store).name == decision["release"]


def test_the_next_good_release_is_compared_with_the_current_one_and_not_with_the_held_one(small) -> None:
    train(small, 0.9)
    first = publish(small)["release"]
    train(small, 0.1)
    publish(small)
    train(small, 0.9, seed=5)
    decision = publish(small)
    assert (decision["decision"], decision["current_before"]) == ("promoted", first)
    assert small.store.manifest("published", SNAPSHOT).details["compatible_with"] == first


def test_a_model_that_is_chosen_by_recall_is_compared_by_hits(small) -> None:
    training = small.config.training.model_copy(update={"selection_metric": "recall@3"})
    small = replace(small, config=small.config.model_copy(update={"training": training}))
    publish(train(small, 0.9))
    decision = publish(train(small, 0.1))
    assert decision["decision"] == "held" and decision["reason"].startswith("Hits@3 ")
    rows = {
        (row["name"], row["metric"]): row["value"]
        for row in small.store.read("drift", SNAPSHOT).to_pylist()
        if row["kind"] == "relation"
    }
    assert rows["all", "hits@3"] < rows["all", "hits@3_current"] <= 1 and "filtered_mrr" in {key[1] for key in rows}
    assert challenge.quality_metric(small_store.config(promotion={"metric": "hits@7"})) == "hits@7"


def test_hits_are_those_of_tails_and_reciprocal_ranks_the_mean_of_both_sides() -> None:
    ranks = {"lhs": [np.array([1.0, 2.0]), np.array([4.0, 4.0])], "rhs": [np.array([2.0, 9.0]), np.array([1.0, 1.5])]}
    new, current = challenge.values(ranks, "filtered_mrr")
    np.testing.assert_allclose(new, [0.75, (1 / 2 + 1 / 9) / 2])
    np.testing.assert_allclose(current, [(1 / 4 + 1) / 2, (1 / 4 + 1 / 1.5) / 2])
    assert [one.tolist() for one in challenge.values(ranks, "hits@2")] == [[1, 0], [1, 1]]
    assert [one.tolist() for one in challenge.values({"lhs": ranks["lhs"]}, "hits@3")] == [[1, 1], [0, 0]]


def test_noise_does_not_decide() -> None:
    rng = np.random.default_rng(0)
    before = rng.random(300)
    noisy = challenge.compared("all", np.clip(before + rng.normal(scale=0.3, size=300), 0, 1), before, 0.95)
    assert noisy.low < 0 < noisy.high
    worse = challenge.compared("all", 0.8 * before, before, 0.95)
    assert worse.change == pytest.approx(-0.2) and worse.high < -0.15
    same = challenge.compared("all", before, before, 0.95)
    assert (same.change, same.low, same.high) == (0, 0, 0)


def test_the_interval_covers_the_true_change_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        before = rng.random(200)
        new = before * (0.9 + 0.4 * (rng.random(200) - 0.5))  # in the mean 0.9 of it
        found = challenge.compared("all", new, before, 0.9)
        covered += found.low <= -0.1 <= found.high
    assert 80 <= covered <= 98


def test_a_release_waits_where_promotion_is_not_automatic(small) -> None:
    train(small, 0.9)
    decision = publish(small, automatic=False)
    assert decision["decision"] == "held" and "promotion.automatic is false" in decision["reason"]
    assert releases.current(small.store) is None


def test_a_decision_that_is_made_again_leaves_the_current_release_current(small) -> None:
    train(small, 0.9)
    first = publish(small)["release"]
    train(small, 0.95, seed=1)
    second = publish(small)["release"]
    moves = releases.history(small.store)
    again = promotion.decide(small.config, small.store, SNAPSHOT).details
    assert (again["release"], again["decision"]) == (second, "promoted") and "current" in again["reason"]
    assert releases.history(small.store) == moves and moves[0].release == first


def test_a_decision_that_is_made_again_does_not_undo_a_rollback(small) -> None:
    train(small, 0.9)
    first = publish(small)["release"]
    train(small, 0.95, seed=1)
    publish(small)
    releases.promote(small.store, first, "me", "clicks fell")
    again = promotion.decide(small.config, small.store, SNAPSHOT).details
    assert again["decision"] == "held" and "given up" in again["reason"] and "clicks fell" in again["reason"]
    current = releases.current(small.store)
    assert current is not None and current.name == first


def test_nothing_to_roll_back_to_is_said_in_a_sentence(tmp_path) -> None:
    with pytest.raises(UserError, match="nothing to roll back to; no release has ever been current"):
        promotion.before_current(Store(str(tmp_path)))


def test_a_decision_needs_the_release_of_what_was_published_last(small) -> None:
    train(small, 0.9)
    publish(small)
    for name in releases.names(small.store):
        small.store.fs.rm(small.store.path("releases", f"{name}.json"))
    small.store.fs.rm(small.store.path("releases", "current.json"))
    with pytest.raises(UserError, match=r"no release of snapshot .* `twhin publish"):
        promotion.decide(small.config, small.store, SNAPSHOT)


CURRENT = Release("old", "2024-01-01", "", {})
MEASURED = {
    ("relation", "all", "filtered_mrr"): {"value": 0.3},
    ("relation", "all", "filtered_mrr_current"): {"value": 0.3},
    ("relation", "all", "filtered_mrr_change"): {"value": 0.0, "low": -0.01, "high": 0.01},
    ("entity", "user", "departed_share"): {"value": 0.1},
    ("entity", "user", "new_share"): {"value": 0.1},
    ("entity", "user", "cosine"): {"value": 0.9},
    ("entity", "user", "neighbors@10"): {"value": 0.6},
    ("entity", "user", "consumer_loss"): {"value": 0.2},
    ("entity", "user", "consumer_loss_mapped"): {"value": 0.22},
}
BAD = {
    "quality": (("relation", "all", "filtered_mrr_change"), {"value": -0.1, "low": -0.12, "high": -0.08}),
    "departed": (("entity", "user", "departed_share"), {"value": 0.6}),
    "new": (("entity", "user", "new_share"), {"value": 0.6}),
    "consumer": (("entity", "user", "consumer_loss_mapped"), {"value": 0.4}),
    "cosine": (("entity", "user", "cosine"), {"value": 0.1}),
    "neighbors": (("entity", "user", "neighbors@10"), {"value": 0.1}),
}


def failed(
    rows: dict[Any, Any], snapshot: str = "2024-01-02", *, lacks: tuple[str, ...] = (), **options: Any
) -> list[str]:
    details = {"compared_with": "old", "lacks": list(lacks), "edges": 100}
    found = gates.gates(PromotionConfig(**options), rows, details, CURRENT, snapshot)
    return [gate.name for gate in found if not gate.passed]


def test_an_ordinary_day_passes_every_gate() -> None:
    assert failed(MEASURED) == []


@pytest.mark.parametrize("gate", BAD)
def test_each_gate_holds_a_release_back_by_its_limit(gate: str) -> None:
    key, row = BAD[gate]
    limits = {"least_cosine": 0.5, "least_neighbors": {"user": 0.5}} if gate in ("cosine", "neighbors") else {}
    assert failed(MEASURED | {key: row}, drift=limits) == [gate]


@pytest.mark.parametrize("gate", ["departed", "new", "consumer"])
def test_a_limit_may_be_of_one_entity_type_and_left_out_for_the_others(gate: str) -> None:
    key, row = BAD[gate]
    field = {"departed": "largest_departed", "new": "largest_new", "consumer": "largest_consumer_loss"}[gate]
    assert failed(MEASURED | {key: row}, drift={field: {"item": 0.0}}) == []
    assert failed(MEASURED | {key: row}, drift={field: {"user": 0.55}}) == [gate]


def test_an_older_snapshot_is_not_promoted_over_a_newer_one_nor_a_release_that_lacks_something() -> None:
    assert failed(MEASURED, "2023-12-31") == ["order"]
    assert failed(MEASURED, lacks=("no relation buys",)) == ["complete"]


def test_a_comparison_with_a_release_that_is_no_longer_current_does_not_count() -> None:
    found = gates.gates(PromotionConfig(), MEASURED, {"compared_with": "older"}, CURRENT, "2024-01-02")
    assert [gate.name for gate in found if not gate.passed] == ["compared"]


def test_what_the_current_release_has_and_the_new_one_lacks_is_named(tmp_path) -> None:
    store = Store(str(tmp_path / "home"))

    def made(snapshot: str, relations: list[str], dim: int) -> Release:
        model = {"relations": [{"name": r} for r in relations], "embeddings": {"tables": [{"embedding_dim": dim}]}}
        with store.replace("embeddings/relations", snapshot, config_hash="c") as draft:
            draft.write(pa.table({"relation": relations}))
            draft.details = {"model": model}
        return Release(snapshot, snapshot, "", store.versions(snapshot, ["embeddings/relations"]))

    before, after = made("2024-01-01", ["likes", "buys"], 8), made("2024-01-02", ["likes"], 16)
    before = replace(before, tables={**before.tables, "embeddings/shop": "v"})
    assert comparison.lacks(store, before, after) == [
        "no table embeddings/shop", "no relation buys", "16 dimensions, before 8"
    ]  # fmt: skip


def test_a_comparison_that_failed_says_so_in_the_gate() -> None:
    details = {"compared_with": "old", "notes": ["old cannot be compared with: a table is gone"]}
    found = {gate.name: gate for gate in gates.gates(PromotionConfig(), {}, details, CURRENT, "2024-01-02")}
    assert found["quality"].passed and found["quality"].text == "old cannot be compared with: a table is gone"
