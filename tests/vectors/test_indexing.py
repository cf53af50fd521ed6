"""The stage `index`: which types get one, what the table says of it, and that it is opened for its own vectors only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import small_store
import torch
from small_store import NUM, SNAPSHOT, Small

from twhin_pipeline import load_model
from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.store.draft import is_data
from twhin_pipeline.vectors import index_choice, indexing, vector_index
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.retrieval import ExactSearch


def made(folder: Path | str, comparator: str = "dot", normalize: bool = False, **indexes: object) -> Small:
    """Write the small store, its vectors and its indexes, by the chain's own step."""
    config = small_store.config(
        model={"comparator": comparator, "temperature": 0.5},
        indexes={"recall_at": [3, 10], **indexes},
        export={"normalize": normalize},
        training={"refit": False},
    )
    small = small_store.make(folder, config=config)
    export(config, small.store, SNAPSHOT)
    return small


def run_stage(small: Small) -> list[str]:
    said: list[str] = []
    chain.run_stage(Run(small.config, "unused", [], small.store, SNAPSHOT), chain.STAGES["index"], said.append)
    return said


@pytest.mark.parametrize("comparator", ["dot", "cosine", "l2", "squared_l2"])
@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_every_relation_finds_its_best_trained_tails_with_the_models_scores(
    tmp_path: Path, comparator: str, kind: str
) -> None:
    small = made(tmp_path, comparator, kind=kind)
    run_stage(small)
    for number, (relation, (lhs, rhs)) in enumerate(small_store.RELATIONS.items()):
        manifest = small.store.manifest(f"embeddings/{rhs}", SNAPSHOT)
        found = index_choice.manifest_of(small.store, manifest)
        assert found is not None
        index = indexing.open_index(small.store, found, EntityTable.open(small.store, manifest), small.config.model)
        assert index is not None
        heads = torch.from_numpy(small.vectors[lhs][:5]).unsqueeze(0)
        with torch.inference_mode():
            queries = small.scorer.queries("rhs", heads, torch.tensor([number]))[0].numpy()
        rows, scores = index.search(queries, 10)
        trained = {int(row) for split in ("train",) for edge in small.edges[split] for row in _ends(edge, rhs)}
        for head in range(5):
            plain = {row: small_store.score(small, number, head, row) for row in sorted(trained)}
            best = sorted(plain, key=lambda row: -plain[row])[:10]
            assert rows[head].tolist() == best, relation
            np.testing.assert_allclose(scores[head], [plain[row] for row in best], rtol=1e-4, atol=1e-4)


def _ends(edge: np.ndarray, entity: str) -> list[int]:
    lhs, rhs = list(small_store.RELATIONS.values())[int(edge[1])]
    return [int(row) for row, kind in ((edge[0], lhs), (edge[2], rhs)) if kind == entity]


def test_the_table_has_each_relations_recall_at_each_k_and_passes_its_check(tmp_path: Path) -> None:
    small = made(tmp_path, kind="hnsw")
    [line] = run_stage(small)
    assert "index/item hnsw of" in line and "recall 1.000" in line
    table = small.store.read("index/item", SNAPSHOT).to_pylist()
    assert [(row["relation"], row["k"]) for row in table] == [
        ("likes", 3), ("likes", 10), ("rates", 3), ("rates", 10)
    ]  # fmt: skip
    heads = {
        relation: len({e[0] for e in small.edges["train"] if e[1] == number})
        for number, relation in enumerate(small_store.RELATIONS)
    }
    assert {row["relation"]: row["queries"] for row in table} == {name: heads[name] for name in ("likes", "rates")}
    manifest = small.store.manifest("index/item", SNAPSHOT)
    for row in table:
        assert row["recall"] == 1.0 and row["wanted_recall"] == 0.95 and row["latency_ms"] > 0 < row["exact_ms"]
        assert row["bytes"] == os.path.getsize(
            small.store.path("index/item", SNAPSHOT, manifest.version, indexing.FILE)
        )
    assert small.store.verify(manifest) == manifest.bytes  # FAISS's file is one of the version's
    assert [file["path"] for file in manifest.files if not is_data(file["path"])] == [indexing.FILE]
    verdict = small.store.verdict("index/item", SNAPSHOT, manifest.version)
    assert verdict is not None and verdict.status == "passed"


def test_the_least_recall_of_each_type_is_logged_with_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[str, float] = {}
    monkeypatch.setattr("twhin_pipeline.tracking.log_evaluation", lambda store, model, metrics: logged.update(metrics))
    small = made(tmp_path, kind="hnsw")
    run_stage(small)
    found = {name: small.store.manifest(f"index/{name}", SNAPSHOT).details["least_recall"] for name in NUM}
    assert logged == {f"index_recall/{name}": least for name, least in found.items()} and min(found.values()) > 0


def test_a_recall_below_the_wanted_one_holds_the_index_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = made(tmp_path, kind="flat")
    monkeypatch.setattr(vector_index, "recall", lambda found, best, k: 0.9 if k == 3 else 0.96)
    with pytest.raises(UserError, match=r"index_recall of index/item .*recalls are below"):
        run_stage(small)
    result = checks.run("index_recall", small.config, small.store, SNAPSHOT, "index/item")
    assert result.offending is not None and set(result.offending["k"].to_pylist()) == {3}


def test_by_default_a_small_graph_gets_no_index_and_no_table(tmp_path: Path) -> None:
    small = made(tmp_path)
    [line] = run_stage(small)
    assert "left out: exact search is fast enough below 200,000 entities" in line
    assert not [asset for asset in small.store.assets() if asset.startswith("index")]


def test_where_one_type_is_large_the_small_ones_get_a_table_without_rows(tmp_path: Path) -> None:
    small = made(tmp_path, exact_rows=35)  # 30 users, 40 items, some of both untrained
    large = index_choice.indexable(small.store.manifest("embeddings/item", SNAPSHOT)) >= 35
    assert large
    [line] = run_stage(small)
    assert "index/user none (small)" in line and "index/item hnsw" in line
    users = small.store.manifest("index/user", SNAPSHOT)
    assert users.rows == 0 and users.details == {"kind": "none"}
    table = EntityTable.open(small.store, small.store.manifest("embeddings/user", SNAPSHOT))
    assert indexing.open_index(small.store, users, table, small.config.model) is None


def test_an_index_larger_than_may_be_is_made_of_compressed_vectors(tmp_path: Path) -> None:
    config = made(tmp_path, exact_rows=0, largest_gib=1.0).config
    fits = 2**30 // (4 * small_store.DIM + 8 * index_choice.LINKS)
    assert [index_choice.kind_for(config, rows) for rows in (0, fits, fits + 1)] == ["none", "hnsw", "ivf_pq"]
    forced = small_store.config(indexes={"kind": "ivf_pq"})
    assert [index_choice.kind_for(forced, rows) for rows in (9_000, 10_000)] == ["flat", "ivf_pq"]


@contextmanager
def hard_store(folder: Path, size: int, **indexes: object) -> Iterator[Small]:
    """Write a store with `size` items, whose best tails a graph of inner products cannot reach, and its indexes.

    Most items are long, and all items are nearest to those. Heads point away from them, to a few short items, which no
    item is linked to.
    """
    rng = np.random.default_rng(0)
    sizes = {"user": 40, "item": size}
    users, items = (0.1 * rng.normal(size=(n, small_store.DIM)).astype(np.float32) for n in sizes.values())
    items[:, 0] += 30
    items[:, 1:] *= 30
    short = np.arange(0, sizes["item"], 26)
    items[short] = rng.normal(size=(len(short), small_store.DIM))
    items[short, 0] = 0.5
    users += 100 * rng.normal(size=users.shape)
    users[:, 0] = -400
    heads = np.arange(sizes["item"]) % sizes["user"]
    # Each item has a training edge, of either relation that leads to it.
    edges = np.stack([heads, np.arange(sizes["item"]) // 40 % 2 * 2, np.arange(sizes["item"])], 1)
    splits = {"train": edges, "validation": edges[:0], "test": edges[:0]}
    with pytest.MonkeyPatch.context() as patch:
        for name, count in sizes.items():
            patch.setitem(small_store.NUM, name, count)
        config = small_store.config(
            indexes={"recall_at": [10], "queries": 60, **indexes},
            training={"refit": False},
            launch={"data_threads": 1},
        )
        small = small_store.make(folder, config=config, splits=splits, vectors={"user": users, "item": items})
        export(config, small.store, SNAPSHOT)
        run_stage(small)
        yield small


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Small]:
    with hard_store(tmp_path_factory.mktemp("hard"), 10_400, kind="auto", exact_rows=5_000) as small:
        yield small


def test_of_few_vectors_that_a_graph_does_not_reach_all_are_compared(tmp_path: Path) -> None:
    with hard_store(tmp_path, 2_080, kind="hnsw") as small:
        details = {name: small.store.manifest(f"index/{name}", SNAPSHOT).details for name in NUM}
        assert details["item"]["kind"] == "flat" and details["item"]["least_recall"] == 1
        assert details["user"]["kind"] == "hnsw"  # no head points away from a user


def test_of_vectors_that_a_graph_does_not_reach_auto_makes_lists_which_do(hard: Small) -> None:
    details = hard.store.manifest("index/item", SNAPSHOT).details
    assert details["kind"] == "ivf_pq" and details["least_recall"] >= 0.95
    figures = hard.store.read("index/item", SNAPSHOT)
    assert set(figures["relation"].to_pylist()) == {"likes", "rates", None}
    assert checks.run("index_recall", hard.config, hard.store, SNAPSHOT, "index/item").passed


def test_neighbors_have_an_index_of_their_own_where_the_comparator_is_not_the_cosine(
    hard: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(hard.store.root)
    exact = model.neighbors("item", k=10, search="exact").read_all()
    with monkeypatch.context() as patch:
        patch.setattr(ExactSearch, "search", lambda *_: pytest.fail("compared all"))
        found = model.neighbors("item", k=10, search="index").read_all()
        one = model.neighbors("item", small_store.ids("item")[7], 10)
    assert one == [(row["neighbor"], pytest.approx(row["similarity"])) for row in found.slice(70, 10).to_pylist()]
    pairs, best = (set(zip(*table.to_pydict().values(), strict=True)) for table in (
        found.select(["id", "neighbor"]), exact.select(["id", "neighbor"])
    ))  # fmt: skip
    assert len(pairs & best) / len(best) >= 0.94  # the share is measured on some, and wanted to be .95
    assert all(id != other for id, other in pairs)
    unit = hard.vectors["item"] / np.linalg.norm(hard.vectors["item"], axis=1, keepdims=True)
    row = {id: number for number, id in enumerate(small_store.ids("item"))}
    for answer in found.slice(0, 500).to_pylist():
        cosine = unit[row[answer["id"]]] @ unit[row[answer["neighbor"]]]
        assert answer["similarity"] == pytest.approx(cosine, abs=1e-5)


def test_neighbors_that_lists_do_not_find_are_found_by_comparing_all(
    hard: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_index, "_efforts", lambda index, k: [[vector_index.Effort(1, 1)]])
    config = hard.config.model_copy(update={"indexes": hard.config.indexes.model_copy(update={"kind": "ivf_pq"})})
    indexing.build(config, hard.store, SNAPSHOT, {})
    manifest = hard.store.newest("index/item", SNAPSHOT)
    assert manifest is not None and "neighbors" not in manifest.details
    assert not [file for file in manifest.files if indexing.NEIGHBORS in str(file)]
    assert hard.store.read("index/item", SNAPSHOT)["relation"].null_count == 0
    model = load_model(hard.store.root)
    assert len(model.neighbors("item", small_store.ids("item")[7], 10)) == 10
    with pytest.raises(UserError, match="no index of item for neighbors"):
        model.neighbors("item", small_store.ids("item")[7], 10, search="index")


def test_an_index_is_none_of_other_vectors(tmp_path: Path) -> None:
    small = made(tmp_path, kind="flat")
    run_stage(small)
    assert index_choice.current(small.store, SNAPSHOT, NUM) == ["index/user", "index/item"]
    export(small.config, small.store, SNAPSHOT)  # the same vectors, but another version
    assert index_choice.current(small.store, SNAPSHOT, NUM) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [({"normalize": True}, "export.normalize"), ({"kind": "none"}, "indexes.kind is none")],
)
def test_what_cannot_have_an_index_says_why(tmp_path: Path, change: dict[str, object], why: str) -> None:
    small = made(tmp_path, **{"kind": "hnsw", **change})  # type: ignore[arg-type]
    assert why in run_stage(small)[0]


def test_without_the_library_auto_makes_do_and_a_kind_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twhin_pipeline.extras.find_spec", lambda name: None if name == "faiss" else object())
    assert "twhin-pipeline[index]" in run_stage(made(tmp_path / "a", exact_rows=1))[0]
    with pytest.raises(UserError, match=r"twhin-pipeline\[index\]"):
        run_stage(made(tmp_path / "b", kind="flat"))


def test_the_index_of_a_remote_store_is_read_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = made(f"memory://{tmp_path.name}", kind="hnsw")
    run_stage(small)
    store = Store(small.store.root)
    manifest = store.manifest("embeddings/item", SNAPSHOT)
    found = index_choice.manifest_of(store, manifest)
    assert found is not None
    index = indexing.open_index(store, found, EntityTable.open(store, manifest), small.config.model)
    assert index is not None and len(index) == index_choice.indexable(manifest)
    assert len(list((tmp_path / "cache").rglob(indexing.FILE))) == 1


def test_whether_there_is_an_index_to_build_is_found_without_torch(tmp_path: Path) -> None:
    small = made(tmp_path)
    code = (
        "import sys\n"
        "from twhin_pipeline.config import load_config\n"
        "from twhin_pipeline.store import Store\n"
        "from twhin_pipeline.vectors import index_choice\n"
        f"config = load_config({str(tmp_path / 'c.yaml')!r})\n"
        f"assert index_choice.reason_against(config, Store({small.store.root!r}), {SNAPSHOT!r})\n"
        "assert not {'torch', 'faiss'} & set(sys.modules)\n"
    )
    (tmp_path / "c.yaml").write_text(small.config.to_yaml())
    subprocess.run([sys.executable, "-c", code], check=True)
