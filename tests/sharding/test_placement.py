"""One process equals two ranks: tests/support/ranks.py run here, and once under torchrun with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import patience
import pytest
import ranks as ranks_script
import tiny

from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.sharding.planner import rows_of_ranks

RANKS = Path(__file__).resolve().parents[1] / "support" / "ranks.py"


def run(command: list[str]) -> subprocess.CompletedProcess:
    paths = [str(RANKS.parent), str(RANKS.parents[2])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = patience.run(command, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """What both ranks saw, and what was printed."""
    out = tmp_path_factory.mktemp("ranks") / "out.json"
    done = run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(RANKS), str(out)]
    )
    return json.loads(out.read_text()), done.stdout


@pytest.fixture(scope="module")
def ranks(torchrun):
    return torchrun[0]


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "ROWS", ranks_script.ROWS)
        cases = {name: ranks_script.train(*case) for name, case in ranks_script.CASES.items()}
    return {"cases": cases, "metrics": ranks_script.metrics()}


CASES = (
    "rowwise_adagrad row_wise",
    "rowwise_adagrad table_wise",
    "adagrad row_wise",
    "sgd table_wise",
    "fp16 row_wise",
    "all candidates row_wise",
    "all candidates reciprocal",
    "sampled candidates reciprocal",
    "one table table_wise",
    "rowwise_adagrad auto",
)


def test_every_case_is_looked_at(alone, ranks):
    assert tuple(alone["cases"]) == tuple(ranks[0]["cases"]) == CASES


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_process_trains(alone, ranks, case):
    one, two = alone["cases"][case], ranks[0]["cases"][case]
    tolerance = 2e-3 if case.startswith("fp16") else 1e-5
    assert two["losses"] == pytest.approx(one["losses"], rel=tolerance)
    for table, rows in one["last"].items():
        np.testing.assert_allclose(two["last"][table], rows, atol=tolerance)
        assert not np.allclose(rows, one["first"][table]), f"{table} was not trained"
    for relation, row in one["relations"].items():
        np.testing.assert_allclose(two["relations"][relation], row, atol=tolerance)


@pytest.mark.parametrize("case", ranks_script.EXCHANGED)
def test_ranks_train_the_same_bits_in_shared_memory_as_by_exchanging_vectors(ranks, case):
    for rank in ranks:
        shared, exchanged = rank["cases"][case], rank["exchanged"][case]
        assert shared["plan"].endswith("ranks look rows up in each other's memory")
        assert exchanged["plan"].endswith("ranks exchange vectors: as asked")
        for seen in ("losses", "last", "relations", "counted"):
            assert shared[seen] == exchanged[seen], seen


@pytest.mark.parametrize("case", ranks_script.EXCHANGED)
def test_ranks_train_the_same_bits_into_however_many_samples_their_rows_are_divided(ranks, case):
    for rank in ranks:
        for seen in ("losses", "last", "relations"):
            assert rank["in_samples"][case][seen] == rank["exchanged"][case][seen], seen


@pytest.mark.parametrize("case", ranks_script.HALVED)
def test_ranks_that_send_half_precision_train_nearly_the_same(ranks, case):
    for rank in ranks:
        halved, exchanged = rank["halved"][case], rank["exchanged"][case]
        assert halved["plan"].endswith("they send fp16")
        assert halved["last"] != exchanged["last"]
        assert halved["losses"] == pytest.approx(exchanged["losses"], rel=1e-3)
        for table, rows in exchanged["last"].items():
            np.testing.assert_allclose(halved["last"][table], rows, atol=1e-2)


def test_a_type_that_the_backend_does_not_send_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["refused"]["bf16"].startswith("launch.exchange: ranks on the CPU send no bf16")


@pytest.mark.parametrize("case", ["sgd table_wise", "fp16 row_wise"])
def test_ranks_exchange_the_vectors_of_tables_that_fbgemm_keeps(ranks, case):
    for rank in ranks:
        assert rank["cases"][case]["plan"].endswith("exchange vectors: fbgemm's kernels keep some of their tables")


def test_all_ranks_exchange_vectors_where_one_cannot_map_the_shards(ranks):
    for rank in ranks:
        plan = rank["unmapped"]["plan"]
        assert plan.endswith("exchange vectors: rank 1 cannot share memory (not allowed)")
        assert rank["unmapped"]["last"] == rank["exchanged"]["rowwise_adagrad row_wise"]["last"]


@pytest.mark.parametrize(
    ("case", "expected"), [("rowwise_adagrad row_wise", True), ("adagrad row_wise", True), ("fp16 row_wise", False)]
)
def test_compiled_loops_train_the_tables_that_they_know(ranks, case, expected):
    assert [set(rank["cases"][case]["compiled"]) for rank in ranks] == [{expected}, {expected}]


@pytest.mark.parametrize("case", CASES)
def test_initial_vectors_are_the_same_bits_at_any_sharding(alone, ranks, case):
    assert ranks[0]["cases"][case]["first"] == ranks[1]["cases"][case]["first"] == alone["cases"][case]["first"]


def test_initial_vectors_have_the_configured_length(alone):
    rows = np.array(alone["cases"]["rowwise_adagrad row_wise"]["first"]["user"])
    assert np.sqrt((rows**2).sum(1).mean()) == pytest.approx(1.0, rel=0.1)
    assert len(np.unique(rows[:, 0])) == len(rows)


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_agree_on_rates_and_relation_vectors(ranks, case):
    first, second = (rank["cases"][case] for rank in ranks)
    assert first["rates"] == second["rates"]
    assert [rates["item"] for rates in first["rates"]] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert first["relations"] == second["relations"]


def test_kernels_count_on_from_the_step_of_a_resumed_run(ranks):
    """Adam's bias correction goes by that count, which no state dict holds."""
    for rank in ranks:
        counted = rank["cases"]["rowwise_adagrad row_wise"]["counted"]
        assert counted and counted == [5] * (len(counted) // 2) + [40] * (len(counted) // 2)


def test_tables_of_fewer_rows_than_ranks_are_shared(ranks):
    for rank in ranks:
        shared, exchanged = rank["few"]
        assert shared["plan"].endswith("ranks look rows up in each other's memory")
        assert shared["last"] == exchanged["last"]
        assert shared["last"]["user"] != shared["first"]["user"]
    assert [sum(rank["few"][0]["held"]["item"]) for rank in ranks] == [1, 0]


def test_a_rank_that_holds_no_table_trains_along(ranks):
    held = [rank["cases"]["one table table_wise"]["held"]["item"] for rank in ranks]
    assert sorted(map(sum, held)) == [0, 5003]


def test_row_wise_gives_each_rank_half_of_a_table(ranks):
    held = [rank["cases"]["rowwise_adagrad row_wise"]["held"]["user"] for rank in ranks]
    assert held == [[4501], [4500]]


def test_the_plan_tells_each_tables_rows_by_rank_and_is_printed_once(torchrun):
    ranks, printed = torchrun
    plan = ranks[0]["cases"]["rowwise_adagrad row_wise"]["plan"]
    assert "user: 9,001 x 8 float32 (0.3 MiB), row_wise, fused; rows on rank 0: 4,501, rank 1: 4,500" in plan
    assert ranks[1]["cases"]["rowwise_adagrad row_wise"]["plan"] == plan
    assert (
        printed.count("sharding plan for 2 ranks")
        == len(CASES) + 2 * len(ranks_script.EXCHANGED) + len(ranks_script.HALVED) + 3
    )


@pytest.mark.parametrize("case", CASES)
def test_the_layout_that_a_plan_shows_beforehand_is_that_of_the_ranks(ranks, case):
    config, _, sharding = ranks_script.CASES[case]
    config = config.model_copy(update={"launch": LaunchConfig(device="cpu", nproc_per_node=2, sharding=sharding)})
    planned = rows_of_ranks(config, ranks_script.ROWS, 2)
    held = [{table: sum(rows) for table, rows in rank["cases"][case]["held"].items() if sum(rows)} for rank in ranks]
    assert [{table: rows for table, rows in rank.items() if rows} for rank in planned] == held


def test_off_distributed_the_plan_says_so(alone):
    plan = alone["cases"]["rowwise_adagrad row_wise"]["plan"]
    assert plan == "one process without a process group: tables are not sharded, user 9,001 x 8, item 5,003 x 8"


def test_norms_are_sampled_of_every_shard_and_known_to_every_rank(alone, ranks):
    for case in CASES:
        first, second = (rank["cases"][case]["norms"] for rank in ranks)
        assert first == second
    norms = ranks[1]["cases"]["rowwise_adagrad row_wise"]["norms"]["user"]
    kinds = ("norm_min", "norm_mean", "norm_max")
    assert set(norms) == {f"user/rows_from_{row}/{kind}" for row in (0, 4501) for kind in kinds}
    whole = alone["cases"]["rowwise_adagrad row_wise"]["norms"]["user"]
    assert set(whole) == {f"user/rows_from_0/{kind}" for kind in kinds}
    for values in (norms, whole):
        assert 0 < values["user/rows_from_0/norm_min"] < values["user/rows_from_0/norm_mean"]
        assert values["user/rows_from_0/norm_mean"] == pytest.approx(1.0, rel=0.1)


def test_metrics_of_two_ranks_are_those_of_all_examples(alone, ranks):
    assert ranks[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-9)
    assert ranks[1]["metrics"] == ranks[0]["metrics"]


def test_a_plan_that_does_not_fit_is_refused_on_every_rank_with_the_remedy(ranks):
    for rank in ranks:
        assert "do not fit, row_wise, on 2 ranks" in rank["refused"]["memory"]
        assert "raise launch.hbm_gib" in rank["refused"]["memory"]


def test_an_optimizer_without_a_kernel_is_refused_on_every_rank_with_the_remedy(ranks):
    for rank in ranks:
        for name in ("adam", "rmsprop"):
            assert f"the optimizer of 'user' is {name}" in rank["refused"][name]
            assert "take rowwise_adagrad or adagrad" in rank["refused"][name]
