"""Evaluation: how the model ranks the edges it has not seen, beside popularity, item-kNN and ALS, and calibration."""

import math
from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.results import BASELINES, chief_rows, comparisons
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.words import CALIBRATION

from . import steps
from .metadata import counts, picture, rounded, table, thumbnail

STAGE = STAGES["evaluate"]
OVERALL = "all"
TITLES = {"baseline": "most popular", "item_knn": "item-kNN", "als": "ALS", "compared": "model, on the same sample"}
"""Of the table's columns; in metadata their names are prefixes."""
SHOWN_APART = ("metrics", "warnings", "als_settings", "notes", *TITLES)


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    texts = {
        "evaluation": "Ranks, Recall, NDCG, AUC and RCE of held-out edges: a row for each relation, side and metric.",
        CALIBRATION: "The map of each relation from scores to probabilities, and what thresholds reach.",
    }
    specs = [
        steps.spec(
            name,
            STAGE,
            config,
            group="evaluation",
            description=text,
            code="evaluation.evaluate",
            kinds=["parquet", "torch", *(["mlflow"] if name == "evaluation" else [])],
        )
        for name, text in texts.items()
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return what was measured, and the model's run in MLflow; of the calibration, what was fitted to what."""
    if manifest.asset == CALIBRATION:
        return counts(manifest.details, leave_out=("notes",))
    model = step.store.manifest("twhin_model", step.snapshot)
    run_id = model.details.get("mlflow_run_id")
    linked = {"mlflow_run": step.tracking.link(step.store, run_id)} if run_id else {}
    shown = measured(step.store, manifest) | reliability(step.store, manifest)
    return shown | linked | counts(manifest.details, leave_out=SHOWN_APART)


def reliability(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Return a picture of how well probabilities hold on test edges, where that was measured."""
    import numpy as np

    from twhin_pipeline.vectors.calibration import RELIABILITY
    from twhin_pipeline.views import plots, thumbnails

    bins = store.read_part(store.manifest(CALIBRATION, manifest.snapshot), RELIABILITY).to_pydict()
    rows = [i for i, name in enumerate(bins["relation"]) if name == OVERALL]
    if not rows:
        return {}
    predicted, uncalibrated, observed, pairs = (
        np.array(bins[column])[rows] for column in ("predicted", "uncalibrated", "observed", "pairs")
    )
    small = thumbnails.reliability(predicted, observed, pairs)
    large = plots.reliability(predicted, uncalibrated, observed, pairs)
    return {
        "reliability": thumbnail(small, "Share of edges by probability; the diagonal is exact"),
        "reliability_large": picture(store, manifest, "reliability", large),
    }


def measured(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Overall metrics as numbers, so that the page draws them across runs; each relation's as a table and bars; and the
    warnings.
    """
    import numpy as np

    from twhin_pipeline.evaluation.advice import title
    from twhin_pipeline.views import plots, thumbnails

    evaluation, details = store.read("evaluation", manifest.snapshot), manifest.details
    rows = chief_rows(evaluation, details).to_pylist()
    shown: dict[str, Any] = {}
    besides: dict[str, Any] = {}
    for row in rows:
        if row["relation"] == OVERALL and _finite(row["value"]):
            shown[row["metric"]] = rounded(row["value"])
            for column in TITLES:
                if _finite(row[column]):
                    besides[f"{column}_{row['metric']}"] = rounded(row[column])
    if details.get("warnings"):
        shown["warnings"] = dg.MetadataValue.md("\n".join(f"- {line}" for line in details["warnings"]))
    if details.get("als_settings"):
        besides["als_settings"] = dg.MetadataValue.json(details["als_settings"])
    by_metric: dict[str, dict[str, Any]] = {}
    edges: dict[str, int] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], {})[row["relation"]] = row
        edges[row["relation"]] = max(edges.get(row["relation"], 0), row["edges"] or 0)
    # All of them together, then the largest: the table and the picture show the first ones.
    relations = sorted(edges, key=lambda name: (name != OVERALL, -edges[name]))
    if not relations:
        return shown | besides
    columns: dict[str, list[Any]] = {"relation": relations}
    mrr = by_metric.get("filtered_mrr", {})
    columns["edges"] = [mrr[r]["edges"] if r in mrr else None for r in relations]
    sampled = details.get("compared_edges", 0) < details.get("edges", 0)
    for metric, found in by_metric.items():
        columns[metric] = [found[r]["value"] if r in found else None for r in relations]
        for column, name in TITLES.items():
            values = [found[r][column] if r in found else None for r in relations]
            wanted = sampled if column == "compared" else metric.startswith(("filtered", "recall", "ndcg"))
            if wanted and (column == "baseline" or any(value is not None for value in values)):
                columns[f"{metric} of {name}"] = values
    shown["relations"] = table(columns)
    compared = {one.relation: one for one in comparisons(evaluation, details)}
    if compared:
        kept = [name for name in relations if name in compared]
        baselines = {
            TITLES[column]: np.array([compared[r].baselines.get(name, np.nan) for r in kept])
            for name, column in BASELINES.items()
            if any(name in one.baselines for one in compared.values())
        }
        metric = title(next(iter(compared.values())).metric)
        model = np.array([compared[r].value for r in kept])
        picture_of = plots.relation_metrics(kept, model, baselines, metric)
        best = np.fmax.reduce([np.full(len(kept), np.nan), *baselines.values()])
        small = thumbnails.bars(model, best)
        shown["model_beside_baselines"] = thumbnail(small, f"{metric} of the model, and the best baseline's as marks")
        shown["model_beside_baselines_large"] = picture(store, manifest, "model_beside_baselines", picture_of)
    return shown | besides


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
