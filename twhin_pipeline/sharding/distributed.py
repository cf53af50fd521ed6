"""The process group: who am I, on what device, and how ranks agree."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.sharding.machine import threads_per_process


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    `control` is a gloo group on the CPU, apart from the one that carries tensors: flags, counts and checkpoints agree
    over it without waiting for a GPU. It is None where there is one process without a process group.
    """

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    saving: Any = None
    """A second gloo group, for the thread that writes checkpoints."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add lists of numbers over ranks, in float64."""
        if self.control is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value (anything that pickles), by rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def gather_to_first(self, value: Any) -> list[Any] | None:
        """Return every rank's value (anything that pickles), by rank, on rank 0; None on the others."""
        if self.control is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, values, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        if self.control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.control is not None:
            dist.barrier(group=self.control)


class Agreement:
    """A flag that all ranks agree on at each step: the all-reduce runs beside the step and is read at its end."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.value = torch.zeros(1, dtype=torch.int32)
        self.work: Any = None

    def start(self, flag: bool) -> None:
        """Send this rank's flag."""
        self.value.fill_(int(flag))
        if self.ranks.control is not None:
            self.work = dist.all_reduce(self.value, group=self.ranks.control, async_op=True)

    def wait(self) -> bool:
        """Return whether any rank's flag was set."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return bool(self.value.item())


def pick_device(config: TwhinConfig) -> torch.device:
    """Return this rank's device. Raises UserError where CUDA is asked for and missing."""
    wanted = config.launch.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("launch.device is cuda, but torch finds no CUDA device; set it to cpu, or install the GPU set")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"launch.nproc_per_node is {config.launch.nproc_per_node}, but the node has {torch.cuda.device_count()} "
            "GPUs; lower it to that"
        )
    return torch.device("cuda", local)


@contextmanager
def process_group(config: TwhinConfig) -> Iterator[Ranks]:
    """Join torchrun's process group where there is one (gloo, with NCCL for CUDA) and set threads; leave at the end.

    One rank alone joins none on a CPU, or where a table has an optimizer for which fbgemm has no kernel: its tables
    are whole, and `row_optimizers` update their rows.
    """
    torch.set_num_threads(threads_per_process(config))
    device = pick_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    unsharded = any(table.optimizer.unsharded for table in config.model.embeddings.tables)
    if "RANK" not in os.environ or (alone and (device.type == "cpu" or unsharded)):
        yield Ranks(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Ranks wait for each other through an evaluation, which has a limit of its own, and through slow storage.
    timeout = timedelta(seconds=config.training.eval_timeout_in_s + 1800)
    dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        saving = dist.new_group(backend="gloo", timeout=timeout)
        yield Ranks(dist.get_rank(), dist.get_world_size(), device, control, saving)
    finally:
        dist.destroy_process_group()
