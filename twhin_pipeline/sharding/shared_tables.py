"""Sharded tables on the CPUs of one machine: ranks look rows up where they lie, in each other's memory.

Between ranks of one machine an all-to-all copies each vector several times, and through sockets. Here every rank maps
all shards. It reads a step's rows from them, lays the gradients where the others can read them, and updates the rows of
its own shards by what all ranks have laid there. Plans, shards, checkpoints and schedules stay torchrec's; so does the
gradient of a row: the sum over ranks, in their order, of each one's gradient divided by their number.
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
from twhin_pipeline.sharding.cpu_tables import Shard, count_step, known_shards
from twhin_pipeline.sharding.machine import SHARED_MEMORY
from twhin_pipeline.sharding.row_optimizers import RowGradients
from twhin_pipeline.sharding.shared_memory import Desk, File, laid_out, tensor_in

_BOOT = Path("/proc/sys/kernel/random/boot_id")
# More than is needed: shared memory is not filled to the brim.
_SPARE = 1.25


def share_tables(model: nn.Module, tables: Sequence[str], timeout: timedelta) -> SharedTables | str:
    """Let ranks that are all on this machine read each other's shards. All ranks call it together, for CPU tables.

    Args:
        model: With torchrec's sharded tables.
        tables: Their names, in the configuration's order.
        timeout: How long a rank waits for the others in a step.

    Returns:
        The tables; or, on all ranks alike, why vectors have to be exchanged: a rank is on another machine, fbgemm's
        kernels keep a table, or shared memory has no room.
    """
    shards = known_shards(model)
    reason = _reason_against(_all(_Offer.of(shards)))
    if reason is None:
        mine, reason = _together(lambda: [_Part.of(shard) for shard in shards or ()])
    if reason is None:
        parts = [part for of_rank in _all(mine) for part in of_rank]
        mapped, reason = _together(lambda: [(part, part.open()) for part in parts])
    if reason is not None:
        return reason
    return SharedTables(tables, shards or [], mapped, timeout)


class SharedTables:
    """Tables of which each rank updates some rows, and reads all.

    Who fills shards by other means lets ranks wait for each other before the next step.
    """

    def __init__(
        self,
        tables: Sequence[str],
        own: Sequence[Shard],
        mapped: Sequence[tuple[_Part, torch.Tensor]],
        timeout: timedelta,
    ) -> None:
        """Take the tables' names, this rank's shards, all ranks' as they lie here, and the time to wait for others."""
        self.tables, self.own = list(tables), own
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.world_size = dist.get_world_size()
        self.lying = {}
        for table in self.tables:
            shards = sorted(((part.first, weight) for part, weight in mapped if part.table == table), key=_first)
            self.lying[table] = _Lying([first for first, _ in shards], [weight for _, weight in shards])
        self.dim = mapped[0][1].shape[1]
        self.desk = Desk()
        self.desks: list[tuple[File, torch.UntypedStorage] | None] = [None] * self.world_size
        # What the gradients of rows that lie elsewhere are handed to autograd by.
        self.leaf = torch.zeros((), requires_grad=True)
        self.updated: Any = None

    def rows(self, ids: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Return rows of all tables, where they lie; their gradients update the tables. Where it is asked for
        gradients, all ranks call it together, and go backward together.

        Args:
            ids: Table to `int64 [U_t]`, ascending, each once.

        Returns:
            `[U_t, D]` of each table, in order.

        Raises:
            IndexError: A row is not there.
        """
        if self.updated is not None:
            self.updated.wait()
            self.updated = None
        asked = [ids[table] for table in self.tables]
        addresses = [self.lying[table].addresses(rows) for table, rows in zip(self.tables, asked, strict=True)]
        stand_ins = _LookUp.apply(self.leaf, self, asked)
        return [Rows(x, address=a, room=self.desk.room) for x, a in zip(stand_ins, addresses, strict=True)]

    def update(self, ids: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor]) -> None:
        """Update the rows of this rank's shards by the gradients of all ranks, which call it together.

        Args:
            ids: `int64 [U_t]` of each table, ascending, each once.
            vectors: Their gradients, `float32 [U_t, D]` of each table.
        """
        file = self.desk.lay(ids, vectors)
        header = torch.tensor([*astuple(file), *map(len, ids)])
        headers = [torch.empty_like(header) for _ in range(self.world_size)]
        dist.all_gather(headers, header, group=self.group)
        laid = [self._read(rank, told.tolist()) for rank, told in enumerate(headers)]
        count_step(self.own)
        for shard in self.own:
            number = self.tables.index(shard.table)
            last = shard.first + len(shard.weight)
            parts = [_between(*of_rank[number], shard.first, last) for of_rank in laid]
            gradients = RowGradients.merged([rows for rows, _ in parts], [values for _, values in parts])
            shard.update(gradients, 1 / self.world_size)
        # Nobody reads rows, or lays gradients again, before all have come here.
        self.updated = dist.all_reduce(torch.zeros(1), group=self.group, async_op=True)

    def _read(self, rank: int, header: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the ids and the gradients of each table that a rank has laid on its desk."""
        file, counts = File(*header[: File.FIELDS]), header[File.FIELDS :]
        known = self.desks[rank]
        if known is None or known[0] != file:
            known = self.desks[rank] = file, file.open()
        ids, vectors = laid_out(known[1], sum(counts), self.dim)
        return list(zip(ids.split(counts), vectors.split(counts), strict=True))


class _LookUp(torch.autograd.Function):
    """Gives what stands for rows that lie elsewhere, and takes their gradients."""

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
    """A shard, as another process finds it."""

    table: str
    first: int
    shape: tuple[int, int]
    file: File
    offset: int
    """Elements of the file that come before it."""

    @classmethod
    def of(cls, shard: Shard) -> _Part:
        """Move a shard to shared memory, with all that has its storage, and describe it."""
        weight = shard.weight
        file = File.of(*weight.untyped_storage()._share_fd_cpu_())
        rows, dim = weight.shape
        return cls(shard.table, shard.first, (rows, dim), file, int(weight.storage_offset()))

    def open(self) -> torch.Tensor:
        """Map it. Raises OSError where this process cannot."""
        return tensor_in(self.file.open(), torch.float32, self.offset, *self.shape)


@dataclass(frozen=True)
class _Offer:
    """What decides on whether ranks share their tables."""

    boot: str
    """Which machine, since when."""
    size: int | None
    """Bytes of this rank's shards; None where fbgemm keeps one of them."""
    free: int
    """Bytes of shared memory."""

    @classmethod
    def of(cls, shards: Sequence[Shard] | None) -> _Offer:
        """Make this rank's."""
        there = _BOOT.exists() and SHARED_MEMORY.exists() and hasattr(os, "memfd_create")
        size = None if shards is None else sum(shard.weight.nbytes for shard in shards)
        return cls(_BOOT.read_text() if there else "", size, shutil.disk_usage(SHARED_MEMORY).free if there else 0)


def _reason_against(offers: Sequence[_Offer]) -> str | None:
    sizes = [offer.size for offer in offers]
    if None in sizes:
        return "fbgemm's kernels keep some of their tables"
    if len({offer.boot for offer in offers}) > 1 or not offers[0].boot:
        return "they are not all on one machine, or it has no memory that processes share"
    needed, free = _SPARE * sum(size or 0 for size in sizes), min(offer.free for offer in offers)
    if needed > free:
        return (
            f"their tables and some room take {needed / 2**30:.3g} GiB, and {SHARED_MEMORY} has {free / 2**30:.3g} GiB "
            "(a container gets more by --shm-size)"
        )
    return None


class _Lying:
    """Where all rows of a table lie in this process."""

    def __init__(self, first: Sequence[int], shards: Sequence[torch.Tensor]) -> None:
        """Take the first row of each shard, ascending, and the shards, `float32 [n, D]`."""
        self.shards = shards  # kept, so that their memory is
        self.rows = first[-1] + len(shards[-1])
        self.row_bytes = shards[0].shape[1] * shards[0].element_size()
        self.first = torch.tensor(first)
        self.origin = torch.tensor([shard.data_ptr() for shard in shards]) - self.first * self.row_bytes

    def addresses(self, rows: torch.Tensor) -> torch.Tensor:
        """Return where each of `rows`, ascending, begins: int64. Raises IndexError where one is not there."""
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
    """Do the same on all ranks; return what it gave here, and how it failed on the first rank where it did."""
    found: list[Any] = []
    failed = None
    try:
        found = work()
    except (OSError, RuntimeError) as error:  # torch tells of the system's errors by the latter
        failed = f"rank {dist.get_rank()} cannot share memory ({error})"
    return found, next(filter(None, _all(failed)), None)


def _all(value: Any) -> list[Any]:
    """Return every rank's value, by rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
