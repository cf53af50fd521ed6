"""The read API: vectors, probabilities, neighbours and candidates, as training scored them."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_store
import torch
from plain_batches import Chunk, assemble
from small_store import DIM, NUM, SNAPSHOT, Small

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.model.comparators import COMPARATORS
from twhin_pipeline.model.operators import OPERATORS
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.opening import load_model
from twhin_pipeline.vectors.reader import TwhinEmbeddings


def make(tmp_path, model=None, **options) -> tuple[Small, TwhinEmbeddings]:
    small = small_store.make(tmp_path, config=small_store.config(export=options, model=model or {}))
    export(small.config, small.store, SNAPSHOT)
    return small, load_model(small.store.root)


@pytest.mark.parametrize(
    "model",
    [{}, {"comparator": "cosine", "temperature": 0.1}, {"comparator": "l2", "reciprocal": True}],
    ids=["dot", "cosine", "l2"],
)
def test_serving_scores_equal_those_of_the_training_forward_pass(tmp_path, model):
    small, served = make(tmp_path, model)
    trained = TwhinModel(small.config.model, UnshardedTables(small.config.model, NUM))
    with torch.no_grad():
        for name, vectors in small.vectors.items():
            trained.tables.table(name).weight.copy_(torch.from_numpy(vectors))
    trained.scorer.load_rows(small.scorer.state_rows())
    none, masks = np.empty(0, np.int64), np.empty((0, 2), np.int64)
    for number, (name, (lhs, rhs)) in enumerate(small_store.RELATIONS.items()):
        heads, tails, pool = np.array([3, 9, 3]), np.array([1, 4, 0]), np.arange(NUM[rhs])
        ones = np.ones(3, np.float32)
        chunk = Chunk(number, heads, tails, ones, none, none, pool, masks, masks, sides="rhs")
        batch = assemble([chunk], small.config.model, 3)
        with torch.no_grad():
            outputs = trained(batch)
        lhs_ids, rhs_ids = ([small_store.ids(e)[row] for row in rows] for e, rows in ((lhs, heads), (rhs, tails)))
        found = served.predict_relation(lhs_ids, rhs_ids, name)
        assert found == pytest.approx(outputs["probabilities"][0].numpy(), rel=1e-5)
        best = served.candidates(name, lhs_ids[1], 5)
        top = outputs["rhs_logits"][0, batch.rhs_query[0, 1]].topk(5)
        assert [i for i, _ in best] == [small_store.ids(rhs)[row] for row in top.indices]
        assert [s for _, s in best] == pytest.approx(top.values.tolist(), rel=1e-4)


def test_an_id_gives_its_vector_and_a_sequence_of_ids_a_matrix_in_its_order(tmp_path):
    small, model = make(tmp_path)
    for entity in NUM:
        ids = small_store.ids(entity)
        rows = [7, 2, 7]
        asked = [ids[row] for row in rows]
        for given in (asked, tuple(asked), np.array(asked)):
            assert np.array_equal(model.get_embedding(entity, given), small.vectors[entity][rows])
        assert np.array_equal(model.get_embedding(entity, ids[4]), small.vectors[entity][4])
    assert model.get_embedding("item", np.int64(small_store.ids("item")[4])).shape == (DIM,)
    assert model.get_embedding("item", []).shape == (0, DIM)


def test_every_entity_type_has_its_getter_and_others_are_refused_by_name(tmp_path):
    small, model = make(tmp_path)
    assert {"get_user_embedding", "get_item_embedding"} <= set(dir(model))
    assert np.array_equal(model.get_user_embedding(small_store.ids("user")[3]), small.vectors["user"][3])
    with pytest.raises(AttributeError, match=r"did you mean 'item'.*entity types: user, item"):
        model.get_items_embedding(1)
    with pytest.raises(AttributeError, match="entity types: user, item"):
        _ = model.nonsense
    assert not hasattr(model, "get_tweet_embedding")


def test_an_unknown_id_is_a_key_error_that_names_the_nearest(tmp_path):
    _, model = make(tmp_path)
    with pytest.raises(KeyError, match=r"no user has the id 'u100'; nearest: 'u10'"):
        model.get_user_embedding("u100")
    with pytest.raises(KeyError, match="no item has the id 123; nearest: 120, 130, 110"):
        model.get_item_embedding([120, 123])
    with pytest.raises(KeyError, match="nearest: 390"):
        model.get_item_embedding(10**30)
    with pytest.raises(KeyError, match="no item has the id 'vim'; nearest"):
        model.get_item_embedding("vim")
    with pytest.raises(KeyError, match=r"no item has the id 120\.5"):
        model.get_item_embedding(120.5)
    with pytest.raises(UserError):  # so that the command line tells it in one line
        model.neighbors("user", "nobody")


def test_an_integer_id_may_come_as_text_as_from_a_command_line(tmp_path):
    _, model = make(tmp_path)
    assert np.array_equal(model.get_item_embedding("120"), model.get_item_embedding(120))


def test_an_unknown_entity_type_or_relation_names_the_nearest(tmp_path):
    _, model = make(tmp_path)
    with pytest.raises(KeyError, match="unknown entity type 'users'; did you mean 'user'"):
        model.get_embedding("users", "u01")
    with pytest.raises(KeyError, match="unknown relation 'like'; did you mean 'likes'"):
        model.predict_relation("u01", 10, "like")
    assert model.entities == ["user", "item"] and model.relations == ["likes", "follows", "rates"]


def test_probabilities_are_those_of_a_plain_formula_for_ids_vectors_and_mixtures(tmp_path):
    small, model = make(tmp_path)
    users, items = small_store.ids("user")[:3], small_store.ids("item")[5:8]
    plain = [1 / (1 + np.exp(-small_store.score(small, 0, i, 5 + i))) for i in range(3)]
    assert model.predict_relation(users, items, "likes") == pytest.approx(plain, rel=1e-5)
    user_vectors, item_vectors = model.get_user_embedding(users), model.get_item_embedding(items)
    assert model.predict_relation(user_vectors, item_vectors, "likes") == pytest.approx(plain, rel=1e-5)
    assert model.predict_relation(torch.from_numpy(user_vectors), items, "likes") == pytest.approx(plain, rel=1e-5)
    one = model.predict_relation(model.get_user_embedding(users[0]), items[0], "likes")
    assert isinstance(one, float) and one == pytest.approx(plain[0], rel=1e-5)
    many = model.predict_relation(users[0], items, "likes")
    assert many == pytest.approx([model.predict_relation(users[0], item, "likes") for item in items], rel=1e-5)


@pytest.mark.parametrize("reciprocal", [False, True], ids=["one operator", "reciprocal"])
@pytest.mark.parametrize("comparator", list(COMPARATORS))
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_every_operator_and_comparator_is_served_as_a_plain_formula_says(
    tmp_path, monkeypatch, operator, comparator, reciprocal
):
    """The other relations have another operator, and so rows of another length in the same file."""
    monkeypatch.setitem(small_store.OPERATOR, "likes", operator)
    for name, value in (("TILE_ROWS", 8), ("KEPT_ROWS", 16), ("GROUP", 2)):
        monkeypatch.setattr(f"twhin_pipeline.vectors.retrieval.{name}", value)
    small, model = make(tmp_path, {"comparator": comparator, "temperature": 2.0, "reciprocal": reciprocal})
    users, items = small_store.ids("user"), small_store.ids("item")
    plain = np.array([small_store.score(small, 0, 3, row) for row in range(NUM["item"])])
    assert model.predict_relation(users[3], items, "likes") == pytest.approx(1 / (1 + np.exp(-plain)), abs=1e-5)
    order = np.argsort(-plain)[:5]
    found = model.candidates("likes", users[3], 5)
    assert [name for name, _ in found] == [items[row] for row in order]
    assert [value for _, value in found] == pytest.approx(plain[order], rel=1e-3, abs=1e-3)


def test_vectors_and_counts_that_do_not_fit_are_refused(tmp_path):
    _, model = make(tmp_path)
    with pytest.raises(UserError, match=r"vectors of user must be \[8\] or \[n, 8\], got \[3\]"):
        model.predict_relation([0.1, 0.2, 0.3], 10, "likes")
    with pytest.raises(UserError, match="got 2 and 3"):
        model.predict_relation(["u01", "u02"], [10, 20, 30], "likes")
    with pytest.raises(UserError, match="one head"):
        model.candidates("likes", ["u01", "u02"])


def test_the_relation_may_be_left_out_only_where_there_is_one(tmp_path, monkeypatch):
    _, model = make(tmp_path / "a")
    with pytest.raises(UserError, match="several relations; say which one: likes, follows, rates"):
        model.predict_relation("u01", 10)
    monkeypatch.setattr(small_store, "RELATIONS", {"likes": ("user", "item")})
    monkeypatch.setattr(small_store, "edges", lambda: {s: np.zeros((1, 3), np.int64) for s in ("train", "validation", "test")})  # fmt: skip # noqa: E501
    _, single = make(tmp_path / "b")
    assert single.predict_relation("u01", 10) == single.predict_relation("u01", 10, "likes")


@pytest.mark.parametrize("block", [4, 262_144])
def test_neighbors_are_the_nearest_by_cosine_without_the_entity_itself_in_blocks_of_any_size(
    tmp_path, monkeypatch, block
):
    for module in ("vectors.nearest", "vectors.entity_table"):
        monkeypatch.setattr(f"twhin_pipeline.{module}.BATCH_ROWS", block)
    small, model = make(tmp_path)
    vectors = small.vectors["user"] / np.linalg.norm(small.vectors["user"], axis=1, keepdims=True)
    cosines = vectors @ vectors[6]
    order = [row for row in np.argsort(-cosines) if row != 6]
    ids = small_store.ids("user")
    found = model.neighbors("user", ids[6], 5)
    assert [name for name, _ in found] == [ids[row] for row in order[:5]]
    assert [value for _, value in found] == pytest.approx(cosines[order[:5]], rel=1e-5)
    assert len(model.neighbors("user", ids[6], 1000)) == NUM["user"] - 1
    assert len(model.candidates("likes", ids[6], 1000, untrained=True)) == NUM["item"]
    # Tails of the second relation, follows, are users.
    trained = {tail for relation, tail in small.edges["train"][:, 1:].tolist() if relation != 1}
    assert len(model.candidates("likes", ids[6], 1000)) == len(trained) < NUM["item"]


def test_normalized_vectors_give_neighbors_but_no_scores(tmp_path):
    _, model = make(tmp_path, normalize=True)
    assert len(model.neighbors("user", "u01", 3)) == 3
    for call in (model.predict_relation, model.candidates):
        with pytest.raises(UserError, match="normalize: false"):
            call("likes", "u01", 1)


def test_a_snapshot_is_named_by_argument_or_by_path_and_the_newest_is_the_default(tmp_path, monkeypatch):
    small, _ = make(tmp_path)
    monkeypatch.setattr(small_store, "SNAPSHOT", "2025-01-01")
    later = small_store.make(tmp_path, config=small.config)
    export(later.config, later.store, "2025-01-01")
    root = small.store.root
    assert load_model(root).snapshot == "2025-01-01"
    assert load_model(f"{root}@{SNAPSHOT}").snapshot == load_model(root, snapshot=SNAPSHOT).snapshot == SNAPSHOT
    with pytest.raises(UserError, match="two snapshots"):
        load_model(f"{root}@{SNAPSHOT}", snapshot="2025-01-01")
    with pytest.raises(UserError, match=r"2023-03-03.*twhin export"):
        load_model(f"{root}@2023-03-03")


def test_a_registered_model_is_opened_and_stays_readable_when_a_later_one_was_exported(tmp_path, monkeypatch):
    small, model = make(tmp_path)
    registered = {"store": small.store.root, "snapshot": SNAPSHOT, "version": model.version}
    asked = []
    monkeypatch.setattr("twhin_pipeline.tracking.pointer", lambda uri: asked.append(uri) or registered)
    for uri in ("models:/twhin/3", "models:/twhin@newest", "runs:/abc/model"):
        assert load_model(uri).snapshot == SNAPSHOT
    assert asked == ["models:/twhin/3", "models:/twhin@newest", "runs:/abc/model"]
    small_store.write_model(
        small.store, small.config, {**small.vectors, "item": np.ones((45, DIM), np.float32)}, small.scorer
    )
    export(small.config, small.store, SNAPSHOT)
    opened = load_model("models:/twhin/3")
    assert opened.version == model.version != load_model(small.store.root).version
    assert np.array_equal(opened.get_item_embedding(120), model.get_item_embedding(120))
    assert not np.array_equal(opened.get_item_embedding(120), load_model(small.store.root).get_item_embedding(120))


def test_a_store_without_embeddings_is_refused_with_its_remedy(tmp_path):
    with pytest.raises(UserError, match=r"no embeddings/relations there \(it has none.*twhin export"):
        load_model(str(tmp_path / "nothing"))


def test_tables_of_two_exports_are_not_mixed(tmp_path):
    small, _ = make(tmp_path)
    with small.store.replace("embeddings/user", SNAPSHOT, config_hash="other") as draft:
        draft.write(small.store.read("embeddings/user", SNAPSHOT))
    with pytest.raises(UserError, match="not of the same export"):
        load_model(small.store.root)


def test_vectors_are_mapped_from_one_local_copy_of_each_version(tmp_path):
    small, model = make(tmp_path)
    assert isinstance(model.tables["user"].vectors.base, np.memmap)
    copies = sorted((tmp_path / "home").rglob("vectors.npy"))
    written = [path.stat().st_mtime_ns for path in copies]
    load_model(small.store.root)
    assert len(copies) == len(NUM) and [path.stat().st_mtime_ns for path in copies] == written
    export(small.config, small.store, SNAPSHOT)
    assert all(path.exists() for path in copies)
    assert model.get_user_embedding("u01").shape == (DIM,)  # who holds the old ones can go on
    assert load_model(small.store.root).get_user_embedding("u01").shape == (DIM,)


def test_after_an_export_a_model_is_opened_and_asked_without_reading_its_tables(tmp_path, monkeypatch):
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)

    def read(*_, **__):
        raise AssertionError("a table was read")

    monkeypatch.setattr("twhin_pipeline.vectors.entity_table._build", read)
    monkeypatch.setattr(EntityTable, "nearest_ids", read)
    model = load_model(small.store.root)
    assert np.array_equal(model.get_user_embedding("u07"), small.vectors["user"][small_store.ids("user").index("u07")])
    assert model.has("user", "u07") and not model.has("user", "nobody") and not model.has("item", "nobody")


def test_a_store_and_a_cache_that_cannot_be_written_are_told_in_one_line(tmp_path, monkeypatch):
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    for copy in (tmp_path / "home").rglob("_index"):
        shutil.rmtree(copy)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("twhin_pipeline.store.array_cache.os.access", lambda *_: False)
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can be written"):
        load_model(small.store.root)


def test_whoever_may_read_a_table_may_read_its_mapped_copy(tmp_path):
    small, _ = make(tmp_path)
    folder = Path(
        small.store.path("embeddings/user", SNAPSHOT, small.store.manifest("embeddings/user", SNAPSHOT).version)
    )
    assert (folder / "_index").stat().st_mode == folder.stat().st_mode
    assert folder.stat().st_mode & 0o055, "the umask of this test hides the difference"


def test_a_remote_store_is_evaluated_exported_and_mapped_from_the_users_cache_whose_old_versions_go(
    tmp_path, monkeypatch
):
    for name in ("XDG_CACHE_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    here = small_store.make(tmp_path, config=small_store.config())
    remote = small_store.make("memory://evaluate", config=small_store.config())
    values = [evaluate(each.config, each.store, SNAPSHOT).details["metrics"] for each in (here, remote)]
    assert values[0] == pytest.approx(values[1])
    copies = set()
    for _ in range(2):
        export(remote.config, remote.store, SNAPSHOT)
        model = load_model("memory://evaluate/home")
        assert np.array_equal(model.get_item_embedding(120), remote.vectors["item"][small_store.ids("item").index(120)])
        found = set((tmp_path / "twhin").rglob("vectors.npy"))
        assert len(found) == len(NUM) and not found & copies
        copies = found


def test_a_copy_that_broke_off_is_not_taken_for_whole(tmp_path, monkeypatch):
    small = small_store.make(tmp_path, config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    for copy in (tmp_path / "home").rglob("_index"):
        shutil.rmtree(copy)
    with monkeypatch.context() as patched:
        patched.setattr("twhin_pipeline.vectors.id_index.hashes", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            load_model(small.store.root)
    assert not list((tmp_path / "home").rglob("_index")) and not list((tmp_path / "home").rglob(".draft-*"))
    assert load_model(small.store.root).get_user_embedding("u01").shape == (DIM,)


# --- recommendations ---

KNOWN = {"likes": {"train": [0, 5, 9], "test": [12]}, "rates": {"train": [7]}}


def write_raw_edges(small: Small, head: int = 3, others: int = 4) -> None:
    """Write the head's KNOWN tails and other heads' edges, sorted by relation and head, a row group for each head."""
    users, items = small_store.ids("user"), small_store.ids("item")
    rows = []
    for relation, parts in KNOWN.items():
        rows += [(users[head], relation, str(items[tail])) for tails in parts.values() for tail in tails]
        rows += [(users[other], relation, str(items[tail])) for other in range(10, 10 + others) for tail in range(40)]
    rows += [(users[head], "follows", users[8])]
    rows.sort(key=lambda row: (list(small_store.RELATIONS).index(row[1]), row[0]))
    schema = pa.schema([(name, pa.string()) for name in ("lhs", "rel", "rhs")])
    with (
        small.store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft,
        draft.writer("part-00000.parquet", schema) as writer,
    ):
        for _, group in itertools.groupby(rows, key=lambda row: row[:2]):
            columns = zip(*group, strict=True)
            writer.write_table(pa.table([pa.array(column) for column in columns], schema=schema))
        draft.details = {"edges_per_relation": {"likes": 164, "follows": 1, "rates": 161}}


@pytest.mark.parametrize(
    ("exclude", "excluded"), [(True, [0, 5, 9, 12]), ("any", [0, 5, 9, 12, 7]), (False, [])], ids=["own", "any", "none"]
)
def test_recommended_tails_are_the_best_of_those_that_the_head_does_not_have(tmp_path, exclude, excluded):
    small, model = make(tmp_path)
    write_raw_edges(small)
    user, items = small_store.ids("user")[3], small_store.ids("item")
    plain = {items[row]: small_store.score(small, 0, 3, row) for row in range(NUM["item"]) if row not in excluded}
    expected = sorted(plain, key=plain.__getitem__, reverse=True)
    found = model.recommend("likes", user, 6, exclude, untrained=True)
    assert [tail for tail, _ in found] == expected[:6]
    assert [score for _, score in found] == pytest.approx([plain[tail] for tail in expected[:6]], rel=1e-5)
    assert [tail for tail, _ in model.recommend("likes", user, 1000, exclude, untrained=True)] == expected
    assert model.recommend("likes", user, 0, exclude) == []


def test_nobody_is_recommended_to_themselves(tmp_path):
    small, model = make(tmp_path)
    write_raw_edges(small)
    users = small_store.ids("user")
    expected = set(users) - {users[3], users[8]}
    assert {tail for tail, _ in model.recommend("follows", users[3], 100, untrained=True)} == expected
    every = model.recommend("follows", users[3], 100, exclude_known=False, untrained=True)
    assert {tail for tail, _ in every} == set(users)


def test_only_the_row_groups_of_the_head_are_read(tmp_path):
    small, model = make(tmp_path)
    write_raw_edges(small)
    expected = model.recommend("likes", small_store.ids("user")[3], 40, "any")
    (path,) = small.store.files("raw_edges", SNAPSHOT)
    metadata = pq.ParquetFile(path).metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    with open(path, "r+b") as file:
        for group in groups:
            if group.column(0).statistics.min != small_store.ids("user")[3]:
                for number in range(group.num_columns):
                    column = group.column(number)
                    file.seek(column.dictionary_page_offset or column.data_page_offset)
                    file.write(b"\xff" * column.total_compressed_size)
    assert len(groups) == 2 * 5 + 1
    assert model.recommend("likes", small_store.ids("user")[3], 40, "any") == expected
    with pytest.raises(OSError, match=r".+"):
        model.recommend("likes", small_store.ids("user")[10], 40)


def test_without_the_edges_nothing_is_left_out_and_a_warning_says_so(tmp_path):
    _, model = make(tmp_path)
    user = small_store.ids("user")[3]
    with pytest.warns(UserWarning, match="there is no table raw_edges of 2024-05-01, so known edges are not left out"):
        found = model.recommend("likes", user, 100, untrained=True)
    assert found == model.candidates("likes", user, 100, untrained=True)


def test_a_remote_stores_known_edges_are_left_out_too(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = small_store.make("memory://recommend", config=small_store.config())
    export(small.config, small.store, SNAPSHOT)
    write_raw_edges(small)
    model = load_model("memory://recommend/home")
    found = model.recommend("likes", small_store.ids("user")[3], 100, untrained=True)
    assert {small_store.ids("item")[row] for row in (0, 5, 9, 12)}.isdisjoint(tail for tail, _ in found)
    assert len(found) == NUM["item"] - 4


def write_trained_edges(small: Small, untrained: dict[str, list[int]] | None) -> None:
    """Write the embeddings anew with the column `trained_edges`, 0 for the rows of `untrained`; None: without it."""
    for entity in NUM:
        table = small.store.read(f"embeddings/{entity}", SNAPSHOT).drop_columns("trained_edges")
        if untrained is not None:
            counts = [0 if row in untrained.get(entity, ()) else 2 for row in range(len(table))]
            table = table.append_column("trained_edges", pa.array(counts, pa.int64()))
        manifest = small.store.manifest(f"embeddings/{entity}", SNAPSHOT)
        with small.store.replace(
            f"embeddings/{entity}", SNAPSHOT, config_hash="test", parents=manifest.parents
        ) as draft:
            draft.write(table)
    relations = small.store.manifest("embeddings/relations", SNAPSHOT)
    parents = relations.parents | small.store.versions(SNAPSHOT, [f"embeddings/{entity}" for entity in NUM])
    rows = small.store.read("embeddings/relations", SNAPSHOT)
    with small.store.replace("embeddings/relations", SNAPSHOT, config_hash="test", parents=parents) as draft:
        draft.write(rows)
        draft.details = relations.details


def test_entities_without_training_edges_are_neither_neighbors_nor_recommended_unless_asked_for(tmp_path):
    small, _ = make(tmp_path)
    write_raw_edges(small)
    write_trained_edges(small, {"user": [4, 20], "item": [1, 2]})
    model = load_model(small.store.root)
    users, items = small_store.ids("user"), small_store.ids("item")
    near = {name for name, _ in model.neighbors("user", users[3], 100)}
    assert near == set(users) - {users[3], users[4], users[20]}
    every = {name for name, _ in model.neighbors("user", users[3], 100, untrained=True)}
    assert every == set(users) - {users[3]}
    known = {items[row] for row in (0, 5, 9, 12)}
    recommended = {tail for tail, _ in model.recommend("likes", users[3], 100)}
    assert recommended == set(items) - known - {items[1], items[2]}
    assert {tail for tail, _ in model.recommend("likes", users[3], 100, untrained=True)} == set(items) - known
    with pytest.warns(UserWarning, match=f"user '{users[4]}' has no training edge"):
        model.recommend("likes", users[4])
    with pytest.warns(UserWarning, match=f"user '{users[4]}' has no training edge"):
        assert len(model.neighbors("user", users[4], 100)) == NUM["user"] - 2


def test_the_vector_of_an_entity_without_a_training_edge_comes_with_a_warning(tmp_path):
    small, _ = make(tmp_path)
    write_trained_edges(small, {"user": [4, 20], "item": [1]})
    model = load_model(small.store.root)
    users = small_store.ids("user")
    with pytest.warns(UserWarning, match=f"user '{users[4]}' has no training edge, so its vector says nothing$"):
        assert len(model.get_embedding("user", users[4])) == model.dim
    with pytest.warns(UserWarning, match=rf"user '{users[20]}' has no training edge.* \(2 such ids\)$"):
        model.get_embedding("user", [users[20], users[3], users[4]])
    for ask in (
        lambda: model.predict_relation(users[3], users[4], "follows"),
        lambda: model.candidates("likes", users[4]),
        lambda: model.queries("likes", [users[4]]),
    ):
        with pytest.warns(UserWarning, match=f"user '{users[4]}' has no training edge") as seen:
            ask()
        assert __file__ in {one.filename for one in seen}, "the caller's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.get_embedding("user", users[3])
        model.candidates("likes", model.get_embedding("user", users[3]))
        assert all(len(batch) for batch in model.neighbors("user"))


def test_a_table_that_does_not_tell_training_edges_leaves_nobody_out(tmp_path):
    small, _ = make(tmp_path)
    write_raw_edges(small)
    write_trained_edges(small, None)
    model = load_model(small.store.root)
    users = small_store.ids("user")
    assert {name for name, _ in model.neighbors("user", users[3], 100)} == set(users) - {users[3]}
    assert len(model.recommend("likes", users[3], 100, exclude_known=False)) == NUM["item"]


@pytest.mark.parametrize(
    ("arguments", "relation"),
    [
        (["u01", "--relation", "likes"], "likes"),
        (["u01", "-r", "rates", "--entity", "user"], "rates"),
        (["u01", "-r", "follows"], "follows"),
    ],
)
def test_the_command_recommends_as_the_api_does(tmp_path, arguments, relation, capsys):
    small, model = make(tmp_path)
    write_raw_edges(small)
    home = ["--home", small.store.root]
    assert run_arguments(["recommend", *arguments, "-k", "4", *home, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["id"], told["relation"], told["snapshot"]) == ("u01", relation, SNAPSHOT)
    expected = model.recommend(relation, "u01", 4)
    assert [(tail["id"], pytest.approx(tail["score"])) for tail in told["tails"]] == expected
    assert run_arguments(["recommend", *arguments, "-k", "4", *home]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["id", *(str(i) for i, _ in expected)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["u01"], "'u01' may be the head of several relations: likes, rates (user to item); follows (user to user)"),
        (["u100"], "no user has the id 'u100'; nearest: 'u10'"),
        (["u01", "-r", "like"], "unknown relation 'like'; did you mean 'likes'"),
        (["u01", "-e", "users"], "unknown entity type 'users'; did you mean 'user'"),
        (["u01", "-r", "likes", "-e", "item"], "relation likes goes from user to item; leave out --entity item"),
        (["120", "-e", "item"], "no relation goes from item; relations: likes, rates (user to item)"),
    ],
)
def test_a_relation_that_is_not_clear_is_one_line_that_lists_what_there_is(tmp_path, arguments, message, capsys):
    small, _ = make(tmp_path)
    assert run_arguments(["recommend", *arguments, "--home", small.store.root]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1 and captured.out == ""


def test_of_relations_between_the_same_types_the_one_with_the_most_edges_is_taken_and_a_note_says_so(tmp_path, capsys):
    relations = [{"name": name, "lhs": "user", "rhs": "item"} for name in ("rates", "likes")]
    relations.append({"name": "follows", "lhs": "item", "rhs": "user"})
    rows = [min(NUM.values()), len(relations), min(NUM.values())]  # which every type has
    splits = {split: edges % rows for split, edges in small_store.edges().items()}
    small = small_store.make(tmp_path, config=small_store.config(model={"relations": relations}), splits=splits)
    export(small.config, small.store, SNAPSHOT)
    write_raw_edges(small)
    assert run_arguments(["recommend", "u01", "--home", small.store.root, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["relation"] == "likes"
    assert captured.err == (
        "twhin: note: relation likes, which has the most edges of rates, likes; --relation chooses another\n"
    )
    assert run_arguments(["recommend", "120", "--home", small.store.root, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["relation"] == "follows" and captured.err == ""
