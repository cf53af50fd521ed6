"""`TwhinConfig.corrupted_sides` is what the sampler, the training batches, the loss, evaluation and its checks do."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ITEMS, SNAPSHOT, USERS, planted_config, write_planted

from twhin_pipeline.checks import check_views
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.operations.plan import step_of
from twhin_pipeline.sharding.placement import init_tables
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset, table_sizes
from twhin_pipeline.training_set import negatives
from twhin_pipeline.vectors.model_files import Writer, manifest_details
from twhin_pipeline.words import SIDES

CASES: list[tuple[str, str | None, str | None, list[tuple[str, ...]]]] = [
    ("both", None, None, [("lhs", "rhs"), ("lhs", "rhs")]),
    ("both", "lhs", None, [("lhs",), ("lhs", "rhs")]),
    ("rhs", None, "both", [("rhs",), ("lhs", "rhs")]),
    ("rhs", "lhs", None, [("lhs",), ("rhs",)]),
    ("lhs", None, "lhs", [("lhs",), ("lhs",)]),
]
"""`negatives.sides`, the two relations' own `sides`, and the sides that are corrupted."""


def made(tmp_path: Any, default: str, likes: str | None, follows: str | None) -> tuple[TwhinConfig, Store]:
    relations = [
        {"name": "likes", "lhs": "user", "rhs": "item", "sides": likes},
        {"name": "follows", "lhs": "user", "rhs": "user", "sides": follows},
    ]
    config = planted_config(
        model={"relations": relations},
        negatives={"sides": default},
        train_data={"in_batch_negatives": 0},
        evaluation={"recall_at": [], "auc_negatives": 1},
    )
    store = Store(str(tmp_path))
    write_planted(store, config)
    with store.replace("held_out/test", SNAPSHOT, config_hash="test") as draft:
        draft.write(store.read("held_out/validation", SNAPSHOT))
    return config, store


@pytest.mark.parametrize(("default", "likes", "follows", "expected"), CASES)
def test_a_relation_corrupts_its_own_sides_or_those_of_the_negatives(tmp_path, default, likes, follows, expected):
    config, _ = made(tmp_path, default, likes, follows)
    assert list(config.corrupted_sides.items()) == list(zip(["likes", "follows"], expected, strict=True))


@pytest.mark.parametrize(("default", "likes", "follows", "expected"), CASES)
def test_negatives_batches_and_losses_are_of_the_corrupted_sides(tmp_path, default, likes, follows, expected):
    config, store = made(tmp_path, default, likes, follows)
    negatives.build(config, store, SNAPSHOT)
    relation_of = dict(
        zip(*store.read("training_set/positives", SNAPSHOT).select(["chunk", "rel"]).to_pydict().values(), strict=True)
    )
    sampled = defaultdict(set)
    for row in store.read("training_set/negatives", SNAPSHOT).select(["chunk", "side"]).to_pylist():
        sampled[relation_of[row["chunk"]]].add(SIDES[row["side"]])
    assert [tuple(side for side in SIDES if side in sampled[rel]) for rel in range(2)] == expected

    model = TwhinModel(config.model, UnshardedTables(config.model, table_sizes(config, store, SNAPSHOT)))
    init_tables(model, seed=0)
    wrapped = TwhinModelAndLoss(model, LOSSES["softmax"](config.loss), config.model).eval()
    batches = iter(EdgesDataset(config, store, SNAPSHOT))
    seen = set()
    for batch in (next(batches) for _ in range(6)):
        outputs = wrapped(batch)[1]
        for g, rel in enumerate(batch.relation.tolist()):
            seen.add(rel)
            assert tuple(side for side in SIDES if getattr(batch, f"{side}_on")[g]) == expected[rel]
            edge = 0  # padding comes after it
            of_sides = []
            for side in expected[rel]:
                scores = outputs[f"{side}_logits"][g, getattr(batch, f"{side}_query")[g, edge]]
                own = outputs[f"{side}_positive"][g, edge]
                of_sides.append(torch.cat([own[None], scores]).logsumexp(0) - own)
            # An edge's loss is the mean over the corrupted sides.
            torch.testing.assert_close(outputs["edge_loss"][g, edge], torch.stack(of_sides).mean())
    batches.close()
    assert seen == {0, 1}
    pools = {side: config.train_data.global_negatives for sides in expected for side in sides}
    assert step_of(config, {"user": USERS, "item": ITEMS}).places == 2 * 64 + 2 * sum(pools.values())


@pytest.mark.parametrize(("default", "likes", "follows", "expected"), CASES)
def test_evaluation_and_checks_measure_the_corrupted_sides(tmp_path, default, likes, follows, expected):
    config, store = made(tmp_path, default, likes, follows)
    parents = store.versions(SNAPSHOT, ["training_set/positives", "vocabulary/user", "vocabulary/item"])
    with store.replace("twhin_model", SNAPSHOT, config_hash="test", parents=parents) as draft:
        generator = torch.Generator().manual_seed(0)
        for name, rows in (("user", USERS), ("item", ITEMS)):
            Writer(draft, 0).table(name, [(0, torch.randn(rows, 16, generator=generator))])
        Writer(draft, 0).relations(config.model, Scorer(config.model).state_rows())
        draft.details = manifest_details(config)
    manifest = evaluate(config, store, SNAPSHOT)
    words = {name: sides[0] if len(sides) == 1 else "both" for name, sides in config.corrupted_sides.items()}
    assert manifest.details["sides"] == (words if len(set(words.values())) > 1 else words["likes"])
    rows = store.read("evaluation", SNAPSHOT).to_pylist()
    mrr = {(row["relation"], row["side"]): row["value"] for row in rows if row["metric"] == "filtered_mrr"}
    # Both relations have the same number of held-out edges.
    each = [mrr[name, side] for name, sides in zip(["likes", "follows"], expected, strict=True) for side in sides]
    assert manifest.details["metrics"]["filtered_mrr"] == pytest.approx(np.mean(each))

    with check_views.prepare(config, store, SNAPSHOT, "evaluation") as con:
        found = con.execute("SELECT side, sides FROM relation ORDER BY rel").fetchall()
        overall = con.execute("SELECT getvariable('overall_side')").fetchall()[0][0]
    assert found == [(words[name], [SIDES.index(s) for s in sides]) for name, sides in config.corrupted_sides.items()]
    assert overall == (expected[0][0] if len({side for sides in expected for side in sides}) == 1 else "both")
