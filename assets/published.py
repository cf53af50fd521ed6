"""Published: after the vectors' checks a release, the model in MLflow's registry, the catalog."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps

STAGE = STAGES["publish"]


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage."""
    text = (
        "The snapshot's release, which `promotion` may make the current one; its model in MLflow's registry; and every "
        "table as a view in `catalog.duckdb`. The rows are maps from its vectors into the space of the release before."
    )
    specs = [
        steps.spec(
            table, STAGE, config, group="releases", description=text, code="stages.publish", kinds=["mlflow", "duckdb"]
        )
        for table in STAGE.tables(config)
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return where the registered model, the explorer and the catalog are."""
    from twhin_pipeline.store import releases

    details = manifest.details
    shown: dict[str, Any] = {"mlflow_model": details.get("model") or "; ".join(details["notes"])}
    if "model" in details:
        shown["mlflow_model_page"] = step.tracking.model_link(step.store, details["model"])
        shown["mlflow_run"] = step.tracking.link(step.store, details["mlflow_run_id"])
    if "compatible_with" in details:
        shown["compatible_with"] = details["compatible_with"]
    made = releases.of_published(step.store, manifest.snapshot, manifest.version)
    if made:
        shown["explorer"] = step.tracking.explorer_link(made[-1].name)
    return shown | {"catalog": dg.MetadataValue.path(details["catalog"])}
