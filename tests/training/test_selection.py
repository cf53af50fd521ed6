"""Model selection: validation edges ranked against every entity, and of test edges nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import SNAPSHOT, planted_config, planted_edges, write_planted

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.held_out import shares, some_heads
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import init_tables, table_weights
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import table_sizes
from twhin_pipeline.training.selection import FullRanking

ALONE = Ranks(0, 1, torch.device("cpu"))


def setting(tmp_path: Path, metric: str, **training: Any) -> tuple[TwhinConfig, Store, TwhinModel]:
    """A store, and a model of random vectors."""
    config = planted_config(training={"early_stopping_metric": metric, **training})
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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("gathered") == 4


@pytest.mark.parametrize("metric", ["filtered_mr", "recall", "recall@0", "hits@10", "raw_mrr"])
def test_an_unknown_metric_is_told_with_those_there_are(metric: str) -> None:
    with pytest.raises(UserError, match=r"training.early_stopping_metric: unknown metric .*another k from 1"):
        planted_config(training={"early_stopping_metric": metric})
