"""Records that are too many to sort in memory, in a file: written a piece at a time, and read a bucket at a time.

A bucket is read from as many places as there are pieces. So small pieces are written together, and buckets are few: the
number of reads grows in proportion to the records, and each reads enough to be worth it.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np

from twhin_pipeline.store.file_array import read_at

Array = np.ndarray[Any, Any]

MOST_BUCKETS = 256
"""Of a group. With more records a bucket is larger, and is parted again in memory."""
BYTES_AT_ONCE = 32 << 20
"""So much of a group is written together."""


class BucketFile:
    """Records in a file. They come in groups, and each group has buckets of its own."""

    def __init__(self, path: str, record: np.dtype[Any]) -> None:
        """Begin a new file."""
        self.record = record
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115 (closed by `__exit__`)
        self.size = 0
        # By group: the position of each piece in the file, and where each bucket begins in the piece.
        self.pieces: dict[int, list[tuple[int, Array]]] = {}
        self.group = -1
        self.waiting: list[tuple[Array, Array]] = []
        """What has been added to `group` since it was last written."""
        self.lock = threading.Lock()

    def __enter__(self) -> BucketFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()

    def add(self, group: int, records: Array, ends: Array) -> None:
        """Add a piece `[n]` to a group of B buckets: bucket i gets those from `ends[i]` on, int64 `[B + 1]`."""
        with self.lock:
            if group != self.group:
                self._write()
                self.group = group
            self.waiting.append((records, ends))
            if sum(records.nbytes for records, _ in self.waiting) >= BYTES_AT_ONCE:
                self._write()

    def _write(self) -> None:
        """Write what is waiting, bucket by bucket, as one piece."""
        if not self.waiting:
            return
        ends = np.stack([ends for _, ends in self.waiting])
        parts = [
            records[start:end]
            for bucket in range(ends.shape[1] - 1)
            for (records, _), start, end in zip(self.waiting, ends[:, bucket], ends[:, bucket + 1], strict=True)
        ]
        written = np.concatenate(parts)
        view = written.view(np.uint8).data
        while len(view):
            view = view[os.write(self.file.fileno(), view) :]
        self.pieces.setdefault(self.group, []).append((self.size, ends.sum(0)))
        self.size += len(written)
        self.waiting = []

    def read(self, group: int, bucket: int) -> Array:
        """Return a bucket's records in the order in which they were added. Threads may read at once."""
        with self.lock:
            self._write()
        pieces = self.pieces.get(group, [])
        sizes = [int(ends[bucket + 1] - ends[bucket]) for _, ends in pieces]
        records = np.empty(sum(sizes), self.record)
        done = 0
        for (start, ends), size in zip(pieces, sizes, strict=True):
            if size:
                position = (start + int(ends[bucket])) * self.record.itemsize
                read_at(self.file.fileno(), records[done : done + size], position, str(self.file.name))
            done += size
        return records
