"""Tables in memory that the ranks of one machine share: each rank reads rows directly from the others' shards.

Between ranks of one machine an all-to-all copies each vector several times, through sockets. Here every rank maps all
shards. It reads a step's rows from them, writes its gradients where the others can read them, and updates the rows of
its own shards by the gradients of all ranks. Plans, shards, checkpoints and schedules stay torchrec's; so does the
gradient of a row: the sum over ranks, in their order, of each one's gradient divided by the number of ranks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from twhin_pipeline.model.rows import Rows
from twhin_pipeline.sharding.machine import SHARED_MEMORY
from twhin_pipeline.sharding.row_optimizers import RowGradients
from twhin_pipeline.sharding.shared_memory import GradientBuffer, SharedFile, buffer_views, forget, tensor_in
from twhin_pipeline.sharding.torchrec_tables import Shard, TorchrecTables, count_step, known_shards

_BOOT = Path("/proc/sys/kernel/random/boot_id")
# Ask for more shared memory than the tables need, so that it is not filled completely.
_SPARE = 1.25


def share_tables(model: nn.Module, tables: TorchrecTables, timeout: timedelta) -> SharedTables | str:
    """Let ranks that are all on this machine read each other's shards. All ranks call it together, for CPU tables.

    Args:
        model: The model that torchrec has sharded.
        tables: Its tables.
        timeout: How long a rank waits for the others in a step.

    Returns:
        The tables; or, on all ranks alike, why vectors have to be exchanged: a rank is on another machine, fbgemm's
        kernels keep a table, or there is too little shared memory.
    """
    shards = known_shards(model)
    reason = _reason_against(_all(_Offer.of(shards)))
    if reason is None:
        own, reason = _together(lambda: [_Part.of(shard) for shard in shards or ()])
    if reason is None:
        parts = [part for of_rank in _all(own) for part in of_rank]
        mapped, reason = _together(lambda: [(part, part.open()) for part in parts])
    if reason is not None:
        return reason
    return SharedTables(tables, shards or [], mapped, timeout)


class SharedTables:
    """EmbeddingTables of which each rank updates some rows, and reads all.

    Code that fills shards in another way must make the ranks wait for each other before the next step.
    """

    def __init__(
        self,
        tables: TorchrecTables,
        own: Sequence[Shard],
        mapped: Sequence[tuple[_Part, torch.Tensor]],
        timeout: timedelta,
    ) -> None:
        """Take the tables as torchrec sharded them, this rank's shards, and all ranks' as mapped here.

        `timeout` is how long a rank waits for the others.
        """
        self.names, self.module, self.own = tables.names, tables.module, own
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.world_size = dist.get_world_size()
        self.addresses = {}
        for table in self.names:
            shards = sorted(((part.first, weight) for part, weight in mapped if part.table == table), key=_first)
            self.addresses[table] = _RowAddresses([first for first, _ in shards], [weight for _, weight in shards])
        self.dim = mapped[0][1].shape[1]
        self.buffer = GradientBuffer()
        self.mapped_buffers: list[tuple[SharedFile, torch.UntypedStorage] | None] = [None] * self.world_size
        # Makes autograd call `_LookUp.backward`: the rows themselves are no tensors of this process.
        self.leaf = torch.zeros((), requires_grad=True)
        self.updated: Any = None

    def rows(self, ids: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Return rows of all tables, by address; see EmbeddingTables. Ranks look up, and go backward, together.

        Raises:
            IndexError: A row does not exist.
        """
        if self.updated is not None:
            self.updated.wait()
            self.updated = None
        of_tables = [ids[table] for table in self.names]
        addresses = [self.addresses[table].of(rows) for table, rows in zip(self.names, of_tables, strict=True)]
        placeholders = _LookUp.apply(self.leaf, self, of_tables)
        memory = self.buffer.gradients
        return [Rows(x, address=a, gradient_memory=memory) for x, a in zip(placeholders, addresses, strict=True)]

    def update(self, ids: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]) -> None:
        """Update the rows of this rank's shards by the gradients of all ranks, which call it together.

        Args:
            ids: `int64 [U_t]` of each table, ascending, each once.
            gradients: `float32 [U_t, D]` of each table.
        """
        file = self.buffer.write(ids, gradients)
        header = torch.tensor([*astuple(file), *map(len, ids)])
        headers = [torch.empty_like(header) for _ in range(self.world_size)]
        dist.all_gather(headers, header, group=self.group)
        of_ranks = [self._read(rank, header.tolist()) for rank, header in enumerate(headers)]
        count_step(self.own)
        for shard in self.own:
            number = self.names.index(shard.table)
            last = shard.first + len(shard.weight)
            parts = [_between(*of_rank[number], shard.first, last) for of_rank in of_ranks]
            merged = RowGradients.merged([rows for rows, _ in parts], [values for _, values in parts])
            shard.update(merged, 1 / self.world_size)
        # No rank reads rows, or writes gradients again, before all have reached this point.
        self.updated = dist.all_reduce(torch.zeros(1), group=self.group, async_op=True)

    def _read(self, rank: int, header: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the ids and the gradients of each table that a rank has written into its buffer."""
        file, counts = SharedFile(*header[: SharedFile.FIELDS]), header[SharedFile.FIELDS :]
        mapped = self.mapped_buffers[rank]
        if mapped is None or mapped[0] != file:
            mapped = self.mapped_buffers[rank] = file, file.open()
        ids, gradients = buffer_views(mapped[1], sum(counts), self.dim)
        return list(zip(ids.split(counts), gradients.split(counts), strict=True))


class _LookUp(torch.autograd.Function):
    """Returns tensors that represent rows of other processes in autograd, and takes their gradients."""

    @staticmethod
    def forward(
        ctx: Any, leaf: torch.Tensor, tables: SharedTables, ids: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        ctx.tables, ctx.ids = tables, ids
        return tuple(leaf.new_empty(()).expand(len(rows), tables.dim) for rows in ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.tables.update(ctx.ids, gradients)
        return None, None, None


@dataclass(frozen=True)
class _Part:
    """A shard, described so that another process can map it."""

    table: str
    first: int
    shape: tuple[int, int]
    file: SharedFile
    offset: int
    """Elements of the file that come before it."""

    @classmethod
    def of(cls, shard: Shard) -> _Part:
        """Move a shard to shared memory, with all that has its storage, and describe it.

        Vectors that are there are lost if the storage is not shared yet: they are undefined until `init_tables`. So it
        takes the memory of the shard once, and not twice.
        """
        weight = shard.weight
        storage = weight.untyped_storage()
        if not storage.is_shared():
            forget(storage)
        file = SharedFile.of(*storage._share_fd_cpu_())
        rows, dim = weight.shape
        return cls(shard.table, shard.first, (rows, dim), file, int(weight.storage_offset()))

    def open(self) -> torch.Tensor:
        """Map it. Raises OSError where this process cannot."""
        return tensor_in(self.file.open(), torch.float32, self.offset, *self.shape)


@dataclass(frozen=True)
class _Offer:
    """A rank's part of the decision whether ranks share their tables."""

    boot: str
    """Identifies the machine, and when it was started."""
    size: int | None
    """Bytes of this rank's shards; None where fbgemm keeps one of them."""
    free: int
    """Bytes of shared memory."""

    @classmethod
    def of(cls, shards: Sequence[Shard] | None) -> _Offer:
        """Describe this rank."""
        can_share = _BOOT.exists() and SHARED_MEMORY.exists() and hasattr(os, "memfd_create")
        size = None if shards is None else sum(shard.weight.nbytes for shard in shards)
        boot = _BOOT.read_text(encoding="utf-8") if can_share else ""
        return cls(boot, size, shutil.disk_usage(SHARED_MEMORY).free if can_share else 0)


def _reason_against(offers: Sequence[_Offer]) -> str | None:
    sizes = [offer.size for offer in offers]
    if None in sizes:
        return "fbgemm's kernels keep some of their tables"
    if len({offer.boot for offer in offers}) > 1 or not offers[0].boot:
        return "they are not all on one machine, or it has no memory that processes share"
    needed, free = _SPARE * sum(size or 0 for size in sizes), min(offer.free for offer in offers)
    if needed > free:
        return (
            f"their tables and some spare memory take {needed / 2**30:.3g} GiB, and {SHARED_MEMORY} has "
            f"{free / 2**30:.3g} GiB (a container gets more by --shm-size)"
        )
    return None


class _RowAddresses:
    """Where the rows of a table are in this process's memory."""

    def __init__(self, first: Sequence[int], shards: Sequence[torch.Tensor]) -> None:
        """Take the first row of each shard, ascending, and the shards, `float32 [n, D]`."""
        self.shards = shards  # keeps their memory alive
        self.rows = first[-1] + len(shards[-1])
        self.row_bytes = shards[0].shape[1] * shards[0].element_size()
        self.first = torch.tensor(first)
        self.origin = torch.tensor([shard.data_ptr() for shard in shards]) - self.first * self.row_bytes

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the address of each of `rows`, ascending: int64. Raises IndexError where one does not exist."""
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.rows:
            raise IndexError(f"rows {int(rows[0])} to {int(rows[-1])} of a table that has {self.rows}")
        holder = torch.bucketize(rows, self.first[1:], right=True)
        return self.origin[holder] + rows * self.row_bytes


def _between(rows: torch.Tensor, values: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the part whose rows, ascending, are from `first` to before `last`; its rows are counted from `first`."""
    low, high = torch.searchsorted(rows, torch.tensor([first, last])).tolist()
    return rows[low:high] - first, values[low:high]


def _first(shard: tuple[int, torch.Tensor]) -> int:
    return shard[0]


def _together(work: Callable[[], list[Any]]) -> tuple[list[Any], str | None]:
    """Do the same on all ranks; return this rank's result, and how it failed on the first rank where it did."""
    result: list[Any] = []
    failed = None
    try:
        result = work()
    except (OSError, RuntimeError) as error:  # torch raises the latter for errors of the system
        failed = f"rank {dist.get_rank()} cannot share memory ({error})"
    return result, next(filter(None, _all(failed)), None)


def _all(value: Any) -> list[Any]:
    """Return every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
