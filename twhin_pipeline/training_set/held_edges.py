"""Edges that are held out, in a file: they are added, read and chosen from some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

HELD = np.dtype(
    [
        ("rel", np.int32),
        ("lhs", np.int64),
        ("rhs", np.int64),
        ("h", np.uint64),
        ("weight", np.float32),
        ("part", np.int8),
        ("time", np.int64),
        ("first_time", np.int64),
    ]
)
"""An edge that is held out."""
EDGES_AT_ONCE = 1 << 18


class HeldEdges:
    """Records `HELD` in a file."""

    def __init__(self, path: str, records: Iterable[Array] = ()) -> None:
        """Begin a new file with some records."""
        self.path = Path(path)
        self.path.write_bytes(b"")
        self.size = 0
        self.add(records)

    def __len__(self) -> int:
        return self.size

    def add(self, records: Iterable[Array]) -> None:
        """Add records, a piece `[n]` at a time."""
        with self.path.open("ab") as file:
            for piece in records:
                file.write(np.ascontiguousarray(piece).data)
                self.size += len(piece)

    def pieces(self) -> Iterator[Array]:
        """Yield all records in the order in which they were added, a copy of some at a time."""
        with self.path.open("rb") as file:
            while len(records := np.fromfile(file, HELD, EDGES_AT_ONCE)):
                yield records

    def of(self, part: int) -> Iterator[Array]:
        """Yield the records of a part."""
        return (records[records["part"] == part] for records in self.pieces())

    def replaced(self, path: str, change: Callable[[Array], Array]) -> HeldEdges:
        """Return what `change` makes of each piece, in a new file; this one is removed."""
        made = HeldEdges(path, map(change, self.pieces()))
        self.path.unlink()
        return made
