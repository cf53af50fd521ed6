"""A small model as ranks write it."""

from __future__ import annotations

from typing import Any

import torch
from helpers import SNAPSHOT, planted_config

from twhin_pipeline.store import Draft, Store
from twhin_pipeline.training.progress import LOSSES_SCHEMA
from twhin_pipeline.vectors.model_files import Writer

CONFIG = planted_config()


def write_model(
    store: Store, seed: int = 0, snapshot: str = SNAPSHOT, details: dict[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """Write a model as three ranks would: rank 1 holds no user, and items are on rank 2 alone, in half precision."""
    generator = torch.Generator().manual_seed(seed)
    tables = {name: torch.randn(rows, 16, generator=generator) for name, rows in (("user", 60), ("item", 48))}
    tables["item"] = tables["item"].half()
    draft = store.begin("twhin_model", snapshot)
    for rank, users in ((2, [(35, 60)]), (0, [(0, 10), (10, 35)]), (1, [])):
        writer = Writer(Draft(store, "twhin_model", snapshot, draft.version), rank)
        writer.table("user", [(first, tables["user"][first:last]) for first, last in users])
        writer.table("item", [(0, tables["item"])] if rank == 2 else [])
    writer = Writer(draft, 0)
    writer.relations(CONFIG.model, {"likes": torch.arange(16.0), "follows": torch.zeros(16)})
    writer.records("losses", [{"step": 1, "epoch": 0, "loss": 2.5, "loss/likes": 2.0}], LOSSES_SCHEMA)
    draft.details = {"model": CONFIG.model.model_dump(mode="json"), **(details or {})}
    draft.commit(config_hash="test", parents={})
    return tables
