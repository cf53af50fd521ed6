"""Evaluation: how the model ranks the edges it has not seen, beside the most-popular baseline."""

import math
from typing import Any

import dagster as dg

from assets import checks, provenance
from assets.stage import OWNERS, POOL, counts, opened, picture, table, table_metadata
from resources.configuration import ConfigurationResource
from resources.store import StoreResource
from resources.tracking import TrackingResource
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.figures import chief_rows
from twhin_pipeline.store import Manifest, Store

OVERALL = "all"


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    above = ["twhin_model", "held_out/test", "held_out/validation", "training_set/positives"]
    above += ["held_out/repeats"] if config.split.repeats else []

    @dg.asset(
        deps=[provenance.key(name) for name in above],
        partitions_def=partitions,
        group_name="evaluation",
        description="Ranks, Recall and NDCG, AUC and RCE of held-out edges: a row for each relation, side and metric.",
        kinds={"torch", "parquet", "mlflow"},
        owners=OWNERS,
        code_version=provenance.code("evaluation"),
        pool=POOL,
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        configuration: ConfigurationResource,
        store: StoreResource,
        tracking: TrackingResource,
    ) -> dg.MaterializeResult:
        from twhin_pipeline.evaluation import evaluate

        with opened(context, configuration, store, above) as (loaded, tables, snapshot):
            manifest = evaluate(loaded, tables, snapshot)
            metadata = table_metadata(tables, manifest) | counts(manifest.details, leave_out=["metrics", "baseline"])
            metadata |= _metadata(tables, manifest)
            model = tables.manifest("twhin_model", snapshot)
            tracking.log_metrics(tables, model, manifest.details["metrics"])
            if run_id := model.details.get("mlflow_run_id"):
                metadata["mlflow_run"] = tracking.link(tables, run_id)
            return dg.MaterializeResult(metadata=metadata)

    return [evaluation, checks.make("evaluation_checks", config, ["evaluation"])]


def _metadata(store: Store, manifest: Manifest) -> dict[str, Any]:
    """Overall metrics as numbers, so that the page draws them across runs; each relation's as a table and bars."""
    import numpy as np

    from twhin_pipeline import plots

    rows = chief_rows(store.read("evaluation", manifest.snapshot), manifest.details).to_pylist()
    shown: dict[str, Any] = {}
    for row in rows:
        if row["relation"] == OVERALL and row["value"] is not None and math.isfinite(row["value"]):
            shown[row["metric"]] = float(row["value"])
            if row["baseline"] is not None and math.isfinite(row["baseline"]):
                shown[f"baseline_{row['metric']}"] = float(row["baseline"])
    by_metric: dict[str, dict[str, Any]] = {}
    edges: dict[str, int] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], {})[row["relation"]] = row
        edges[row["relation"]] = max(edges.get(row["relation"], 0), row["edges"] or 0)
    # All of them together, then the largest: the table and the picture show the first ones.
    relations = sorted(edges, key=lambda name: (name != OVERALL, -edges[name]))
    if not relations:
        return shown
    columns: dict[str, list[Any]] = {"relation": relations}
    mrr = by_metric.get("filtered_mrr", {})
    columns["edges"] = [mrr[r]["edges"] if r in mrr else None for r in relations]
    for metric, found in by_metric.items():
        columns[metric] = [found[r]["value"] if r in found else None for r in relations]
        if metric.startswith(("filtered", "recall", "ndcg")):
            columns[f"{metric} of most popular"] = [found[r]["baseline"] if r in found else None for r in relations]
    shown["relations"] = table(columns)

    def values(name: str) -> Any:
        return np.array([mrr[r][name] if r in mrr and mrr[r][name] is not None else np.nan for r in relations], float)

    shown["filtered_mrr_by_relation"] = picture(
        plots.relation_metrics(relations, values("value"), values("baseline"), "filtered MRR"), "filtered MRR"
    )
    return shown
