"""A store that is filled day after day: each day's model starts from that of the day before, and each is published."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import small_store
import torch
from small_store import DIM, NUM, RELATIONS

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.ancestors import Origin
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.store import Store, Verdict, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors import compatibility
from twhin_pipeline.vectors.export import export
from twhin_pipeline.vectors.model_files import Writer, manifest_details

CONFIG = small_store.config(training={"refit": False})
PASSED = Verdict("passed", "2025-01-01T00:00:00+00:00")
NOW = datetime.now(UTC) + timedelta(days=100)
"""Long after everything was made."""


def name(day: int) -> str:
    return str(date(2025, 1, 1) + timedelta(days=day))


def drawn(day: int, size: int) -> np.ndarray:
    """Edges `[E, 3]` of a day: head, relation, tail."""
    rng = np.random.default_rng(day)
    rel = rng.integers(len(RELATIONS), size=size)
    ends = [np.array([NUM[pair[side]] for pair in RELATIONS.values()])[rel] for side in (0, 1)]
    rows = np.stack(
        [(rng.random(size) * ends[0]).astype(np.int64), rel, (rng.random(size) * ends[1]).astype(np.int64)], 1
    )
    return np.unique(rows, axis=0)


def make(store: Store, day: int, publish: bool = True, uri: str | None = None, edges: int = 300) -> Release:
    """Make and publish one day; without `publish` its release is made and does not become current."""
    snapshot = name(day)
    rng = np.random.default_rng(day)
    rows = rng.permutation(drawn(day, edges))
    test, train = rows[:30], rows[30:]

    def write(asset: str, table: pa.Table, parents: dict[str, str], details: dict[str, Any] | None = None) -> None:
        with store.replace(asset, snapshot, config_hash="c", parents=parents) as draft:
            draft.write(table)
            draft.details = details or {}
        store.judge(store.manifest(asset, snapshot), PASSED)

    write("raw_edges_rejected", pa.table({"reason": ["x"]}), {})
    write("raw_edges", _named(rows), {}, {"relations": list(RELATIONS)})
    edges_of = store.versions(snapshot, ["raw_edges"])
    for entity, size in NUM.items():
        asset = f"vocabulary/{entity}"
        before = store.latest_before(asset, snapshot)
        parents = edges_of | ({f"{asset}@{before.snapshot}": before.version} if before else {})
        table = {"id": small_store.ids(entity), "row": range(size), "degree": [1] * size}
        write(asset, pa.table({**table, "first_snapshot": [name(0)] * size}), parents)
    words = [f"vocabulary/{entity}" for entity in NUM]
    for asset, some in (
        ("training_set/positives", train), ("held_out/validation", test[:0]), ("held_out/test", test),
    ):  # fmt: skip
        write(asset, _encoded(some), store.versions(snapshot, ["raw_edges", *words]))
    _model(store, snapshot, CONFIG, rng, store.versions(snapshot, ["training_set/positives", *words]))
    export(CONFIG, store, snapshot)
    for entity in (*NUM, "relations"):
        store.judge(store.manifest(f"embeddings/{entity}", snapshot), PASSED)
    held = ["twhin_model", "training_set/positives", "held_out/validation", "held_out/test", *words]
    write("evaluation", pa.table({"metric": ["filtered_mrr"], "value": [day / 100]}), store.versions(snapshot, held))
    return _publish(store, snapshot, publish, uri, write)


def _publish(store: Store, snapshot: str, publish: bool, uri: str | None, write: Any) -> Release:
    tables = store.versions(snapshot, ["evaluation", *(f"embeddings/{entity}" for entity in (*NUM, "relations"))])
    before = releases.current(store)
    maps = compatibility.SCHEMA.empty_table()
    if before is not None:
        with database.connect(store=store) as con:
            maps = compatibility.table(con, store, before, tables, snapshot, "linear")
    write("published", maps, tables, {"compatible_with": before.name} if before else {})
    version = store.manifest("published", snapshot).version
    release = releases.make(store, snapshot, {"published": version}, {"filtered_mrr": 0.1}, uri)
    if publish:
        releases.promote(store, release.name, "me", "checked")
    return release


def _model(store: Store, snapshot: str, config: TwhinConfig, rng: np.random.Generator, parents: dict[str, str]) -> None:
    before = store.latest_before("twhin_model", snapshot)
    origins = [Origin.of_model(store, before, store).as_details()] if before else []
    more = {f"twhin_model@{before.snapshot}": before.version} if before else {}
    with store.replace("twhin_model", snapshot, config_hash="c", parents=parents | more) as draft:
        writer = Writer(draft, 0)
        for entity, size in NUM.items():
            writer.table(entity, [(0, torch.from_numpy(rng.normal(size=(size, DIM)).astype(np.float32)))])
        writer.relations(config.model, Scorer(config.model).state_rows())
        draft.details = {**manifest_details(config), "mlflow_run_id": None, "started_from": origins}
    store.judge(store.manifest("twhin_model", snapshot), PASSED)


def _named(rows: np.ndarray) -> pa.Table:
    names, sides = list(RELATIONS), list(RELATIONS.values())
    columns: dict[str, list[str]] = {"lhs": [], "rel": [], "rhs": []}
    known = {entity: [str(one) for one in small_store.ids(entity)] for entity in NUM}
    for lhs, rel, rhs in rows.tolist():
        columns["lhs"].append(known[sides[rel][0]][lhs])
        columns["rel"].append(names[rel])
        columns["rhs"].append(known[sides[rel][1]][rhs])
    weights = pa.array(np.ones(len(rows)), pa.float32())
    return pa.table({**columns, "weight": weights}).sort_by([("rel", "ascending"), ("lhs", "ascending")])


def _encoded(rows: np.ndarray) -> pa.Table:
    count = len(rows)
    return pa.table(
        {
            "chunk": pa.array(np.zeros(count), pa.int32()),
            "lhs": pa.array(rows[:, 0]),
            "rhs": pa.array(rows[:, 2]),
            "rel": pa.array(rows[:, 1].astype(np.int32)),
            "weight": pa.array(np.ones(count), pa.float32()),
        }
    )
