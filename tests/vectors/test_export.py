"""Embedding tables hold the model's vectors, keyed by the original ids."""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import small_store
from small_store import DIM, NUM, SNAPSHOT

from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError
from twhin_pipeline.vectors.export import export


def make(tmp_path, **options):
    return small_store.make(tmp_path, config=small_store.config(export=options))


@pytest.mark.parametrize("batch", [1, 7, 65_536])
def test_every_id_of_the_vocabulary_has_its_own_vector_however_parts_and_batches_lie(tmp_path, monkeypatch, batch):
    monkeypatch.setattr("twhin_pipeline.vectors.export.BATCH_ROWS", batch)
    small = make(tmp_path)
    written = export(small.config, small.store, SNAPSHOT)
    assert list(written) == ["embeddings/user", "embeddings/item", "embeddings/relations"]
    for entity in NUM:
        rows = small.store.read(f"embeddings/{entity}", SNAPSHOT)
        assert rows["id"].to_pylist() == small_store.ids(entity)
        assert rows["row"].to_pylist() == list(range(NUM[entity]))
        assert np.array_equal(np.array(rows["embedding"].to_pylist(), np.float32), small.vectors[entity])
        assert str(rows["embedding"].type) == f"fixed_size_list<element: float not null>[{DIM}]"


def test_longer_vectors_are_written_in_row_groups_of_fewer_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("twhin_pipeline.vectors.export.BATCH_BYTES", 4 * DIM * 7)
    small = make(tmp_path)
    export(small.config, small.store, SNAPSHOT)
    (path,) = small.store.files("embeddings/user", SNAPSHOT)
    groups = pq.read_metadata(path)
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [7, 7, 7, 7, 2]
    rows = small.store.read("embeddings/user", SNAPSHOT)["embedding"].to_pylist()
    assert np.array_equal(np.array(rows, np.float32), small.vectors["user"])


@pytest.mark.parametrize("threads", [1, 3])
def test_files_hold_so_many_rows_and_stay_in_order_however_many_are_written_at_once(tmp_path, monkeypatch, threads):
    monkeypatch.setattr("twhin_pipeline.vectors.export.BATCH_ROWS", 5)
    small = small_store.make(
        tmp_path, config=small_store.config(export={"rows_per_file": 12}, launch={"data_threads": threads})
    )
    written = export(small.config, small.store, SNAPSHOT)
    assert [f["rows"] for f in written["embeddings/user"].files] == [12, 12, 6]
    rows = small.store.read("embeddings/user", SNAPSHOT)
    assert rows["row"].to_pylist() == list(range(30)) and rows["id"].to_pylist() == small_store.ids("user")
    assert np.array_equal(np.array(rows["embedding"].to_pylist(), np.float32), small.vectors["user"])


def test_normalized_vectors_have_length_one_and_the_direction(tmp_path):
    small = make(tmp_path, normalize=True)
    small.vectors["user"][3] = 0
    small_store.write_model(
        small.store, small.config, {**small.vectors, "item": np.ones((45, DIM), np.float32)}, small.scorer
    )
    export(small.config, small.store, SNAPSHOT)
    vectors = np.array(small.store.read("embeddings/user", SNAPSHOT)["embedding"].to_pylist(), np.float32)
    lengths = np.linalg.norm(vectors, axis=1)
    assert lengths[3] == 0 and np.delete(lengths, 3) == pytest.approx(np.ones(29))
    assert vectors[0] == pytest.approx(small.vectors["user"][0] / np.linalg.norm(small.vectors["user"][0]))


def test_half_precision_is_stored_as_such_and_read_by_duckdb(tmp_path):
    small = make(tmp_path, data_type="fp16")
    export(small.config, small.store, SNAPSHOT)
    (path,) = small.store.files("embeddings/item", SNAPSHOT)
    assert str(pq.read_schema(path).field("embedding").type) == f"fixed_size_list<element: halffloat not null>[{DIM}]"
    with duckdb.connect() as con:
        vectors = con.execute("SELECT embedding FROM read_parquet(?) ORDER BY row", [path]).fetchall()
    found = np.array([v[0] for v in vectors], np.float32)
    assert np.array_equal(found, small.vectors["item"].astype(np.float16).astype(np.float32))


def test_relations_hold_operators_and_all_that_reading_needs(tmp_path):
    small = make(tmp_path)
    manifest = export(small.config, small.store, SNAPSHOT)["embeddings/relations"]
    rows = {row["relation"]: row for row in small.store.read("embeddings/relations", SNAPSHOT).to_pylist()}
    assert {name: (row["lhs"], row["rhs"]) for name, row in rows.items()} == small_store.RELATIONS
    assert rows["rates"]["operator"] == "identity" and set(rows["rates"]["embedding"]) == {0}
    assert rows["likes"]["embedding"] == small.scorer.state_rows()["likes"].tolist()
    assert manifest.details["model"] == small.config.model.model_dump(mode="json")
    assert manifest.parents["twhin_model"] == small.store.manifest("twhin_model", SNAPSHOT).version


@pytest.mark.parametrize("reciprocal", [False, True])
def test_relations_of_different_operators_keep_rows_of_their_own_lengths_and_pass_the_checks(
    tmp_path, monkeypatch, reciprocal
):
    for name, operator in {"likes": "affine", "follows": "rotation", "rates": "identity"}.items():
        monkeypatch.setitem(small_store.OPERATOR, name, operator)
    small = small_store.make(tmp_path, config=small_store.config(model={"reciprocal": reciprocal}))
    export(small.config, small.store, SNAPSHOT)
    table = small.store.read("embeddings/relations", SNAPSHOT)
    found = dict(zip(table["relation"].to_pylist(), table["embedding"].to_pylist(), strict=True))
    assert {name: row.tolist() for name, row in small.scorer.state_rows().items()} == found
    twice = 2 if reciprocal else 1
    lengths = {"likes": DIM * DIM + DIM, "follows": DIM // 2, "rates": DIM}
    assert {name: len(row) for name, row in found.items()} == {name: twice * n for name, n in lengths.items()}
    assert str(table["embedding"].type) == "list<element: float>"
    assert checks.run("relations_match_model", small.config, small.store, SNAPSHOT).passed


def test_relations_of_one_operator_are_lists_of_a_fixed_size(tmp_path):
    small = make(tmp_path)
    export(small.config, small.store, SNAPSHOT)
    kind = small.store.read("embeddings/relations", SNAPSHOT)["embedding"].type
    assert str(kind) == f"fixed_size_list<element: float not null>[{DIM}]"
    assert checks.run("relations_match_model", small.config, small.store, SNAPSHOT).passed


def test_an_entity_type_without_entities_gives_an_empty_table(tmp_path, monkeypatch):
    monkeypatch.setitem(NUM, "item", 0)
    small = small_store.make(
        tmp_path, config=small_store.config(), splits={s: np.zeros((0, 3), np.int64) for s in small_store.edges()}
    )
    written = export(small.config, small.store, SNAPSHOT)
    assert written["embeddings/item"].rows == 0
    assert set(written["embeddings/item"].schema) == {"id", "row", "embedding", "trained_edges"}


def test_a_vocabulary_made_anew_after_training_is_refused(tmp_path):
    small = make(tmp_path)
    small_store.write_vocabulary(small.store, "item")
    with pytest.raises(UserError, match=r"vocabulary/item was made anew.*twhin train"):
        export(small.config, small.store, SNAPSHOT)


@pytest.mark.parametrize("rows_per_file", [3, 1000])
def test_a_model_with_fewer_rows_than_its_vocabulary_is_refused_and_nothing_is_left(tmp_path, rows_per_file):
    small = make(tmp_path, rows_per_file=rows_per_file)
    short = {"user": small.vectors["user"], "item": small.vectors["item"][:20]}
    small_store.write_model(small.store, small.config, short, small.scorer)
    with pytest.raises(UserError, match="fewer rows of item"):
        export(small.config, small.store, SNAPSHOT)
    assert not small.store.exists("embeddings/item", SNAPSHOT)
    assert not small.store.exists("embeddings/relations", SNAPSHOT)
    assert not list((tmp_path / "home" / "embeddings" / "item").rglob("*.parquet"))
