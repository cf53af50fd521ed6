"""Tables of which one process holds every row, on its CPU or its GPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.rows import Rows

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class UnshardedTables:
    """EmbeddingTables in one process.

    Under a process group they hold no memory: they are what `maybe_shard_model` shards, so that no rank ever holds a
    full table. `init_tables` gives them their first vectors.
    """

    def __init__(
        self, model_config: TwhinModelConfig, num_embeddings: Mapping[str, int], device: torch.device | str = "cpu"
    ) -> None:
        """Make the tables.

        Args:
            model_config: Has the tables' names, dimension and data type.
            num_embeddings: Table to its number of rows.
            device: Where the tables are, without a process group.
        """
        self.names = model_config.table_names
        to_be_sharded = dist.is_available() and dist.is_initialized()
        self.module = EmbeddingCollection(
            tables=[
                EmbeddingConfig(
                    name=table.name,
                    num_embeddings=num_embeddings[table.name],
                    embedding_dim=table.embedding_dim,
                    feature_names=[table.name],
                    data_type=_DATA_TYPES[table.data_type],
                )
                for table in model_config.embeddings.tables
            ],
            device=torch.device("meta") if to_be_sharded else torch.device(device),
        )

    def table(self, name: str) -> nn.Embedding:
        """Return the module of one table. Raises KeyError where there is none of that name."""
        embedding = self.module.embeddings[name]
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def rows(self, ids: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Return rows of all tables; see EmbeddingTables.

        Where the gradient is sparse (`apply_optimizers`), float32 rows on the CPU are not copied here: they are read
        from the table where they are used.
        """
        rows = []
        for name in self.names:
            embedding, of_table = self.table(name), ids[name]
            weight = embedding.weight
            in_place = embedding.sparse and weight.device.type == "cpu" and weight.dtype == torch.float32
            rows.append(Rows(weight, of_table) if in_place else Rows(embedding(of_table).float()))
        return rows
