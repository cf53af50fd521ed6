"""The table `drift`: a snapshot's new vectors and model beside those of the current release.

It is made before the snapshot is published, and `promotion` decides by it. Where nothing is current it is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle.challenge import ALL, MRR, Outcome, challenge, quality_metric
from twhin_pipeline.lifecycle.drift import Drift, drift
from twhin_pipeline.store import Manifest, Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import DRIFT

ENTITY, RELATION = "entity", "relation"
K = 10
"""Neighbors of an id that are compared."""
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string()),
        pa.field("name", pa.string()),
        pa.field("metric", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
    ]
)


def compare(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Write the table `drift` of a snapshot and return its manifest.

    Raises:
        UserError: A table of the snapshot is missing.
    """
    vectors = [f"embeddings/{name}" for name in (*config.model.table_names, "relations")]
    parents = store.versions(snapshot, ["twhin_model", "held_out/test", "training_set/positives", *vectors])
    current = releases.current(store)
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {"compared_with": None}
    if current is not None:
        try:
            rows, details = _beside(config, store, snapshot, current, Release("the new export", snapshot, "", parents))
        except UserError as error:  # a current release that cannot be read is no reason to hold the new one back
            rows, details = [], {"notes": [f"{current.name} cannot be compared with: {error}"]}
        details["compared_with"] = current.name
    with store.replace(DRIFT, snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.write(pa.Table.from_pylist(rows, schema=SCHEMA))
        draft.details = details
    return store.manifest(DRIFT, snapshot)


def _beside(
    config: TwhinConfig, store: Store, snapshot: str, current: Release, new: Release
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the rows, and the manifest's details."""
    with database.connect(config, store) as con:
        moved = drift(con, store, current, new, K, config.export.compatibility)
        outcome = challenge(con, config, store, snapshot, current)
    details = {
        "edges": next((one.edges for one in outcome.challenges if one.relation == ALL), 0),
        "edges_left_out": outcome.left_out,
        "metric": quality_metric(config),
        "lacks": lacks(store, current, new),
        "notes": outcome.notes,
    }
    return [*_of_relations(outcome), *_of_entities(moved)], details


def _of_relations(outcome: Outcome) -> Iterator[dict[str, Any]]:
    for one in outcome.challenges:
        about = {"kind": RELATION, "name": one.relation}
        if one.metric == MRR:
            yield about | {"metric": "edges", "value": float(one.edges)}
        yield about | {"metric": one.metric, "value": one.new}
        yield about | {"metric": f"{one.metric}_current", "value": one.current}
        yield about | {"metric": f"{one.metric}_change", "value": one.change, "low": one.low, "high": one.high}


def _of_entities(moved: list[Drift]) -> Iterator[dict[str, Any]]:
    for one in moved:
        for metric, value in values(one).items():
            if value is not None:
                yield {"kind": ENTITY, "name": one.entity, "metric": metric, "value": float(value)}


def values(one: Drift) -> dict[str, float | None]:
    """Return what is measured of an entity type, by the metric's name in the table; None where it is not."""
    told: dict[str, float | None] = {}
    if (consumer := one.consumer) is not None:
        told = {
            "consumer_loss": consumer.loss, "consumer_loss_new": consumer.loss_new,
            "consumer_loss_mapped": consumer.loss_mapped, "consumer_auc": consumer.auc,
            "consumer_auc_new": consumer.auc_new, "consumer_auc_mapped": consumer.auc_mapped,
        }  # fmt: skip
    return {
        "kept": one.kept, "new": one.added, "departed": one.departed,
        "new_share": one.new, "departed_share": one.gone,
        "cosine": one.cosine, "cosine_p05": one.cosine_p05, "aligned_cosine": one.aligned_cosine,
        "distance": one.distance, "length": one.length, f"neighbors@{K}": one.neighbors,
        **told,
    }  # fmt: skip


def lacks(store: Store, current: Release, new: Release) -> list[str]:
    """Say what consumers of the current release would miss in the new one: tables, relations, the same dimension."""
    missing = [name for name in current.tables if name.startswith("embeddings/") and name not in new.tables]
    result = [f"no table {name}" for name in missing]
    models = [_model_of(store, release) for release in (current, new)]
    if models[0] and models[1]:
        names = [{one["name"] for one in model["relations"]} for model in models]
        result += [f"no relation {name}" for name in sorted(names[0] - names[1])]
        sizes = [{one["embedding_dim"] for one in model["embeddings"]["tables"]} for model in models]
        if sizes[0] != sizes[1]:
            result.append(f"{_one(sizes[1])} dimensions, before {_one(sizes[0])}")
    return result


def _one(sizes: set[int]) -> str:
    return " and ".join(str(size) for size in sorted(sizes))


def _model_of(store: Store, release: Release) -> Mapping[str, Any]:
    name = "embeddings/relations"
    manifest = store.seen_as(None).manifest(name, release.snapshot, release.tables.get(name))
    model: Mapping[str, Any] = manifest.details["model"]
    return model
