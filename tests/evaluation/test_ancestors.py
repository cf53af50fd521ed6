"""A model that started from an earlier one is not asked for edges that the earlier one was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small_store
from small_store import RELATIONS, SNAPSHOT, Small

from twhin_pipeline.checks import checks
from twhin_pipeline.evaluation import ancestors
from twhin_pipeline.evaluation import evaluate as evaluation
from twhin_pipeline.evaluation.ancestors import Origin
from twhin_pipeline.evaluation.evaluate import evaluate
from twhin_pipeline.store import Manifest, Store, database

EARLIER, FIRST = "2024-04-01", "2024-03-01"
NAMES = list(RELATIONS)


def write_ancestor(
    small: Small,
    edges: np.ndarray,
    snapshot: str = EARLIER,
    view: str | None = None,
    started_from: list[dict[str, Any]] | None = None,
    store: Store | None = None,
) -> Manifest:
    """Write an earlier model trained on `edges` `[E, 3]`: its rows and its relations are in the opposite order."""
    store = store or small.store
    seen, whole = store.seen_as(view), store
    last = {name: small_store.NUM[name] - 1 for name in small_store.NUM}
    heads, tails = zip(*RELATIONS.values(), strict=True)
    lhs = np.array([last[name] for name in heads])[edges[:, 1]] - edges[:, 0]
    rhs = np.array([last[name] for name in tails])[edges[:, 1]] - edges[:, 2]
    rows = {"lhs": pa.array(lhs), "rhs": pa.array(rhs), "rel": pa.array((2 - edges[:, 1]).astype(np.int32))}
    with seen.replace("training_set/positives", snapshot, config_hash="test") as draft:
        draft.write(pa.table(rows))
    for name, size in small_store.NUM.items():
        if not whole.exists(f"vocabulary/{name}", snapshot):
            ids = small_store.ids(name)[::-1]
            with whole.replace(f"vocabulary/{name}", snapshot, config_hash="test") as draft:
                draft.write(pa.table({"id": ids, "row": pa.array(range(size), pa.int64())}))
    parents = seen.versions(snapshot, ["training_set/positives", *(f"vocabulary/{name}" for name in small_store.NUM)])
    relations = [{"name": name, "lhs": RELATIONS[name][0], "rhs": RELATIONS[name][1]} for name in NAMES[::-1]]
    with seen.replace("twhin_model", snapshot, config_hash="test", parents=parents) as draft:
        draft.details = {"model": {"relations": relations}, "started_from": started_from or []}
    return seen.manifest("twhin_model", snapshot)


def start_from(small: Small, *origins: Origin) -> None:
    """Make the small model anew, as one that started from others."""
    made = small.store.manifest("twhin_model", SNAPSHOT)
    small_store.write_model(small.store, small.config, _vectors(small), small.scorer)
    written = small.store.manifest("twhin_model", SNAPSHOT)
    with small.store.replace("twhin_model", SNAPSHOT, config_hash="test", parents=made.parents) as draft:
        for path in written.files:
            old = Path(small.store.path("twhin_model", SNAPSHOT, written.version, path["path"]))
            with draft.local_file(path["path"]) as new:
                Path(new).write_bytes(old.read_bytes())
        draft.details = {**written.details, "started_from": [one.as_details() for one in origins]}


def _vectors(small: Small) -> dict[str, np.ndarray]:
    spare = {name: np.zeros((5 if name == "item" else 0, small_store.DIM), np.float32) for name in small.vectors}
    return {name: np.concatenate([small.vectors[name], spare[name]]) for name in small.vectors}


@pytest.fixture
def small(tmp_path: Path) -> Small:
    return small_store.make(tmp_path, config=small_store.config())


@pytest.fixture
def ranked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The edges that an evaluation asks for."""
    asked: list[tuple[int, int, int]] = []
    original = evaluation.read_edges

    def read(con: Any, files: list[str], count: int) -> Any:
        found = original(con, files, count)
        for rel, edges in enumerate(found):
            asked.extend((a, rel, b) for a, b in zip(edges["lhs"].tolist(), edges["rhs"].tolist(), strict=True))
        return found

    monkeypatch.setattr(evaluation, "read_edges", read)
    return asked


def found(small: Small, origins: list[Origin]) -> ancestors.SeenBefore:
    with database.connect() as con:
        files = small.store.files("held_out/test", SNAPSHOT)
        return ancestors.find(con, small.config, small.store, SNAPSHOT, origins, files)


def triples(seen: ancestors.SeenBefore) -> set[tuple[int, int, int]]:
    return {(row["lhs"], row["rel"], row["rhs"]) for row in seen.edges.to_pylist()}


def test_edges_are_found_by_id_and_relation_name_whatever_rows_they_had(small: Small) -> None:
    test = small.edges["test"]
    trained = np.concatenate([test[::3], small.edges["train"]])
    origin = Origin.of_model(small.store, write_ancestor(small, trained), small.store)
    assert triples(found(small, [origin])) == {tuple(edge) for edge in test[::3].tolist()}


def test_edges_of_a_view_and_of_the_ancestors_of_an_ancestor_are_found_too(small: Small) -> None:
    test = small.edges["test"]
    first = Origin.of_model(small.store.seen_as("refit"), write_ancestor(small, test[:9], FIRST, "refit"), small.store)
    assert first.view == "refit"
    second = write_ancestor(small, test[20:25], started_from=[first.as_details()])
    seen = found(small, [Origin.of_model(small.store, second, small.store)])
    assert seen.ancestors == 2 and not seen.unknown
    assert triples(seen) == {tuple(edge) for edge in [*test[:9].tolist(), *test[20:25].tolist()]}


def test_a_checkpoints_training_set_is_found_in_the_store_by_its_version(small: Small) -> None:
    version = small.store.manifest("training_set/positives", SNAPSHOT).version
    with database.connect() as con:
        files = small.store.files("training_set/positives", SNAPSHOT)
        origin = Origin(checkpoint="/somewhere", training_set=version)
        seen = ancestors.find(con, small.config, small.store, SNAPSHOT, [origin], files)
        unknown = ancestors.find(con, small.config, small.store, SNAPSHOT, [Origin(checkpoint="/somewhere")], files)
    assert len(seen) == len(small.edges["train"]) and seen.ancestors == 1
    assert unknown.ancestors == 0 and "does not say what it was trained on" in unknown.unknown[0]


def test_an_ancestor_noted_by_an_earlier_version_of_the_package_is_followed(small: Small) -> None:
    refitted = write_ancestor(small, small.edges["test"][:4], view="refit")
    noted = {"store": small.store.root, "snapshot": EARLIER, "version": refitted.version}
    seen = found(small, list(ancestors.origins_in({"started_from": noted})))
    assert len(seen) == 4


def test_an_evaluation_leaves_out_what_an_ancestor_was_trained_on_and_says_how_many(
    small: Small, ranked: list[tuple[int, int, int]]
) -> None:
    test = small.edges["test"]
    start_from(small, Origin.of_model(small.store, write_ancestor(small, test[::2]), small.store))
    manifest = evaluate(small.config, small.store, SNAPSHOT)
    assert sorted(ranked) == sorted(tuple(edge) for edge in test[1::2].tolist())
    assert manifest.details["edges"] == len(test[1::2]) and manifest.details["edges_left_out"] == len(test[::2])
    assert sum(manifest.details["edges_left_out_per_relation"].values()) == len(test[::2])
    assert manifest.details["notes"][0].startswith(f"{len(test[::2])} test edges were left out")
    result = checks.run("ancestors_left_out", small.config, small.store, SNAPSHOT)
    assert result.passed and result.measured is not None
    assert result.measured.to_pylist()[0]["edges_left_out"] == len(test[::2])


def test_an_edge_that_is_left_out_is_no_rival_of_the_others(small: Small) -> None:
    """It is a true edge: the ranks of the other edges are as they were, and retrieval leaves it out as known."""
    before = evaluate(small.config, small.store, SNAPSHOT)
    rows = small.store.read("evaluation", SNAPSHOT).to_pylist()
    test, follows = small.edges["test"], NAMES.index("follows")
    out = test[test[:, 1] != follows]
    start_from(small, Origin.of_model(small.store, write_ancestor(small, out), small.store))
    after = evaluate(small.config, small.store, SNAPSHOT)
    again = small.store.read("evaluation", SNAPSHOT).to_pylist()
    assert before.details["edges"] == len(test) and after.details["edges"] == len(test) - len(out)
    kept = [_of(rows, metric) for metric in ("filtered_mrr", "recall@10")]
    assert all(kept) and kept == [_of(again, metric) for metric in ("filtered_mrr", "recall@10")]
    seen = found(small, list(ancestors.origins_of(small.store.manifest("twhin_model", SNAPSHOT))))
    with database.connect() as con:
        left = evaluation.HeldOut.open(small.store, SNAPSHOT).without(con, seen.edges, small.store.root)
    assert set(left.before) <= set(left.seen) and len(left.before) == 1


def _of(rows: list[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["relation"] == "follows" and row["metric"] == metric]


def test_an_ancestor_whose_training_set_is_gone_is_named_and_holds_the_evaluation_back(small: Small) -> None:
    model = write_ancestor(small, small.edges["test"][:5])
    start_from(small, Origin.of_model(small.store, model, small.store))
    small.store.fs.rm(small.store.path("training_set/positives", EARLIER), recursive=True)
    manifest = evaluate(small.config, small.store, SNAPSHOT)
    assert "could not be left out" in manifest.details["warnings"][0] and EARLIER in manifest.details["warnings"][0]
    result = checks.run("ancestors_left_out", small.config, small.store, SNAPSHOT)
    assert not result.passed and checks.CHECKS["ancestors_left_out"].blocking


def test_a_model_of_no_other_leaves_out_nothing_and_passes(small: Small) -> None:
    details = evaluate(small.config, small.store, SNAPSHOT).details
    assert details["edges_left_out"] == 0 and details["notes"] == []
    assert checks.run("ancestors_left_out", small.config, small.store, SNAPSHOT).passed
