"""The stage `index`: which types get one, what the table says of it, and that it is opened for its own vectors only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small_store
import torch
from small_store import NUM, SNAPSHOT, Small

from twhin_pipeline.checks import checks
from twhin_pipeline.errors import UserError
from twhin_pipeline.stages import chain
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Store
from twhin_pipeline.store.draft import is_data
from twhin_pipeline.vectors import index_choice, indexing, vector_index
from twhin_pipeline.vectors.entity_table import EntityTable
from twhin_pipeline.vectors.export import export


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


def test_where_a_graph_finds_too_few_auto_takes_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = made(tmp_path, exact_rows=35)
    built: list[str] = []
    whole = vector_index.build

    def build(kind, *given, **options):  # type: ignore[no-untyped-def]
        built.append(kind)
        return whole("flat", *given, **options)

    monkeypatch.setattr(indexing, "LEAST_FOR_PQ", 1)
    monkeypatch.setattr(vector_index, "build", build)
    monkeypatch.setattr(vector_index, "_efforts", lambda index, k: [[vector_index.Effort()]])
    monkeypatch.setattr(vector_index.VectorIndex, "_searching", lambda self, effort: None)
    monkeypatch.setattr(vector_index, "recall", lambda found, best, k: 0.9 if built[-1] == "hnsw" else 0.99)
    run_stage(small)
    assert built == ["hnsw", "ivf_pq"]
    assert small.store.manifest("index/item", SNAPSHOT).details["kind"] == "ivf_pq"


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
