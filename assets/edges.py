"""Raw edges: the source, typed and merged, and the rows that could not be edges."""

from typing import Any

import dagster as dg

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.model import EVERY_OTHER
from twhin_pipeline.stages.chain import STAGES
from twhin_pipeline.store import Manifest

from . import steps
from .metadata import counts, table

STAGE = STAGES["ingest"]
HEADLINES = ("edges_per_relation", "duplicates_merged", "rejected_per_reason")


def make(config: TwhinConfig, partitions: dg.PartitionsDefinition) -> list[dg.AssetsDefinition]:
    """Return the stage and its checks."""
    relations = ", ".join(config.model.relation_names).replace(EVERY_OTHER, "every other one of the source")
    texts = {
        "raw_edges": f"Typed edges of the snapshot, duplicates merged. Relations: {relations}.",
        "raw_edges_rejected": "Rows that could not be edges, each with the reason, the column to blame, file and row.",
    }
    specs = [
        steps.spec(
            table, STAGE, config, group="edges", description=text, code="graph.raw_edges", kinds=["parquet", "duckdb"]
        )
        for table, text in texts.items()
    ]
    return steps.make(STAGE, config, partitions, specs=specs, page=page)


def page(step: steps.Step, manifest: Manifest) -> dict[str, Any]:
    """Return what was counted, and the first of the source's files with their sizes and times."""
    shown = counts(manifest.details, first=HEADLINES, leave_out=["relations", "notes", "files", "source_files"])
    files = manifest.details.get("source_files", [])
    columns = {name: [file.get(name) for file in files] for name in ("path", "bytes", "modified", "checksum")}
    return shown | ({"files": table(columns)} if files else {})
