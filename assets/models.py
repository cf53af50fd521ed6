"""The models: torchrun's processes train them; a step starts those, listens, and shows what came out.

`twhin_model` is evaluated. `refit/twhin_model` is the same recipe trained once more on all edges, and is published.
"""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES, Stage
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, picture, rounded, table, thumbnail

HEADLINES = ("final_loss", "best_validation", "validation_metric", "edges_per_second", "seconds", "chosen_epoch")
LEFT_OUT = ("model", "mlflow_run_id", "notes")


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the step that trains and its checks, and the one that trains once more where the configuration has it."""
    names = ", ".join(config.model.table_names)
    trained = f"Embedding tables ({names}) and relations' operators, trained by torchrun; a retry resumes."
    again = "The model that is published: trained once more, on all edges, for the epochs that were chosen."
    return [
        *_make(STAGES["train"], config, partitions, trained, "training.train"),
        *(_make(STAGES["refit"], config, partitions, again, "stages.refit") if STAGES["refit"].tables(config) else []),
    ]


def _make(
    stage: Stage, config: TwhinConfig, partitions: dg.PartitionsDefinition, description: str, code: str
) -> list[dg.AssetsDefinition]:
    (name,) = stage.tables(config)
    kinds = ["parquet", "torch", "mlflow"]
    specs = [steps.spec(name, stage, config, group="model", description=description, code=code, kinds=kinds)]
    retry = dg.RetryPolicy(max_retries=2, delay=5)
    return steps.make(stage, config, partitions, specs=specs, page=page, retry_policy=retry)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return how training went: its figures, the loss curve, the tables' sizes, and its run in MLflow."""
    import numpy as np

    from twhin_pipeline.views import plots, thumbnails

    losses, metrics = (step.store.read_part(manifest, name) for name in ("losses", "metrics"))
    loss_steps, values = (np.asarray(losses[name], dtype=np.float64) for name in ("step", "loss"))
    at = [row for row in metrics.to_pylist() if row["metric"] == "loss"]
    validation = np.array([row["step"] for row in at]), np.array([row["value"] for row in at])
    label = f"{step.config.loss.name} loss"
    names = step.config.model.table_names
    rows = [sum(f.get("rows", 0) for f in manifest.files if f["path"].startswith(f"tables/{n}/")) for n in names]
    bytes_of = 4 if step.config.model.embeddings.tables[0].data_type == "fp32" else 2
    sizes = [rounded(n * step.config.model.embedding_dim * bytes_of / 2**20) for n in rows]
    figures = counts(manifest.details, first=HEADLINES, leave_out=LEFT_OUT)
    first = {name: figures.pop(name) for name in HEADLINES if name in figures}
    if run_id := manifest.details.get("mlflow_run_id"):
        first["mlflow_run"] = step.tracking.link(step.store, run_id)
    large = plots.losses(loss_steps, values, validation, label)
    return {
        **first,
        "loss_curve": thumbnail(thumbnails.curve(loss_steps, values, validation), label),
        "tables": table({"table": names, "rows": rows, "MiB": sizes}),
        **figures,
        "loss_curve_large": picture(step.store, manifest, "loss_curve", large),
    }
