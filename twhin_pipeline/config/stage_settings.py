"""Which fields each stage reads. Their values name what a table was made with: another value of another stage's field
neither makes a table unusable nor loses a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

STAGES = ("ingest", "vocabulary", "sample", "train", "index")
"""Stages whose tables are compared with what later stages, or they themselves when they run again, are asked for."""
UNTRAINED_SECTIONS = (
    "launch", "engine", "tune", "export", "indexes", "maps", "promotion", "retention", "source", "sources",
    "vocabulary", "split", "negatives", "recipe",
)  # fmt: skip
"""Sections that training does not read, or reads as part of the training set, whose version it compares."""
UNTRAINED_FIELDS = {
    "training": {
        "save_dir", "checkpoint_every_n", "checkpoint_max_to_keep", "train_log_every_n", "eval_timeout_in_s", "refit",
    },
    "evaluation": {"baselines", "baseline_edges", "must_beat", "floors"},
}  # fmt: skip
"""Fields that change what is written beside a training, and not its steps."""
SCORING = re.compile(
    r"model\.(comparator|reciprocal|temperature|max_norm|relations\..*\.(lhs|rhs|operator)"
    r"|embeddings\.tables\..*\.embedding_dim)"
)
"""Paths of the fields that say how a trained model scores an edge."""
SNAPSHOTS = re.compile(r"(source|sources\.[^.]+)\.snapshots\b")
"""Paths of the fields that list snapshots; tables that an earlier version made have them among their settings."""
LIMITS = re.compile(r"(source|sources\.[^.]+)\.(max_rejected_share|min_kept_share|max_growth|max_top_gain)")
"""Paths of the fields that checks of `raw_edges` judge by: another limit makes no other table; it is judged anew."""

ADDED: dict[str, Any] = {
    "time_unit": "s",
    "normalize_ids": [],
    "new_ids": "random",
    "keep_departed": 30,
    "pull": 0.0,
    "freeze": False,
}
"""Fields that an earlier version did not have, by their last name, with the value that says what it did."""


def settings(config: TwhinConfig, stage: str) -> dict[str, Any]:
    """Return the values of the fields that a stage reads, by their paths.

    Args:
        config: The configuration, with relations found and the recipe's values filled in where the stage reads these.
        stage: One of `STAGES`.
    """
    everything = config.model_dump(mode="json")
    model = everything["model"]
    if stage == "ingest":
        # Which snapshots there are is no matter to one of them.
        values = flatten({"source": everything["source"], "sources": everything["sources"]})
        return {path: value for path, value in values.items() if not SNAPSHOTS.match(path)}
    if stage == "vocabulary":
        tables = _chosen(model["embeddings"]["tables"], ("num_embeddings", "vocab"))
        ends = _chosen(model["relations"], ("lhs", "rhs"))
        return flatten({"vocabulary": everything["vocabulary"], "model": {"tables": tables, "relations": ends}})
    if stage == "sample":
        values = {name: everything[name] for name in ("split", "negatives")}
        for name in ("train_data", "validation_data"):
            values[name] = {k: v for k, v in everything[name].items() if k != "per_replica_batch_size"}
        relations = _chosen(model["relations"], ("lhs", "rhs", "sides"))
        epochs = {"epochs": config.epochs_of_negatives}
        return flatten(
            values
            | {"negatives": values["negatives"] | epochs, "loss": {"log_q": config.loss.log_q}}
            # Edges are encoded by their relation's position, so the order counts.
            | {"model": {"relations": relations, "relation_order": config.model.relation_names}}
        )
    if stage == "index":
        return flatten({"indexes": everything["indexes"]})
    assert stage == "train", stage
    values = {name: value for name, value in everything.items() if name not in UNTRAINED_SECTIONS}
    for section, left_out in UNTRAINED_FIELDS.items():
        values[section] = {key: value for key, value in values[section].items() if key not in left_out}
    result = flatten(values)
    result.pop("model.embeddings.tables_to_log", None)
    return result


def digest(config: TwhinConfig, stage: str) -> str:
    """Return 12 hex digits that name what a stage reads."""
    return hashlib.sha256(json.dumps(settings(config, stage), sort_keys=True).encode()).hexdigest()[:12]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields whose values differ, with both values; a field that one side lacks is None there.

    One that was added since (`ADDED`) had the value there that it stands for.
    """
    paths = [*now, *(path for path in before if path not in now)]
    both = {path: (before.get(path, ADDED.get(path.rpartition(".")[2])), now.get(path)) for path in paths}
    return {path: values for path, values in both.items() if values[0] != values[1] and not SNAPSHOTS.match(path)}


def _chosen(items: list[dict[str, Any]], fields: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return some fields of each of a list of named sections, by their names."""
    return {item["name"]: {field: item[field] for field in fields} for item in items}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as `{"model.relations.fav.lhs": "user"}`; list items go by their name, else number."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(item.get("name", i)), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat
