"""Memory that processes of one machine share: files without a name, and buffers for a step's gradients."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# A buffer gets more memory than it needs, so that it seldom has to grow; and at least some, since an empty file cannot
# be mapped.
_SPARE, _MIN_BYTES = 1.25, 1 << 16
_CACHE_LINE = 64
# What torch.multiprocessing maps tensors by; torch's type stubs lack it.
_STORAGE: Any = torch.UntypedStorage


@dataclass(frozen=True)
class SharedFile:
    """Shared memory of a process, described so that another process can map it."""

    process: int
    descriptor: int
    device: int
    """With `inode`, distinguishes the file from one of another process that has the same number."""
    inode: int
    size: int

    FIELDS = 5

    @classmethod
    def of(cls, descriptor: int, size: int) -> SharedFile:
        """Describe an open file of this process."""
        status = os.fstat(descriptor)
        return cls(os.getpid(), descriptor, status.st_dev, status.st_ino, size)

    def open(self) -> torch.UntypedStorage:
        """Map it. Raises OSError where this process cannot."""
        descriptor = os.open(f"/proc/{self.process}/fd/{self.descriptor}", os.O_RDWR)
        try:
            expected = SharedFile(os.getpid(), descriptor, self.device, self.inode, self.size)
            if SharedFile.of(descriptor, self.size) != expected:
                raise OSError(f"process {self.process} is another one here")
            mapped: torch.UntypedStorage = _STORAGE._new_shared_fd_cpu(descriptor, self.size)
            return mapped
        finally:
            os.close(descriptor)


def forget(storage: torch.UntypedStorage) -> None:
    """Set the complete pages of a private storage to 0, which frees their memory."""
    page = mmap.PAGESIZE
    first = -(-storage.data_ptr() // page) * page
    size = (storage.data_ptr() + storage.nbytes() - first) // page * page
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and size > 0:
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


class GradientBuffer:
    """Shared memory into which a rank writes the row ids and gradients of a step, for all ranks to read."""

    def __init__(self) -> None:
        self.descriptor: int | None = None
        self.file: SharedFile | None = None
        self.storage: torch.UntypedStorage | None = None

    def gradients(self, count: int, dim: int) -> torch.Tensor:
        """Return the memory for the gradients of `count` rows, `float32 [count, dim]`."""
        size = _gradients_offset(count) + 4 * count * dim
        if self.file is None or self.file.size < size:
            self._allocate(max(int(_SPARE * size), _MIN_BYTES))
        assert self.storage is not None
        return buffer_views(self.storage, count, dim)[1]

    def write(self, ids: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> SharedFile:
        """Write the ids and the gradients of each table; gradients that are already in this memory are not copied."""
        counts, dim = [len(rows) for rows in ids], gradients[0].shape[1]
        memory = self.gradients(sum(counts), dim)
        assert self.file is not None and self.storage is not None
        torch.cat(list(ids), out=buffer_views(self.storage, sum(counts), dim)[0])
        for place, gradient in zip(memory.split(counts), gradients, strict=True):
            if place.data_ptr() != gradient.data_ptr():
                place.copy_(gradient)
        return self.file

    def _allocate(self, size: int) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = os.memfd_create("twhin-gradients")
        os.ftruncate(self.descriptor, size)
        self.file = SharedFile.of(self.descriptor, size)
        self.storage = self.file.open()


def buffer_views(storage: torch.UntypedStorage, count: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids `int64 [count]` and the gradients `float32 [count, dim]` in a buffer's memory."""
    ids = tensor_in(storage, torch.int64, 0, count)
    return ids, tensor_in(storage, torch.float32, _gradients_offset(count) // 4, count, dim)


def tensor_in(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, *shape: int) -> torch.Tensor:
    """Return the tensor that begins `offset` elements into a storage."""
    empty: Any = torch.empty(0, dtype=dtype)
    tensor: torch.Tensor = empty.set_(storage, offset, shape)
    return tensor


def _gradients_offset(count: int) -> int:
    """Return the byte of a buffer at which the gradients of `count` ids begin."""
    return -(-8 * count // _CACHE_LINE) * _CACHE_LINE
