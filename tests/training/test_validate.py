"""Evaluation during training equals a plain loop over the validation edges and their candidates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SNAPSHOT, planted_config, write_planted
from sklearn.metrics import roc_auc_score

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import init_tables
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset, table_sizes
from twhin_pipeline.training.validate import Validator, sampled_reciprocal_ranks

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
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)


def untrained(config: TwhinConfig, store: Store) -> TwhinModelAndLoss:
    model = TwhinModel(config.model, UnshardedTables(config.model, table_sizes(config, store, SNAPSHOT)))
    init_tables(model, seed=0)
    return TwhinModelAndLoss(model, LOSSES["softmax"](config.loss), config.model)


def test_a_tie_counts_half_and_masked_candidates_not_at_all() -> None:
    positive = torch.tensor([1.0, 2.0])
    candidates = torch.tensor([[1.0, 3.0, -torch.inf], [0.0, 1.0, 1.5]])
    assert sampled_reciprocal_ranks(positive, candidates).tolist() == [1 / 2.5, 1.0]


def test_the_sampled_candidates_can_be_left_out_where_every_entity_is_ranked(tmp_path: Path) -> None:
    config = planted_config(training={"num_eval_steps": 0, "early_stopping_metric": "filtered_mrr"})
    store = Store(str(tmp_path))
    write_planted(store, config)
    store.fs.rm(f"{store.root}/held_out/validation_negatives", recursive=True)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(untrained(config, store))
    assert found.metrics.keys() == {"filtered_mrr"} and found.complete and found.edges == 120


def test_a_ranking_out_of_time_is_not_complete(tmp_path: Path) -> None:
    training = {"num_eval_steps": 0, "early_stopping_metric": "recall@5", "eval_timeout_in_s": 1e-9}
    config = planted_config(training=training)
    store = Store(str(tmp_path))
    write_planted(store, config)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(untrained(config, store))
    assert np.isnan(found.metrics["recall@5"]) and not found.complete
