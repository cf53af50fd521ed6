"""Tables that torchrec shards: ranks exchange the vectors of a step's rows, and their gradients.

fbgemm's CPU update takes several times as long as reading and writing the row does. So on the CPU its kernels are
replaced by compiled loops of our own; tests compare the two. All else is torchrec's and fbgemm's: plans, shards,
memory, optimizer state, checkpoints, schedules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twhin_pipeline.kernels import parallel
from twhin_pipeline.kernels.parallel import ParallelLoop
from twhin_pipeline.model.rows import Rows
from twhin_pipeline.sharding.row_optimizers import RowGradients

_UPDATES: dict[EmbOptimType, ParallelLoop] = {
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: parallel.rowwise_adagrad,
    EmbOptimType.EXACT_ADAGRAD: parallel.adagrad,
}


SAMPLES = {"cpu": 1, "cuda": 8192}
"""Into how many samples a table's rows are divided, by device. Kernels on CUDA look a sample up row after row, and
samples side by side: with one sample a step on an H200 spent 30 of its 33 ms of GPU time on waiting for that."""


def row_counts(rows: int, samples: int) -> torch.Tensor:
    """Divide a number of rows into samples as evenly as can be: int64 `[samples]`."""
    return torch.full((samples,), rows // samples).index_fill_(0, torch.arange(rows % samples), rows // samples + 1)


class TorchrecTables:
    """EmbeddingTables that torchrec has sharded. Ranks look up, and go backward, together."""

    def __init__(self, names: Sequence[str], module: nn.Module) -> None:
        """Take the tables' names, in the configuration's order, and torchrec's sharded EmbeddingCollection of them."""
        self.names = list(names)
        self.module = module

    def rows(self, ids: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Return rows of all tables, looked up at once; see EmbeddingTables."""
        of_tables = [ids[name] for name in self.names]
        device = of_tables[0].device
        samples = SAMPLES[device.type]
        lengths = torch.cat([row_counts(len(rows), samples) for rows in of_tables])
        features = KeyedJaggedTensor(
            keys=self.names,
            values=torch.cat(of_tables),
            lengths=lengths.to(device),
            stride=samples,
        )
        vectors = self.module(features)
        return [Rows(vectors[name].values().float()) for name in self.names]


def use_compiled_loops(model: nn.Module) -> int:
    """Make the fbgemm tables of a sharded model, where they are on the CPU, look up and update rows by our loops.

    Returns:
        How many groups of tables do so: those of float32 with Adagrad or row-wise Adagrad; fbgemm keeps the others.
    """
    count = 0
    for module in _modules(model):
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and _fits(module):
            module.forward = partial(_lookup, module)
            count += 1
    return count


def empty_caches(model: nn.Module) -> None:
    """Write rows that a GPU keeps in a cache (`launch.uvm_cache`) to their tables, and empty the caches.

    What then reads the tables' memory finds every update, and what writes there is not overwritten from a cache.
    """
    for module in _modules(model):
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen) and module.weights_uvm.numel():
            module.flush()
            module.reset_cache_states()


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a table, updated by compiled loops."""

    table: str
    first: int
    """The row of the table that is the shard's first."""
    group: SplitTableBatchedEmbeddingBagsCodegen
    """The tables that share a kernel."""
    number: int
    """The table's position among them."""

    @property
    def weight(self) -> torch.Tensor:
        """Its vectors, `float32 [n, D]`, in the group's memory."""
        return self.group.split_embedding_weights()[self.number]

    def update(self, gradients: RowGradients, scale: float) -> None:
        """Update rows of the shard by their gradients times `scale`."""
        _update(self.group, self.number, gradients, scale)


def known_shards(model: nn.Module) -> list[Shard] | None:
    """Return this rank's shards of a sharded model's tables, leaving out those without rows; or None where fbgemm's
    kernels keep one of them."""
    shards = []
    for kernel in _modules(model):
        if isinstance(kernel, BaseBatchedEmbedding):
            group = kernel.emb_module
            if not (isinstance(group, SplitTableBatchedEmbeddingBagsCodegen) and _fits(group)):
                return None
            for number, table in enumerate(kernel._config.embedding_tables):
                assert table.local_metadata is not None
                if table.local_rows:
                    shards.append(Shard(table.name, table.local_metadata.shard_offsets[0], group, number))
    return shards


def count_step(shards: Sequence[Shard]) -> None:
    """Count a step of the shards' groups; a resumed run continues from that count."""
    for group in {id(shard.group): shard.group for shard in shards}.values():
        group.iter.add_(1)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    # torchrec keeps its lookups in plain lists, which `modules` does not visit.
    lookups = [lookup for module in model.modules() for lookup in getattr(module, "_lookups", [])]
    return nn.ModuleList([model, *lookups]).modules()


def _fits(tables: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    return (
        tables.optimizer in _UPDATES
        and tables.weights_precision == SparseType.FP32
        and tables.pooling_mode == PoolingMode.NONE
        and tables.weights_host.device.type == "cpu"
        and tables.optimizer_args.weight_decay == 0
    )


def _lookup(
    tables: SplitTableBatchedEmbeddingBagsCodegen, indices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Return the rows `[L, D]`, as fbgemm does.

    Args:
        tables: T features, each of one table; `D` is the same in all.
        indices: `int64 [L]`, feature after feature.
        offsets: `[T * B + 1]` where the indices of each feature's B samples begin.
    """
    if torch.is_grad_enabled():
        tables.iter.add_(1)  # a resumed run continues from that count
    features = len(tables.feature_table_map)
    cuts = offsets[:: max((len(offsets) - 1) // features, 1)].tolist()
    vectors: torch.Tensor = _LookUp.apply(tables.placeholder_autograd_tensor, tables, indices, cuts)
    return vectors


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        placeholder: torch.Tensor,
        tables: SplitTableBatchedEmbeddingBagsCodegen,
        indices: torch.Tensor,
        cuts: list[int],
    ) -> torch.Tensor:
        ctx.tables, ctx.indices, ctx.cuts = tables, indices, cuts
        weights = tables.split_embedding_weights()
        vectors = torch.empty(len(indices), weights[0].shape[1])
        for feature, table in enumerate(tables.feature_table_map):
            part = slice(cuts[feature], cuts[feature + 1])
            torch.index_select(weights[table], 0, indices[part], out=vectors[part])
        return vectors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        tables: SplitTableBatchedEmbeddingBagsCodegen = ctx.tables
        for table in range(len(tables.embedding_specs)):
            parts = [
                slice(ctx.cuts[feature], ctx.cuts[feature + 1])
                for feature, of in enumerate(tables.feature_table_map)
                if of == table
            ]
            # All of a table's gradients make one step of a row, also where several ranks ask for it.
            index = torch.cat([ctx.indices[part] for part in parts])
            _update(tables, table, RowGradients.of(index, *(gradient[part] for part in parts)), 1)
        return None, None, None, None


def _update(tables: SplitTableBatchedEmbeddingBagsCodegen, table: int, gradients: RowGradients, scale: float) -> None:
    """Update a table's rows by their gradients times `scale`."""
    weight, momentum = tables.split_embedding_weights()[table], tables.split_optimizer_states()[table][0]
    momentum = momentum.view(-1 if tables.optimizer == EmbOptimType.EXACT_ROWWISE_ADAGRAD else weight.shape)
    rule = tables.get_learning_rate(), tables.optimizer_args.eps
    gradients.update(_UPDATES[tables.optimizer], weight, momentum, scale, *rule)
