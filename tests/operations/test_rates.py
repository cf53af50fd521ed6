"""`twhin rates` and `twhin plan --rates`: a step's time is that of its work at the rates given."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import yaml

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.comparators import COMPARATORS, Dot
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.operations import plan, rates
from twhin_pipeline.operations.rates import Rates, Work, step_time

RATES = {
    "device": "a stone",
    "gflops": 2.0,
    "pass_gbps": 4.0,
    "gather_gbps": 0.5,
    "place_gbps": 0.25,
    "update_gbps": 0.125,
    "link_gbps": 8.0,
    "network_gbps": 1.0,
    "exchange_us": 1000.0,
    "operation_us": 10.0,
}
WORK = Work(flop=1e9, passed=2e9, row_bytes=1e8, place_bytes=1e8, within=4e9, beyond=1e9, exchanges=3, operations=2000)


def test_a_steps_time_is_worked_out_by_hand():
    found = step_time(WORK, Rates(**RATES))
    assert found.products == pytest.approx(0.5)
    assert found.passes == pytest.approx(0.5)
    assert found.rows == pytest.approx(0.2 + 0.8 + 0.4)
    assert found.exchange == pytest.approx(0.003 + 0.5 + 1.0)
    assert found.launches == pytest.approx(0.02)
    assert found.rest == pytest.approx(rates.REST * (0.5 + 0.5 + 1.4 + 1.503 + 0.02))
    assert found.total == pytest.approx((1 + rates.REST) * (0.5 + 0.5 + 1.4 + 1.503 + 0.02))


@pytest.mark.parametrize("field", ["link_gbps", "network_gbps"])
def test_a_link_that_is_used_must_have_a_rate(field):
    without = Rates(**{**RATES, field: None})
    with pytest.raises(UserError, match=rf"a stone: {field} is missing"):
        step_time(WORK, without)
    unused = replace(WORK, within=0.0, beyond=0.0)
    assert step_time(unused, without).exchange == pytest.approx(0.003)


def config_of(tmp_path, **launch):
    path = tmp_path / "config.yaml"
    table = {"embedding_dim": 8, "num_embeddings": 1000}
    path.write_text(
        yaml.safe_dump(
            {
                "source": {"path": "edges.parquet"},
                "model": {
                    "embeddings": {"tables": [{"name": "user", **table}, {"name": "item", **table}]},
                    "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
                },
                "train_data": {"per_replica_batch_size": 10, "global_negatives": 5, "in_batch_negatives": 2},
                "negatives": {"chunk_size": 10},
                "launch": launch,
            }
        )
    )
    return str(path)


def test_a_plan_counts_products_passes_rows_and_what_is_sent(tmp_path):
    config = load_config(config_of(tmp_path, nproc_per_node=2, nnodes=2, rdzv_endpoint="host:1"))
    rows = {"user": (1000, ""), "item": (1000, "")}
    found = plan.estimate(config, rows, 4, None, Rates(**RATES))
    places, scores = 2 * 10 + 2 * 5, 2 * 10 * (2 + 5)
    assert found.time.products == pytest.approx(3 * 2 * 8 * scores / 2e9)
    assert found.time.passes == pytest.approx(2 * 4 * (10 * places * 8 + 5 * scores) / 4e9)
    assert found.time.rows == pytest.approx(places * 8 * 4 * (1 / 0.5e9 + 1 / 0.25e9 + 1 / 0.125e9))
    # Of three other ranks one is in the same node.
    assert found.time.exchange == pytest.approx(7e-3 + found.sent_per_step * (1 / 8e9 + 2 / 1e9) / 3, rel=1e-4)
    assert found.edges_per_second == pytest.approx(40 / found.time.total)
    assert plan.estimate(config, rows, 4).time is None
    alone = plan.estimate(config, rows, 1, None, Rates(**{**RATES, "link_gbps": None, "network_gbps": None}))
    assert alone.time.exchange == 0
    assert alone.time.passes == pytest.approx(2 * 4 * (4 * places * 8 + 5 * scores) / 4e9)


def test_ranks_that_share_memory_send_the_operators_gradients_alone(tmp_path):
    config = load_config(config_of(tmp_path, nproc_per_node=2))
    rows = {"user": (1000, ""), "item": (1000, "")}
    given = Rates(**RATES, shared_memory=True)
    found, sending = plan.estimate(config, rows, 2, None, given), plan.estimate(config, rows, 2, None, Rates(**RATES))
    places, scores = 2 * 10 + 2 * 5, 2 * 10 * (2 + 5)
    assert found.sent_per_step == 2 * 8 * 4 / 2 < sending.sent_per_step
    assert found.time.passes == pytest.approx(2 * 4 * (4 * places * 8 + 5 * scores) / 4e9)
    assert found.time.exchange == pytest.approx(5e-3 + found.sent_per_step / 8e9)
    on_cpu = config.model_copy(update={"launch": config.launch.model_copy(update={"device": "cpu"})})
    assert plan.estimate(on_cpu, rows, 2).sent_per_step == found.sent_per_step


@pytest.mark.parametrize(
    "changes",
    [
        ["launch.nnodes=2"],
        ["model.embeddings.tables.item.optimizer={sgd: {lr: 0.1}}"],
        [f"model.embeddings.tables.{name}.data_type=fp16" for name in ("user", "item")],
    ],
)
def test_ranks_of_several_nodes_and_tables_that_fbgemm_keeps_exchange_vectors(tmp_path, changes):
    config = load_config(config_of(tmp_path, nproc_per_node=2, rdzv_endpoint="host:1"), changes)
    rows = {"user": (1000, ""), "item": (1000, "")}
    assert plan.estimate(config, rows, 2, None, Rates(**RATES, shared_memory=True)).sent_per_step > 30 * 8 * 4


def test_losses_taken_chunk_by_chunk_pass_over_no_scores(tmp_path):
    config = load_config(config_of(tmp_path))
    rows, given = {"user": (1000, ""), "item": (1000, "")}, Rates(**RATES, by_chunk=True)
    places, scores = 2 * 10 + 2 * 5, 2 * 10 * (2 + 5)
    found = plan.estimate(config, rows, 1, None, given).time
    assert found.passes == pytest.approx(2 * 4 * 2 * places * 8 / 4e9)
    assert found.products == pytest.approx(3 * 2 * 8 * scores / 2e9)
    other = load_config(config_of(tmp_path), ["loss.name=margin"])
    assert plan.estimate(other, rows, 1, None, given).time.passes > found.passes


def test_the_plan_knows_which_losses_are_taken_chunk_by_chunk(tmp_path):
    for loss, comparator in itertools.product(LOSSES, COMPARATORS):
        config = load_config(config_of(tmp_path), [f"loss.name={loss}", f"model.comparator={comparator}"])
        summed = LOSSES[loss](config.loss).by_sum is not None
        assert plan.chunks_apart(config) == (summed and issubclass(COMPARATORS[comparator], Dot)), (loss, comparator)


@pytest.mark.parametrize("operator", ["linear", "affine"])
def test_matrix_operators_add_their_products(tmp_path, operator):
    config = load_config(config_of(tmp_path), [f"model.relations.0.operator={operator}"])
    rows = {"user": (1000, ""), "item": (1000, "")}
    scores = 2 * 10 * (2 + 5)
    found = plan.estimate(config, rows, 1, None, Rates(**RATES))
    assert found.time.products == pytest.approx(3 * 2 * (8 * scores + 8 * 8 * 10) / 2e9)


def test_scores_with_all_entities_are_counted_though_a_block_is_held(tmp_path):
    config = load_config(
        config_of(tmp_path),
        ["train_data.global_negatives=all", "train_data.in_batch_negatives=0", "negatives.sides=rhs"],
    )
    step = plan.step_of(config, {"user": 1000, "item": 700})
    assert step.scores == 10 * 700
    assert step.scores_held == plan.BLOCK_BYTES // 4
    assert step.looked_up == 2 * 10 + 700


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("gflops: [", "cannot be read"),
        ("- 1", "must be a mapping"),
        (yaml.safe_dump({**RATES, "gflops": 0}), "gflops: Input should be greater than 0"),
        (yaml.safe_dump({**RATES, "speed": 1}), "speed: Extra inputs are not permitted; the fields are device, gflops"),
        (yaml.safe_dump({"device": "x"}), "gflops: Field required"),
    ],
)
def test_a_file_that_is_none_of_rates_is_refused(tmp_path, text, told):
    path = tmp_path / "rates.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told):
        rates.load(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        rates.load(str(tmp_path / "absent.yaml"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_commands_measure_and_plan(tmp_path, capsys, ranks):
    config, path = config_of(tmp_path, nproc_per_node=ranks, device="cpu"), str(tmp_path / "rates.yaml")
    assert run_arguments(["rates", path, "--config", config]) == 0
    assert "gflops: " in capsys.readouterr().out
    found = rates.load(path)
    assert found.device == f"{ranks} x cpu, {found.device.split()[3]} threads"
    assert (found.link_gbps is None) == (ranks == 1)
    assert found.shared_memory == (ranks == 2)
    # Two chunks a step, which several threads take together, and one by one.
    assert found.by_chunk == (found.device.split()[3] == "1")
    assert found.network_gbps is None
    arguments = ["plan", "--config", config, "--home", str(tmp_path), "--rates", path]
    assert run_arguments(arguments) == 0
    assert "edges/s of all ranks" in capsys.readouterr().out
    assert run_arguments([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["edges_per_second"] == pytest.approx(10 * ranks / sum(told["time"].values()))


def test_a_rank_that_fails_says_why(tmp_path, capsys):
    config = config_of(tmp_path, device="cuda")
    assert run_arguments(["rates", str(tmp_path / "rates.yaml"), "--config", config]) != 0
    assert "launch.device is cuda" in capsys.readouterr().err
    assert not (tmp_path / "rates.yaml").exists()


def test_the_examples_plan_a_billion_users(capsys):
    sets = ["launch.nnodes=8", "launch.rdzv_endpoint=host:29500"]
    arguments = ["plan", "--config", "examples/plan/billion.yaml", "--rates", "examples/plan/rates-h200.yaml", "--json"]
    assert run_arguments([*arguments, *(part for text in sets for part in ("--set", text))]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["world_size"] == 64 and told["ranks_per_node"] == 8
    assert told["ranks"][0]["rows"] == {"user": 15_625_000, "tweet": 4_687_500}
    assert told["edges_per_second"] > 0
