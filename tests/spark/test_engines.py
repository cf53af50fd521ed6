"""Both engines make the same tables of the same files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3_server
from edge_files import SNAPSHOT, pass_checks, write
from lake_tables import WRITERS
from two_engines import BAD, COLUMNS, Both, rows

from twhin_pipeline.errors import UserError
from twhin_pipeline.spark import examples, masks, session, tables
from twhin_pipeline.stages import engine
from twhin_pipeline.store import Store

VOCABULARIES = ["vocabulary/user", "vocabulary/item"]
SAMPLED = [
    "training_set/positives",
    "held_out/validation",
    "held_out/test",
    "training_set/negatives",
    "held_out/validation_negatives",
]
EVERY = ["raw_edges", "raw_edges_rejected", *VOCABULARIES, *SAMPLED]
LATER = "2025-01-02"
WEIGHED = {"columns": {"weight": "w"}, "max_rejected_share": 1}


@pytest.fixture(autouse=True)
def _several_slices(spark: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let edges of a small graph be divided as those of a large one are."""
    monkeypatch.setattr(masks, "LEAST_SLICE", 100)
    monkeypatch.setattr(session, "LEAST_ROWS", 10)


DATED = {"columns": {"weight": "w", "time": "t"}, "repeat_weight": "sum", "max_rejected_share": 1, "max_growth": 100,
         "min_kept_share": 0}  # fmt: skip


def test_both_make_the_same_tables_of_repeated_dated_and_rejected_rows_day_after_day(tmp_path: Path) -> None:
    """Row for row: merged weights, who is held out, positions, pools, masks; and then rows of a second snapshot."""
    made = [*rows(700), *BAD]
    write(tmp_path / f"{SNAPSHOT}-1.parquet", made[:400], COLUMNS)
    write(tmp_path / f"{SNAPSHOT}-2.parquet", made[400:], COLUMNS)
    # Half of the ids are gone, others are new.
    write(tmp_path / f"{LATER}-1.parquet", rows(300, users=90, items=20, seed=2), COLUMNS)
    both = Both(
        tmp_path,
        f"{tmp_path}/{{snapshot}}-*.parquet",
        source=DATED,
        split={"validation": 0.1, "test": 0.1},
        negatives={"chunk_size": 50, "epochs": 2},
        vocabulary={"keep_departed": 0},
    )
    both.prepare(SNAPSHOT)
    both.assert_equal(EVERY, SNAPSHOT)
    rejected = both.stores[1].read("raw_edges_rejected", SNAPSHOT).to_pylist()
    assert [(one["reason"], one["row"]) for one in rejected] == [
        ("null", 301), ("empty id", 302), ("unknown relation", 303), ("bad weight", 304),
    ]  # fmt: skip
    assert len(both.stores[1].files("raw_edges", SNAPSHOT)) > 1
    for store in both.stores:
        pass_checks(store)
    both.prepare(LATER, ("ingest", "vocabulary"))
    both.assert_equal(["raw_edges", *VOCABULARIES], LATER)
    details = both.stores[1].manifest("vocabulary/item", LATER).details
    assert details["departed"] == details["evicted"] > 0 and details["earlier_snapshot"] == SNAPSHOT


@pytest.mark.long
@pytest.mark.parametrize("collected", [1 << 16, 10])
def test_both_divide_edges_by_time_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collected: int) -> None:
    """By first times and weights as they were before the held-out time; whether times are counted or collected."""
    monkeypatch.setattr(examples, "COLLECTED", collected)
    split = {"strategy": "temporal", "validation": 0.1, "test": 0.1, "repeats": True}
    path = write(tmp_path / "e.parquet", [*rows(700), *BAD], COLUMNS)
    both = Both(tmp_path, path, source=DATED, split=split, negatives={"chunk_size": 50, "epochs": 2})
    both.prepare(SNAPSHOT)
    both.assert_equal([*EVERY, "held_out/repeats"], SNAPSHOT)


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [
        {"split": {"validation": 0.2, "test": 0.2}, "source": WEIGHED, "vocabulary": {"min_count": 2}},
        {"split": {"validation": 0.1, "test": 0.1, "relations": ["fav"]}, "negatives": {"sides": "rhs", "epochs": 3},
         "loss": {"name": "softmax", "log_q": True}},
        {"split": {"strategy": "given"}, "source": {"columns": {"split": "s"}}, "negatives": {"mask": "own"}},
        {"train_data": {"global_negatives": "all", "in_batch_negatives": 0}},
    ],
)  # fmt: skip
@pytest.mark.parametrize("integers", [False, True])
def test_both_make_the_same_tables_whatever_is_asked_for(tmp_path: Path, sections: dict, integers: bool) -> None:
    path = write(tmp_path / "e.parquet", rows(900, integers=integers), COLUMNS)
    negatives_section = {"chunk_size": 50, **sections.get("negatives", {})}
    both = Both(tmp_path, path, **{**sections, "negatives": negatives_section})
    both.prepare(SNAPSHOT)
    both.assert_equal(EVERY, SNAPSHOT)


@pytest.mark.long
def test_validation_edges_are_drawn_alike_where_the_source_has_none(tmp_path: Path) -> None:
    made = [row for row in rows(900) if row[-1] != "validation"]
    split = {"strategy": "given", "validation": 0.3}
    both = Both(tmp_path, write(tmp_path / "e.parquet", made, COLUMNS), split=split, source={"columns": {"split": "s"}})
    both.prepare(SNAPSHOT)
    both.assert_equal(EVERY, SNAPSHOT)


@pytest.mark.long
def test_times_that_are_equal_are_divided_alike(tmp_path: Path) -> None:
    made = [(*row[:4], row[4] // 300_000, row[5]) for row in rows(900)]
    split = {"strategy": "temporal", "validation": 0.1, "test": 0.15}
    both = Both(tmp_path, write(tmp_path / "e.parquet", made, COLUMNS), split=split, source={"columns": {"time": "t"}})
    both.prepare(SNAPSHOT)
    both.assert_equal(EVERY, SNAPSHOT)


@pytest.mark.long
def test_text_files_and_several_sources_are_read_alike(tmp_path: Path) -> None:
    """Types of ids are those of all files; lines that are no rows are told by file and line."""
    (tmp_path / "a.csv").write_text("lhs,rel,rhs\n1,fav,7\n2,fav\n3,reply,8\n,fav,9\n4,nope,9\n")
    (tmp_path / "b.csv").write_text("lhs,rel,rhs\n10,fav,7\nu5,follows,1\n10,fav,7\n")
    write(tmp_path / "fav.parquet", [("9", "x1"), ("1", "7")], ("lhs", "rhs"))
    sources = [
        {"path": str(tmp_path / "*.csv"), "max_rejected_share": 1},
        {"path": str(tmp_path / "fav.parquet"), "weights": {"fav": 3}},
    ]
    both = Both(tmp_path, None, sources=sources, split={"validation": 0, "test": 0})
    both.prepare(SNAPSHOT)
    both.assert_equal(EVERY, SNAPSHOT)
    rejected = both.stores[1].read("raw_edges_rejected", SNAPSHOT).to_pylist()
    assert [(Path(one["file"]).name, one["row"], one["reason"]) for one in rejected] == [
        ("a.csv", 3, "malformed line"), ("a.csv", 5, "empty id"), ("a.csv", 6, "unknown relation"),
    ]  # fmt: skip


@pytest.mark.long
def test_relations_are_found_alike(tmp_path: Path) -> None:
    relations = [{"name": "follows", "lhs": "user", "rhs": "user"}, {"name": "*", "lhs": "user", "rhs": "item"}]
    tables = [{"name": name, "embedding_dim": 4} for name in ("user", "item")]
    model = {"embeddings": {"tables": tables}, "relations": relations}
    made = [*rows(300), (None, "never", "ï1", 1.0, 1, "train")]
    both = Both(tmp_path, write(tmp_path / "e.parquet", made, COLUMNS), model=model, source={"max_rejected_share": 1})
    both.prepare(SNAPSHOT, ("ingest",))
    both.assert_equal(["raw_edges", "raw_edges_rejected"], SNAPSHOT)
    assert both.stores[1].manifest("raw_edges", SNAPSHOT).details["relations"] == ["follows", "fav", "reply"]


@pytest.mark.long
@pytest.mark.parametrize("kind", WRITERS)
def test_tables_of_a_lake_are_read_alike_each_data_file_by_itself(tmp_path: Path, kind: str) -> None:
    columns = {"lhs": "who", "rhs": "what", "time": "at"}
    path = WRITERS[kind](tmp_path / "table")
    both = Both(tmp_path, path, source={"format": kind, "columns": columns, "max_rejected_share": 1})
    both.prepare(SNAPSHOT, ("ingest",))
    both.assert_equal(["raw_edges"], SNAPSHOT)
    (rejected,) = both.stores[1].read("raw_edges_rejected", SNAPSHOT).to_pylist()
    (other,) = both.stores[0].read("raw_edges_rejected", SNAPSHOT).to_pylist()
    place = ("file", "row")
    assert {k: v for k, v in rejected.items() if k not in place} == {k: v for k, v in other.items() if k not in place}
    # The data file and the row in it, not the table's.
    assert rejected["file"].endswith(".parquet") and rejected["row"] == 2


@pytest.mark.long
def test_rows_that_a_delta_table_has_deleted_are_not_read(tmp_path: Path) -> None:
    from deltalake import DeltaTable, write_deltalake

    path = str(tmp_path / "table")
    edges = pa.table({"lhs": ["a", "b", "c"], "rel": ["fav"] * 3, "rhs": ["x", "y", "z"], "day": [1, 1, 2]})
    write_deltalake(path, edges, partition_by=["day"])
    DeltaTable(path).delete("lhs = 'b'")
    both = Both(tmp_path, path, source={"format": "delta"})
    both.prepare(SNAPSHOT, ("ingest",))
    both.assert_equal(["raw_edges", "raw_edges_rejected"], SNAPSHOT)
    assert both.stores[1].read("raw_edges", SNAPSHOT)["lhs"].to_pylist() == ["a", "c"]


@pytest.mark.long
def test_a_vocabulary_is_compacted_alike(tmp_path: Path) -> None:
    days = [SNAPSHOT, LATER, "2025-01-03"]
    for number, day in enumerate(days):
        write(tmp_path / f"{day}.parquet", rows(300, users=90 - 30 * number, items=20, seed=number), COLUMNS)
    kept = {"max_growth": 100, "min_kept_share": 0}
    both = Both(tmp_path, f"{tmp_path}/{{snapshot}}.parquet", source=kept, vocabulary={"keep_departed": 0})
    for day in days[:2]:
        both.prepare(day, ("ingest", "vocabulary"))
        for store in both.stores:
            pass_checks(store, day)
    both.prepare(days[2], ("ingest",))
    for config, store in both.each:
        engine.vocabulary(config, store, days[2], compact=True)
    both.assert_equal(VOCABULARIES, days[2])
    assert both.stores[1].manifest("vocabulary/user", days[2]).details["left_out"] > 0


@pytest.mark.long
def test_each_engine_goes_on_with_edges_of_the_other(tmp_path: Path) -> None:
    path = write(tmp_path / "e.parquet", rows(700), COLUMNS)
    dated = {"columns": {"weight": "w", "time": "t"}, "repeat_weight": "sum"}
    both = Both(tmp_path, path, source=dated, split={"strategy": "temporal", "validation": 0.1, "test": 0.1})
    both.prepare(SNAPSHOT)
    (embedded, home), (on_spark, other) = both.each
    tables = [*VOCABULARIES, *SAMPLED[:3]]
    before = {table: home.read(table, SNAPSHOT) for table in tables}
    engine.vocabulary(embedded, other, SNAPSHOT)
    engine.sample(embedded, other, SNAPSHOT)
    assert "engine" not in other.manifest(SAMPLED[0], SNAPSHOT).details
    assert all(other.read(table, SNAPSHOT).equals(rows) for table, rows in before.items())
    engine.sample(on_spark, home, SNAPSHOT)
    assert home.manifest(SAMPLED[0], SNAPSHOT).details["engine"] == "spark"
    assert all(home.read(table, SNAPSHOT).equals(rows) for table, rows in before.items())


@pytest.mark.long
def test_a_store_of_s3_gets_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "e.parquet", [*rows(500), *BAD], COLUMNS)
    both = Both(tmp_path, path, recipe="none", source={"columns": {"weight": "w"}, "max_rejected_share": 1})
    both.prepare(SNAPSHOT)
    both.stores[1] = Store(f"{s3_server.use(monkeypatch)}/home")
    config = tmp_path / "config.yaml"
    config.write_text(both.configs[1].to_yaml(), encoding="utf-8")
    # In processes of their own: Spark's workers have the environment that it was started in.
    for stage in ("ingest", "vocabulary", "sample"):
        command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "-c", str(config), "--snapshot", SNAPSHOT]
        done = subprocess.run([*command, "--home", both.stores[1].root], capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    both.assert_equal(EVERY, SNAPSHOT)
    names = both.stores[1].sizes(both.stores[1].path("training_set/negatives"))
    assert not [name for name in names if "_work" in name or "/." in name]


def test_a_store_that_workers_do_not_share_is_one_clear_error(tmp_path: Path) -> None:
    both = Both(tmp_path, write(tmp_path / "e.parquet", rows(50), COLUMNS))
    with pytest.raises(UserError, match=r"a worker of Spark has written part-\d+\.parquet, and it is not there"):
        engine.ingest(both.configs[1], Store("memory://not-shared"), SNAPSHOT)


def test_a_source_without_an_edge_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "e.parquet"
    pq.write_table(pa.table({"lhs": ["a"], "rel": ["likes"], "rhs": ["b"]}), path)
    both = Both(tmp_path, path)
    texts = []
    for config, store in both.each:
        with pytest.raises(UserError) as error:
            engine.ingest(config, store, SNAPSHOT)
        texts.append(str(error.value))
    assert texts[0] == texts[1] and "unknown relation in column 'rel' 1" in texts[0]


def test_what_a_task_says_is_wrong_reaches_the_user_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "e.csv").write_text("who,rel,rhs\na,fav,b\n")
    both = Both(tmp_path, tmp_path / "e.csv")
    config, store = both.each[1]
    with pytest.raises(UserError, match=r"^[^\n]*e\.csv: has no column 'lhs' \(columns there: who, rel, rhs\)[^\n]*$"):
        engine.ingest(config, store, SNAPSHOT)


def test_a_table_whose_size_is_not_known_is_joined_without_the_driver(spark: Any) -> None:
    """Nothing that grows with entities goes there: a vocabulary is broadcast only once it was seen to be small."""

    def rows_of(number: int) -> tables.Batches:
        yield pa.record_batch({"id": pa.array([number])})

    one, other = (tables.each(spark, [1, 2], rows_of, "id bigint") for _ in range(2))
    joined = one.join(other, "id", "left")
    planned = joined._jdf.queryExecution().sparkPlan().toString()
    assert "SortMergeJoin" in planned and "Broadcast" not in planned
    assert joined.count() == 2
