"""Releases: how a snapshot's vectors compare with the current release's, and whether it becomes the current one."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, rounded, table, thumbnail

COUNTS = ("kept", "new", "departed", "edges")
"""Whole numbers, among figures that are not."""


def comparison(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage that compares, which comes before the release."""
    text = (
        "The new vectors and model beside the current release's: change of each entity type's vectors, neighbors and "
        "a consumer's loss; and ranks of the same held-out edges by both models."
    )
    stage = STAGES["compare"]
    specs = [
        steps.spec(name, stage, config, group="releases", description=text, code="lifecycle.comparison")
        for name in stage.tables(config)
    ]
    return steps.make(stage, config, partitions, specs=specs, page=drift_page)


def decision(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage that decides, which comes last."""
    text = "The decision: the release became current, or was held back, with each gate's figure and limit."
    stage = STAGES["decide"]
    specs = [
        steps.spec(name, stage, config, group="releases", description=text, code="lifecycle.promotion")
        for name in stage.tables(config)
    ]
    return steps.make(stage, config, partitions, specs=specs, page=promotion_page)


def drift_page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return the figures by entity type and by relation, and a picture of them."""
    from twhin_pipeline.lifecycle.comparison import ENTITY, RELATION
    from twhin_pipeline.views import thumbnails
    from twhin_pipeline.views.release_tables import pivoted

    rows = step.store.read(manifest.asset, manifest.snapshot).to_pylist()
    shown: dict[str, Any] = {"compared_with": manifest.details["compared_with"] or "nothing: no release is current yet"}
    types, relations = pivoted(rows, ENTITY), pivoted(rows, RELATION)
    for row in relations[:1]:
        chief = manifest.details.get("metric", "filtered_mrr")  # by which the gate decides
        names = dict.fromkeys((f"{chief}_change", chief, "filtered_mrr_change", "filtered_mrr"))
        shown |= {name: rounded(row[name]) for name in names if name in row}
    for name in ("neighbors@10", "consumer_loss_mapped", "new_share", "departed_share"):
        shown |= {f"{name} of {row['name']}": rounded(row[name]) for row in types if name in row}
    if types:
        shown["picture"] = thumbnail(thumbnails.drift(types), "Drift by entity type")
        shown["entity_types"] = table(_by_figure(types))
    if relations:
        shown["relations"] = table(_by_relation(relations))
    return shown | counts(manifest.details, leave_out=["compared_with", "notes"])


def _by_figure(types: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return a row for each figure and a column for each entity type: there are more figures than types."""
    figures = [name for name in dict.fromkeys(name for row in types for name in row) if name != "name"]
    return {"figure": figures} | {row["name"]: [_figure(row, name) for name in figures] for row in types}


def _by_relation(relations: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = {"relation": "name", "edges": "edges", "MRR": "filtered_mrr", "current": "filtered_mrr_current"}
    columns = {title: [_figure(row, name) for row in relations] for title, name in names.items()}
    return columns | {"change": [_change(row) for row in relations]}


def _figure(row: dict[str, Any], name: str) -> Any:
    value = row.get(name)
    return int(value) if name in COUNTS and value is not None else value


def _change(row: dict[str, Any]) -> str:
    change, low, high = (row.get(f"filtered_mrr_change{end}") for end in ("", "_low", "_high"))
    if change is None or low is None or high is None:
        return ""
    return f"{change:+.1%} ({low:+.0%} to {high:+.0%})"


def promotion_page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return the decision, and the gates, those that failed first."""
    from twhin_pipeline.lifecycle.decisions import HELD

    rows = step.store.read(manifest.asset, manifest.snapshot).to_pylist()
    gates = sorted(rows, key=lambda row: bool(row["passed"]))
    details = manifest.details
    looked_at = {
        "gate": [f"{row['gate']} {row['about']}".strip() for row in gates],
        "passed": ["yes" if row["passed"] else "no" for row in gates],
        "limit": [row["limit"] for row in gates],
        "found": [row["text"] for row in gates],
    }
    return {
        "decision": details["decision"],
        "reason": details["reason"],
        "release": details["release"],
        "gates": table(looked_at),
        "current_before": details["current_before"] or "nothing",
        "by": details["by"],
        "held": int(details["decision"] == HELD),
    }
