"""Raw edges by number: each id of a snapshot has one, its place among all of them in order, whatever its types.

Ingest writes the numbers beside `raw_edges` (`edge_file`). Who reads them meets no text but each id's own, once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import database
from twhin_pipeline.words import PARTS, TRAIN

if TYPE_CHECKING:
    from twhin_pipeline.store import Store

Array = np.ndarray[Any, Any]

# Files beside the table's; their names begin with `_`, so that nobody takes them for its rows.
IDS, ENDS = "_numbers/ids.parquet", "_numbers/ends.parquet"
# As NumPy has it: the least int64.
NO_TIME = -(2**63)


@dataclass(frozen=True)
class Piece:
    """Edges of one relation that follow one another: numbers of ids `[n]`, and columns of `raw_edges`."""

    relation: str
    lhs: Array
    rhs: Array
    columns: dict[str, Array]


class NumberedEdges:
    """The edges of a snapshot's `raw_edges`, in its order."""

    def __init__(self, store: Store, snapshot: str) -> None:
        """Open them. Raises UserError where the table is not there, or was made without numbers."""
        manifest = store.manifest("raw_edges", snapshot)
        names = {file["path"] for file in manifest.files}
        if not {IDS, ENDS} <= names:
            raise UserError(
                f"raw_edges of snapshot {snapshot} lacks the numbers of its ids, as before this version; make it again "
                f"with `twhin ingest --snapshot {snapshot}`"
            )
        self.store, self.snapshot = store, snapshot
        folder = store.path("raw_edges", snapshot, manifest.version)
        (self.edges,) = store.files_of(manifest)
        self.ends = f"{folder}/{ENDS}"
        self.ids = database.parquet([f"{folder}/{IDS}"], "file_row_number = true")
        """The SQL that scans `id` and its number, `file_row_number`."""
        with store.parquet(f"{folder}/{IDS}") as file:
            self.size = int(file.metadata.num_rows)
            """How many ids there are."""
            self.texts = str(file.schema_arrow.field("id").type) == "string"
        self.counts: dict[str, int] = manifest.details["edges_per_relation"]
        """Edges by relation, in the order in which they stand."""

    def pieces(self, columns: Sequence[str] = (), before: int | None = None) -> Iterator[Piece]:
        """Yield all edges, a row group or less at a time, with some columns.

        These are `weight`, `time` and `first_time` in microseconds (`NO_TIME` where they are null), and `split` as the
        number of the part (training where it is null). With `before` (microseconds), the weight of an edge that was
        there at that time is the one that its rows before it give it, and, where it was new then, those of that time.
        """
        names = [name for name, count in self.counts.items() if count]
        cuts = np.cumsum([self.counts[name] for name in names])
        position = 0
        with self.store.parquet(self.ends) as ends, self.store.parquet(self.edges) as edges:
            if missing := [name for name in columns if name not in edges.schema_arrow.names]:
                raise UserError(
                    f"raw_edges of snapshot {self.snapshot} has no column {missing[0]!r}: it was made by an earlier "
                    f"version or configuration; make it again with `twhin ingest --snapshot {self.snapshot}`"
                )
            for group in range(ends.metadata.num_row_groups):
                found = _columns(ends, group, ["lhs", "rhs"])
                more = _columns(edges, group, list(columns)) if columns else {}
                if before is not None and "step_time" in ends.schema_arrow.names:
                    more["weight"] = _known_weight(ends, group, more["weight"], more["first_time"], before)
                size, start = len(found["lhs"]), 0
                while start < size:
                    number = int(np.searchsorted(cuts, position, side="right"))
                    stop = min(size, start + int(cuts[number]) - position)
                    yield Piece(
                        names[number],
                        found["lhs"][start:stop],
                        found["rhs"][start:stop],
                        {name: values[start:stop] for name, values in more.items()},
                    )
                    position, start = position + stop - start, stop


def _columns(file: pq.ParquetFile, group: int, names: list[str]) -> dict[str, Array]:
    table = file.read_row_group(group, columns=names)
    found = {}
    for name in names:
        column = table[name]
        if name == "split":
            column = pc.fill_null(pc.index_in(column, pa.array(PARTS)), TRAIN).cast(pa.int8())
        elif name in ("time", "first_time"):
            column = pc.fill_null(column.cast(pa.timestamp("us")).cast(pa.int64()), NO_TIME)
        found[name] = column.to_numpy()
    return found


def _known_weight(file: pq.ParquetFile, group: int, weight: Array, first_time: Array, before: int) -> Array:
    """Return the weights that edges had before a time (see `edge_sort.merged` for their steps)."""
    table = file.read_row_group(group, columns=["step_time", "step_weight"]).combine_chunks()
    steps = pc.list_value_length(table["step_time"]).to_numpy()
    edge = np.repeat(np.arange(len(steps)), steps)
    time, then = (pc.list_flatten(table[name]).to_numpy() for name in ("step_time", "step_weight"))
    known = np.flatnonzero((first_time[edge] <= before) & ((time < before) | (time == first_time[edge])))
    weight = weight.copy()
    # Steps ascend, and of several values for one place numpy keeps the last.
    weight[edge[known]] = then[known]
    return weight
