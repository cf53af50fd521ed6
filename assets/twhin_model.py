"""The model: torchrun's processes train it; this step starts them, listens, and shows what came out."""

from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.run import Run
from twhin_pipeline.store import Manifest, Store

from ..resources.configuration import ConfigurationResource
from ..resources.launcher import LauncherResource
from ..resources.store import StoreResource
from ..resources.tracking import TrackingResource
from . import checks, provenance
from .stage import OWNERS, POOL, counts, opened, picture, table

SHOWN_ELSEWHERE = ("model", "mlflow_run_id")


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    above = [
        "training_set/positives",
        "training_set/negatives",
        "held_out/validation",
        "held_out/validation_negatives",
        *(f"vocabulary/{entity}" for entity in config.model.table_names),
    ]
    tables_of = ", ".join(config.model.table_names)

    @dg.asset(
        deps=[provenance.key(name) for name in above],
        partitions_def=partitions,
        group_name="model",
        description=f"Embedding tables ({tables_of}) and relations' operators, trained by torchrun; a retry resumes.",
        kinds={"torch", "torchrec", "mlflow"},
        owners=OWNERS,
        code_version=provenance.code("training.train"),
        retry_policy=dg.RetryPolicy(max_retries=2, delay=5),
        pool=POOL,
    )
    def twhin_model(
        context: dg.AssetExecutionContext,
        configuration: ConfigurationResource,
        store: StoreResource,
        tracking: TrackingResource,
        launcher: LauncherResource,
    ) -> dg.MaterializeResult:
        with opened(context, configuration, store, above) as (loaded, tables, snapshot):
            run = Run(loaded, configuration.file, configuration.overrides(), tables, snapshot)
            return dg.MaterializeResult(metadata=trained(context, run, tracking, launcher))

    return [twhin_model, checks.make("twhin_model_checks", config, ["twhin_model"])]


def trained(
    context: dg.AssetExecutionContext, run: Run, tracking: TrackingResource, launcher: LauncherResource
) -> dict[str, Any]:
    """Train under torchrun in an MLflow run of its own; return what to show."""
    tables, snapshot = run.store, run.snapshot
    with tracking.run(context, tables, snapshot, run.config) as tracked:
        env = {"MLFLOW_RUN_ID": tracked.run_id, "MLFLOW_TRACKING_URI": tracking.uri(tables)}
        reported = launcher.train(context, run.config_path, run.overrides, tables, snapshot, env)
    manifest = tables.manifest("twhin_model", snapshot)
    told = {k: v for k, v in (reported.metadata or {}).items() if k not in SHOWN_ELSEWHERE}
    shown = {**told, **_metadata(tables, manifest, run.config)}
    return shown | {"mlflow_run": tracking.link(tables, tracked.run_id)}


def _metadata(store: Store, manifest: Manifest, config: TwhinConfig) -> dict[str, Any]:
    import numpy as np

    from twhin_pipeline.views import plots

    losses, metrics = (_read(store, manifest, name) for name in ("losses.parquet", "metrics.parquet"))
    steps, values = (np.asarray(losses[name], dtype=np.float64) for name in ("step", "loss"))
    at = [row for row in metrics.to_pylist() if row["metric"] == "loss"]
    validation = np.array([row["step"] for row in at]), np.array([row["value"] for row in at])
    names = config.model.table_names
    rows = [sum(f.get("rows", 0) for f in manifest.files if f["path"].startswith(f"tables/{n}/")) for n in names]
    bytes_of = 4 if config.model.embeddings.tables[0].data_type == "fp32" else 2
    sizes = [round(n * config.model.embedding_dim * bytes_of / 2**20, 2) for n in rows]
    return {
        **counts(manifest.details, leave_out=SHOWN_ELSEWHERE),
        "dagster/row_count": sum(rows),
        "loss_curve": picture(plots.losses(steps, values, validation, f"{config.loss.name} loss"), "loss"),
        "tables": table({"table": names, "rows": rows, "MiB": sizes}),
        "size_mib": round(manifest.bytes / 2**20, 3),
        "path": dg.MetadataValue.path(store.path("twhin_model", manifest.snapshot, manifest.version)),
        "config_hash": manifest.config_hash,
        "store_version": manifest.version,
        "parents": dg.MetadataValue.json(manifest.parents),
    }


def _read(store: Store, manifest: Manifest, file: str) -> pa.Table:
    with store.fs.open(store.path(manifest.asset, manifest.snapshot, manifest.version, file), "rb") as opened_file:
        return pq.read_table(opened_file)
