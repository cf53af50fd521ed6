"""Each check passes on sound tables and finds the one thing that was broken."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_files import make_config, pass_checks, write

from twhin_pipeline.checks import by_hand, check_views, checks
from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import calibrate
from twhin_pipeline.evaluation.results import SCHEMA
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.store import Store, Verdict
from twhin_pipeline.training_set import negatives, positives
from twhin_pipeline.vectors import indexing
from twhin_pipeline.vectors.calibration import RELIABILITY_SCHEMA, THRESHOLDS_SCHEMA, Calibration

BEFORE, NOW = "2025-01-01", "2025-02-01"
Rows = list[dict[str, Any]]
CONFIG: dict[str, Any] = {
    "train_data": {"global_negatives": 12, "in_batch_negatives": 5},
    "validation_data": {"global_negatives": 12, "in_batch_negatives": 5},
    "negatives": {"chunk_size": 40},
    "training": {"num_epochs": 3},
    "evaluation": {"floors": {"filtered_mrr": 0.2}},
}


RELATIONS = ("follows", "fav", "reply")


def planted(seed: int) -> list[tuple[str, str, str]]:
    """Distinct edges of the three relations; 120 of each at least."""
    rng = np.random.default_rng(seed)
    found: set[tuple[str, str, str]] = set()
    while len(found) < 700:
        rel = ("follows", "fav", "reply")[int(rng.integers(3))]
        lhs, rhs = int(40 * rng.random() ** 2), int(40 * rng.random())
        if rel != "follows" or lhs != rhs:
            found.add((f"u{lhs}", rel, f"u{rhs}" if rel == "follows" else f"i{rhs}"))
    return sorted(found)


def save(store: Store, asset: str, table: pa.Table, details: dict[str, Any] | None = None, file: str = "") -> None:
    """Replace a table of the present snapshot."""
    parents = store.manifest(asset, NOW).parents if store.exists(asset, NOW) else {}
    with store.replace(asset, NOW, config_hash="test", parents=parents) as draft:
        draft.write(table, *([file] if file else []))
        draft.details = details or {}


def rows_as(rows: Rows, like: pa.Table) -> pa.Table:
    """Rows with the columns of `like`, nulls allowed."""
    return pa.Table.from_pylist(rows, schema=pa.schema([field.with_nullable(True) for field in like.schema]))


def save_model(store: Store, losses: list[float], rows: dict[str, int], details: dict[str, Any]) -> None:
    """Write a model's folder as training does, its vectors zero: only rows are checked."""
    with store.replace("twhin_model", NOW, config_hash="test") as draft:
        draft.write(
            pa.table({"step": range(len(losses)), "epoch": [0] * len(losses), "loss": losses}), "losses.parquet"
        )
        for name, count in rows.items():
            vectors = pa.array([[0.0] * 4] * count, pa.list_(pa.float32(), 4))
            draft.write(pa.table({"row": range(count), "embedding": vectors}), f"tables/{name}/part-00000.parquet")
        draft.write(pa.table({"relation": ["follows", "fav", "reply"]}), "relations.parquet")
        draft.details = details


DETAILS = {"final_loss": 1.0, "steps": 20, "edges_per_second": 5.0, "world_size": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[TwhinConfig, Path]:
    """Two snapshots through the real stages; a model, its evaluation and its vectors written by hand."""
    folder = tmp_path_factory.mktemp("checks")
    for snapshot, seed in ((BEFORE, 1), (NOW, 2)):
        write(folder / f"{snapshot}.parquet", planted(seed))
    config = make_config(folder / "{snapshot}.parquet", **CONFIG)
    store = Store(str(folder / "home"))
    for snapshot in (BEFORE, NOW):
        raw_edges.ingest(config, store, snapshot)
        vocabulary.build(config, store, snapshot)
        pass_checks(store, snapshot)
    positives.build_positives(config, store, NOW)
    negatives.build(config, store, NOW)
    sizes = {name: store.manifest(f"vocabulary/{name}", NOW).rows for name in ("user", "item")}
    save_model(store, [3.0 - 0.1 * i for i in range(20)], sizes, DETAILS)
    metrics = [("filtered_mrr", 0.3, 0.1), ("raw_mrr", 0.2, 0.1), ("filtered_mean_rank", 12.0, 20.0)]
    metrics += [("ece", 0.01, None), ("calibrated_rce", 20.0, None)]
    save(store, "evaluation", pa.Table.from_pylist([
        {"relation": "all", "side": "both", "metric": m, "value": v, "baseline": b, "edges": 900} for m, v, b in metrics
    ]))  # fmt: skip
    save(store, "calibration", calibrate.table(
        {name: Calibration("platt", 10, np.array([-1.0, 2.0]), np.array([-4.0, 3.0])) for name in RELATIONS},
        dict.fromkeys(RELATIONS, 120),
    ))  # fmt: skip
    rng = np.random.default_rng(3)
    for name in sizes:
        table = store.read(f"vocabulary/{name}", NOW, ["id", "row"])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=4 * len(table)), pa.float32()), 4)
        save(store, f"embeddings/{name}", table.append_column("embedding", vectors))
    save(store, "embeddings/relations", pa.table({
        "relation": ["follows", "fav", "reply"], "lhs": ["user"] * 3, "rhs": ["user", "item", "item"],
        "operator": ["translation"] * 3, "embedding": pa.array([[1.0] * 4] * 3, pa.list_(pa.float32(), 4)),
    }))  # fmt: skip
    for name in sizes:
        figures = [{"relation": "fav", "k": k, "recall": 0.97, "wanted_recall": 0.95} for k in (10, 100)]
        save(store, f"index/{name}", pa.Table.from_pylist(figures, schema=indexing.SCHEMA))
    return config, folder / "home"


@pytest.fixture(autouse=True)
def judged_anew(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave the shared store's tables accepted: tests run its checks with other configurations, by which they fail."""
    yield
    if "made" in request.fixturenames:
        store = Store(str(request.getfixturevalue("made")[1]))
        for asset in {table for check in checks.CHECKS.values() for table in check.tables_of(make_config("e.parquet"))}:
            if (newest := store.newest(asset, NOW)) is not None:
                store.judge(newest, Verdict("passed", "now"))


@pytest.fixture
def broken(made, tmp_path) -> tuple[TwhinConfig, Store]:
    """A copy of the store, to break."""
    config, home = made
    shutil.copytree(home, tmp_path / "home")
    return config, Store(str(tmp_path / "home"))


def all_pairs() -> list[tuple[str, str]]:
    config = make_config("edges.parquet", **CONFIG)
    return [(check.name, table) for check in checks.CHECKS.values() for table in check.tables_of(config)]


@pytest.mark.parametrize(("name", "table"), all_pairs())
def test_sound_tables_pass(made, name, table):
    config, home = made
    result = checks.run(name, config, Store(str(home)), NOW, table)
    assert result.passed and result.offending is None, checks.rows_as_markdown(result.offending)


def first(**values: Any) -> Callable[[Rows], Rows]:
    """Change the first row."""
    return lambda rows: [{**rows[0], **values}, *rows[1:]]


def each(**values: Any) -> Callable[[Rows], Rows]:
    """Change every row."""
    return lambda rows: [{**row, **values} for row in rows]


def metric(name: str, value: float) -> Callable[[Rows], Rows]:
    """Change the value of a metric."""
    return lambda rows: [{**row, "value": value} if row["metric"] == name else row for row in rows]


def trade_ends(rows: Rows) -> Rows:
    """Give each edge the right end of the one before."""
    return [{**row, "rhs": before["rhs"]} for row, before in zip(rows, [rows[-1], *rows[:-1]], strict=True)]


def unmask(rows: Rows) -> Rows:
    """Take one pair out of the first pool's masks."""
    return first(mask_position=rows[0]["mask_position"][1:], mask_candidate=rows[0]["mask_candidate"][1:])(rows)


def mask_all(rows: Rows) -> Rows:
    """Mask each candidate of the first pool for the first edge."""
    count = len(rows[0]["row"])
    return first(mask_position=[0] * count, mask_candidate=list(range(count)))(rows)


def popular_only(rows: Rows) -> Rows:
    """Draw every candidate as 0."""
    return [{**row, "row": [0] * len(row["row"])} for row in rows]


def reject_eight(_rows: Rows) -> Rows:
    """Eight rows of an unknown relation."""
    row = {"lhs": "u1", "rel": "likes", "rhs": "u2", "reason": "unknown relation", "file": "f", "source": "source"}
    return [{**row, "row": i} for i in range(8)]


def lose_most_favs(rows: Rows) -> Rows:
    """Keep one in nine users' favs."""
    return [row for row in rows if row["rel"] != "fav" or int(row["lhs"][1:]) % 9 == 0]


def many_more_favs(rows: Rows) -> Rows:
    """Six times as many favs, of users that nobody knew."""
    favs = [row for row in rows if row["rel"] == "fav"]
    return [*rows, *({**row, "lhs": f"{row['lhs']}-{copy}"} for copy in range(5) for row in favs)]


def shout(rows: Rows) -> Rows:
    """Known ids stay, and all of them come again in capital letters, as if they were new."""
    again = [{**row, "id": row["id"].upper(), "row": len(rows) + place} for place, row in enumerate(rows)]
    return [*rows, *again]


BREAKAGES: list[tuple[str, str, Callable[[Rows], Rows]]] = [
    ("edges_present", "raw_edges", lambda rows: []),
    ("edges_not_null", "raw_edges", first(lhs=None)),
    ("edges_not_null", "raw_edges", first(rhs="")),
    ("edges_not_null", "raw_edges", first(weight=float("nan"))),
    ("edges_not_null", "raw_edges", first(weight=-1.0)),
    ("edges_known_relations", "raw_edges", first(rel="likes")),
    ("edges_unique", "raw_edges", lambda rows: [*rows, rows[5]]),
    ("edges_rejected_share", "raw_edges_rejected", reject_eight),
    ("edges_relations_kept", "raw_edges", lose_most_favs),
    ("edges_relations_grew", "raw_edges", many_more_favs),
    ("edges_relations_present", "raw_edges", lambda rows: [row for row in rows if row["rel"] != "reply"]),
    ("edges_self_loops", "raw_edges", first(lhs="u1", rel="follows", rhs="u1")),
    ("ids_unique", "vocabulary/user", lambda rows: [*rows, {**rows[0], "row": len(rows)}]),
    ("ids_unique", "vocabulary/user", first(row=1)),
    ("rows_contiguous", "vocabulary/user", lambda rows: [rows[0], *rows[2:]]),
    ("rows_contiguous", "vocabulary/item", lambda rows: []),
    ("ids_cover_edges", "vocabulary/item", lambda rows: rows[:-1]),
    ("rows_kept", "vocabulary/user", lambda rows: first(row=rows[1]["row"])(rows)),
    ("new_ids_alike", "vocabulary/user", shout),
    ("ids_alike", "vocabulary/user", lambda rows: first(id=rows[1]["id"].upper())(rows)),
    ("ids_alike", "vocabulary/user", lambda rows: first(id=rows[1]["id"] + " ")(rows)),
    ("edges_in_range", "training_set/positives", first(lhs=10_000)),
    ("edges_in_range", "held_out/test", first(rhs=-1)),
    ("edges_in_range", "held_out/validation", first(rel=7)),
    ("edges_traced", "training_set/positives", trade_ends),
    ("edges_traced", "held_out/validation", trade_ends),
    ("chunks_sound", "training_set/positives", first(rel=2)),
    ("chunks_sound", "training_set/positives", lambda rows: [*rows, rows[0]]),
    ("chunks_sound", "training_set/positives", each(chunk=0, rel=0)),
    ("chunks_sound", "held_out/test", lambda rows: [{**row, "chunk": row["chunk"] + 1} for row in rows]),
    ("held_out_trained", "held_out/test", first(rhs=9_999)),
    ("held_out_present", "held_out/test", lambda rows: []),
    ("negatives_typed", "training_set/negatives", lambda rows: first(row=[9_999, *rows[0]["row"][1:]])(rows)),
    ("negatives_typed", "held_out/validation_negatives", lambda rows: first(row=[-1, *rows[0]["row"][1:]])(rows)),
    ("negatives_complete", "training_set/negatives", lambda rows: rows[1:]),
    ("negatives_complete", "training_set/negatives", lambda rows: [*rows, rows[0]]),
    ("negatives_complete", "training_set/negatives", lambda rows: first(row=rows[0]["row"][1:])(rows)),
    ("negatives_complete", "training_set/negatives", first(epoch=3)),
    ("negatives_log_q", "training_set/negatives", first(log_q=[0.5] * 17)),
    ("negatives_masked", "training_set/negatives", unmask),
    ("negatives_masked", "held_out/validation_negatives", unmask),
    ("masks_true", "training_set/negatives", mask_all),
    ("masks_true", "held_out/validation_negatives", mask_all),
    ("masks_true", "training_set/negatives", first(mask_position=[39_999], mask_candidate=[0])),
    ("negatives_distributed", "training_set/negatives", popular_only),
    ("metrics_sound", "evaluation", first(value=1.2)),
    ("metrics_sound", "evaluation", first(value=float("nan"))),
    ("metrics_sound", "evaluation", lambda rows: rows[1:]),
    ("floors_reached", "evaluation", first(value=0.19)),
    ("floors_reached", "evaluation", lambda rows: rows[1:]),
    ("beats_popular", "evaluation", first(baseline=0.31)),
    ("probabilities_hold", "evaluation", metric("ece", 0.06)),
    ("probabilities_hold", "evaluation", metric("calibrated_rce", -0.1)),
    ("calibration_sound", "calibration", lambda rows: rows[1:]),
    ("calibration_sound", "calibration", lambda rows: [*rows, rows[0]]),
    ("calibration_sound", "calibration", first(relation="likes")),
    ("calibration_sound", "calibration", first(scores=[2.0, -1.0])),
    ("calibration_sound", "calibration", first(log_odds=[3.0, 3.0])),
    ("calibration_sound", "calibration", first(log_odds=[0.0, float("nan")])),
    ("calibration_sound", "calibration", first(scores=[0.0, 1.0, 2.0])),
    ("calibration_sound", "calibration", first(method="none")),
    ("calibration_sound", "calibration", first(negatives=0)),
    ("vectors_match_vocabulary", "embeddings/user", lambda rows: rows[1:]),
    ("vectors_match_vocabulary", "embeddings/user", first(id="stranger")),
    ("vectors_finite", "embeddings/user", first(embedding=[0.0, float("inf"), 0.0, 0.0])),
    ("norms_sound", "embeddings/item", first(embedding=[0.0] * 4)),
    ("norms_sound", "embeddings/item", first(embedding=[1e5] * 4)),
    ("vectors_spread", "embeddings/item", each(embedding=[1.0, 2.0, 3.0, 4.0])),
    ("relations_match_model", "embeddings/relations", lambda rows: rows[1:]),
    ("relations_match_model", "embeddings/relations", first(operator="identity")),
    ("relations_match_model", "embeddings/relations", first(embedding=[float("nan")] * 4)),
]  # fmt: skip


def test_checks_of_very_many_pools_pass(tmp_path):
    """DuckDB 2.0.0 ended `negatives_distributed` of 50,000 pools with an internal error (`database.connect`)."""
    rng = np.random.default_rng(0)
    rows = {"lhs": (8_000 * rng.random(10_000)).astype(int), "rhs": (10_000 * rng.random(10_000)).astype(int)}
    pq.write_table(pa.table(rows | {"rel": ["fav"] * 10_000}), tmp_path / "e.parquet")
    data = {"global_negatives": 5, "in_batch_negatives": 0}
    config = make_config(
        tmp_path / "e.parquet",
        model={
            "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
            "relations": [{"name": "fav", "lhs": "user", "rhs": "item"}],
        },
        negatives={"chunk_size": 2, "epochs": 10, "sides": "rhs"},
        train_data=data,
        validation_data=data,
    )
    store = Store(str(tmp_path / "home"))
    raw_edges.ingest(config, store, NOW)
    vocabulary.build(config, store, NOW)
    pass_checks(store, NOW)
    positives.build_positives(config, store, NOW)
    negatives.build(config, store, NOW)
    assert store.manifest("training_set/negatives", NOW).rows > 40_000
    assert not checks.run_blocking(config, store, NOW, ["training_set/negatives"])


SOUND = {
    "thresholds": [
        {"relation": "fav", "probability": 0.9, "precision": 0.8, "recall": 0.5, "edges": 60},
        {"relation": "fav", "probability": 0.4, "precision": 0.5, "recall": 1.0, "edges": 120},
    ],
    "reliability": [
        {"relation": "fav", "bin": 0, "predicted": 0.1, "uncalibrated": 0.3, "observed": 0.1, "pairs": 40},
        {"relation": "all", "bin": 0, "predicted": 0.1, "uncalibrated": 0.3, "observed": 0.0, "pairs": 90},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("part", "row", "change"),
    [
        ("thresholds", 0, {}),
        ("thresholds", 0, {"relation": "likes"}),
        ("thresholds", 0, {"precision": float("nan")}),
        ("thresholds", 0, {"probability": 1.2}),
        ("thresholds", 1, {"recall": 0.4}),
        ("thresholds", 1, {"edges": 59}),
        ("reliability", 0, {"observed": -0.1}),
        ("reliability", 1, {"predicted": float("nan")}),
        ("reliability", 1, {"pairs": 0}),
    ],
)
def test_thresholds_and_bins_that_are_no_shares_or_fall_are_found(broken, part, row, change):
    config, store = broken
    rows = store.read("calibration", NOW)
    parts = {name: [dict(one) for one in some] for name, some in SOUND.items()}
    parts[part][row] |= change
    with store.replace("calibration", NOW, config_hash="test", parents={}) as draft:
        draft.write(rows)
        for name, schema in (("thresholds", THRESHOLDS_SCHEMA), ("reliability", RELIABILITY_SCHEMA)):
            draft.write(pa.Table.from_pylist(parts[name], schema=schema), f"{name}.parquet")
    result = checks.run("calibration_parts_sound", config, store, NOW, "calibration")
    assert result.passed == (not change)
    if change:
        assert result.offending["part"].to_pylist() == [part]


@pytest.mark.parametrize(
    ("name", "table", "change"), BREAKAGES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BREAKAGES)]
)
def test_what_is_broken_is_found_and_shown(broken, name, table, change):
    config, store = broken
    before = store.read(table, NOW)
    details = store.manifest(table, NOW).details
    save(store, table, rows_as(change(before.to_pylist()), before), details)
    result = checks.run(name, config, store, NOW, "raw_edges" if table.startswith("raw_edges") else table)
    assert not result.passed
    assert result.metadata["offending_rows"] > 0
    assert result.offending is not None and result.offending.num_rows > 0
    assert checks.rows_as_markdown(result.offending).startswith("| ")
    finding = checks.CHECKS[name].finding(result)
    assert not set("[]|{}\n") & set(finding) and "None" not in finding and "NULL" not in finding, finding
    # A row that is a relation, a metric or an entity type is no count of what is wrong with it.
    of_edges = ("edges_traced", "edges_in_range", "held_out_trained")
    assert name in of_edges or not re.search(r"\(\w+ 1(, \w+ 1)*\)", finding), finding


@pytest.mark.parametrize(
    ("name", "table", "change", "finding"),
    [
        ("edges_known_relations", "raw_edges", first(rel="likes"),
         "1 relation of the edges is none of the model's (likes: 1 edge)"),
        ("edges_relations_present", "raw_edges", lambda rows: [row for row in rows if row["rel"] != "reply"],
         "1 relation of the model has no edge (reply)"),
        ("rows_contiguous", "vocabulary/item", lambda rows: [],
         "rows of 1 entity type are missing or out of order, or there is none (item: none)"),
        ("metrics_sound", "evaluation", first(value=1.2),
         "1 metric is missing, not finite, or out of range (filtered_mrr of all relations is 1.2)"),
        ("floors_reached", "evaluation", first(value=0.19),
         "1 metric is below its floor in evaluation.floors (filtered_mrr is 0.1900, its floor 0.2)"),
    ],
)  # fmt: skip
def test_a_finding_says_what_is_wrong_with_each_relation_metric_or_type(broken, name, table, change, finding):
    config, store = broken
    before, details = store.read(table, NOW), store.manifest(table, NOW).details
    save(store, table, rows_as(change(before.to_pylist()), before), details)
    assert checks.CHECKS[name].finding(checks.run(name, config, store, NOW, table)) == finding


def test_a_relation_that_lost_or_gained_edges_is_told_once_with_both_counts(broken):
    """It was counted once for each table that it was compared with: "2 relations (fav 2)"."""
    config, store = broken
    before = store.read("raw_edges", NOW)
    for change, name, words in (
        (lose_most_favs, "edges_relations_kept", "1 relation lost more edges than min_kept_share allows"),
        (many_more_favs, "edges_relations_grew", "1 relation has more edges than max_growth allows"),
    ):
        rows = change(before.to_pylist())
        save(store, "raw_edges", rows_as(rows, before))
        finding = checks.CHECKS[name].finding(checks.run(name, config, store, NOW))
        now = f"{sum(row['rel'] == 'fav' for row in rows):,}"
        assert re.fullmatch(rf"{words} \(fav: {now} (of \d+ edges are left|edges, before \d+)\)", finding), finding


def test_a_burst_from_few_heads_or_to_few_tails_is_found_below_the_limit_of_growth(tmp_path):
    """Against a plain count; more edges of everyone, and a relation that was always so, are none."""
    rng = np.random.default_rng(3)
    many = {(f"u{a}", "fav", f"i{b}") for a, b in rng.integers(400, size=(4_000, 2)).tolist()}
    few = {(f"u{a}", "reply", f"i{b}") for a, b in zip(range(1_500), rng.integers(4, size=1_500), strict=True)}
    more = {(f"u{a}", "fav", f"i{b}") for a, b in rng.integers(500, size=(9_000, 2)).tolist()}
    spam = {(f"bot{a}", "fav", f"i{b}") for a, b in zip(range(3_000), rng.integers(400, size=3_000), strict=True)}
    from_few = {(f"bot{int(bot[3:]) % 8}", rel, item) for bot, rel, item in spam}
    to_few = {(bot, rel, f"i{int(item[1:]) % 8}") for bot, rel, item in spam}
    config = make_config(f"{tmp_path}/{{snapshot}}.parquet", source={"max_growth": 5})
    found = {}
    for name, edges in (("more", more | many), ("heads", from_few | many), ("tails", to_few | many)):
        store = Store(str(tmp_path / name))
        for at, rows in ((BEFORE, many | few), (NOW, edges | few)):
            write(tmp_path / f"{at}.parquet", sorted(rows))
            raw_edges.ingest(config, store, at)
            if at == BEFORE:
                pass_checks(store, at)
        assert checks.run("edges_relations_grew", config, store, NOW).passed
        result = checks.run("edges_concentrated", config, store, NOW)
        found[name] = [] if result.offending is None else result.offending.to_pylist()
        for row in result.measured.to_pylist():
            place = {"heads": 0, "tails": 2}[row["side"]]
            for share, of in (("share_before", many | few), ("share_now", edges | few)):
                degrees = Counter(one[place] for one in of if one[1] == row["relation"])
                top = sum(count for _, count in degrees.most_common(max(10, math.ceil(len(degrees) / 1_000))))
                assert row[share] == pytest.approx(top / degrees.total(), abs=1e-4)
    assert not found["more"]
    for side in ("heads", "tails"):
        [row] = found[side]
        assert (row["relation"], row["side"]) == ("fav", side) and row["share_now"] > 0.25 + row["share_before"]
        assert row["problem"].startswith(f"fav: the first 10 {side} have ")


def test_rejected_rows_are_counted_by_their_reason(broken):
    config, store = broken
    before = store.read("raw_edges_rejected", NOW)
    rows = reject_eight(before.to_pylist())
    for place, row in enumerate(rows):
        row["reason"] = "bad weight" if place % 3 else "empty id"
    save(store, "raw_edges_rejected", rows_as(rows, before))
    finding = checks.CHECKS["edges_rejected_share"].finding(checks.run("edges_rejected_share", config, store, NOW))
    assert re.search(r" rows were rejected, .* \(bad weight \d+, empty id \d+\)$", finding), finding


GATE = [  # relation, side, value, popularity, edges, item-kNN, ALS, compared, compared_edges
    ("fav", "rhs", 0.50, 0.40, 500, 0.45, 0.52, 0.51, 300),
    ("reply", "rhs", 0.10, 0.20, 250, 0.05, 0.05, 0.10, 150),
    ("follows", "rhs", 0.01, 0.90, 199, 0.90, 0.90, 0.01, 199),
    ("all", "rhs", 0.30, 0.29, 949, 0.29, 0.29, 0.30, 649),
]


def gate(rows: list[tuple], metric: str = "recall@20") -> pa.Table:
    """Return a table of evaluation with these rows of the chief metric and those that every table has."""
    names = ("relation", "side", "value", "baseline", "edges", "item_knn", "als", "compared", "compared_edges")
    every = [("all", "both", m, 0.3, 0.1, 9) for m in ("filtered_mrr", "raw_mrr")]
    found = [dict(zip(names, row, strict=True)) | {"metric": metric} for row in rows]
    return pa.Table.from_pylist(
        [dict(zip(("relation", "side", "metric", "value", "baseline", "edges"), row, strict=True)) for row in every]
        + found,
        schema=SCHEMA,
    )


def gated(config: TwhinConfig, **evaluation: Any) -> TwhinConfig:
    data = config.model_dump(exclude_none=True)
    return parse_config(data | {"evaluation": evaluation})


@pytest.mark.parametrize(
    ("must_beat", "tolerance", "below"),
    [
        ([], 0.0, []),
        # Not follows, which has fewer than 200 edges.
        (["popularity"], 0.0, [("reply", "popularity", 0.10, 0.20)]),
        (["popularity"], 0.5, []),
        # Of reply, fewer than 200 edges are compared. The model's figure is that of the same edges.
        (["als"], 0.0, [("fav", "als", 0.51, 0.52)]),
        (["als"], 0.02, []),
        (["item_knn"], 0.0, []),
        (["popularity", "als"], 0.0, [("fav", "als", 0.51, 0.52), ("reply", "popularity", 0.10, 0.20)]),
    ],
)
def test_a_gate_names_the_relation_the_baseline_and_both_figures(broken, must_beat, tolerance, below):
    config, store = broken
    save(store, "evaluation", gate(GATE))
    result = checks.run(
        "beats_baselines", gated(config, must_beat=must_beat, must_beat_tolerance=tolerance), store, NOW, "evaluation"
    )
    offending = [] if result.offending is None else result.offending.to_pylist()
    assert [(r["relation"], r["baseline"], r["model_value"], r["baseline_value"]) for r in offending] == below
    assert all(row["metric"] == "recall@20" for row in offending)


def test_the_gate_without_recall_goes_by_mrr_of_the_corrupted_sides(broken):
    config, store = broken
    rows = [(*row[:1], side, *row[2:]) for row in GATE[:1] for side in ("lhs", "both")]
    rows[0] = (*rows[0][:2], 0.1, *rows[0][3:])
    save(store, "evaluation", gate([*rows, ("all", "lhs", 0.30, 0.29, 949, None, None, None, None)], "filtered_mrr"))
    wanted = gated(config, must_beat=["popularity"], recall_at=[])
    assert checks.run("beats_baselines", wanted, store, NOW, "evaluation").passed
    data = wanted.model_dump(exclude_none=True)
    heads = parse_config(data | {"negatives": {"sides": "lhs"}})
    result = checks.run("beats_baselines", heads, store, NOW, "evaluation")
    assert not result.passed and result.offending.to_pylist()[0]["model_value"] == 0.1


def test_a_gate_is_shut_where_the_baseline_or_the_metric_was_not_measured(broken):
    config, store = broken
    save(store, "evaluation", gate([(*GATE[3][:5], None, None, None, None)]))
    for wanted, passed in ((["popularity"], True), (["als"], False)):
        result = checks.run("beats_baselines", gated(config, must_beat=wanted), store, NOW, "evaluation")
        assert result.passed == passed
    save(store, "evaluation", gate([]))
    assert not checks.run("beats_baselines", gated(config, must_beat=["popularity"]), store, NOW, "evaluation").passed


def test_the_gate_stops_the_run_and_tables_of_earlier_versions_can_be_checked(broken):
    config, store = broken
    rows = [row for row in gate(GATE).to_pylist() if row["edges"] != 199]
    earlier = pa.Table.from_pylist([{name: row[name] for name in SCHEMA.names[:6]} for row in rows])
    save(store, "evaluation", earlier)
    assert checks.run_blocking(gated(config), store, NOW, ["evaluation"]) == []
    with pytest.raises(
        UserError, match=r"beats_baselines of evaluation(?s:.)*\| reply \| recall@20 \| popularity \| 0\.1 "
    ):
        checks.run_blocking(gated(config, must_beat=["popularity"]), store, NOW, ["evaluation"])


def test_an_intended_loss_of_edges_is_accepted_by_the_configuration(broken):
    config, store = broken
    before = store.read("raw_edges", NOW)
    save(store, "raw_edges", rows_as(lose_most_favs(before.to_pylist()), before))
    data = config.model_dump(exclude_none=True)
    data["source"]["min_kept_share"] = 0.05
    assert not checks.run("edges_relations_kept", config, store, NOW, "raw_edges").passed
    assert checks.run("edges_relations_kept", parse_config(data), store, NOW, "raw_edges").passed


def test_a_held_out_edge_in_training_is_found(broken):
    config, store = broken
    positives = store.read("training_set/positives", NOW)
    leaked = store.read("held_out/test", NOW).slice(0, 1)
    save(store, "training_set/positives", pa.concat_tables([positives, leaked.cast(positives.schema)]))
    result = checks.run("held_out_unseen", config, store, NOW)
    assert result.offending is not None and result.offending.to_pylist()[0]["split"] == "test"


@pytest.mark.parametrize(
    ("name", "losses", "missing_rows", "details"),
    [
        ("loss_finite", [2.0, float("nan"), 1.0], 0, DETAILS),
        ("loss_finite", [], 0, DETAILS),
        ("loss_fell", [1.0, 1.1, 1.2], 0, DETAILS),
        ("model_complete", [2.0, 1.0], 1, DETAILS),
        ("model_complete", [2.0, 1.0], 0, {"steps": 2}),
    ],
)
def test_a_model_that_did_not_learn_or_was_cut_short_is_found(broken, name, losses, missing_rows, details):
    config, store = broken
    sizes = {n: store.manifest(f"vocabulary/{n}", NOW).rows - missing_rows for n in ("user", "item")}
    save_model(store, losses, sizes, details)
    assert not checks.run(name, config, store, NOW).passed


def test_a_warm_starts_loss_need_not_fall(broken):
    config, store = broken
    sizes = {n: store.manifest(f"vocabulary/{n}", NOW).rows for n in ("user", "item")}
    save_model(store, [1.0, 1.1, 1.2], sizes, DETAILS | {"started_from": [{"snapshot": NOW, "version": "v"}]})
    assert checks.run("loss_fell", config, store, NOW).passed


def test_a_snapshot_made_again_is_compared_with_what_it_was(broken):
    config, store = broken
    rows = store.read("raw_edges", NOW)
    save(store, "raw_edges", rows.slice(0, len(rows) // 10))
    result = checks.run("edges_relations_kept", config, store, NOW, "raw_edges")
    assert not result.passed and any(NOW in name for name in result.offending["compared_with"].to_pylist())


def test_large_sets_are_audited_in_part_yet_every_relation(made, monkeypatch):
    config, home = made
    monkeypatch.setattr(check_views, "AUDITED_POOLS", 6)
    with check_views.prepare(config, Store(str(home)), NOW, "training_set/negatives") as con:
        relations = con.sql("SELECT DISTINCT rel FROM audited JOIN chunk_size USING (chunk)").fetchall()
    result = checks.run("negatives_masked", config, Store(str(home)), NOW, "training_set/negatives")
    assert len(relations) == 3
    assert 0 < result.metadata["audited_pools"] < result.metadata["pools"]


NEGATIVES = ("training_set/negatives", "held_out/validation_negatives")
NEGATIVES_CHECKS = [name for name, check in checks.CHECKS.items() if NEGATIVES[0] in check.tables]


def resampled(made, tmp_path, **changes: Any) -> tuple[TwhinConfig, Store]:
    """A copy of the store, its negatives made anew under changed sections."""
    config, home = made
    shutil.copytree(home, tmp_path / "home")
    data = config.model_dump(exclude_none=True)
    for section, fields in changes.items():
        data[section] = {**data[section], **fields}
    changed, store = parse_config(data), Store(str(tmp_path / "home"))
    negatives.build(changed, store, NOW)
    return changed, store


@pytest.mark.parametrize(
    "options",
    [{}, {"degree_share": 1.0}, {"degree_share": 0.0}, {"alpha": 0.0}, {"sides": "rhs"}, {"mask": "own"}],
    ids=["default", "popular", "uniform", "alpha0", "rhs", "own"],
)
def test_log_q_passes_as_it_is_made_and_each_wrong_one_is_found(made, tmp_path, options):
    config, store = resampled(made, tmp_path, loss={"log_q": True}, negatives=options)
    for table in NEGATIVES:
        for name in NEGATIVES_CHECKS:
            if table in checks.CHECKS[name].tables:
                result = checks.run(name, config, store, NOW, table)
                assert result.passed, (name, table, checks.rows_as_markdown(result.offending))
        sound = store.read(table, NOW)
        log_q = sound.to_pylist()[1]["log_q"]
        for wrong in ([log_q[0] + 1e-4, *log_q[1:]], [*log_q[:-1], log_q[-1] - 1e-4], log_q[:-1], [*log_q, 0.0], None,
                      [None, *log_q[1:]], [float("nan"), *log_q[1:]]):  # fmt: skip
            rows = sound.to_pylist()
            rows[1]["log_q"] = wrong
            save(store, table, rows_as(rows, sound))
            assert not checks.run("negatives_log_q", config, store, NOW, table).passed, wrong


def test_a_true_mask_at_a_later_position_of_its_entity_is_found(broken):
    """Readers look a query up by its first position; a mask anywhere else would be lost on them."""
    config, store = broken
    table = store.read("training_set/negatives", NOW)
    rows = table.to_pylist()
    chunk = [edge for edge in store.read("training_set/positives", NOW).to_pylist() if edge["chunk"] == 0]
    kept = [edge["rhs"] for edge in chunk]
    place, later = next(
        (i, q) for i, p in enumerate(rows[0]["mask_position"]) for q in range(p + 1, len(kept)) if kept[q] == kept[p]
    )
    assert (rows[0]["chunk"], rows[0]["side"]) == (0, 0)
    rows[0]["mask_position"][place] = later
    save(store, "training_set/negatives", rows_as(rows, table), {})
    for name in ("masks_true", "negatives_masked"):
        result = checks.run(name, config, store, NOW, "training_set/negatives")
        assert result.metadata["offending_rows"] == 1
    found = checks.run("masks_true", config, store, NOW, "training_set/negatives").offending
    assert found is not None and found.to_pylist()[0]["position"] == later


def test_sides_are_those_of_the_relation(made, tmp_path):
    config, home = made
    model = config.model_dump(exclude_none=True)["model"]
    model["relations"][1]["sides"] = "rhs"
    own, store = resampled(made, tmp_path, model=model)
    for table in NEGATIVES:
        assert checks.run("negatives_complete", own, store, NOW, table).passed
        # What was asked of the relation before is now too few, or too much.
        assert not checks.run("negatives_complete", config, store, NOW, table).passed
        assert not checks.run("negatives_complete", own, Store(str(home)), NOW, table).passed


def test_masks_are_held_against_the_edges_that_the_configuration_names(made, tmp_path):
    config, home = made
    own, store = resampled(made, tmp_path, negatives={"mask": "own"})
    known = Store(str(home))
    assert store.manifest(NEGATIVES[0], NOW).details["masked"] < known.manifest(NEGATIVES[0], NOW).details["masked"]
    assert not checks.run("negatives_masked", config, store, NOW, NEGATIVES[0]).passed
    assert not checks.run("masks_true", own, known, NOW, NEGATIVES[0]).passed
    for name in ("negatives_masked", "masks_true"):
        assert checks.run(name, own, store, NOW, NEGATIVES[0]).passed
        assert checks.run(name, own, store, NOW, NEGATIVES[1]).passed


def test_with_every_entity_as_candidate_checks_pass_and_say_why(made, tmp_path):
    every = {"global_negatives": "all", "in_batch_negatives": 0}
    config, store = resampled(made, tmp_path, train_data=every)
    for name in NEGATIVES_CHECKS:
        result = checks.run(name, config, store, NOW, "training_set/negatives")
        assert result.passed and "every entity of the type is a candidate" in result.metadata["note"]
        together = checks.run(name, config, store, NOW)
        assert together.passed and "the table is empty" in together.metadata["note"]
    sampled = checks.run("negatives_masked", config, store, NOW, "held_out/validation_negatives")
    assert sampled.passed and "note" not in sampled.metadata
    home = made[1]
    assert not checks.run("negatives_complete", config, Store(str(home)), NOW, "training_set/negatives").passed


def test_a_blocking_check_stops_the_chain_with_the_rows_and_a_warning_does_not(broken):
    config, store = broken
    before = store.read("raw_edges", NOW)
    loops = first(lhs="u1", rel="follows", rhs="u1")(before.to_pylist())
    save(store, "raw_edges", rows_as(loops, before))
    assert any("edges_self_loops" in note for note in checks.run_blocking(config, store, NOW, ["raw_edges"]))
    save(store, "raw_edges", rows_as(first(rel="likes")(loops), before))
    with pytest.raises(UserError, match=r"(?s)edges_known_relations of raw_edges .*\| likes \| 1 \|"):
        checks.run_blocking(config, store, NOW, ["raw_edges"])


def test_a_tables_checks_share_one_preparation(made, monkeypatch):
    """Each check once opened a database with every view of its own."""
    config, home = made
    prepared = []
    prepare = check_views.prepare
    monkeypatch.setattr(check_views, "prepare", lambda *given: prepared.append(given[-1]) or prepare(*given))
    found = [check.name for check, _ in checks.results(config, Store(str(home)), NOW, "vocabulary/user")]
    assert found == ["ids_unique", "rows_contiguous", "ids_cover_edges", "rows_kept", "new_ids_alike", "ids_alike"]
    assert checks.run_blocking(config, Store(str(home)), NOW, ["vocabulary/user", "vocabulary/item"]) == []
    assert prepared == ["vocabulary/user", "vocabulary/user", "vocabulary/item"]


def verdict_of(store: Store, table: str) -> Verdict | None:
    return store.verdict(table, NOW, store.newest(table, NOW).version)


def test_a_table_has_passed_once_all_its_blocking_checks_have(broken):
    config, store = broken
    before = store.read("vocabulary/user", NOW)
    save(store, "vocabulary/user", before)
    assert checks.run("ids_unique", config, store, NOW, "vocabulary/user").passed
    assert verdict_of(store, "vocabulary/user") is None
    checks.run_blocking(config, store, NOW, ["vocabulary/user"])
    assert verdict_of(store, "vocabulary/user").status == "passed"


def test_a_version_that_fails_is_held_back_and_readers_keep_the_one_before(broken):
    config, store = broken
    good = store.manifest("vocabulary/user", NOW)
    rows = store.read("vocabulary/user", NOW)
    save(store, "vocabulary/user", rows_as(rows.to_pylist()[1:], rows))
    with pytest.raises(UserError, match=r"rows_contiguous of vocabulary/user[\s\S]*twhin accept vocabulary/user"):
        checks.require_passed(config, store, NOW, ["vocabulary/item", "vocabulary/user"])
    assert "rows_contiguous" in verdict_of(store, "vocabulary/user").failed_checks
    assert store.manifest("vocabulary/user", NOW) == good
    # A check of the table looks at the version that failed, not at the one that readers get.
    assert not checks.run("rows_contiguous", config, store, NOW, "vocabulary/user").passed


def test_a_failed_version_may_be_accepted_on_the_record_and_stays_so(broken):
    config, store = broken
    with pytest.raises(UserError, match="has passed its checks, so there is nothing to accept"):
        checks.accept(store, "vocabulary/user", NOW, "me", "why")
    rows = store.read("vocabulary/user", NOW)
    save(store, "vocabulary/user", rows_as(rows.to_pylist()[1:], rows))
    with pytest.raises(UserError, match="has not been checked; run `twhin check vocabulary/user` first"):
        checks.accept(store, "vocabulary/user", NOW, "me", "why")
    with pytest.raises(UserError, match="rows_contiguous"):
        checks.run_blocking(config, store, NOW, ["vocabulary/user"])
    accepted = checks.accept(store, "vocabulary/user", NOW, "me", "the first one is a test account")
    assert store.manifest("vocabulary/user", NOW) == accepted
    assert any(
        "Accepted on the record" in note for note in checks.run_blocking(config, store, NOW, ["vocabulary/user"])
    )
    verdict = verdict_of(store, "vocabulary/user")
    assert (verdict.status, verdict.by, verdict.reason) == ("overruled", "me", "the first one is a test account")


def test_checks_by_hand_tell_what_blocks_from_what_does_not(broken):
    config, store = broken
    before = store.read("raw_edges", NOW)
    loops = first(lhs="u1", rel="follows", rhs="u1")(before.to_pylist())
    save(store, "raw_edges", rows_as([*loops, loops[5]], before))
    found = {outcome.check: outcome for outcome in by_hand.outcomes(config, store, NOW, ["raw_*"])}
    status = {name: outcome.status for name, outcome in found.items()}
    assert status["edges_unique"] == "failed" and status["edges_self_loops"] == "warning"
    assert status["edges_present"] == "passed" and found["edges_unique"].offending
    tables = {outcome.table for outcome in by_hand.outcomes(config, store, NOW, ["vocabulary/*", "evaluation"])}
    assert tables == {"vocabulary/user", "vocabulary/item", "evaluation"}
    with pytest.raises(UserError, match="did you mean 'raw_edges'"):
        by_hand.outcomes(config, store, NOW, ["raw_edge"])


def test_every_query_is_a_check_and_tells_what_it_is_about_and_what_it_found():
    folder = Path(checks.__file__).parent / "sql"
    assert {path.stem for path in folder.glob("*.sql")} == set(checks.CHECKS)
    for check in checks.CHECKS.values():
        assert len(check.description) > 20 and checks.FINDING.strip() not in check.description, check.name
        assert check._head()[-1].startswith(checks.FINDING), check.name
        found = check.finding(checks.CheckResult(False, {"offending_rows": 1234}))
        assert len(found) > 15 and not found.startswith(checks.FINDING), check.name
        # Only where there is one thing to find is there no count.
        single = {"ancestors_left_out", "beats_popular", "edges_present", "held_out_present", "loss_fell"}
        single |= {"vectors_spread"}
        assert ("1,234" in found) is (check.name not in single), check.name
        one = check.finding(checks.CheckResult(False, {"offending_rows": 1}))
        assert not set("[]|{}") & set(found + one), check.name
        assert not re.search(r"\b(1 \w+s|1 .* have|are there)\b", one), check.name


def test_the_message_of_a_failed_check_is_the_finding_with_its_counts_by_relation(broken):
    """It once was what must hold ("Every entity of a held-out edge has a training edge"), never what was found."""
    config, store = broken
    before = store.read("raw_edges", NOW)
    rows = before.to_pylist()
    twice = {relation: [row for row in rows if row["rel"] == relation] for relation in ("fav", "reply")}
    save(store, "raw_edges", rows_as([*rows, *twice["fav"][:3], *twice["reply"][:2]], before))
    finding = r"5 edges are there more than once \(fav 3, reply 2\)"
    with pytest.raises(UserError, match=rf"check edges_unique of raw_edges \({NOW}\) failed: {finding}\. No edge is"):
        checks.run_blocking(config, store, NOW, ["raw_edges"])
    verdict = store.verdict("raw_edges", NOW, store.newest("raw_edges", NOW).version)
    stored = {one["name"]: one["finding"] for one in verdict.checks}
    assert re.match(rf"{finding}\. First: ", stored["edges_unique"])
    found = {outcome.check: outcome for outcome in by_hand.outcomes(config, store, NOW, ["raw_edges"])}
    assert re.fullmatch(finding, found["edges_unique"].finding) and found["edges_present"].finding == ""


def test_the_line_of_a_check_that_only_warns_is_the_finding_with_its_count(broken):
    config, store = broken
    before = store.read("vocabulary/user", NOW)
    rows = before.to_pylist()
    rows[0]["id"] = rows[1]["id"].upper()
    rows[2]["id"] = rows[3]["id"] + " "
    save(store, "vocabulary/user", rows_as(rows, before))
    result = checks.run("ids_alike", config, store, NOW, "vocabulary/user")
    expected = "2 groups of ids differ by letter case, spaces at their ends, or Unicode form alone (user: '"
    assert checks.CHECKS["ids_alike"].finding(result).startswith(expected)


def test_an_unknown_check_or_table_names_the_nearest(made):
    config, home = made
    with pytest.raises(UserError, match="did you mean 'edges_unique'"):
        checks.run("edge_unique", config, Store(str(home)), NOW)
    with pytest.raises(UserError, match="unknown table"):
        checks.run("edges_unique", config, Store(str(home)), NOW, "evaluation")
    with pytest.raises(UserError, match="twhin ingest"):
        checks.run("edges_unique", config, Store(str(home)), "2020-01-01")


def test_markdown_escapes_what_would_break_the_table():
    shown = checks.rows_as_markdown(pa.table({"id": ["a|b\nc", "x" * 200, None]}), limit=2)
    assert "a\\|b c" in shown and "… and 1 more" in shown and "x" * 100 not in shown


def test_negatives_of_an_earlier_version_are_told_with_the_remedy(broken):
    config, store = broken
    old = store.read("training_set/negatives", NOW).drop_columns(["log_q"])
    save(store, "training_set/negatives", old, store.manifest("training_set/negatives", NOW).details)
    with pytest.raises(UserError, match=r"lacks the column log_q; make it anew with `twhin sample --snapshot"):
        checks.run("negatives_log_q", config, store, NOW)


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> tuple[TwhinConfig, Path]:
    """A split by time, through the real stages: edges happen on some days, many of them again."""
    folder = tmp_path_factory.mktemp("timed")
    rng = np.random.default_rng(0)
    edges_found = planted(1)
    rows = [(*edge, f"2024-10-{1 + int(rng.integers(28)):02d}") for edge in edges_found for _ in range(3)]
    path = write(folder / f"{NOW}.parquet", rows, ("lhs", "rel", "rhs", "at"))
    split = {"strategy": "temporal", "repeats": True, "test": 0.2, "relations": ["fav", "reply"]}
    config = make_config(path, source={"columns": {"time": "at"}}, split=split, negatives={"chunk_size": 4})
    store = Store(str(folder / "home"))
    raw_edges.ingest(config, store, NOW)
    vocabulary.build(config, store, NOW)
    positives.build_positives(config, store, NOW)
    return config, folder / "home"


@pytest.mark.parametrize("table", ["held_out/test", "held_out/validation"])
def test_an_edge_that_is_new_after_a_held_out_one_must_not_be_trained_on(timed, tmp_path, table):
    config, home = timed
    shutil.copytree(home, tmp_path / "home")
    store = Store(str(tmp_path / "home"))
    assert checks.run("held_out_later", config, store, NOW, table).passed
    held, positives = store.read(table, NOW), store.read("training_set/positives", NOW)
    # Of relations that are not divided all edges are trained on.
    assert {0} < set(positives["rel"].to_pylist())
    leaked = held.slice(held.num_rows // 2)
    save(store, "training_set/positives", pa.concat_tables([positives, leaked.cast(positives.schema)]))
    result = checks.run("held_out_later", config, store, NOW, table)
    assert result.offending is not None and result.offending.column_names[-2:] == ["first_time", "held_out_from"]


def test_edges_that_happen_again_are_checked_as_trained_ones_where_they_are_asked_for(timed, tmp_path):
    config, home = timed
    shutil.copytree(home, tmp_path / "home")
    store = Store(str(tmp_path / "home"))
    table = "held_out/repeats"
    names = [check.name for check, _ in checks.of_tables(config, [table])]
    assert names == ["edges_in_range", "chunks_sound", "repeats_trained"]
    assert all(checks.run(name, config, store, NOW, table).passed for name in names)
    assert not checks.of_tables(make_config("e.parquet"), [table])
    rows = store.read(table, NOW)
    save(store, "training_set/positives", store.read("held_out/test", NOW))
    assert checks.run("repeats_trained", config, store, NOW, table).metadata["offending_rows"] == rows.num_rows > 10
