"""The split: nothing held out is trained on, entities stay connected, and chunks are what they say."""

from __future__ import annotations

import uuid
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import pytest
from edge_files import SNAPSHOT, make_config, pass_checks, rows_of, store_at, triples, write
from random_edges import RELATION_SIDES, random_edges

from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.store import Store
from twhin_pipeline.training_set import positives

PARTS = positives.ASSETS


def build(config, store, snapshot=SNAPSHOT):
    raw_edges.ingest(config, store, snapshot)
    vocabulary.build(config, store, snapshot)
    return positives.build_positives(config, store, snapshot)


def encoded(config, store, snapshot=SNAPSHOT):
    """Encode raw edges by a plain loop: (lhs row, rel index, rhs row) by raw edge."""
    rows = {
        entity: {r["id"]: r["row"] for r in rows_of(store, f"vocabulary/{entity}", snapshot)}
        for entity in ("user", "item")
    }
    found = {}
    for lhs, rel, rhs in triples(store, snapshot=snapshot):
        number = config.model.relation_names.index(rel)
        left, right = RELATION_SIDES[number]
        found[lhs, rel, rhs] = (rows[left].get(lhs), number, rows[right].get(rhs))
    return found


def test_every_edge_is_in_one_part_and_none_held_out_is_in_training(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", random_edges(800)))
    store = store_at(tmp_path)
    build(config, store)
    found = [triples(store, part) for part in PARTS]
    assert not (found[0] & found[1] or found[0] & found[2] or found[1] & found[2])
    assert set.union(*found) == set(encoded(config, store).values())
    assert sum(map(len, found)) == 800 and len(found[1]) > 20 and len(found[2]) > 20


def test_every_entity_keeps_a_training_edge(tmp_path):
    # So sparse that, left to chance, many entities would lose all their edges.
    rows = random_edges(400, users=200, items=150)
    split = {"validation": 0.3, "test": 0.3}
    config = make_config(write(tmp_path / "e.parquet", rows), split=split)
    store = store_at(tmp_path)
    details = build(config, store)[PARTS[0]].details
    trained = {
        (side, row)
        for lhs, rel, rhs in triples(store, PARTS[0])
        for side, row in zip(RELATION_SIDES[rel], (lhs, rhs), strict=True)
    }
    everyone = {(e, r["row"]) for e in ("user", "item") for r in rows_of(store, f"vocabulary/{e}")}
    assert trained == everyone
    assert details["entities_without_training_edge"] == {"user": 0, "item": 0}
    loose = make_config(tmp_path / "e.parquet", split={**split, "keep_connected": False})
    details = build(loose, store_at(tmp_path / "loose"))[PARTS[0]].details
    assert details["entities_without_training_edge"]["user"] > 0


def test_shares_are_those_asked_for_and_only_of_the_relations_asked_for(tmp_path):
    rows = random_edges(4000, users=100, items=80)
    config = make_config(
        write(tmp_path / "e.parquet", rows), split={"validation": 0.1, "test": 0.2, "relations": ["fav", "reply"]}
    )
    store = store_at(tmp_path)
    manifests = build(config, store)
    splittable = sum(rel != "follows" for _, rel, _ in rows)
    for part, share in ((1, 0.1), (2, 0.2)):
        held = manifests[PARTS[part]]
        assert held.details["edges_per_relation"]["follows"] == 0
        # Four standard deviations of a binomial.
        assert abs(held.rows - share * splittable) < 4 * (splittable * share * (1 - share)) ** 0.5


def test_the_split_depends_on_its_seed_and_not_on_threads_or_the_order_of_rows(tmp_path):
    rows = random_edges(1000)
    write(tmp_path / "a.parquet", rows)
    write(tmp_path / "b.parquet", rows[::-1])
    tables = []
    for number, (file, threads, seed) in enumerate((("a", 1, 0), ("b", 2, 0), ("a", 2, 1))):
        config = make_config(tmp_path / f"{file}.parquet", split={"seed": seed}, launch={"data_threads": threads})
        store = store_at(tmp_path / str(number))
        build(config, store)
        tables.append([store.read(part, SNAPSHOT) for part in PARTS])
    assert all(one.equals(other) for one, other in zip(tables[0], tables[1], strict=True))
    assert not tables[0][1].equals(tables[2][1])


def test_a_remote_store_and_small_buckets_give_the_same_tables(tmp_path, monkeypatch):
    config = make_config(write(tmp_path / "e.parquet", random_edges(1000)))
    store = store_at(tmp_path)
    build(config, store)
    for module in ("training_set.shuffle", "graph.edge_sort"):
        monkeypatch.setattr(f"twhin_pipeline.{module}.EDGES_PER_BUCKET", 50)
    remote = Store(f"memory://{uuid.uuid4().hex}")
    build(config, remote)
    for table in ("raw_edges", "vocabulary/user", "vocabulary/item", *PARTS):
        assert remote.read(table, SNAPSHOT).equals(store.read(table, SNAPSHOT)), table


def test_equal_times_are_divided_by_number_and_not_by_the_order_of_rows(tmp_path):
    day = datetime(2024, 1, 1)
    rows = [(*edge, day) for edge in random_edges(400)]
    found = []
    for name, some in (("a", rows), ("b", rows[::-1])):
        path = write(tmp_path / f"{name}.parquet", some, ("lhs", "rel", "rhs", "at"))
        split = {"strategy": "temporal", "validation": 0.1, "test": 0.2, "relations": ["fav", "reply"]}
        config = make_config(path, source={"columns": {"time": "at"}}, split=split)
        store = store_at(tmp_path / name)
        build(config, store)
        found.append([triples(store, part) for part in PARTS])
    assert found[0] == found[1]
    held = sum(rel != "follows" for _, rel, *_ in rows)
    assert [len(part) for part in found[0][1:]] == [round(held * 0.3) - round(held * 0.2), round(held * 0.2)]
    assert all(rel != 0 for part in found[0][1:] for _, rel, _ in part)


def test_a_later_snapshots_test_is_all_that_is_new_between_known_entities(tmp_path):
    first, second = random_edges(600), random_edges(600, seed=1)
    write(tmp_path / "2024-01-01.parquet", first)
    write(tmp_path / "2024-02-01.parquet", second)
    split = {"strategy": "temporal", "later_snapshot": "2024-02-01", "validation": 0.2, "relations": ["fav", "reply"]}
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", split=split)
    store = store_at(tmp_path)
    details = build(config, store, "2024-01-01")[PARTS[2]].details
    rows = {e: {r["id"]: r["row"] for r in rows_of(store, f"vocabulary/{e}", "2024-01-01")} for e in ("user", "item")}
    new = [edge for edge in set(second) - set(first) if edge[1] != "follows"]
    known = {
        (rows["user"][lhs], config.model.relation_names.index(rel), rows["item"][rhs])
        for lhs, rel, rhs in new
        if lhs in rows["user"] and rhs in rows["item"]
    }
    assert triples(store, PARTS[2], "2024-01-01") == known and len(known) > 100
    unknown = [edge for edge in second if edge[1] != "follows"]
    assert details["dropped"] == sum(lhs not in rows["user"] or rhs not in rows["item"] for lhs, _, rhs in unknown)


def test_an_edge_keeps_its_part_in_a_later_snapshot(tmp_path):
    first = random_edges(1000)
    write(tmp_path / "2024-01-01.parquet", first)
    write(tmp_path / "2024-02-01.parquet", first[::2] + random_edges(500, seed=1))
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", split={"keep_connected": False})
    store = store_at(tmp_path)
    for snapshot in ("2024-01-01", "2024-02-01"):
        build(config, store, snapshot)
        pass_checks(store, snapshot)
    held = triples(store, PARTS[2], "2024-01-01")
    assert held and not held & triples(store, PARTS[0], "2024-02-01")


def test_chunks_hold_one_relation_each_are_contiguous_and_lie_in_one_file(tmp_path):
    config = make_config(write(tmp_path / "e.parquet", random_edges(1500)), negatives={"chunk_size": 32})
    store = store_at(tmp_path)
    manifest = build(config, store)[PARTS[0]]
    seen, number = Counter(), 0
    assert len(manifest.files) > 4
    for file in store.dataset(PARTS[0], SNAPSHOT).get_fragments():
        table = file.to_table()
        chunk, rel = table["chunk"].to_numpy(), table["rel"].to_numpy()
        assert (np.diff(chunk) >= 0).all() and set(np.diff(chunk)) <= {0, 1}
        assert chunk[0] == number
        number = chunk[-1] + 1
        for one in np.unique(chunk):
            assert len(set(rel[chunk == one])) == 1
            seen[int(one)] += int((chunk == one).sum())
    assert number == manifest.details["num_chunks"] == len(seen)
    # A relation's chunks differ by one at most, so none is left with a few edges.
    assert max(seen.values()) <= 32 and min(seen.values()) >= 28
    per_relation = Counter(row["rel"] for row in rows_of(store, PARTS[0]))
    assert manifest.details["edges_per_relation"] == {
        name: per_relation[i] for i, name in enumerate(config.model.relation_names)
    }


def test_edges_of_rare_entities_are_left_out_and_counted(tmp_path):
    rows = [("a", "fav", "x"), ("a", "fav", "y"), ("b", "fav", "x"), ("b", "fav", "y"), ("c", "fav", "x")]
    config = make_config(
        write(tmp_path / "e.parquet", rows), vocabulary={"min_count": 2}, split={"validation": 0, "test": 0}
    )
    store = store_at(tmp_path)
    details = build(config, store)[PARTS[0]].details
    assert details["without_row"] == {"follows": 0, "fav": 1, "reply": 0}
    assert len(triples(store, PARTS[0])) == 4


def test_the_temporal_split_holds_out_the_latest_edges(tmp_path):
    start = datetime(2024, 1, 1)
    rows = [(*edge, start + timedelta(minutes=(7 * i) % 1000)) for i, edge in enumerate(random_edges(1000))]
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "at"))
    config = make_config(
        path, source={"columns": {"time": "at"}}, split={"strategy": "temporal", "validation": 0.1, "test": 0.2}
    )
    store = store_at(tmp_path)
    manifests = build(config, store)
    codes = encoded(config, store)
    when = {codes[row[:3]]: row[3] for row in rows}
    times = [[when[edge] for edge in triples(store, part)] for part in PARTS]
    assert [manifests[part].rows for part in PARTS] == [700, 100, 200]
    assert max(times[0]) < min(times[1]) and max(times[1]) < min(times[2])


def test_a_later_snapshots_new_edges_between_known_entities_are_the_test(tmp_path):
    first = [(f"u{i}", "fav", f"i{i % 5}") for i in range(40)]
    new = [("u1", "fav", "i3"), ("u2", "fav", "i4")]
    write(tmp_path / "2024-01-01.parquet", first)
    write(tmp_path / "2024-02-01.parquet", [*first[:10], *new, ("stranger", "fav", "i1")])
    config = make_config(
        f"{tmp_path}/{{snapshot}}.parquet",
        split={"strategy": "temporal", "later_snapshot": "2024-02-01", "validation": 0.2},
    )
    store = store_at(tmp_path)
    manifests = build(config, store, "2024-01-01")
    ids = {e: {r["row"]: r["id"] for r in rows_of(store, f"vocabulary/{e}", "2024-01-01")} for e in ("user", "item")}
    test = {(ids["user"][lhs], "fav", ids["item"][rhs]) for lhs, _, rhs in triples(store, PARTS[2], "2024-01-01")}
    assert test == set(new)
    assert manifests[PARTS[2]].details["dropped"] == 1
    assert "raw_edges@2024-02-01" in manifests[PARTS[2]].parents
    vocabulary.build(config, store, "2024-02-01")
    with pytest.raises(UserError, match=r"later_snapshot: 2024-02-01 must be later than the snapshot, 2024-02-01"):
        positives.build_positives(config, store, "2024-02-01")


def test_the_given_split_is_taken_as_it_is(tmp_path):
    parts = ("train", "validation", "test")
    rows = [(*edge, parts[i % 7 % 3]) for i, edge in enumerate(random_edges(300))]
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "part"))
    config = make_config(path, source={"columns": {"split": "part"}}, split={"strategy": "given"})
    store = store_at(tmp_path)
    build(config, store)
    codes = encoded(config, store)
    for part, asset in zip(parts, PARTS, strict=True):
        assert triples(store, asset) == {codes[row[:3]] for row in rows if row[3] == part}


def given(tmp_path, rows, **split):
    """Build from a split column; return the manifests, the triples of each part, and the codes of raw edges."""
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "part"))
    config = make_config(path, source={"columns": {"split": "part"}}, split={"strategy": "given", **split})
    store = store_at(tmp_path)
    manifests = build(config, store)
    return manifests, [triples(store, part) for part in PARTS], encoded(config, store)


def test_a_given_split_without_validation_takes_it_from_training_and_leaves_the_test_alone(tmp_path):
    rows = [(*edge, "test" if i % 5 == 0 else "train") for i, edge in enumerate(random_edges(3000, users=90, items=90))]
    share = {"validation": 0.1, "keep_connected": False}
    _, parts, codes = given(tmp_path, rows, relations=["fav", "reply"], **share)
    assert parts[2] == {codes[row[:3]] for row in rows if row[3] == "test"}
    assert parts[0] | parts[1] == {codes[row[:3]] for row in rows if row[3] == "train"} and not parts[0] & parts[1]
    assert {rel for _, rel, _ in parts[1]} == {1, 2}
    number = sum(row[3] == "train" and row[1] != "follows" for row in rows)
    # Four standard deviations of a binomial.
    assert abs(len(parts[1]) - 0.1 * number) < 4 * (number * 0.1 * 0.9) ** 0.5
    _, again, _ = given(tmp_path / "again", rows[::-1], relations=["fav", "reply"], **share)
    _, other, _ = given(tmp_path / "other", rows, relations=["fav", "reply"], seed=1, **share)
    assert again == parts and other[1] != parts[1]


def test_validation_taken_from_training_keeps_every_trained_entity_trained(tmp_path):
    # An entity that is in the test only has no training edge to keep, and must not get its test edge back.
    rows = [(*edge, "train") for edge in random_edges(400, users=200, items=150)]
    rows += [("stranger", "fav", "i0", "test"), ("stranger", "fav", "i1", "test")]
    manifests, parts, _ = given(tmp_path, rows, validation=0.5)
    assert len(parts[2]) == 2 and len(parts[1]) > 20
    assert manifests[PARTS[0]].details["entities_without_training_edge"] == {"user": 1, "item": 0}
    loose, _, _ = given(tmp_path / "loose", rows, validation=0.5, keep_connected=False)
    assert loose[PARTS[0]].details["entities_without_training_edge"]["user"] > 1


@pytest.mark.parametrize(("validation", "expected"), [("validation", 1), ("train", 0)])
def test_validation_is_taken_from_training_only_where_there_is_none_and_some_is_asked_for(
    tmp_path, validation, expected
):
    rows = [(*edge, "train") for edge in random_edges(300)]
    rows[0] = (*rows[0][:3], validation)
    share = 0.5 if validation == "validation" else 0.0
    manifests, _, _ = given(tmp_path, rows, validation=share)
    assert manifests[PARTS[1]].rows == expected


def test_published_data_roots_are_the_split(tmp_path):
    path = write(tmp_path / "e.parquet", [(i, 1, i % 3) for i in range(20)])
    root = {"data_root": str(path)}
    config = make_config(
        None, {"user": 20, "item": 3}, train_data={**root, "limit": 15}, validation_data={**root, "offset": 15}
    )
    store = store_at(tmp_path)
    build(config, store)
    assert {lhs for lhs, *_ in triples(store, PARTS[0])} == set(range(15))
    assert {lhs for lhs, *_ in triples(store, PARTS[1])} == set(range(15, 20))
    assert triples(store, PARTS[2]) == set()


def test_limit_and_offset_take_part_of_the_edges_after_the_split(tmp_path):
    path = write(tmp_path / "e.parquet", random_edges(1000))
    whole, some, rest = (store_at(tmp_path / name) for name in ("whole", "some", "rest"))
    build(make_config(path), whole)
    details = build(make_config(path, train_data={"limit": 300}, validation_data={"limit": 5}), some)[PARTS[0]].details
    build(make_config(path, train_data={"offset": 300}), rest)
    taken, left = triples(some, PARTS[0]), triples(rest, PARTS[0])
    assert len(taken) == 300 and taken | left == triples(whole, PARTS[0]) and not taken & left
    assert len(triples(some, PARTS[1])) == 5
    held = len(triples(whole, PARTS[1]))
    assert details["left_out"] == len(left) + held - 5
    assert {rel for _, rel, _ in taken} == {0, 1, 2}


def test_leakage_is_counted_by_relation(tmp_path):
    rows = [
        ("a", "follows", "b", "train"),
        ("b", "follows", "a", "test"),  # its reverse is in training
        ("a", "fav", "x", "train"),
        ("a", "reply", "x", "test"),  # the pair is in training under another relation
        ("c", "follows", "c", "test"),  # a self-loop is no reverse of its own
        ("c", "fav", "x", "train"),
        ("b", "reply", "y", "validation"),
        ("b", "fav", "y", "validation"),  # both held out: nothing given away
    ]
    path = write(tmp_path / "e.parquet", rows, ("lhs", "rel", "rhs", "part"))
    config = make_config(path, source={"columns": {"split": "part"}}, split={"strategy": "given"})
    manifests = build(config, store_at(tmp_path))
    nothing = {"reverse": 0, "same_pair": 0}
    assert manifests[PARTS[2]].details["leakage"] == {
        "follows": {"reverse": 1, "same_pair": 0},
        "fav": nothing,
        "reply": {"reverse": 0, "same_pair": 1},
    }
    assert manifests[PARTS[1]].details["leakage"] == {"follows": nothing, "fav": nothing, "reply": nothing}


def test_nothing_to_train_on_is_one_clear_error(tmp_path):
    path = write(tmp_path / "e.parquet", [("a", "fav", "x", "test")], ("lhs", "rel", "rhs", "part"))
    config = make_config(path, source={"columns": {"split": "part"}}, split={"strategy": "given"})
    with pytest.raises(UserError, match="no edge is left to train on"):
        build(config, store_at(tmp_path))


# The temporal split and repeated edges


def timed(tmp_path, rows, split, **entry):
    """Build a temporal split of (lhs, rel, rhs, day[, weight]); return the configuration, store and manifests."""
    day = datetime(2024, 1, 1)
    names = ("lhs", "rel", "rhs", "at", "w")
    dated = [(*row[:3], None if row[3] is None else day + timedelta(days=row[3]), *row[4:]) for row in rows]
    path = write(tmp_path / "e.parquet", dated, names[: len(rows[0])])
    columns = {"time": "at", **({"weight": "w"} if len(rows[0]) > 4 else {})}
    config = make_config(path, source={"columns": columns, **entry}, split={"strategy": "temporal", **split})
    store = store_at(tmp_path)
    return config, store, build(config, store)


def by_id(config, store, asset):
    """Return a table's weights by raw edge."""
    codes = {code: edge for edge, code in encoded(config, store).items()}
    return {codes[row["lhs"], row["rel"], row["rhs"]]: row["weight"] for row in rows_of(store, asset)}


def repeated_rows(count=400, seed=0, weights=False):
    """Return rows of events of 150 pairs, each several times; (lhs, rel, rhs, day[, weight])."""
    rng = np.random.default_rng(seed)
    pairs = random_edges(150)
    rows = []
    for number in rng.integers(len(pairs), size=count).tolist():
        row = (*pairs[number], None if rng.random() < 0.02 else int(rng.integers(200)))
        rows.append((*row, float(rng.integers(1, 9))) if weights else row)
    return rows


def firsts(rows):
    """Return each pair's first day, and its last; None where one of its rows has no day."""
    days = {}
    for row in rows:
        days.setdefault(row[:3], []).append(row[3])
    return {pair: None if None in each else min(each) for pair, each in days.items()}, {
        pair: max((day for day in each if day is not None), default=None) for pair, each in days.items()
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_test_are_pairs_that_are_new_last_however_often_older_ones_happen_again(tmp_path, seed):
    rows = repeated_rows(seed=seed)
    config, store, manifests = timed(tmp_path, rows, {"validation": 0.1, "test": 0.2})
    first, last = firsts(rows)
    parts = [set(by_id(config, store, part)) for part in PARTS]
    dated = sum(day is not None for day in first.values())
    assert [len(part) for part in parts[1:]] == [round(dated * 0.3) - round(dated * 0.2), round(dated * 0.2)]
    assert all(first[pair] is not None for part in parts[1:] for pair in part)
    train = [first[pair] for pair in parts[0] if first[pair] is not None]
    validation, test = ([first[pair] for pair in part] for part in parts[1:])
    assert max(train) <= min(validation) and max(validation) <= min(test)
    start = min(test)
    again = [pair for pair in parts[0] if last[pair] is not None and last[pair] >= start and last[pair] != first[pair]]
    counts = manifests[PARTS[2]].details["repeated_edges"]
    assert counts == {name: sum(pair[1] == name for pair in again) for name in config.model.relation_names}
    assert sum(counts.values()) > 10 and not store.exists("held_out/repeats", SNAPSHOT)


def test_repeats_are_a_table_of_their_own_and_stay_in_training(tmp_path):
    rows = repeated_rows(weights=True)
    split = {"validation": 0.1, "test": 0.2, "relations": ["fav", "reply"], "repeats": True}
    config, store, manifests = timed(tmp_path, rows, split)
    repeats, train = by_id(config, store, "held_out/repeats"), by_id(config, store, PARTS[0])
    assert repeats and repeats.items() <= train.items()
    test = set(by_id(config, store, PARTS[2]))
    first, last = firsts(rows)
    start = min(first[pair] for pair in test)
    assert set(repeats) == {
        pair
        for pair in train
        if pair[1] != "follows" and last[pair] is not None and last[pair] >= start and last[pair] != first[pair]
    }
    manifest = store.manifest("held_out/repeats", SNAPSHOT)
    counts = manifests[PARTS[2]].details["repeated_edges"]
    assert manifest.details["edges_per_relation"] == counts and counts["follows"] == 0
    assert manifest.schema == manifests[PARTS[2]].schema and manifest.parents == manifests[PARTS[2]].parents


@pytest.mark.parametrize("repeat_weight", ["largest", "sum", 2])
@pytest.mark.parametrize("half_life", [None, "30d"])
def test_weights_of_training_are_those_before_what_is_held_out(tmp_path, monkeypatch, repeat_weight, half_life):
    monkeypatch.setattr("twhin_pipeline.graph.edge_sort.EDGES_PER_BUCKET", 60)
    rows = repeated_rows(weights=True)
    entry = {"repeat_weight": repeat_weight} | ({"half_life": half_life} if half_life else {})
    config, store, _ = timed(tmp_path, rows, {"validation": 0.1, "test": 0.2}, **entry)
    first, _ = firsts(rows)
    train = by_id(config, store, PARTS[0])
    start = min(first[pair] for part in PARTS[1:] for pair in by_id(config, store, part))
    end = (datetime(2025, 1, 2) - datetime(2024, 1, 1)).days
    most = {"largest": 1, "sum": np.inf}.get(repeat_weight, repeat_weight)
    changed = 0
    for pair, weight in train.items():
        mine = [row for row in rows if row[:3] == pair]
        known = [row for row in mine if row[3] is None or row[3] < start or row[3] == first[pair]]
        each = [row[4] * (0.5 ** ((end - row[3]) / 30) if half_life and row[3] is not None else 1) for row in known]
        assert weight == pytest.approx(min(sum(each), most * max(each)), rel=1e-6), pair
        changed += len(known) < len(mine)
    assert changed > 10


def test_with_nothing_held_out_by_time_weights_are_of_all_rows(tmp_path):
    rows = repeated_rows(weights=True)
    config, store, manifests = timed(tmp_path, rows, {"validation": 0, "test": 0}, repeat_weight="sum")
    total = Counter()
    for row in rows:
        total[row[:3]] += row[4]
    assert by_id(config, store, PARTS[0]) == {pair: pytest.approx(weight, rel=1e-6) for pair, weight in total.items()}
    assert sum(manifests[PARTS[2]].details["repeated_edges"].values()) == 0


def test_undated_edges_stay_in_training_and_do_not_count_for_the_shares(tmp_path):
    rows = [(*edge, None if i % 4 == 0 else i % 300) for i, edge in enumerate(random_edges(400))]
    config, store, manifests = timed(tmp_path, rows, {"validation": 0.1, "test": 0.2})
    assert [manifests[part].rows for part in PARTS] == [100 + 210, 30, 60]
    assert {row[:3] for row in rows if row[3] is None} <= set(by_id(config, store, PARTS[0]))


def test_raw_edges_without_the_times_that_the_split_needs_are_to_be_made_again(tmp_path):
    rows = [(*edge, i) for i, edge in enumerate(random_edges(40))]
    config, store, _ = timed(tmp_path, rows, {})
    raw_edges.ingest(make_config(tmp_path / "e.parquet"), store, SNAPSHOT)
    vocabulary.build(config, store, SNAPSHOT)
    with pytest.raises(UserError, match=f"raw_edges of .* no column 'first_time'.*twhin ingest --snapshot {SNAPSHOT}"):
        positives.build_positives(config, store, SNAPSHOT)
