"""Which ids of a vocabulary are in the snapshot: the others have departed, and are no candidates of anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

if TYPE_CHECKING:
    from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]


def present_rows(store: Store, snapshot: str, entity: str) -> Array | None:
    """Return the rows of an entity type's ids that have an edge in the snapshot, ascending, int64 `[P]`.

    An id without one keeps its row and its vector, but nothing draws it: neither as a negative, nor as a candidate of
    validation or evaluation.

    Returns:
        None where every id has an edge, or none has: then all are alike.
    """
    manifest = store.manifest(f"vocabulary/{entity}", snapshot)
    if manifest.details.get("departed") == 0:
        return None
    files = store.files_of(manifest)
    if not files:
        return None
    with store.parquet(files[0]) as file:
        if "degree" not in file.schema_arrow.names:
            return None
    parts = [
        pc.greater(batch.column(0), 0).to_numpy(zero_copy_only=False)
        for batch in store.batches(files, ["degree"], 1 << 20)
    ]
    present = np.flatnonzero(np.concatenate([np.zeros(0, bool), *parts]))
    return None if len(present) in (0, manifest.rows) else present
