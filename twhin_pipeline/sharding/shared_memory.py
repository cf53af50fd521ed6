"""Memory that processes of one machine share: a file that has no name, and a desk to lay a step's gradients on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# More than is needed, so that a desk is seldom made anew; and some bytes at least: an empty file cannot be mapped.
_SPARE, _LEAST = 1.25, 1 << 16
_CACHE_LINE = 64
# What torch.multiprocessing maps tensors by, which torch's type stubs lack.
_STORAGE: Any = torch.UntypedStorage


@dataclass(frozen=True)
class File:
    """Shared memory of a process, as another one finds it."""

    process: int
    descriptor: int
    device: int
    """With `inode`: tells the file from one of another process of that number."""
    inode: int
    size: int

    FIELDS = 5

    @classmethod
    def of(cls, descriptor: int, size: int) -> File:
        """Describe an open file of this process."""
        status = os.fstat(descriptor)
        return cls(os.getpid(), descriptor, status.st_dev, status.st_ino, size)

    def open(self) -> torch.UntypedStorage:
        """Map it. Raises OSError where this process cannot."""
        descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDWR)
        try:
            if File.of(descriptor, self.size) != File(os.getpid(), descriptor, self.device, self.inode, self.size):
                raise OSError(f"process {self.process} is another one here")
            mapped: torch.UntypedStorage = _STORAGE._new_shared_fd_cpu(descriptor, self.size)
            return mapped
        finally:
            os.close(descriptor)


class Desk:
    """Memory in which a rank lays the ids and the gradients of a step for all ranks to read."""

    def __init__(self) -> None:
        self.descriptor: int | None = None
        self.file: File | None = None
        self.storage: torch.UntypedStorage | None = None

    def room(self, count: int, dim: int) -> torch.Tensor:
        """Return the memory for the gradients of `count` rows, `float32 [count, dim]`."""
        size = _vectors_begin(count) + 4 * count * dim
        if self.file is None or self.file.size < size:
            self._make(max(int(_SPARE * size), _LEAST))
        assert self.storage is not None
        return laid_out(self.storage, count, dim)[1]

    def lay(self, ids: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> File:
        """Lay down the `ids` and the gradients of each table; gradients that are already in their `room` stay."""
        counts, dim = [len(rows) for rows in ids], gradients[0].shape[1]
        vectors = self.room(sum(counts), dim)
        assert self.file is not None and self.storage is not None
        torch.cat(list(ids), out=laid_out(self.storage, sum(counts), dim)[0])
        for place, gradient in zip(vectors.split(counts), gradients, strict=True):
            if place.data_ptr() != gradient.data_ptr():
                place.copy_(gradient)
        return self.file

    def _make(self, size: int) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = os.memfd_create("twhin-gradients")
        os.ftruncate(self.descriptor, size)
        self.file = File.of(self.descriptor, size)
        self.storage = self.file.open()


def laid_out(storage: torch.UntypedStorage, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids `int64 [count]` and the vectors `float32 [count, dim]` of a desk."""
    ids = tensor_in(storage, torch.int64, 0, count)
    return ids, tensor_in(storage, torch.float32, _vectors_begin(count) // 4, count, dim)


def tensor_in(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, *shape: int) -> torch.Tensor:
    """Return the tensor that begins `offset` elements into a storage."""
    made: Any = torch.empty(0, dtype=dtype)
    found: torch.Tensor = made.set_(storage, offset, shape)
    return found


def _vectors_begin(count: int) -> int:
    """Return the byte of a desk at which the vectors of `count` ids begin."""
    return -(-8 * count // _CACHE_LINE) * _CACHE_LINE
