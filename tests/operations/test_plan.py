"""`twhin plan`: its figures are those of the formulas, and they hold for what training really does."""

from __future__ import annotations

import json

import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import load_config, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import plan
from twhin_pipeline.store import Store


def make_config(**changes):
    optimizer = changes.pop("optimizer", {"rowwise_adagrad": {"lr": 0.1}})
    tables = [
        {"name": name, "embedding_dim": 8, "optimizer": optimizer, "data_type": changes.get("data_type", "fp32")}
        for name in ("user", "item")
    ]
    changes.pop("data_type", None)
    return parse_config(
        {
            "source": {"path": "edges.parquet"},
            "model": {
                "embeddings": {"tables": tables},
                "relations": [{"name": "likes", "lhs": "user", "rhs": "item"}],
            },
            **changes,
        }
    )


ROWS = {"user": (1000, "--rows"), "item": (301, "--rows")}


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ({"sgd": {"lr": 0.1}}, 0),
        ({"rowwise_adagrad": {"lr": 0.1}}, 4 * 1000),
        ({"adagrad": {"lr": 0.1}}, 4 * 1000 * 8),
        ({"adam": {"lr": 0.1}}, 8 * 1000 * 8),
        ({"rmsprop": {"lr": 0.1}}, 4 * 1000 * 8 + 4 * 1000),
    ],
)
def test_optimizer_state_is_that_of_the_algorithm(optimizer, state):
    user = plan.estimate(make_config(optimizer=optimizer), ROWS, 1).tables[0]
    assert user.optimizer == state
    assert user.weights == 1000 * 8 * 4


def test_half_precision_halves_the_weights():
    assert plan.estimate(make_config(data_type="fp16"), ROWS, 1).tables[0].weights == 1000 * 8 * 2


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_hold_every_row_once(sharding, world_size):
    found = plan.estimate(make_config(launch={"sharding": sharding}), ROWS, world_size)
    assert len(found.ranks) == world_size
    for name, (rows, _) in ROWS.items():
        assert sum(rank.rows.get(name, 0) for rank in found.ranks) == rows
    assert sum(rank.tables for rank in found.ranks) == pytest.approx(found.checkpoint, abs=world_size)


def test_tables_that_do_not_fit_are_refused_as_in_training():
    config = make_config(launch={"hbm_gib": 1e-6})
    with pytest.raises(UserError, match=r"do not fit, row_wise, on 2 ranks of 9.99e-07 GiB; use more ranks"):
        plan.estimate(config, ROWS, 2)


def test_one_rank_sends_nothing_and_two_send_the_lookups():
    config = make_config(
        train_data={"per_replica_batch_size": 10, "global_negatives": 5, "in_batch_negatives": 2},
        negatives={"chunk_size": 10},
    )
    assert plan.estimate(config, ROWS, 1).sent_per_step == 0
    places = 2 * 10 + 2 * 5
    operators = 2 * 1 * 8 * 4
    assert plan.estimate(config, ROWS, 2).sent_per_step == (places * (8 + 2 * 8 * 4) + operators) // 2
    halved = config.model_copy(update={"launch": config.launch.model_copy(update={"exchange": "fp16"})})
    assert plan.estimate(halved, ROWS, 2).sent_per_step == (places * (8 + 2 * 8 * 2) + operators) // 2


def with_sides(first, second, **changes):
    """Two relations, user to item, with sides of their own."""
    relations = [
        {"name": name, "lhs": "user", "rhs": "item", "sides": sides}
        for name, sides in (("likes", first), ("reads", second))
    ]
    tables = [{"name": name, "embedding_dim": 8} for name in ("user", "item")]
    return make_config(model={"embeddings": {"tables": tables}, "relations": relations}, **changes)


@pytest.mark.parametrize(("sides", "pools"), [(("rhs", "rhs"), 1), (("rhs", "lhs"), 2), ((None, "rhs"), 2)])
def test_pools_are_of_the_sides_that_some_relation_replaces(sides, pools):
    data = {"per_replica_batch_size": 10, "global_negatives": 5, "in_batch_negatives": 0}
    config = with_sides(*sides, train_data=data, negatives={"chunk_size": 10})
    places = 2 * 10 + pools * 5
    operators = 2 * 2 * 8 * 4
    assert plan.estimate(config, ROWS, 2).sent_per_step == (places * (8 + 2 * 8 * 4) + operators) // 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_edges_and_negatives_take_some_bytes_a_chunk_however_large_chunks_and_pools_are(ranks):
    """Ranks read them from files."""
    found = {
        size: plan.estimate(
            make_config(
                train_data={"per_replica_batch_size": size, "global_negatives": pool}, negatives={"chunk_size": size}
            ),
            ROWS,
            ranks,
            num_edges=1_000_000,
        )
        .ranks[0]
        .edges
        for size, pool in ((100, 50), (1000, 500))
    }
    assert found == {100: 10_000 * plan.CHUNK_BYTES, 1000: 1_000 * plan.CHUNK_BYTES}


def test_all_entities_as_candidates_are_looked_up_and_scored_a_block_at_a_time():
    data = {"per_replica_batch_size": 10, "global_negatives": "all", "in_batch_negatives": 0}
    every = with_sides("rhs", "rhs", train_data=data, negatives={"chunk_size": 10})
    places = 2 * 10 + 301  # items only are replaced
    found = plan.estimate(every, ROWS, 2, num_edges=100)
    assert found.sent_per_step == (places * (8 + 2 * 8 * 4) + 2 * 2 * 8 * 4) // 2
    block = plan.BLOCK_BYTES // 4
    held = 8 * places * 8 * 4 + block * (5 * 4 + 1) + 4 * (16 * places + 4 * 10)
    assert found.ranks[0].step == plan.LOOPS_BYTES + held
    assert found.ranks[0].edges == 10 * plan.CHUNK_BYTES + 100 * 2 * 20 // 2, "what is masked is shared by the two"
    own = with_sides("rhs", "rhs", train_data=data, negatives={"chunk_size": 10, "mask": "own"})
    assert plan.estimate(own, ROWS, 2, num_edges=100).ranks[0].edges == 10 * plan.CHUNK_BYTES
    both = plan.estimate(make_config(train_data=data), ROWS, 1)
    assert both.ranks[0].step > found.ranks[0].step


def test_of_a_steps_sample_no_more_is_looked_up_than_is_drawn():
    data = {"per_replica_batch_size": 10, "global_negatives": "all", "in_batch_negatives": 0}
    found = {
        size: plan.estimate(
            with_sides("rhs", "rhs", train_data={**data, "sampled_per_step": size}, negatives={"chunk_size": 10}),
            ROWS,
            2,
        ).sent_per_step
        for size in (None, 40, 1000)
    }
    assert found[40] == ((2 * 10 + 40) * (8 + 2 * 8 * 4) + 2 * 2 * 8 * 4) // 2
    assert found[1000] == found[None]  # the type has 301


def test_the_block_of_scores_is_that_of_training():
    from twhin_pipeline.model import all_candidates

    assert plan.BLOCK_BYTES == all_candidates.BLOCK_BYTES


def test_the_tiles_and_blocks_of_evaluation_and_writing_are_those_of_the_code():
    from twhin_pipeline.model import relation_scores
    from twhin_pipeline.vectors import model_files

    assert plan.TILE_BYTES == 4 * relation_scores.CPU_TILE_ELEMENTS
    assert plan.ROWS_WRITTEN == model_files.BLOCK


def test_of_losses_that_are_taken_chunk_by_chunk_each_thread_holds_the_scores_of_one_chunk():
    data = {"per_replica_batch_size": 8000, "global_negatives": 500, "in_batch_negatives": 500}
    launch = {"threads_per_process": 2}
    by_chunk, at_once = (
        plan.estimate(make_config(train_data=data, loss={"name": name}, launch=launch), ROWS, 1).ranks[0].step
        for name in ("softmax", "bce")
    )
    chunk = 1000 * (500 + 500)
    assert at_once - by_chunk == (2 * 8 * chunk - 2 * chunk) * (5 * 4 + 1)


@pytest.mark.parametrize("metric", ["recall@20", "filtered_mrr", "auc"])
def test_ranking_every_entity_takes_the_vectors_of_all_ranks_on_the_first(metric):
    config = make_config(training={"selection_metric": metric, "num_eval_steps": 0})
    alone, (first, second) = plan.estimate(config, ROWS, 1).ranks[0], plan.estimate(config, ROWS, 2).ranks
    assert second.evaluation == 0
    vectors = (1000 + 301) * 8 * 4 if metric != "auc" else 0
    assert first.evaluation - alone.evaluation == vectors
    assert (alone.evaluation > 0) == (metric != "auc"), "sampled candidates take no more than a step"


def test_ranking_heads_or_by_cosine_copies_all_candidates():
    found = {
        (metric, comparator): plan.estimate(
            make_config(
                training={"selection_metric": metric, "num_eval_steps": 0},
                model=make_config().model.model_dump() | {"comparator": comparator},
            ),
            ROWS,
            1,
        ).ranks[0]
        for metric in ("recall@20", "filtered_mrr")
        for comparator in ("dot", "cosine")
    }
    least = found["recall@20", "dot"].evaluation
    copied = [one.evaluation - least for one in found.values()]
    assert copied == [0, 1000 * 8 * 4, 1000 * 8 * 4, 1000 * 8 * 4]


def test_validation_against_samples_takes_memory_where_its_batches_are_larger_than_those_of_training():
    data = {"per_replica_batch_size": 1000, "global_negatives": 10, "in_batch_negatives": 0}
    large = {**data, "per_replica_batch_size": 100_000, "global_negatives": 500}
    metric = {"selection_metric": "auc"}
    small = make_config(train_data=data, validation_data=data, training=metric)
    assert plan.estimate(small, ROWS, 1).ranks[0].evaluation == 0
    found = plan.estimate(make_config(train_data=data, validation_data=large, training=metric), ROWS, 1).ranks[0]
    scores = 2 * 100_000 * 500
    assert scores * 3 * 4 < found.evaluation + found.step < scores * 4 * 4 + plan.LOOPS_BYTES
    without = make_config(train_data=data, validation_data=large, training=metric, split={"validation": 0.0})
    assert plan.estimate(without, ROWS, 1).ranks[0].evaluation == 0


def test_one_node_holds_its_ranks_and_what_they_share():
    found = plan.estimate(make_config(), ROWS, 2)
    assert found.node == sum(rank.total for rank in found.ranks) + plan.SHARED_BYTES
    launch = {"device": "cuda"}
    gpu = plan.estimate(make_config(launch=launch), ROWS, 1)
    assert gpu.shared == 0 and gpu.ranks[0].process == plan.GPU_PROCESS_BYTES, "of a GPU nothing was measured"


def test_steps_are_those_of_the_loop():
    config = make_config(
        train_data={"per_replica_batch_size": 20}, negatives={"chunk_size": 10}, training={"num_epochs": 3}
    )
    found = plan.estimate(config, ROWS, 2, num_edges=401)
    assert found.edges_per_step == 40
    assert found.steps == 3 * 11


def test_rows_come_from_the_flag_then_the_configuration_then_the_vocabulary(tmp_path):
    import pyarrow as pa

    config = load_config("configs/twitter.yaml")
    store = Store(str(tmp_path))
    assert plan.table_rows(config, store, None, {"tweet": 7}) == {
        "user": (424_241, "num_embeddings"),
        "tweet": (7, "--rows"),
    }
    named = make_config()
    with store.replace("vocabulary/user", "2025-01-01", config_hash="0") as draft:
        draft.write(pa.table({"id": ["a", "b"], "row": [0, 1]}))
    found = plan.table_rows(named, store, "2025-01-01", {"item": 5})
    assert found == {"user": (2, "vocabulary 2025-01-01"), "item": (5, "--rows")}
    with pytest.raises(UserError, match=r"no vocabulary and no num_embeddings for item: .*--rows item="):
        plan.table_rows(named, store, "2025-01-01", {})
    with pytest.raises(UserError, match="unknown table 'items'; did you mean 'item'"):
        plan.table_rows(named, store, "2025-01-01", {"items": 5})


@pytest.mark.parametrize("given", ["user", "user=", "user=-3", "user=many", "user=0"])
def test_rows_that_are_no_number_are_refused(given):
    with pytest.raises(UserError, match="package=70000"):
        plan.parse_rows([given])


def test_the_command_prints_people_a_table_and_programs_json(tmp_path, capsys):
    arguments = ["plan", "--config", "configs/twitter.yaml", "--home", str(tmp_path), "--world-size", "2"]
    assert run_arguments(arguments) == 0
    shown = capsys.readouterr().out
    assert "424,241" in shown and "2 ranks" in shown
    assert run_arguments([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tables"][0]["weights"] == 424_241 * 4 * 4
    assert len(found["ranks"]) == 2


@pytest.mark.parametrize("reciprocal", [False, True])
def test_operators_are_counted_as_the_scorer_has_them(reciprocal):
    from twhin_pipeline.config.model import OPERATOR_NAMES
    from twhin_pipeline.model.scorer import Scorer

    relations = [
        {"name": f"r{i}", "lhs": "user", "rhs": "item", "operator": name} for i, name in enumerate(OPERATOR_NAMES * 2)
    ]
    model = make_config().model.model_dump() | {"relations": relations, "reciprocal": reciprocal}
    config = make_config(model=model)
    assert plan.operator_parameters(config) == sum(p.numel() for p in Scorer(config.model).parameters())
