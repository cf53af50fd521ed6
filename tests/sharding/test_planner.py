"""Plans for GPUs, made without one: tables on the meta device, and memory as it is said to be."""

import psutil
import pytest
import torch

from twhin_pipeline.config import parse_config
from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.optimizer import apply_optimizers
from twhin_pipeline.sharding.planner import plan_tables, rows_of_ranks, sharder
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

ROWS = {"topic": 1_000, "user": 10_000_000}
GIB = 2**30
EXCHANGE = "SEQUENCE_EMBEDDINGS_ALL_TO_ALL"


@pytest.fixture(autouse=True)
def _host(monkeypatch):
    """A machine of 64 GiB, whatever this one has."""
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=64 * GIB))


def plan(gib, world_size=2, **launch):
    """Return how each table is sharded, its kernel, and on how many ranks: 4.8 GiB of vectors in all."""
    optimizer = {"rowwise_adagrad": {"lr": 0.1}}
    tables = [{"name": name, "embedding_dim": 128, "optimizer": optimizer} for name in ROWS]
    relations = [{"name": "likes", "lhs": "user", "rhs": "topic"}]
    model_section = {"embeddings": {"tables": tables}, "relations": relations}
    config = parse_config({"source": {"path": "edges.parquet"}, "model": model_section}).model
    model = apply_optimizers(TwhinModel(config, UnshardedTables(config, ROWS, "meta"), "meta"), config)
    planned = plan_tables(model, LaunchConfig(**launch), "cuda", world_size, world_size, int(gib * GIB))
    tables_of = planned.get_plan_for_module("embeddings")
    return {name: (t.sharding_type, t.compute_kernel, len(t.sharding_spec.shards)) for name, t in tables_of.items()}


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "auto"])
def test_tables_that_fit_stay_in_the_gpus_memory_though_a_cache_is_allowed(sharding):
    assert {kernel for _, kernel, _ in plan(40, sharding=sharding, uvm_cache=0.2).values()} == {"fused"}


def test_auto_lays_whole_tables_where_there_is_room_and_parts_of_one_where_there_is_not():
    assert plan(80, sharding="auto")["user"] == ("table_wise", "fused", 1)
    assert plan(4, sharding="auto")["user"] == ("row_wise", "fused", 2)


def test_a_table_beyond_the_gpus_memory_is_cached_there_and_a_small_one_stays():
    planned = plan(1, sharding="auto", uvm_cache=0.2)
    assert planned["user"] == ("row_wise", "fused_uvm_caching", 2)
    assert planned["topic"][1] == "fused"


def test_tables_may_take_all_of_the_memory_that_is_given_for_them():
    """User and topic together: 10,001,000 rows of 512 bytes, and 4 of the optimizer's state, on two GPUs."""
    half = (10_001_000 * 516 / 2 + 1e6) / GIB
    assert plan(half)["user"] == ("row_wise", "fused", 2)
    with pytest.raises(UserError, match="do not fit"):
        plan(half - 0.1)


def test_without_a_cache_such_a_table_is_refused_and_the_message_names_the_cache():
    with pytest.raises(UserError, match=r"do not fit, row_wise, on 2 ranks of 1 GiB.*set launch.uvm_cache"):
        plan(1)


def test_a_table_beyond_the_hosts_memory_is_refused_with_a_cache_too(monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(total=2 * GIB))
    with pytest.raises(UserError, match="do not fit"):
        plan(1, uvm_cache=0.2)


def test_more_ranks_than_a_node_can_have_devices_are_planned_too():
    optimizer = {"rowwise_adagrad": {"lr": 0.1}}
    tables = {"tables": [{"name": "user", "embedding_dim": 8, "optimizer": optimizer}]}
    relations = [{"name": "follows", "lhs": "user", "rhs": "user"}]
    section = {"embeddings": tables, "relations": relations}
    launch = {"device": "cuda"}
    config = parse_config({"source": {"path": "edges.parquet"}, "model": section, "launch": launch})
    assert rows_of_ranks(config, {"user": 2560}, 256) == [{"user": 10}] * 256


@pytest.mark.parametrize("edges", [1_000_000, 2**20])
def test_gradients_of_a_large_step_survive_half_precision(edges):
    codecs = sharder(LaunchConfig(exchange="fp16"), "cpu", edges).qcomm_codecs_registry[EXCHANGE]
    gradients = torch.tensor([0.01, -0.3, 2.0, 50.0]) / edges
    sent = codecs.backward.encode(gradients)
    assert sent.dtype == torch.float16
    torch.testing.assert_close(codecs.backward.decode(sent), gradients, rtol=1e-3, atol=0)
    # Without the factor most of them are below what half precision can tell apart.
    assert not torch.allclose(gradients.half().float(), gradients, rtol=1e-3, atol=0)
