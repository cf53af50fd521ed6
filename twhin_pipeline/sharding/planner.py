"""How tables are distributed over ranks, by torchrec's planner: training follows it, `twhin plan` shows it before."""

from __future__ import annotations

from collections.abc import Mapping

import psutil
import torch
from fbgemm_gpu.quantize_comm import QuantizationContext, QuantizedCommCodec
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import KernelConfig, PlannerError, TopologyFactory, TrainerConfig
from torchrec.distributed.types import (
    CacheParams,
    CommOp,
    EmbeddingModuleShardingPlan,
    QuantizedCommCodecs,
    ShardingPlan,
    ShardingType,
)

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.training import LaunchConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.optimizer import apply_optimizers
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

UNLIMITED = 2**60
"""Bytes of a rank whose memory is not known."""

MOST_DEVICES = 128
"""Devices of a node that torch can number."""
LOOKUPS = 100_000
"""Rows of each table that a rank is taken to look up in a step: with `auto` the planner weighs costs by it."""


class ScaledCodec(QuantizedCommCodec):
    """Multiplies tensors on their way by a number, so that small ones keep their digits in half precision.

    fbgemm's own `loss_scale` divides what arrives while it still is of half precision, which loses them again.
    """

    def __init__(self, precision: SparseType, scale: float) -> None:
        super().__init__(precision)
        self.scale = scale

    def encode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().encode(input_tensor * self.scale, ctx)

    def decode(self, input_tensor: torch.Tensor, ctx: QuantizationContext | None = None) -> torch.Tensor:
        return super().decode(input_tensor, ctx) / self.scale


def sharder(launch: LaunchConfig, device: str, edges_per_step: int = 1) -> EmbeddingCollectionSharder:
    """Return what shards the tables, and sends vectors and gradients as `launch.exchange` says.

    A gradient is that of a step's mean loss, about 1 / edges, and float16 ends at 6e-8. So gradients are multiplied on
    their way by a power of two near `edges_per_step`.

    Raises:
        UserError: The ranks' backend does not send that type.
    """
    if launch.exchange == "fp32":
        return EmbeddingCollectionSharder()
    if device == "cpu" and launch.exchange == "bf16":
        raise UserError("launch.exchange: ranks on the CPU send no bf16 (gloo); take fp16, or fp32")
    kind = {"fp16": SparseType.FP16, "bf16": SparseType.BF16}[launch.exchange]
    scale = float(1 << max(edges_per_step - 1, 0).bit_length())
    codecs = QuantizedCommCodecs(forward=ScaledCodec(kind, 1.0), backward=ScaledCodec(kind, scale))
    return EmbeddingCollectionSharder(qcomm_codecs_registry={CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL.name: codecs})


def plan_tables(
    model: TwhinModel, launch: LaunchConfig, device: str, world_size: int, local_world_size: int, capacity: int
) -> ShardingPlan:
    """Plan which rank holds which rows. It needs no process group, and the tables no memory.

    Args:
        model: After `apply_optimizers`, its tables on the meta device.
        launch: Its `sharding` and `uvm_cache`.
        device: `cpu` or `cuda`, which the ranks train on.
        world_size: Number of ranks.
        local_world_size: Ranks of a node.
        capacity: Bytes that a rank's tables and their optimizer state may take.

    Raises:
        UserError: The tables do not fit.
    """
    cached = device == "cuda" and launch.uvm_cache is not None
    # The host's memory that GPUs' caches stand before; on a CPU it is the only one there is.
    host = psutil.virtual_memory().total // local_world_size if cached else 0
    topology = TopologyFactory.create_topology(
        TrainerConfig(
            world_size=world_size,
            local_world_size=local_world_size,
            **({"hbm_cap_bytes": capacity, "ddr_cap_bytes": host} if device == "cuda" else {"ddr_cap_bytes": capacity}),
        ),
        kernel_config=KernelConfig(compute_device=device),
    )
    kernels = [EmbeddingComputeKernel.FUSED.value]
    if cached:
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
    types = [ShardingType.ROW_WISE.value, ShardingType.TABLE_WISE.value]
    constraint = ParameterConstraints(
        sharding_types=types if launch.sharding == "auto" else [launch.sharding],
        compute_kernels=kernels,
        # What is looked up takes memory beside the tables, which `hbm_gib` does not mean where there is no choice.
        pooling_factors=[float(LOOKUPS) if launch.sharding == "auto" else 1.0],
        cache_params=CacheParams(load_factor=launch.uvm_cache) if cached else None,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,
        storage_reservation=FixedPercentageStorageReservation(0.0),
        constraints=dict.fromkeys(model.table_names, constraint),
        debug=False,
    )
    try:
        return planner.plan(model, [EmbeddingCollectionSharder()])
    except PlannerError as error:
        reason = str(error).splitlines()[0].strip(" .")
        size = sum(weight.numel() * weight.element_size() for weight in model.embeddings.parameters()) / 2**30
        raise UserError(
            f"tables of {size:.3g} GiB and their optimizer state do not fit, {launch.sharding}, on {world_size} "
            f"ranks of {capacity / 2**30:.3g} GiB; use more ranks, raise launch.hbm_gib, "
            f"{'set launch.uvm_cache, ' if device == 'cuda' and not cached else ''}or take data_type fp16, "
            f"rowwise_adagrad or a smaller embedding_dim ({reason})"
        ) from error


def rows_of_ranks(config: TwhinConfig, rows: Mapping[str, int], world_size: int) -> list[dict[str, int]]:
    """Return how many rows of each table each rank would hold, without loading or training anything.

    Args:
        config: Tables, optimizers and `launch`; without `launch.hbm_gib` memory is taken to be enough.
        rows: Table to its number of rows.
        world_size: Number of ranks.

    Raises:
        UserError: The tables do not fit into `launch.hbm_gib`, or no kernel has the optimizer of one.
    """
    launch = config.launch
    cuda = launch.device == "cuda" or (launch.device == "auto" and torch.cuda.is_available())
    capacity = UNLIMITED if launch.hbm_gib is None else int(launch.hbm_gib * 2**30)
    tables = UnshardedTables(config.model, rows, "meta")
    model = apply_optimizers(TwhinModel(config.model, tables, "meta"), config.model)
    ranks_per_node = min(world_size, launch.nproc_per_node) if launch.nnodes > 1 else world_size
    if ranks_per_node > MOST_DEVICES:
        ranks_per_node = max(n for n in range(1, MOST_DEVICES + 1) if world_size % n == 0)
    plan = plan_tables(model, launch, "cuda" if cuda else "cpu", world_size, ranks_per_node, capacity)
    planned = plan.get_plan_for_module("embeddings")
    assert isinstance(planned, EmbeddingModuleShardingPlan)
    ranks: list[dict[str, int]] = [{} for _ in range(world_size)]
    for table, sharding in planned.items():
        assert sharding.sharding_spec is not None
        for shard in sharding.sharding_spec.shards:
            assert shard.placement is not None
            ranks[shard.placement.rank()][table] = shard.shard_sizes[0]
    return ranks
