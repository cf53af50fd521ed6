"""Records that are too many to sort in memory, in a file: written a piece at a time, and read a bucket at a time."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class BucketFile:
    """Records in a file. They come in groups, and each group has buckets of its own."""

    def __init__(self, path: str, record: np.dtype[Any]) -> None:
        """Begin a new file."""
        self.record = record
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
        self.size = 0
        # By group: the position of each piece in the file, and where each bucket begins in the piece.
        self.pieces: dict[int, list[tuple[int, Array]]] = {}

    def __enter__(self) -> BucketFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def add(self, group: int, records: Array, ends: Array) -> None:
        """Add a piece `[n]` to a group of B buckets: bucket i gets those from `ends[i]` on, int64 `[B + 1]`."""
        view = records.view(np.uint8).data
        while len(view):
            view = view[os.write(self.file.fileno(), view) :]
        self.pieces.setdefault(group, []).append((self.size, ends))
        self.size += len(records)

    def read(self, group: int, bucket: int) -> Array:
        """Return a bucket's records in the order in which they were added. Threads may read at once."""
        pieces = self.pieces.get(group, [])
        sizes = [int(ends[bucket + 1] - ends[bucket]) for _, ends in pieces]
        records = np.empty(sum(sizes), self.record)
        done = 0
        for (start, ends), size in zip(pieces, sizes, strict=True):
            view = records[done : done + size].view(np.uint8).data
            position = (start + int(ends[bucket])) * self.record.itemsize
            while len(view):
                read = os.preadv(self.file.fileno(), [view], position)
                if read == 0:
                    raise OSError(f"{self.file.name}: ended early; was it changed?")
                view, position = view[read:], position + read
            done += size
        return records
