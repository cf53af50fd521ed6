"""Placement: how tables are distributed over ranks, their first vectors, and statistics of each shard."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingEnv, ShardingPlan

from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.planner import plan_tables, sharder
from twhin_pipeline.sharding.shared_tables import SharedTables, share_tables
from twhin_pipeline.sharding.torchrec_tables import TorchrecTables, empty_caches, use_compiled_loops

logger = logging.getLogger(__name__)

# Rows whose first vectors come from one random stream: whatever the sharding, a row's vector is the same.
INIT_BLOCK = 4096
# Rows of a table that are handled at a time.
BLOCK_ROWS = 65_536

LocalShards = list[tuple[int, torch.Tensor]]


def maybe_shard_model(
    model: TwhinModel, device: torch.device | str, launch: LaunchConfig, edges_per_step: int = 1
) -> nn.Module:
    """Distribute the model's tables over the process group's ranks, by an explicit plan; without one, keep the model.

    The operators' parameters are on every rank, kept equal by DistributedDataParallel. The plan is printed by rank 0
    and kept as `sharding_plan_text` of what is returned. The tables' vectors are undefined until `init_tables`.

    Args:
        model: After `apply_optimizers`.
        device: This rank's device.
        launch: `sharding`, `hbm_gib`, `uvm_cache` and `exchange`.
        edges_per_step: Of all ranks, by which a step's loss is divided.

    Returns:
        A DistributedModelParallel of the model, or the model itself on `device`.

    Raises:
        UserError: The tables do not fit, or no kernel of the device can do an optimizer.
    """
    device = torch.device(device)
    if not (dist.is_available() and dist.is_initialized()):
        model = model.to(device)
        text = "one process without a process group: tables are not sharded, " + ", ".join(
            f"{table} {weight.shape[0]:,} x {weight.shape[1]}" for table, weight in _weights(model).items()
        )
        _keep_plan(model, text)
        logger.info(text)
        return model

    _refuse_unsupported(model, device)
    plan = _agreed_plan(model, device, launch)
    text = plan_text(model, plan)
    with warnings.catch_warnings():
        # torchrec passes DistributedDataParallel an argument that torch is about to rename.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        sharded = DistributedModelParallel(
            model,
            env=ShardingEnv.from_process_group(dist.group.WORLD),
            device=device,
            plan=plan,
            sharders=[sharder(launch, device.type, edges_per_step)],
        )
    tables = TorchrecTables(model.table_names, model.embeddings)
    model.use_tables(tables)
    if device.type == "cpu":
        logger.info("%d groups of tables are updated by compiled loops", use_compiled_loops(sharded))
        shared = share_tables(sharded, tables, _timeout())
        if isinstance(shared, SharedTables):
            model.use_tables(shared)
            text += "\n  ranks look rows up in each other's memory"
        else:
            text += f"\n  ranks exchange vectors: {shared}"
            if launch.exchange != "fp32":
                text += f"; they send {launch.exchange}"
    _keep_plan(sharded, text)
    if dist.get_rank() == 0:
        print(text, flush=True)
    return sharded


def plan_text(model: TwhinModel, plan: ShardingPlan) -> str:
    """Describe a plan, a line a table: its size, how it is sharded, and the rows that each rank holds.

    Args:
        model: Whose tables the plan shards.
        plan: As the planner made it.
    """
    tables = plan.get_plan_for_module("embeddings")
    assert isinstance(tables, EmbeddingModuleShardingPlan)
    lines = [f"sharding plan for {dist.get_world_size()} ranks"]
    bytes_of: dict[int, int] = {}
    for table, weight in _weights(model).items():
        sharding = tables[table]
        specification = sharding.sharding_spec
        assert specification is not None
        parts = []
        for shard in specification.shards:
            rank, rows = shard.placement.rank(), shard.shard_sizes[0]
            bytes_of[rank] = bytes_of.get(rank, 0) + rows * shard.shard_sizes[1] * weight.element_size()
            parts.append(f"rank {rank}: {rows:,}")
        size = weight.numel() * weight.element_size() / 2**20
        lines.append(
            f"  {table}: {weight.shape[0]:,} x {weight.shape[1]} {str(weight.dtype).removeprefix('torch.')} "
            f"({size:,.1f} MiB), {sharding.sharding_type}, {sharding.compute_kernel}; rows on {', '.join(parts)}"
        )
    totals = ", ".join(f"rank {rank}: {bytes_of.get(rank, 0) / 2**20:,.1f}" for rank in range(dist.get_world_size()))
    lines.append(f"  MiB of vectors, without optimizer state, on {totals}")
    return "\n".join(lines)


def unwrapped(model: nn.Module) -> TwhinModel:
    """Return the TwhinModel inside a sharded model, or the model itself."""
    inner = model.module if isinstance(model, DistributedModelParallel) else model
    assert isinstance(inner, TwhinModel)
    return inner


def table_weights(model: nn.Module) -> dict[str, torch.Tensor | ShardedTensor]:
    """Return each table's weight: a ShardedTensor under a process group, else `[N, D]`; both in the model's memory."""
    state = unwrapped(model).embeddings.state_dict()
    empty_caches(model)
    return {table: state[f"embeddings.{table}.weight"] for table in unwrapped(model).table_names}


def local_shards(weight: torch.Tensor | ShardedTensor) -> LocalShards:
    """Return what this rank holds of a table, by its first row: `(row, [n, D])` pairs, none where it holds nothing."""
    if isinstance(weight, ShardedTensor):
        shards = weight.local_shards()
        return sorted(((s.metadata.shard_offsets[0], s.tensor) for s in shards), key=lambda shard: shard[0])
    return [(0, weight.detach())]


@torch.no_grad()
def gather_table(weight: torch.Tensor | ShardedTensor, ranks: Ranks, num_rows: int) -> torch.Tensor | None:
    """Gather the first rows of a table to rank 0, in blocks, so that no other rank holds more than its shards.

    All ranks call it together.

    Args:
        weight: As `table_weights` gives it.
        ranks: This process among the others.
        num_rows: How many rows; the others are left out.

    Returns:
        On rank 0 `[num_rows, D]`, of the weight's type and on this rank's device (the table's own memory where it is
        not sharded); None on other ranks.
    """
    if not isinstance(weight, ShardedTensor):
        return weight.detach()[:num_rows]
    mine = dict(local_shards(weight))
    metadata = weight.metadata()
    size = metadata.size[1]
    table = None
    if ranks.rank == 0:
        table = torch.empty(num_rows, size, dtype=metadata.tensor_properties.dtype, device=ranks.device)
    for shard in metadata.shards_metadata:
        assert shard.placement is not None
        first, rows, owner = shard.shard_offsets[0], shard.shard_sizes[0], shard.placement.rank()
        for start in range(first, min(first + rows, num_rows), BLOCK_ROWS):
            end = min(start + BLOCK_ROWS, first + rows, num_rows)
            if owner == ranks.rank:
                block = mine[first][start - first : end - first].detach()
                if table is None:
                    dist.send(block.cpu().contiguous(), 0, group=ranks.control)
                else:
                    table[start:end] = block
            elif table is not None:
                received = torch.empty(end - start, size, dtype=table.dtype)
                dist.recv(received, owner, group=ranks.control)
                table[start:end] = received
    return table


@torch.no_grad()
def limit_norm(vectors: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """Return `vectors [N, D]` with the longer ones scaled down to the length `max_norm`, as a lookup returns them."""
    if max_norm is None:
        return vectors
    lengths = vectors.float().norm(dim=1, keepdim=True)
    return (vectors.float() * (max_norm / lengths.clamp(min=max_norm))).to(vectors.dtype)


@torch.no_grad()
def limit_norms(model: nn.Module, max_norm: float | None) -> None:
    """Scale down this rank's longer vectors in place, so that the tables hold what lookups return."""
    if max_norm is None:
        return
    for weight in table_weights(model).values():
        for _, shard in local_shards(weight):
            for start in range(0, len(shard), BLOCK_ROWS):
                shard[start : start + BLOCK_ROWS] = limit_norm(shard[start : start + BLOCK_ROWS], max_norm)


@torch.no_grad()
def init_tables(model: nn.Module, seed: int) -> None:
    """Fill the tables with normal numbers of standard deviation `init_scale / sqrt(D)`.

    A row's vector depends on the seed, the table's name and the row alone, whatever the world size, sharding or device.
    """
    inner = unwrapped(model)
    scale = inner.init_scale / inner.dim**0.5
    for table, weight in table_weights(model).items():
        for first, shard in local_shards(weight):
            last = first + shard.shape[0]
            for block in range(first // INIT_BLOCK, -(-last // INIT_BLOCK)):
                digest = hashlib.sha256(f"{seed}/{table}/{block}".encode()).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
                values = torch.randn(INIT_BLOCK, inner.dim, generator=generator) * scale
                low, high = max(first, block * INIT_BLOCK), min(last, (block + 1) * INIT_BLOCK)
                shard[low - first : high - first] = values[low - block * INIT_BLOCK : high - block * INIT_BLOCK].to(
                    shard
                )
    if dist.is_available() and dist.is_initialized():
        dist.barrier()  # others may read these rows


@torch.no_grad()
def log_sharded_tensor_content(
    weight_name: str, table_name: str, weight_tensor: torch.Tensor | ShardedTensor, num_rows: int = 1024
) -> dict[str, float]:
    """Sample the lengths of a table's vectors, shard by shard, on any device and at any world size.

    Under a process group every rank must call it; all get the same answer, and rank 0 logs it.

    Args:
        weight_name: The weight's name in the model, for the log.
        table_name: The table; the figures' names begin with it.
        weight_tensor: As `table_weights` gives it.
        num_rows: Evenly spaced rows to sample of each shard.

    Returns:
        For each shard, by its first row, `<table>/rows_from_<row>/norm_{min,mean,max}`.
    """
    norms_of: dict[str, float] = {}
    for first, shard in local_shards(weight_tensor):
        count = min(num_rows, shard.shape[0])
        if count == 0:
            continue
        rows = torch.linspace(0, shard.shape[0] - 1, count, dtype=torch.float64, device=shard.device).round().long()
        norms = shard[rows].float().norm(dim=1)
        key = f"{table_name}/rows_from_{first}/norm"
        norms_of |= {
            f"{key}_min": float(norms.min()),
            f"{key}_mean": float(norms.mean()),
            f"{key}_max": float(norms.max()),
        }
    if isinstance(weight_tensor, ShardedTensor):
        gathered: list[dict[str, float]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, norms_of)
        norms_of = {key: value for part in gathered for key, value in part.items()}
    if not isinstance(weight_tensor, ShardedTensor) or dist.get_rank() == 0:
        logger.info("%s of %s: %s", weight_name, table_name, norms_of)
    return norms_of


def _weights(model: TwhinModel) -> dict[str, nn.Parameter]:
    parameters = dict(model.embeddings.named_parameters())
    return {table: parameters[f"embeddings.{table}.weight"] for table in model.table_names}


def _keep_plan(model: nn.Module, text: str) -> None:
    model.sharding_plan_text = text  # type: ignore[assignment]


def _refuse_unsupported(model: TwhinModel, device: torch.device) -> None:
    for table, weight in _weights(model).items():
        classes = [cls.__name__ for cls in getattr(weight, "_optimizer_classes", [])]
        if device.type == "cpu" and "Adam" in classes:
            raise UserError(
                f"model.embeddings.tables: the optimizer of {table!r} is adam, for which fbgemm has no CPU kernel; "
                "take rowwise_adagrad or adagrad, train on CUDA, or train in one process without torchrun"
            )


def _agreed_plan(model: TwhinModel, device: torch.device, launch: LaunchConfig) -> ShardingPlan:
    """Plan on rank 0, for all ranks; where that fails, all of them raise the same UserError."""
    world_size = dist.get_world_size()
    local_world_size = min(int(os.environ.get("LOCAL_WORLD_SIZE", launch.nproc_per_node)), world_size)
    answer: list[ShardingPlan | str | None] = [None]
    if dist.get_rank() == 0:
        capacity = _capacity(device, launch, local_world_size)
        try:
            answer[0] = plan_tables(model, launch, device.type, world_size, local_world_size, capacity)
        except UserError as error:
            answer[0] = str(error)
    dist.broadcast_object_list(answer, src=0, device=device)
    plan = answer[0]
    if not isinstance(plan, ShardingPlan):
        raise UserError(str(plan))
    return plan


def _timeout() -> timedelta:
    """Return how long ranks wait for each other."""
    assert dist.group.WORLD is not None
    timeout: timedelta = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    return timeout


def _capacity(device: torch.device, launch: LaunchConfig, local_world_size: int) -> int:
    """Return the bytes that a rank's tables may take."""
    if launch.hbm_gib is not None:
        return int(launch.hbm_gib * 2**30)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // local_world_size
