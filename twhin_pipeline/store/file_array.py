"""Arrays in files, read a few ranges at a time: what is not asked for takes no memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class FileArray:
    """The elements of a file without a header, all of one type. Threads may read at once."""

    def __init__(self, path: Path | str, dtype: Any) -> None:
        """Open the file."""
        self.path, self.dtype = str(path), np.dtype(dtype)
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed when nothing refers to it)

    def __len__(self) -> int:
        return os.fstat(self.file.fileno()).st_size // self.dtype.itemsize

    def take(self, starts: Array, lengths: Array) -> Array:
        """Return the elements `starts[0], …, starts[0] + lengths[0] - 1, starts[1], …`, in a new array."""
        elements = np.empty(int(lengths.sum()), self.dtype)
        if not len(elements):
            return elements
        filled = 0
        # Ranges that follow one another are one read.
        apart = np.flatnonzero(np.append(starts[1:] != starts[:-1] + lengths[:-1], True))
        sizes = np.diff(np.cumsum(lengths)[apart], prepend=0)
        firsts = starts[np.append(0, apart[:-1] + 1)]
        for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True):
            read_at(self.file.fileno(), elements[filled : filled + size], first * self.dtype.itemsize, self.path)
            filled += size
        return elements


def read_at(descriptor: int, into: Array, position: int, name: str) -> None:
    """Fill an array in C order with what an open file has from a position (in bytes) on.

    Raises:
        OSError: The file, called `name`, ends before.
    """
    view = into.view(np.uint8).data
    while len(view):
        read = os.preadv(descriptor, [view], position)
        if read == 0:
            raise OSError(f"{name}: ended early; was it changed?")
        view, position = view[read:], position + read
