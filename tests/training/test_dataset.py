"""EdgesDataset: each edge once an epoch, in a seeded order, with the candidates and masks that were written."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ITEMS, SNAPSHOT, USERS, planted_config, write_planted
from plain_batches import Chunk, assemble

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.prefetch import Prefetcher
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset, table_sizes
from twhin_pipeline.training_set.step_sample import StepSampler


@pytest.fixture(scope="module")
def config() -> TwhinConfig:
    return planted_config(training={"num_epochs": 3})


@pytest.fixture(scope="module")
def store(config: TwhinConfig, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("store")))
    write_planted(store, config)
    return store


def edges_of(batch: EdgeBatch, config: TwhinConfig) -> list[tuple[int, int, int, float]]:
    """The batch's edges (relation, lhs, rhs, weight), found through its ids and indices."""
    rows = torch.cat([batch.ids[name] for name in config.model.table_names])
    table = np.repeat(config.model.table_names, [len(batch.ids[name]) for name in config.model.table_names])
    edges = []
    for g, c in (batch.weight > 0).nonzero().tolist():
        relation = config.model.relations[int(batch.relation[g])]
        lhs, rhs = int(batch.lhs_index[g, c]), int(batch.rhs_index[g, c])
        assert (table[lhs], table[rhs]) == (relation.lhs, relation.rhs)
        edges.append((int(batch.relation[g]), int(rows[lhs]), int(rows[rhs]), float(batch.weight[g, c])))
    return edges


def written(store: Store) -> Counter[tuple[int, int, int, float]]:
    table = store.read("training_set/positives", SNAPSHOT)
    return Counter(zip(*(table.column(name).to_pylist() for name in ("rel", "lhs", "rhs", "weight")), strict=True))


def equal(a: EdgeBatch, b: EdgeBatch) -> None:
    for field in dataclasses.fields(EdgeBatch):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, dict):
            assert left.keys() == right.keys(), field.name
            assert all(np.array_equal(left[k], right[k]) for k in left), field.name
        elif field.name.endswith("_mask"):
            # A pair may be there for each of a query's positions.
            assert torch.equal(left.unique(dim=0), right.unique(dim=0)), field.name
            assert (left[:, 0].diff() >= 0).all() and (right[:, 0].diff() >= 0).all(), "chunks ascend"
        elif isinstance(left, torch.Tensor):
            assert left.dtype == right.dtype and torch.equal(left, right), field.name
        else:
            assert left == right, field.name


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_edge_is_read_once_an_epoch_at_any_world_size(config: TwhinConfig, store: Store, world_size: int) -> None:
    ranks = [EdgesDataset(config, store, SNAPSHOT, rank=r, world_size=world_size) for r in range(world_size)]
    read: dict[int, Counter[Any]] = {epoch: Counter() for epoch in range(3)}
    steps = 0
    for batches in zip(*ranks, strict=True):
        epoch = steps // ranks[0].steps_per_epoch
        steps += 1
        assert len({batch.global_edges for batch in batches}) == 1
        assert sum(batch.num_edges for batch in batches) == batches[0].global_edges
        for batch in batches:
            edges = edges_of(batch, config)
            assert len(edges) == batch.num_edges
            read[epoch].update(edges)
    assert steps == 3 * ranks[0].steps_per_epoch
    assert all(counts == written(store) for counts in read.values())


def test_the_same_global_batch_is_read_by_one_rank_and_by_two(config: TwhinConfig, store: Store) -> None:
    one = EdgesDataset(planted_config(train_data={"per_replica_batch_size": 128}), store, SNAPSHOT)
    two = [EdgesDataset(config, store, SNAPSHOT, rank=r, world_size=2) for r in (0, 1)]
    for whole, left, right in zip(one, *two, strict=False):
        assert sorted(edges_of(whole, config)) == sorted(edges_of(left, config) + edges_of(right, config))


def test_epochs_have_different_orders_and_a_seed_gives_the_same_ones(config: TwhinConfig, store: Store) -> None:
    first, second = (list(EdgesDataset(config, store, SNAPSHOT)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        equal(a, b)
    per_epoch = len(first) // 3
    assert edges_of(first[0], config) != edges_of(first[per_epoch], config)
    other = EdgesDataset(planted_config(training={"seed": 1}), store, SNAPSHOT)
    assert edges_of(first[0], config) != edges_of(next(iter(other)), config)


def test_several_reader_threads_make_the_batches_of_one_in_its_order(config: TwhinConfig, store: Store) -> None:
    several = planted_config(training={"num_epochs": 3}, launch={"reader_threads": 3})
    for a, b in zip(EdgesDataset(config, store, SNAPSHOT), EdgesDataset(several, store, SNAPSHOT), strict=True):
        equal(a, b)


def test_a_pinned_batch_has_the_same_tensors_in_one_piece_of_memory(
    config: TwhinConfig, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine without CUDA no memory can be page-locked; all else is the same."""
    empty = torch.empty

    def unlocked(*shape: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        assert pin_memory
        return empty(*shape, **kwargs)

    for batch in (next(iter(EdgesDataset(config, store, SNAPSHOT))), EdgeBatch.empty(config.model, 7)):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", unlocked)
            pinned = batch.pinned()
        equal(dataclasses.replace(pinned, memory=None), batch)
        assert pinned.memory is not None
        places = [pinned.relation, pinned.rhs_log_q, *pinned.ids.values()]
        assert {tensor.untyped_storage().data_ptr() for tensor in places} == {pinned.memory.data_ptr()}


def test_a_saved_position_goes_on_with_the_batches_that_would_have_come(config: TwhinConfig, store: Store) -> None:
    whole = list(EdgesDataset(config, store, SNAPSHOT))
    first = EdgesDataset(config, store, SNAPSHOT)
    batches = iter(first)
    read = [next(batches) for _ in range(len(whole) // 2)]
    second = EdgesDataset(config, store, SNAPSHOT)
    second.load_state_dict(first.state_dict())
    assert second.steps_left == len(whole) - len(read)
    for a, b in zip(whole, read + list(second), strict=True):
        equal(a, b)


def test_a_position_saved_by_two_ranks_goes_on_at_three_without_losing_or_repeating_an_edge(
    config: TwhinConfig, store: Store
) -> None:
    config = planted_config(training={"num_epochs": 1})
    counts: Counter[Any] = Counter()
    two = [EdgesDataset(config, store, SNAPSHOT, rank=r, world_size=2) for r in range(2)]
    for dataset in two:
        batches = iter(dataset)
        for _ in range(3):
            counts.update(edges_of(next(batches), config))
    assert two[0].state_dict() == two[1].state_dict()
    for rank in range(3):
        dataset = EdgesDataset(config, store, SNAPSHOT, rank=rank, world_size=3)
        dataset.load_state_dict(two[0].state_dict())
        for batch in dataset:
            counts.update(edges_of(batch, config))
    assert counts == written(store)


@pytest.fixture(scope="module")
def store_with_log_q(config: TwhinConfig, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A copy of `store` whose negatives have log_q: random numbers, no rows for the sides that are not replaced."""
    store = Store(str(tmp_path_factory.mktemp("log_q")))
    write_planted(store, config)
    for asset in ("training_set/negatives", "held_out/validation_negatives"):
        add_log_q(store, asset)
    return store


def add_log_q(store: Store, asset: str) -> None:
    rng = np.random.default_rng(0)
    positives = asset.replace("validation_negatives", "validation").replace("negatives", "positives")
    sizes = Counter(store.read(positives, SNAPSHOT)["chunk"].to_pylist())

    def values(table: pa.Table) -> pa.Array:
        drawn = [rng.normal(size=8 + min(6, sizes[chunk])).tolist() for chunk in table["chunk"].to_pylist()]
        return pa.array(drawn, pa.list_(pa.float32()))

    write_log_q(store, asset, values)


def write_log_q(store: Store, asset: str, values: Callable[[pa.Table], pa.Array]) -> None:
    """Write a version of negatives whose log_q are the `values` of each file's table."""
    tables = {path.rpartition("/")[2]: pq.read_table(path) for path in store.files(asset, SNAPSHOT)}
    with store.replace(asset, SNAPSHOT, config_hash="test") as draft:
        for name, table in tables.items():
            others = table.drop_columns(["log_q"]) if "log_q" in table.column_names else table
            draft.write(others.append_column("log_q", values(table)), name)


@pytest.mark.parametrize("sides", ["both", "rhs", "lhs"])
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize(("of_follows", "log_q"), [(None, False), ("rhs", True), ("both", True)])
def test_batches_equal_those_assembled_chunk_by_chunk(
    store: Store, store_with_log_q: Store, split: Any, sides: str, of_follows: str | None, log_q: bool
) -> None:
    store = store_with_log_q if log_q else store
    relations = [
        {"name": "likes", "lhs": "user", "rhs": "item"},
        {"name": "follows", "lhs": "user", "rhs": "user", "sides": of_follows},
    ]
    config = planted_config(
        negatives={"chunk_size": 32, "epochs": 2, "sides": sides},
        training={"num_epochs": 3},
        model={"relations": relations},
        loss={"log_q": log_q},
    )
    asset, negatives_asset = (
        ("training_set/positives", "training_set/negatives")
        if split == "train"
        else ("held_out/validation", "held_out/validation_negatives")
    )
    positives = store.read(asset, SNAPSHOT).to_pandas()
    files = [pq.read_table(path).to_pandas() for path in store.files(negatives_asset, SNAPSHOT)]
    dataset = EdgesDataset(config, store, SNAPSHOT, split)
    per_step, step = dataset.chunks_per_step, 0
    for batch in dataset:
        epoch, place = divmod(step, dataset.steps_per_epoch)
        order = np.random.default_rng([config.training.seed, epoch]).permutation(dataset.num_chunks)
        chunks = []
        for number in order[place * per_step : (place + 1) * per_step]:
            edges = positives[positives.chunk == number]
            table = files[epoch % len(files)]
            table = table[table.chunk == number].set_index("side")
            count = len(edges)
            window = [(epoch % len(files) * 6 + j) % count for j in range(min(6, count))]
            sided: dict[str, Any] = {}
            for side, name in ((0, "lhs"), (1, "rhs")):
                replaced = of_follows if edges["rel"].iloc[0] == 1 and of_follows else sides
                used = replaced in ("both", name)
                line = table.loc[side]
                sided[f"{name}_pool"] = np.asarray(line["row"]) if used else np.zeros(0, np.int64)
                pairs = np.stack([line["mask_position"], line["mask_candidate"]], 1)
                sided[f"{name}_mask"] = pairs if used else np.zeros((0, 2), np.int64)
                if log_q and used:
                    sided[f"{name}_log_q"] = np.asarray(line["log_q"], np.float32)
            chunks.append(
                Chunk(
                    relation=int(edges["rel"].iloc[0]),
                    lhs=edges["lhs"].to_numpy(),
                    rhs=edges["rhs"].to_numpy(),
                    weight=edges["weight"].to_numpy(),
                    in_batch=np.array(window),
                    sides=replaced,
                    **sided,
                )
            )
        edges_here = sum(len(chunk.lhs) for chunk in chunks)
        equal(batch, assemble(chunks, config.model, edges_here))
        step += 1
    assert step == dataset.num_epochs * dataset.steps_per_epoch


def test_log_q_that_the_negatives_lack_is_refused_with_the_remedy(store: Store) -> None:
    with pytest.raises(UserError, match=r"has no log_q.*twhin sample"):
        next(iter(EdgesDataset(planted_config(loss={"log_q": True}), store, SNAPSHOT)))


def test_log_q_that_is_null_is_refused_with_the_remedy(tmp_path: Path) -> None:
    config = planted_config(loss={"log_q": True})
    store = Store(str(tmp_path))
    write_planted(store, config)
    add_log_q(store, "training_set/negatives")
    write_log_q(store, "training_set/negatives", lambda table: pa.nulls(len(table), pa.list_(pa.float32())))
    with pytest.raises(UserError, match=r"has no log_q.*twhin sample"):
        next(iter(EdgesDataset(config, store, SNAPSHOT)))


def everything_config(**sections: Any) -> TwhinConfig:
    return planted_config(train_data={"global_negatives": "all", "in_batch_negatives": 0}, **sections)


@pytest.mark.parametrize("mask", ["known", "own"])
@pytest.mark.parametrize("sides", ["both", "rhs", "lhs"])
@pytest.mark.parametrize("of_follows", [None, "rhs"])
def test_with_all_candidates_batches_hold_whole_types_and_masks_are_the_training_edges(
    store: Store, sides: str, of_follows: str | None, mask: str
) -> None:
    relations = [
        {"name": "likes", "lhs": "user", "rhs": "item"},
        {"name": "follows", "lhs": "user", "rhs": "user", "sides": of_follows},
    ]
    negatives = {"chunk_size": 32, "sides": sides, "mask": mask}
    config = everything_config(negatives=negatives, model={"relations": relations})
    positives = store.read("training_set/positives", SNAPSHOT).to_pandas()
    true = set(zip(positives.rel, positives.lhs, positives.rhs, strict=True))
    dataset = EdgesDataset(config, store, SNAPSHOT)
    order = np.random.default_rng([config.training.seed, 0]).permutation(dataset.num_chunks)
    for step, batch in zip(range(dataset.steps_per_epoch), dataset, strict=False):
        chunks = []
        for number in order[step * dataset.chunks_per_step : (step + 1) * dataset.chunks_per_step]:
            edges = positives[positives.chunk == number]
            relation = int(edges["rel"].iloc[0])
            lhs, rhs = edges["lhs"].to_numpy(), edges["rhs"].to_numpy()
            if mask == "own":
                true = {(relation, head, tail) for head, tail in zip(lhs, rhs, strict=True)}
            replaced = of_follows if relation == 1 and of_follows else sides
            masks: dict[str, list[tuple[int, int]]] = {"lhs": [], "rhs": []}
            for i, (head, tail) in enumerate(zip(lhs, rhs, strict=True)):
                if replaced != "rhs":
                    masks["lhs"] += [(i, c) for c in range(USERS) if (relation, c, tail) in true]
                if replaced != "lhs":
                    tails = USERS if relation == 1 else ITEMS
                    masks["rhs"] += [(i, c) for c in range(tails) if (relation, head, c) in true]
            none = np.zeros(0, np.int64)
            pairs = {side: np.array(found, np.int64).reshape(-1, 2) for side, found in masks.items()}
            chunks.append(
                Chunk(relation, lhs, rhs, edges["weight"].to_numpy(), none, none, none, *pairs.values(), replaced)
            )
        edges_here = sum(len(chunk.lhs) for chunk in chunks)
        expected = assemble(chunks, config.model, edges_here, everything={"user": USERS, "item": ITEMS})
        equal(batch, expected)
        for side in ("lhs", "rhs"):
            owner = getattr(batch, f"{side}_mask")[:, 0] * 1000 + getattr(batch, f"{side}_mask")[:, 1]
            assert (owner.diff() >= 0).all(), "masks come in the order of queries"


def sampled_config(size: int, *, batch: int = 512, degree_share: float = 0.0, **negatives: Any) -> TwhinConfig:
    data = {"global_negatives": "all", "in_batch_negatives": 0, "sampled_per_step": size}
    return planted_config(
        train_data={**data, "per_replica_batch_size": batch},
        negatives={"chunk_size": 32, "degree_share": degree_share, **negatives},
        training={"num_epochs": 2},
        loss={"log_q": True},
    )


@pytest.mark.parametrize("sides", ["both", "rhs"])
def test_a_steps_sample_stands_for_all_and_masks_are_the_training_edges_among_it(store: Store, sides: str) -> None:
    config = sampled_config(9, sides=sides)
    positives = store.read("training_set/positives", SNAPSHOT).to_pandas()
    true = set(zip(positives.rel, positives.lhs, positives.rhs, strict=True))
    rows_of = {"user": USERS, "item": ITEMS}
    drawn: dict[str, Counter[int]] = {table: Counter() for table in rows_of}
    dataset = EdgesDataset(config, store, SNAPSHOT)
    assert dataset.chunks_per_step > 1
    masked = 0
    for batch in dataset:
        relations = [config.model.relations[int(r)] for r in batch.relation]
        replaced = [(r.lhs, "lhs") for r in relations if sides == "both"] + [(r.rhs, "rhs") for r in relations]
        assert set(batch.sample) == {table for table, _ in replaced}
        sample = {table: batch.ids[table][places].tolist() for table, places in batch.sample.items()}
        for table, rows in sample.items():
            assert rows == sorted(set(rows)) and len(rows) == 9
            assert torch.allclose(batch.sample_log_q[table], torch.full((9,), math.log(9 / rows_of[table])))
            drawn[table].update(rows)
        line = torch.cat([batch.ids[table] for table in config.model.table_names]).tolist()
        edges = (batch.weight > 0).nonzero().tolist()
        for side, other in (("lhs", "rhs"), ("rhs", "lhs")):
            expected = set()
            kept, ends = (getattr(batch, name).tolist() for name in (f"{side}_query_index", f"{other}_index"))
            queries = getattr(batch, f"{side}_query").tolist()
            for g, c in edges if side == "rhs" or sides == "both" else []:
                query = queries[g][c]
                entity = line[kept[g][query]]
                assert kept[g][query] == ends[g][c]
                for place, row in enumerate(sample[getattr(relations[g], side)]):
                    edge = (row, entity) if side == "lhs" else (entity, row)
                    if (config.model.relations.index(relations[g]), *edge) in true:
                        expected.add((g, query, place))
            assert set(map(tuple, getattr(batch, f"{side}_mask").tolist())) == expected
            masked += len(expected)
    assert masked > 0
    steps = sum(drawn["item"].values()) / 9
    share = np.array([drawn["item"][row] for row in range(ITEMS)]) / steps
    # Each is drawn with probability 9 / ITEMS, so 6 standard deviations bound them all.
    deviation = np.sqrt(9 / ITEMS * (1 - 9 / ITEMS) / steps)
    assert np.abs(share - 9 / ITEMS).max() < 6 * deviation


def test_all_ranks_draw_the_same_sample_and_a_saved_position_draws_it_again(store: Store) -> None:
    config = sampled_config(9, batch=64)
    ranks = [EdgesDataset(config, store, SNAPSHOT, rank=r, world_size=2) for r in (0, 1)]
    seen = []
    for left, right in zip(*ranks, strict=True):
        for table in left.sample.keys() & right.sample.keys():
            assert torch.equal(left.ids[table][left.sample[table]], right.ids[table][right.sample[table]])
        seen.append(left)
    first = EdgesDataset(config, store, SNAPSHOT, rank=0, world_size=2)
    batches = iter(first)
    for _ in range(len(seen) // 2):
        next(batches)
    again = EdgesDataset(config, store, SNAPSHOT, rank=0, world_size=2)
    again.load_state_dict(first.state_dict())
    rest = list(again)
    assert len(rest) == len(seen) - len(seen) // 2 > 1
    for a, b in zip(seen[len(seen) // 2 :], rest, strict=True):
        equal(a, b)
    other = sampled_config(9, batch=64, seed=1)
    batch = next(iter(EdgesDataset(other, store, SNAPSHOT, rank=0, world_size=2)))
    assert any(batch.sample[t].tolist() != seen[0].sample[t].tolist() for t in batch.sample)


def test_a_samples_share_is_corrected_for_where_log_q_is_on_only(store: Store) -> None:
    corrected = sampled_config(9)
    plain = corrected.model_copy(update={"loss": corrected.loss.model_copy(update={"log_q": False})})
    for on, off in zip(*(EdgesDataset(config, store, SNAPSHOT) for config in (corrected, plain)), strict=True):
        assert on.sample_log_q.keys() == off.sample.keys()
        assert all(bool((value < 0).all()) for value in on.sample_log_q.values())
        assert not off.sample_log_q


def test_a_sample_by_degree_has_each_entity_as_often_as_its_log_q_says(store: Store) -> None:
    positives = store.read("training_set/positives", SNAPSHOT).to_pandas()
    config = sampled_config(10, degree_share=0.5, alpha=1.0)
    sampler = EdgesDataset(config, store, SNAPSHOT).sampler
    assert sampler is not None
    items = [relation.rhs == "item" for relation in config.model.relations]
    degree = np.bincount(positives.rhs[np.array(items)[positives.rel]], minlength=ITEMS)
    share = degree / degree.sum()
    expected = 1 - (1 - 5 / ITEMS) * (1 - share) ** 5
    base = config.model.table_names.index("item") and USERS
    found, draws = np.zeros(ITEMS), 4000
    for step in range(draws):
        sample = sampler.draw(0, step)
        part = sample.span(base, base + ITEMS)
        rows = sample.rows[part] - base
        assert 5 <= len(rows) == len(set(rows.tolist())) <= 10
        assert np.allclose(np.exp(sample.log_q[part]), expected[rows], rtol=1e-5)
        found[rows] += 1
    deviation = np.sqrt(expected * (1 - expected) / draws)
    assert np.abs(found / draws - expected).max() < 5 * deviation.max()
    assert expected.max() > 1.5 * expected.min(), "some are drawn more often than others"


def test_a_sum_over_a_sample_divided_by_its_probabilities_is_on_average_the_sum_over_all() -> None:
    generator = np.random.default_rng(0)
    degree = generator.zipf(1.5, 200).clip(max=1000)
    values = generator.random(200)
    sampler = StepSampler(40, degree_share=0.5, alpha=0.75, seed=3, degrees=[degree])
    sums = []
    for step in range(3000):
        sample = sampler.draw(1, step)
        sums.append((values[sample.rows] / np.exp(sample.log_q)).sum())
    assert abs(np.mean(sums) - values.sum()) < 4 * np.std(sums) / len(sums) ** 0.5


def test_a_type_without_training_edges_is_sampled_evenly() -> None:
    sampler = StepSampler(4, degree_share=0.5, alpha=0.75, seed=0, degrees=[np.zeros(9, np.int64), np.arange(3)])
    sample = sampler.draw(0, 0)
    assert np.allclose(np.exp(sample.log_q), [4 / 9] * 4 + [1] * 3)
    assert sample.rows[4:].tolist() == [9, 10, 11]


def test_a_moved_batch_leaves_no_tensor_behind(store: Store) -> None:
    batch = next(iter(EdgesDataset(sampled_config(9), store, SNAPSHOT)))
    moved = batch.to("meta")
    for field in dataclasses.fields(EdgeBatch):
        value = getattr(moved, field.name)
        for found in value.values() if isinstance(value, dict) else [value]:
            assert not isinstance(found, torch.Tensor) or found.device.type == "meta", field.name
    assert moved.sample.keys() == batch.sample.keys() == moved.sample_log_q.keys() > set()


def test_a_sample_larger_than_the_type_is_all_of_it(store: Store) -> None:
    sampled, whole = (EdgesDataset(c, store, SNAPSHOT) for c in (sampled_config(1000), sampled_config(1000)))
    whole.sampler = None
    for a, b in zip(sampled, whole, strict=True):
        assert all(not a.sample_log_q[table].any() for table in a.sample)
        assert all(a.sample[table].tolist() == list(range(len(a.ids[table]))) for table in a.sample)
        equal(dataclasses.replace(a, sample={}, sample_log_q={}), b)


def test_with_all_candidates_rows_that_a_table_has_to_spare_are_none(tmp_path: Path) -> None:
    data = everything_config().model.model_dump()
    data["embeddings"]["tables"][1]["num_embeddings"] = ITEMS + 7
    config = everything_config(model=data)
    store = Store(str(tmp_path))
    write_planted(store, planted_config())
    for batch in EdgesDataset(config, store, SNAPSHOT):
        if (batch.relation == 0).any():
            assert batch.ids["item"].tolist() == list(range(ITEMS))


def test_in_batch_candidates_alone_are_enough(tmp_path: Path) -> None:
    config = planted_config(train_data={"global_negatives": 0})
    store = Store(str(tmp_path))
    write_planted(store, config)
    batch = next(iter(EdgesDataset(config, store, SNAPSHOT)))
    assert batch.lhs_pool_index.shape == batch.rhs_pool_index.shape == (len(batch.relation), 0)
    assert batch.in_batch.shape[1] == 6 and batch.num_edges == len(edges_of(batch, config))


def test_a_rank_without_edges_gets_an_empty_batch(store: Store) -> None:
    config = planted_config(train_data={"per_replica_batch_size": 100_000}, training={"num_epochs": 1})
    chunks = EdgesDataset(config, store, SNAPSHOT).num_chunks
    batches = list(EdgesDataset(config, store, SNAPSHOT, rank=chunks, world_size=chunks + 1))
    assert [batch.num_edges for batch in batches] == [0] and batches[0].global_edges > 0
    equal(batches[0], assemble([], config.model, batches[0].global_edges))


def test_an_error_of_the_background_thread_reaches_the_loop_and_the_thread_ends(
    tmp_path: Path, config: TwhinConfig
) -> None:
    store = Store(str(tmp_path))
    write_planted(store, config)
    dataset = EdgesDataset(config, store, SNAPSHOT)
    Path(store.files("training_set/negatives", SNAPSHOT)[1]).unlink()
    batches = iter(dataset)
    for _ in range(dataset.steps_per_epoch):
        next(batches)
    with pytest.raises(FileNotFoundError):
        next(batches)
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_reading_ahead_is_bounded_and_stops_with_the_reader() -> None:
    made = []

    def items() -> Any:
        for i in range(1000):
            made.append(i)
            yield i

    with Prefetcher(items(), depth=3) as ahead:
        assert next(iter(ahead)) == 0
    assert len(made) <= 6
    assert not ahead.thread.is_alive()


def test_pools_of_another_size_than_configured_are_refused(store: Store) -> None:
    config = planted_config(train_data={"global_negatives": 9})
    with pytest.raises(UserError, match=r"global_negatives.*twhin sample"):
        next(iter(EdgesDataset(config, store, SNAPSHOT)))


def test_a_vocabulary_that_outgrew_its_table_is_refused(store: Store, config: TwhinConfig) -> None:
    data = config.model.model_dump()
    data["embeddings"]["tables"][1]["num_embeddings"] = 40
    with pytest.raises(UserError, match=r"tables\[1\].num_embeddings is 40.*48 rows"):
        table_sizes(planted_config(model=data), store, SNAPSHOT)


def test_a_training_set_beyond_its_vocabulary_is_refused(tmp_path: Path, config: TwhinConfig) -> None:
    store = Store(str(tmp_path))
    write_planted(store, config)
    items = store.read("vocabulary/item", SNAPSHOT)
    with store.replace("vocabulary/item", SNAPSHOT, config_hash="test") as draft:
        draft.write(items.slice(0, 30))
    with pytest.raises(UserError, match=r"\(likes\) has a rhs beyond the 30 rows of table 'item'"):
        EdgesDataset(config, store, SNAPSHOT)
