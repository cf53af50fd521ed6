"""Evaluation during training equals a plain loop over the validation edges and their candidates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SNAPSHOT, planted_config, write_planted
from sklearn.metrics import roc_auc_score

from twhin_pipeline.dataset import EdgesDataset, table_sizes
from twhin_pipeline.distributed import Ranks
from twhin_pipeline.losses import LOSSES
from twhin_pipeline.model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding import init_tables
from twhin_pipeline.store import Store
from twhin_pipeline.validate import Validator, sampled_reciprocal_ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
CANDIDATES = 14  # 6 of the chunk and a pool of 8


@pytest.mark.parametrize("sides", ["both", "lhs", "rhs"])
def test_loss_auc_and_mrr_equal_a_plain_loop(tmp_path: Path, sides: str) -> None:
    # Batches of chunks of 32 and 28 edges, so that there is padding.
    config = planted_config(
        negatives={"sides": sides},
        evaluation={"auc_negatives": CANDIDATES},
        validation_data={"per_replica_batch_size": 128},
    )
    store = Store(str(tmp_path))
    write_planted(store, config)
    model = TwhinModel(config.model, table_sizes(config, store, SNAPSHOT))
    init_tables(model, seed=0)
    trainable = TwhinModelAndLoss(model, LOSSES["softmax"](config.loss), config.model, config.negatives.sides)
    found = Validator(config, store, SNAPSHOT, ALONE).evaluate(trainable)

    losses, reciprocal, scores, labels = [], [], [], []
    masked = 0
    for batch in EdgesDataset(config, store, SNAPSHOT, "validation"):
        with torch.no_grad():
            _, outputs = trainable(batch)
        for g, i in (batch.weight > 0).nonzero().tolist():
            own = outputs["logits"][g, i].item()
            losses.append(outputs["edge_loss"][g, i].item() * batch.weight[g, i].item())
            scores.append(own)
            labels.append(1)
            for side in ("lhs", "rhs") if sides == "both" else (sides,):
                others = [v for v in outputs[f"{side}_logits"][g, i].tolist() if v > -np.inf]
                masked += CANDIDATES - len(others)
                better, tied = sum(v > own for v in others), sum(v == own for v in others)
                reciprocal.append(1 / (1 + better + tied / 2))
                scores += others
                labels += [0] * len(others)
    assert masked, "nothing is masked, so nothing is tested"
    assert found.complete and found.edges == len(losses) == 120
    assert found.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.metrics["mrr"] == pytest.approx(np.mean(reciprocal), rel=1e-9)
    assert found.metrics["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-3)


def test_a_tie_counts_half_and_masked_candidates_not_at_all() -> None:
    outputs = {
        "logits": torch.tensor([[1.0, 2.0, 9.0]]),
        "rhs_logits": torch.tensor([[[1.0, 3.0, -torch.inf], [0.0, 1.0, 1.5], [0.0, 0.0, 0.0]]]),
    }
    real = torch.tensor([[True, True, False]])
    assert sampled_reciprocal_ranks(outputs, real, ("rhs",)).tolist() == [1 / 2.5, 1.0]
