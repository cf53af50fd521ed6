"""Which fields each stage reads. Their values name what a table was made with: another value of another stage's field
neither makes a table unusable nor loses a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

STAGES = ("ingest", "vocabulary", "sample", "train")
"""Stages whose tables later stages compare with what they are asked for."""
UNTRAINED_SECTIONS = ("launch", "tune", "export", "source", "sources", "vocabulary", "split", "negatives", "recipe")
"""Sections that training does not read, or reads as part of the training set, whose version it compares."""
UNTRAINED_FIELDS = {
    "training": {
        "save_dir", "checkpoint_every_n", "checkpoint_max_to_keep", "train_log_every_n", "eval_timeout_in_s", "refit",
    },
    "evaluation": {"baselines", "baseline_edges", "must_beat", "floors"},
}  # fmt: skip
"""Fields that change what is written beside a training, and not its steps."""


def settings(config: TwhinConfig, stage: str) -> dict[str, Any]:
    """Return the values of the fields that a stage reads, by their paths.

    Args:
        config: The configuration, with relations found and the recipe's values filled in where the stage reads these.
        stage: One of `STAGES`.
    """
    everything = config.model_dump(mode="json")
    model = everything["model"]
    if stage == "ingest":
        return flat({"source": everything["source"], "sources": everything["sources"]})
    if stage == "vocabulary":
        tables = _chosen(model["embeddings"]["tables"], ("num_embeddings", "vocab"))
        ends = _chosen(model["relations"], ("lhs", "rhs"))
        return flat({"vocabulary": everything["vocabulary"], "model": {"tables": tables, "relations": ends}})
    if stage == "sample":
        values = {name: everything[name] for name in ("split", "negatives")}
        for name in ("train_data", "validation_data"):
            values[name] = {k: v for k, v in everything[name].items() if k != "per_replica_batch_size"}
        relations = _chosen(model["relations"], ("lhs", "rhs", "sides"))
        epochs = {"epochs": config.epochs_of_negatives}
        return flat(
            values
            | {"negatives": values["negatives"] | epochs, "loss": {"log_q": config.loss.log_q}}
            | {"model": {"relations": relations}}
        )
    assert stage == "train", stage
    values = {name: value for name, value in everything.items() if name not in UNTRAINED_SECTIONS}
    for section, left_out in UNTRAINED_FIELDS.items():
        values[section] = {key: value for key, value in values[section].items() if key not in left_out}
    found = flat(values)
    found.pop("model.embeddings.tables_to_log", None)
    return found


def digest(config: TwhinConfig, stage: str) -> str:
    """Return 12 hex digits that name what a stage reads."""
    return hashlib.sha256(json.dumps(settings(config, stage), sort_keys=True).encode()).hexdigest()[:12]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields whose values differ, with both values; a field that one side lacks is None there."""
    paths = [*now, *(path for path in before if path not in now)]
    return {path: (before.get(path), now.get(path)) for path in paths if before.get(path) != now.get(path)}


def _chosen(items: list[dict[str, Any]], fields: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return some fields of each of a list of named sections, by their names."""
    return {item["name"]: {field: item[field] for field in fields} for item in items}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return nested sections as `{"split.test": 0.1}`; of a list, named sections go by their names."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        value = {item["name"]: {k: v for k, v in item.items() if k != "name"} for item in value}
    if not isinstance(value, dict) or not value:
        return {path: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{path}.{key}" if path else str(key))
    return found
