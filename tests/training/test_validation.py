"""Evaluation during training equals a plain loop over the validation edges and their candidates, or over all entities.

Model selection reads nothing of test edges.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import patience
import pyarrow as pa
import pytest
import torch
from helpers import SNAPSHOT, planted_config, planted_edges, write_planted
from sklearn.metrics import roc_auc_score

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.ancestors import EDGE, SeenBefore
from twhin_pipeline.evaluation.evaluate import _scored_metrics
from twhin_pipeline.evaluation.held_out import shares, some_heads
from twhin_pipeline.evaluation.measurements import Scored
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import init_tables, table_weights
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset, table_sizes
from twhin_pipeline.training.validation import FullRanking, Validator, edge_scores, sampled_reciprocal_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CANDIDATES = 14  # 6 of the chunk and a pool of 8


@pytest.mark.parametrize("sides", ["both", "lhs", "rhs", "by relation"])
def test_loss_auc_and_mrr_equal_a_plain_loop(tmp_path: Path, sides: str) -> None:
    # Batches of chunks of 32 and 28 edges, so that there is padding.
    sections: dict[str, Any] = {"negatives": {"sides": sides}}
    if sides == "by relation":
        model = json.loads(planted_config().model.model_dump_json())
        model["relations"][0]["sides"] = "rhs"
        sections = {"model": model}
    config = planted_config(
        **sections, evaluation={"auc_negatives": CANDIDATES}, validation_data={"per_replica_batch_size": 128}
    )
    store = Store(str(tmp_path))
    write_planted(store, config)
    trainable = untrained(config, store)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(trainable)

    edges, losses, reciprocal, scores, labels = 0, 0.0, [], [], []
    masked = 0
    for batch in EdgesDataset(config, store, SNAPSHOT, "validation"):
        with torch.no_grad():
            _, outputs = trainable(batch)
        for g, i in (batch.weight > 0).nonzero().tolist():
            edges += 1
            losses += outputs["edge_loss"][g, i].item() * batch.weight[g, i].item()
            replaced = ["lhs", "rhs"] if sides in ("both", "by relation") else [sides]
            if sides == "by relation" and batch.relation[g] == 0:
                replaced = ["rhs"]
            for side in replaced:
                own = outputs["logits"][g, i].item()
                query = getattr(batch, f"{side}_query")[g, i]
                others = [v for v in outputs[f"{side}_logits"][g, query].tolist() if v > -np.inf]
                masked += CANDIDATES - len(others)
                better, tied = sum(v > own for v in others), sum(v == own for v in others)
                reciprocal.append(1 / (1 + better + tied / 2))
                scores += [own, *others]
                labels += [1] + [0] * len(others)
    assert masked, "nothing is masked, so nothing is tested"
    assert found.complete and found.edges == edges == 120
    assert len(reciprocal) == {"both": 240, "by relation": 180}.get(sides, 120)
    assert found.metrics["loss"] == pytest.approx(losses / edges, rel=1e-5)
    assert found.metrics["mrr"] == pytest.approx(np.mean(reciprocal), rel=1e-9)
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-9)


def untrained(config: TwhinConfig, store: Store) -> TwhinModelAndLoss:
    model = TwhinModel(config.model, UnshardedTables(config.model, table_sizes(config, store, SNAPSHOT)))
    init_tables(model, seed=0)
    return TwhinModelAndLoss(model, LOSSES["softmax"](config.loss), config.model)


@pytest.mark.parametrize("temperature", [0.1, 0.001])
def test_training_and_evaluation_measure_the_same_auc_and_rce_of_the_same_scores(
    tmp_path: Path, temperature: float
) -> None:
    """Validation once clipped probabilities: where evaluation's RCE was -606, it logged -329."""
    model = json.loads(planted_config().model.model_dump_json()) | {"comparator": "cosine", "temperature": temperature}
    config = planted_config(model=model, evaluation={"auc_negatives": CANDIDATES})
    store = Store(str(tmp_path))
    write_planted(store, config)
    trainable = untrained(config, store)
    during_training = Validator(config, store, SNAPSHOT, ALONE).evaluate(trainable).metrics

    positive, negative = [], []
    for batch in EdgesDataset(config, store, SNAPSHOT, "validation"):
        with torch.no_grad():
            _, outputs = trainable(batch)
        for side in batch.sides:
            own, candidates = edge_scores(outputs, batch, side)
            positive.append(own.numpy())
            negative.append(candidates[candidates > -torch.inf].numpy())
    no_ranks = np.ones(1)
    scored = Scored(no_ranks, no_ranks, np.concatenate(positive), np.concatenate(negative))
    evaluated = _scored_metrics([scored], config.evaluation)
    assert (np.abs(scored.positive).max() > 100) == (temperature < 0.1), "float32 has no such probabilities"
    for metric in ("auc", "rce"):
        assert during_training[metric] == pytest.approx(evaluated[metric], rel=1e-12)


@pytest.mark.parametrize("metric", ["loss", "filtered_mrr"])
def test_edges_that_an_earlier_model_was_trained_on_are_not_measured(tmp_path: Path, metric: str) -> None:
    """Both parts of the edges, each measured without the other, add up to all of them."""
    config = planted_config(training={"selection_metric": metric})
    store = Store(str(tmp_path))
    write_planted(store, config)
    trainable = untrained(config, store)
    held_out = store.read("held_out/validation", SNAPSHOT, ["rel", "lhs", "rhs"]).cast(EDGE)
    known = pa.array(np.random.default_rng(0).random(len(held_out)) < 0.4)
    parts = [held_out.filter(known), held_out.filter(pa.compute.invert(known))]
    found = [
        Validator(config, store, SNAPSHOT, ALONE, SeenBefore(left_out)).evaluate(trainable)
        for left_out in (held_out.slice(0, 0), *parts)
    ]
    counts = [len(held_out), len(parts[1]), len(parts[0])]
    assert [one.edges for one in found] == counts
    everything, *rest = [one.metrics["loss"] * count for one, count in zip(found, counts, strict=True)]
    assert sum(rest) == pytest.approx(everything, rel=1e-5)
    if metric == "filtered_mrr":
        everything, *rest = [one.metrics[metric] * count for one, count in zip(found, counts, strict=True)]
        assert sum(rest) == pytest.approx(everything, rel=1e-9)


def test_a_tie_counts_half_and_masked_candidates_not_at_all() -> None:
    positive = torch.tensor([1.0, 2.0])
    candidates = torch.tensor([[1.0, 3.0, -torch.inf], [0.0, 1.0, 1.5]])
    assert sampled_reciprocal_ranks(positive, candidates).tolist() == [1 / 2.5, 1.0]


def test_the_sampled_candidates_can_be_left_out_where_every_entity_is_ranked(tmp_path: Path) -> None:
    config = planted_config(training={"num_eval_steps": 0, "selection_metric": "filtered_mrr"})
    store = Store(str(tmp_path))
    write_planted(store, config)
    store.fs.rm(f"{store.root}/held_out/validation_negatives", recursive=True)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(untrained(config, store))
    assert found.metrics.keys() == {"filtered_mrr"} and found.complete and found.edges == 120


def test_a_ranking_out_of_time_is_not_complete(tmp_path: Path) -> None:
    training = {"num_eval_steps": 0, "selection_metric": "recall@5", "eval_timeout_in_s": 1e-9}
    config = planted_config(training=training)
    store = Store(str(tmp_path))
    write_planted(store, config)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(untrained(config, store))
    assert np.isnan(found.metrics["recall@5"]) and not found.complete


def setting(tmp_path: Path, metric: str, **training: Any) -> tuple[TwhinConfig, Store, TwhinModel]:
    """A store, and a model of random vectors."""
    config = planted_config(training={"selection_metric": metric, **training})
    store = Store(str(tmp_path))
    write_planted(store, config)
    model = TwhinModel(config.model, UnshardedTables(config.model, table_sizes(config, store, SNAPSHOT)))
    init_tables(model, seed=0)
    return config, store, model


def held_out(store: Store) -> list[tuple[int, int, int]]:
    rows = store.read("held_out/validation", SNAPSHOT).to_pylist()
    return [(row["lhs"], row["rel"], row["rhs"]) for row in rows]


def test_the_filtered_mrr_is_that_of_a_plain_loop_over_all_entities_without_known_edges(tmp_path: Path) -> None:
    config, store, model = setting(tmp_path, "filtered_mrr")
    tables = {name: weight.detach() for name, weight in table_weights(model).items()}
    known = {(int(a), rel, int(b)) for rel, pairs in planted_edges().items() for a, b in pairs}
    reciprocal = []
    for lhs, rel, rhs in held_out(store):
        relation = config.model.relations[rel]
        heads, tails = tables[relation.lhs], tables[relation.rhs]
        by_tail = model.scorer.score(heads[lhs].expand_as(tails), rel, tails).tolist()
        by_head = model.scorer.score(heads, rel, tails[rhs].expand_as(heads)).tolist()
        true_tails = [(lhs, rel, e) in known for e in range(len(tails))]
        true_heads = [(e, rel, rhs) in known for e in range(len(heads))]
        for scores, true, target in ((by_tail, true_tails, rhs), (by_head, true_heads, lhs)):
            rivals = [score for score, left_out in zip(scores, true, strict=True) if not left_out]
            reciprocal.append(1 / (1 + sum(score > scores[target] for score in rivals)))
    assert len(reciprocal) == 240
    value = FullRanking(config, store, SNAPSHOT, ALONE).measure(model, 60)
    assert value == pytest.approx(np.mean(reciprocal), rel=1e-6)


@pytest.mark.parametrize("metric", ["filtered_mrr", "filtered_hits@10", "recall@10", "ndcg@10"])
def test_test_edges_never_influence_the_selection(metric: str, tmp_path: Path) -> None:
    config, store, model = setting(tmp_path, metric)
    before = FullRanking(config, store, SNAPSHOT, ALONE).measure(model, 60)
    # Half of all pairs are "true": as filters, they would lift every rank.
    pairs = np.stack(np.meshgrid(np.arange(60), np.arange(48)), -1).reshape(-1, 2)[::2]
    rows = {"chunk": np.zeros(len(pairs), np.int32), "lhs": pairs[:, 0], "rhs": pairs[:, 1]}
    with store.replace("held_out/test", SNAPSHOT, config_hash="test") as draft:
        draft.write(
            pa.table({**rows, "rel": np.zeros(len(pairs), np.int32), "weight": np.ones(len(pairs), np.float32)})
        )
    assert FullRanking(config, store, SNAPSHOT, ALONE).measure(model, 60) == before


def test_what_does_not_depend_on_the_model_is_read_once(tmp_path: Path) -> None:
    config, store, model = setting(tmp_path, "recall@10")
    ranking = FullRanking(config, store, SNAPSHOT, ALONE)
    before = ranking.measure(model, 60)
    for name in ("held_out", "training_set", "vocabulary"):
        store.fs.rm(f"{store.root}/{name}", recursive=True)
    assert ranking.measure(model, 60) == before
    init_tables(model, seed=1)
    assert ranking.measure(model, 60) != before


@pytest.mark.parametrize("metric", ["filtered_mrr", "recall@10"])
def test_few_edges_are_drawn_by_the_seed_of_evaluation_from_every_relation(metric: str, tmp_path: Path) -> None:
    drawn = []
    for part, (seed, training_seed) in enumerate(((0, 0), (0, 1), (1, 0))):
        config, store, _ = setting(tmp_path / str(part), metric, eval_max_edges=20, seed=training_seed)
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"seed": seed})})
        ranking = FullRanking(config, store, SNAPSHOT, ALONE)
        assert ranking.edges <= 20 and {relation for relation, _ in ranking.questions} == {0, 1}
        drawn.append([(asked.side, asked.queries.tolist(), asked.targets.tolist()) for _, asked in ranking.questions])
    assert drawn[0] == drawn[1] != drawn[2]


def test_shares_are_one_each_and_the_rest_in_proportion() -> None:
    counts = np.array([600, 0, 300, 1, 99])
    assert shares(counts, 1000).tolist() == counts.tolist()
    assert shares(counts, 104).tolist() == [61, 0, 31, 1, 10]
    assert shares(counts, 2).tolist() == [1, 0, 1, 1, 1]
    for limit in range(4, 1000, 7):
        found = shares(counts, limit)
        assert found.sum() <= limit and (found <= counts).all() and (found > 0).tolist() == (counts > 0).tolist()


def test_a_head_is_drawn_with_all_of_its_edges() -> None:
    edges = {"lhs": np.repeat(np.arange(20), 3), "rhs": np.arange(60)}
    drawn = some_heads(edges, 10, np.random.default_rng(0))
    assert len(drawn["lhs"]) == 9 and (np.unique(drawn["lhs"], return_counts=True)[1] == 3).all()
    assert len(some_heads(edges, 1, np.random.default_rng(0))["lhs"]) == 3


def test_rank_0_gathers_every_row_that_is_an_entity_from_the_ranks_shards() -> None:
    script = Path(__file__).resolve().parents[1] / "support" / "gather_ranks.py"
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(script.parent), str(script.parents[2])]),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = patience.run(command, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("gathered") == 4


@pytest.mark.parametrize("metric", ["filtered_mr", "recall", "recall@0", "hits@10", "raw_mrr"])
def test_an_unknown_metric_is_told_with_those_there_are(metric: str) -> None:
    with pytest.raises(UserError, match=r"training.selection_metric: unknown metric .*another k from 1"):
        planted_config(training={"selection_metric": metric})
