"""Negatives: typed, masked, distributed as asked, and the same bits for a seed."""

from __future__ import annotations

import math
import os
import uuid
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from edge_files import RELATIONS, SNAPSHOT, make_config, rows_of, store_at, triples, write
from random_edges import RELATION_SIDES, random_edges
from scipy.stats import chisquare

from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.kernels import sampling_kernels
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset
from twhin_pipeline.training_set import negatives
from twhin_pipeline.training_set.positives import ASSETS, build_positives

SMALL = {"global_negatives": 12, "in_batch_negatives": 6}


def build(config, store):
    raw_edges.ingest(config, store, SNAPSHOT)
    vocabulary.build(config, store, SNAPSHOT)
    build_positives(config, store, SNAPSHOT)
    return negatives.build(config, store, SNAPSHOT)


def make(tmp_path, rows, **sections):
    sections = {"train_data": SMALL, "validation_data": SMALL, **sections}
    return make_config(write(tmp_path / "e.parquet", rows), **sections)


def chunks_of(store, asset):
    """Return the edges of each chunk, in order."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for row in rows_of(store, asset):
        found.setdefault(row["chunk"], []).append((row["lhs"], row["rel"], row["rhs"]))
    return found


def listed_by_a_plain_loop(chunk, side, epoch, pool, window):
    """Return the candidates `[window | pool]` of a chunk and side."""
    entities = [edge[0] if side == 0 else edge[2] for edge in chunk]
    return [entities[(epoch * window + j) % len(chunk)] for j in range(min(window, len(chunk)))] + pool


def masks_by_a_plain_loop(chunk, side, epoch, pool, window, true):
    """Return the (position, candidate) pairs that the contract asks for, one edge and one candidate at a time: those of
    the first edge that keeps an entity."""
    candidates = listed_by_a_plain_loop(chunk, side, epoch, pool, window)
    pairs, seen = [], set()
    for position, (lhs, rel, rhs) in enumerate(chunk):
        kept = rhs if side == 0 else lhs
        if kept in seen:
            continue
        seen.add(kept)
        for number, entity in enumerate(candidates):
            if ((entity, rel, rhs) if side == 0 else (lhs, rel, entity)) in true:
                pairs.append((position, number))
    return pairs


def assert_no_unmasked_candidate_of_any_edge_is_true(chunk, row, window, true):
    """Look every edge's query up by its first position, as a reader does, and compare edge by edge."""
    side = row["side"]
    masked = set(zip(row["mask_position"], row["mask_candidate"], strict=True))
    candidates = listed_by_a_plain_loop(chunk, side, row["epoch"], row["row"], window)
    first = {}
    for position, edge in enumerate(chunk):
        first.setdefault(edge[2 - 2 * side], position)
    for lhs, rel, rhs in chunk:
        query = first[rhs if side == 0 else lhs]
        for number, entity in enumerate(candidates):
            is_true = ((entity, rel, rhs) if side == 0 else (lhs, rel, entity)) in true
            assert is_true == ((query, number) in masked)


@pytest.mark.parametrize(("chunk_size", "mask"), [(7, "known"), (32, "known"), (32, "own")])
def test_masks_are_exactly_the_true_edges_or_those_of_the_chunk(tmp_path, chunk_size, mask):
    negatives = {"chunk_size": chunk_size, "epochs": 3, "seed": 5, "mask": mask}
    config = make(tmp_path, random_edges(500, users=30, items=20), negatives=negatives)
    store = store_at(tmp_path)
    build(config, store)
    trained = triples(store, "training_set/positives")
    everything = trained | triples(store, "held_out/validation") | triples(store, "held_out/test")
    for asset, positives, true, epochs in (
        ("training_set/negatives", "training_set/positives", trained, 3),
        ("held_out/validation_negatives", "held_out/validation", everything, 1),
    ):
        chunks = chunks_of(store, positives)
        rows = rows_of(store, asset)
        assert [(r["epoch"], r["chunk"], r["side"]) for r in rows] == list(
            product(range(epochs), sorted(chunks), (0, 1))
        )
        masked = 0
        for row in rows:
            found = list(zip(row["mask_position"], row["mask_candidate"], strict=True))
            chunk = chunks[row["chunk"]]
            # Validation ranks edges, so there all true ones are masked.
            edges = set(chunk) if mask == "own" and asset == "training_set/negatives" else true
            assert found == masks_by_a_plain_loop(chunk, row["side"], row["epoch"], row["row"], 6, edges)
            assert_no_unmasked_candidate_of_any_edge_is_true(chunk, row, 6, edges)
            assert row["log_q"] is None
            masked += len(found)
        details = store.manifest(asset, SNAPSHOT).details
        assert masked == details["masked"] > 0
        assert details["mask"] == (mask if asset == "training_set/negatives" else "known")


@pytest.mark.parametrize("cost", [0, 1, 10**6])
def test_pairs_are_the_same_however_they_are_searched(tmp_path, monkeypatch, cost):
    """Expanding neighbours and probing pairs must agree; a cost of 0 probes all, one of 10^6 expands all."""
    monkeypatch.setattr(negatives, "PROBE_COST", cost)
    config = make(tmp_path, random_edges(700, users=25, items=15), negatives={"chunk_size": 50, "epochs": 2})
    store = store_at(tmp_path)
    build(config, store)
    true = triples(store, "training_set/positives")
    chunks = chunks_of(store, "training_set/positives")
    for row in rows_of(store, "training_set/negatives"):
        found = list(zip(row["mask_position"], row["mask_candidate"], strict=True))
        assert found == masks_by_a_plain_loop(chunks[row["chunk"]], row["side"], row["epoch"], row["row"], 6, true)


def test_pools_are_of_the_sides_entity_type(tmp_path):
    # Rows from 5 on are users only, so an item pool drawn from the wrong type would show.
    config = make(tmp_path, random_edges(300, users=60, items=5))
    store = store_at(tmp_path)
    build(config, store)
    relation = {chunk: edges[0][1] for chunk, edges in chunks_of(store, "training_set/positives").items()}
    largest = {"user": 0, "item": 0}
    for row in rows_of(store, "training_set/negatives"):
        kind = RELATION_SIDES[relation[row["chunk"]]][row["side"]]
        assert len(row["row"]) == 12
        largest[kind] = max(largest[kind], *row["row"])
    assert largest["item"] <= 4 < largest["user"]


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_pools_are_distributed_as_asked(tmp_path, alpha):
    config = make(
        tmp_path,
        random_edges(600, users=40, items=25),
        train_data={"global_negatives": 400, "in_batch_negatives": 0},
        negatives={"chunk_size": 16, "degree_share": 0.25, "alpha": alpha, "epochs": 2},
    )
    store = store_at(tmp_path)
    build(config, store)
    chunks = chunks_of(store, "training_set/positives")
    sizes = {e: len(rows_of(store, f"vocabulary/{e}")) for e in ("user", "item")}
    degree = {e: np.zeros(n) for e, n in sizes.items()}
    for edge in (edge for chunk in chunks.values() for edge in chunk):
        for kind, row in zip(RELATION_SIDES[edge[1]], (edge[0], edge[2]), strict=True):
            degree[kind][row] += 1
    uniform = {e: np.zeros(n) for e, n in sizes.items()}
    popular = {e: np.zeros(n) for e, n in sizes.items()}
    for row in rows_of(store, "training_set/negatives"):
        kind = RELATION_SIDES[chunks[row["chunk"]][0][1]][row["side"]]
        np.add.at(uniform[kind], row["row"][:300], 1)
        np.add.at(popular[kind], row["row"][300:], 1)
    for kind in sizes:
        assert chisquare(uniform[kind]).pvalue > 1e-3
        weight = degree[kind] ** alpha
        assert chisquare(popular[kind], weight / weight.sum() * popular[kind].sum()).pvalue > 1e-3


@pytest.mark.parametrize("popular", [0, 5, 11])
def test_draws_are_those_of_numpys_philox(popular):
    """So a seed's pools stay what they were, whatever draws them."""
    cumulative, none = np.cumsum(np.random.default_rng(0).random(1000)), np.zeros(0, np.int64)
    for seed, stream, epoch, chunk in ((0, 0, 0, 0), (2**64 - 1, 3, 7, 12_345_678), (5, 1, 1, 2**31 - 1)):
        key = np.array([seed, stream], np.uint64)
        bits = np.random.Philox(key=key, counter=[0, 0, chunk, epoch]).random_raw(11)
        unit = (bits >> np.uint64(11)) * 2.0**-53
        expected = np.minimum((unit * 1000).astype(np.int64), 999)
        split = 11 - popular
        expected[split:] = np.searchsorted(cumulative, unit[split:] * cumulative[-1], side="right")
        found = np.empty(11, np.int64)
        sampling_kernels.draw(np.uint64(seed), stream, epoch, chunk, 1000, none, popular, cumulative, found)
        assert found.tolist() == expected.tolist()


def test_a_seed_gives_the_same_bits_at_any_number_of_threads(tmp_path):
    rows = random_edges(500)
    tables = []
    for number, (threads, seed) in enumerate(((1, 3), (2, 3), (2, 4))):
        config = make(
            tmp_path, rows, negatives={"seed": seed, "epochs": 3, "chunk_size": 20}, launch={"data_threads": threads}
        )
        store = store_at(tmp_path / str(number))
        build(config, store)
        tables.append(store.read("training_set/negatives", SNAPSHOT))
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_pools_differ_between_epochs_chunks_sides_and_validation(tmp_path):
    config = make(tmp_path, random_edges(500, users=300, items=300), negatives={"chunk_size": 20, "epochs": 2})
    store = store_at(tmp_path)
    build(config, store)
    pools = [
        tuple(r["row"]) for a in ("training_set/negatives", "held_out/validation_negatives") for r in rows_of(store, a)
    ]
    assert len(pools) == len(set(pools))


@pytest.mark.parametrize(("sides", "expected"), [("rhs", {1}), ("lhs", {0})])
def test_only_the_sides_asked_for_are_made(tmp_path, sides, expected):
    store = store_at(tmp_path)
    build(make(tmp_path, random_edges(100), negatives={"sides": sides}), store)
    assert {row["side"] for row in rows_of(store, "training_set/negatives")} == expected


def test_a_relation_may_ask_for_sides_of_its_own(tmp_path):
    own = {"fav": "rhs", "reply": "lhs", "follows": None}
    model = {"relations": [{**relation, "sides": own[relation["name"]]} for relation in RELATIONS]}
    store = store_at(tmp_path)
    build(make(tmp_path, random_edges(200), model=model, negatives={"chunk_size": 20}), store)
    for asset, edges_of in (
        ("training_set/negatives", "training_set/positives"),
        ("held_out/validation_negatives", "held_out/validation"),
    ):
        chunks = chunks_of(store, edges_of)
        relation = {chunk: RELATIONS[edges[0][1]]["name"] for chunk, edges in chunks.items()}
        found = {(row["chunk"], row["side"]) for row in rows_of(store, asset)}
        wanted = {"fav": [1], "reply": [0], "follows": [0, 1]}
        assert found == {(chunk, side) for chunk, name in relation.items() for side in wanted[name]}
        assert store.manifest(asset, SNAPSHOT).details["sides"] == wanted


@pytest.mark.parametrize(("pool", "share", "alpha"), [(12, 0.5, 0.75), (12, 0.25, 0.0), (8, 1.0, 1.0), (0, 0.5, 0.75)])
def test_log_q_is_the_log_of_the_expected_number_in_the_list(tmp_path, pool, share, alpha):
    data = {"global_negatives": pool, "in_batch_negatives": 6}
    config = make(
        tmp_path,
        random_edges(500, users=40, items=20),
        train_data=data,
        validation_data=data,
        negatives={"chunk_size": 10, "degree_share": share, "alpha": alpha, "epochs": 2},
        loss={"log_q": True},
    )
    store = store_at(tmp_path)
    build(config, store)
    trained = chunks_of(store, "training_set/positives")
    trained_edges = [edge for chunk in trained.values() for edge in chunk]
    held = [edge for asset in ASSETS[1:] for edge in triples(store, asset)]
    degree: Counter[tuple[str, int]] = Counter()
    for lhs, rel, rhs in trained_edges:
        degree[RELATION_SIDES[rel][0], lhs] += 1
        degree[RELATION_SIDES[rel][1], rhs] += 1
    popular = round(pool * share)
    sizes = {e: len(rows_of(store, f"vocabulary/{e}")) for e in ("user", "item")}
    for asset, chunks, known in (
        ("training_set/negatives", trained, trained_edges),
        ("held_out/validation_negatives", chunks_of(store, "held_out/validation"), trained_edges + held),
    ):
        rows = rows_of(store, asset)
        assert rows
        for row in rows:
            chunk, side = chunks[row["chunk"]], row["side"]
            rel = chunk[0][1]
            kind = RELATION_SIDES[rel][side]
            mass = sum(number**alpha for (k, _), number in degree.items() if k == kind)
            of_relation = [edge[2 * side] for edge in known if edge[1] == rel]
            expected = []
            for entity in listed_by_a_plain_loop(chunk, side, row["epoch"], row["row"], 6):
                number = (pool - popular) / sizes[kind]
                if degree[kind, entity]:
                    number += popular * degree[kind, entity] ** alpha / mass
                number += min(6, len(chunk)) * of_relation.count(entity) / len(of_relation)
                expected.append(math.log(number))
            assert row["log_q"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_log_q_is_how_often_candidates_really_come(tmp_path):
    """Over many pools, an entity comes exp(log_q) times a list: uniform, popular and in-batch parts together."""
    data = {"global_negatives": 10, "in_batch_negatives": 5}
    config = make(
        tmp_path,
        random_edges(600, users=12, items=40),
        train_data=data,
        negatives={"chunk_size": 20, "epochs": 200},
        loss={"log_q": True},
        split={"validation": 0, "test": 0},
    )
    store = store_at(tmp_path)
    build(config, store)
    chunks = {c: edges for c, edges in chunks_of(store, "training_set/positives").items() if edges[0][1] == 0}
    # The window's share is exact where chunks are of one size, so that all edges are in it equally often.
    counts, told, lists = Counter(), {}, 0
    for row in rows_of(store, "training_set/negatives"):
        if row["chunk"] in chunks and row["side"] == 1:
            listed = listed_by_a_plain_loop(chunks[row["chunk"]], 1, row["epoch"], row["row"], 5)
            counts.update(listed)
            told.update(zip(listed, row["log_q"], strict=True))
            lists += 1
    for entity, log_q in told.items():
        assert counts[entity] / lists == pytest.approx(math.exp(log_q), rel=0.1)


def test_with_all_entities_as_candidates_the_table_is_one_empty_file(tmp_path):
    every = {"global_negatives": "all", "in_batch_negatives": 0}
    store = store_at(tmp_path)
    build(make(tmp_path, random_edges(200), train_data=every, training={"num_epochs": 5}), store)
    manifest = store.manifest("training_set/negatives", SNAPSHOT)
    assert [file["path"] for file in manifest.files] == ["epoch-00000.parquet"] and manifest.rows == 0
    assert manifest.details["pool"] == "all" and manifest.details["masked"] == 0
    assert store.read("training_set/negatives", SNAPSHOT).schema.names == negatives.SCHEMA.names
    assert len(rows_of(store, "held_out/validation_negatives")) > 0


@pytest.mark.parametrize("log_q", [False, True])
def test_epochs_used_again_come_with_their_own_windows_and_masks(tmp_path, log_q):
    """Training that outlasts its negatives reads them again; candidates, masks and log q must still be of one file."""
    config = make(
        tmp_path,
        random_edges(300, users=25, items=15),
        negatives={"chunk_size": 25, "epochs": 2},
        training={"num_epochs": 5},
        loss={"log_q": log_q},
    )
    store = store_at(tmp_path)
    build(config, store)
    true = triples(store, "training_set/positives")
    tables = config.model.table_names
    read = masked = 0
    for batch in EdgesDataset(config, store, SNAPSHOT):
        row = torch.cat([batch.ids[name] for name in tables]).tolist()
        for side, other in (("lhs", "rhs"), ("rhs", "lhs")):
            masks = {tuple(mask) for mask in getattr(batch, f"{side}_mask").tolist()}
            masked += len(masks)
            query, log = getattr(batch, f"{side}_query"), getattr(batch, f"{side}_log_q")
            for g, c in (batch.weight > 0).nonzero().tolist():
                rel = int(batch.relation[g])
                kept = row[getattr(batch, f"{other}_index")[g, c]]
                window = getattr(batch, f"{side}_index")[g][batch.in_batch[g]]
                listed = torch.cat([window, getattr(batch, f"{side}_pool_index")[g]])
                for number, index in enumerate(listed.tolist()):
                    if int(batch.num_in_batch[g]) <= number < batch.in_batch.shape[1]:
                        continue
                    edge = (row[index], rel, kept) if side == "lhs" else (kept, rel, row[index])
                    assert (edge in true) == ((g, int(query[g, c]), number) in masks)
                    assert (float(log[g, number]) != 0) == log_q
        read += batch.num_edges
    assert read == 5 * len(true) and masked > 0


def test_hundreds_of_relations_need_few_open_files(tmp_path):
    """Each mapped file holds a descriptor; a process has 1,024 of them."""
    relations = [{"name": f"r{i}", "lhs": "user", "rhs": "item"} for i in range(300)]
    rows = [(f"u{i % 17}", f"r{i % 300}", f"i{i % 13}") for i in range(600)]
    store, config = store_at(tmp_path), make(tmp_path, rows, model={"relations": relations})
    before = len(os.listdir("/proc/self/fd"))
    most = 0

    class Watching(negatives.Sampler):
        def write(self, draft, threads):
            nonlocal most
            most = max(most, len(os.listdir("/proc/self/fd")))
            return super().write(draft, threads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(negatives, "Sampler", Watching)
        build(config, store)
    assert 0 < most - before < 60
    true = triples(store, "training_set/positives")
    chunks = chunks_of(store, "training_set/positives")
    for row in rows_of(store, "training_set/negatives"):
        found = list(zip(row["mask_position"], row["mask_candidate"], strict=True))
        assert found == masks_by_a_plain_loop(chunks[row["chunk"]], row["side"], row["epoch"], row["row"], 6, true)


def test_a_pool_may_be_larger_than_its_entity_type_or_absent(tmp_path):
    rows = random_edges(60, users=6, items=5)
    for number, pool in enumerate((50, 0)):
        store = store_at(tmp_path / str(number))
        build(make(tmp_path, rows, train_data={"global_negatives": pool, "in_batch_negatives": 3}), store)
        found = rows_of(store, "training_set/negatives")
        assert found and all(len(row["row"]) == pool for row in found)
        assert all(row["mask_position"] for row in found)


def test_without_held_out_edges_there_are_no_validation_negatives(tmp_path):
    store = store_at(tmp_path)
    build(make(tmp_path, random_edges(100), split={"validation": 0, "test": 0}), store)
    assert rows_of(store, "held_out/validation_negatives") == [] and rows_of(store, "training_set/negatives")


def test_one_file_an_epoch_and_parents_are_recorded(tmp_path):
    store = store_at(tmp_path)
    build(make(tmp_path, random_edges(100), training={"num_epochs": 3}), store)
    manifest = store.manifest("training_set/negatives", SNAPSHOT)
    assert [file["path"] for file in manifest.files] == [f"epoch-{i:05d}.parquet" for i in range(3)]
    assert not store.stale("training_set/negatives", SNAPSHOT)
    assert set(store.manifest("held_out/validation_negatives", SNAPSHOT).parents) > {
        "held_out/validation",
        "held_out/test",
    }


def test_a_remote_store_holds_the_same_tables(tmp_path):
    config = make(tmp_path, random_edges(200))
    local, remote = store_at(tmp_path), Store(f"memory://{uuid.uuid4().hex}")
    for store in (local, remote):
        build(config, store)
    for asset in ("vocabulary/user", *ASSETS, "training_set/negatives", "held_out/validation_negatives"):
        assert local.read(asset, SNAPSHOT).equals(remote.read(asset, SNAPSHOT)), asset
