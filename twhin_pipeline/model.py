"""TwhinModel: scores of a batch's edges and candidates; and the wrappers that make it trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twhin_pipeline.batch import EdgeBatch
from twhin_pipeline.losses import Loss
from twhin_pipeline.scorer import Scorer
from twhin_pipeline.sections.model import TwhinModelConfig

Sides = Literal["both", "lhs", "rhs"]
Outputs = dict[str, torch.Tensor]

_DATA_TYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}


class TwhinModel(nn.Module):
    """TwHIN (El-Kishky et al., 2022): a table an entity type, and a scorer.

    Under a process group its tables hold no memory until `maybe_shard_model` lays them out; without one they are on
    `device`. Either way `sharding.init_tables` gives them their first vectors.
    """

    def __init__(
        self, model_config: TwhinModelConfig, num_embeddings: Mapping[str, int], device: torch.device | str = "cpu"
    ) -> None:
        """Make the tables and the scorer.

        Args:
            model_config: Tables, relations and the scorer.
            num_embeddings: Table to its number of rows.
            device: Where the scorer is, and, without a process group, the tables.
        """
        super().__init__()
        self.tables = model_config.table_names
        self.dim = model_config.embedding_dim
        self.init_scale = model_config.init_scale
        # A table that will be sharded is made without memory, so that no rank ever holds a whole one.
        meta = dist.is_available() and dist.is_initialized()
        self.embeddings = EmbeddingCollection(
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
            device=torch.device("meta") if meta else torch.device(device),
        )
        self.scorer = Scorer(model_config).to(device)

    def lookup(self, ids: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Look up rows of all tables at once.

        Args:
            ids: Table to `int64 [U_t]`.

        Returns:
            `float32 [sum of U_t, D]`, in the configuration's order of tables.
        """
        rows = [ids[table] for table in self.tables]
        features = KeyedJaggedTensor(
            keys=self.tables,
            values=torch.cat(rows),
            lengths=torch.tensor([len(r) for r in rows], dtype=torch.int64, device=rows[0].device),
            stride=1,
        )
        found = self.embeddings(features)
        return torch.cat([found[table].values() for table in self.tables])

    def forward(self, batch: EdgeBatch, sides: Sides = "both") -> Outputs:
        """Score a batch's edges and their candidates.

        Args:
            batch: G chunks of C edges, n window and K pool candidates.
            sides: Whose candidates are scored.

        Returns:
            `logits [G, C]` and `probabilities [G, C]` of the edges; of each side asked for, `lhs_logits` or
            `rhs_logits` `[G, C, n + K]` of the edges with that side replaced by each candidate, -inf where masked.
            Padding positions have scores without meaning and weight 0.
        """
        vectors = self.lookup(batch.ids)
        chunks = len(batch.relation)
        heads = _take(vectors, batch.lhs_index)
        tails = _take(vectors, batch.rhs_index)
        left = self.scorer.transform(heads, batch.relation)
        right = self.scorer.prepare(tails)
        logits = self.scorer.pairs(left, right).float()
        outputs = {"logits": logits, "probabilities": logits.sigmoid()}
        window = batch.in_batch.unsqueeze(-1).expand(chunks, batch.in_batch.shape[1], self.dim)
        if sides in ("both", "rhs"):
            pool = self.scorer.prepare(_take(vectors, batch.rhs_pool_index))
            candidates = torch.cat([right.gather(1, window), pool], dim=1)
            scores = self.scorer.compare(left, candidates).float()
            masked = _mask(scores, batch, batch.rhs_mask)
            outputs["rhs_logits"] = scores.masked_fill(masked, float("-inf"))
        if sides in ("both", "lhs"):
            pool = self.scorer.transform(_take(vectors, batch.lhs_pool_index), batch.relation)
            candidates = torch.cat([left.gather(1, window), pool], dim=1)
            scores = self.scorer.compare(candidates, right).float().transpose(1, 2)
            masked = _mask(scores, batch, batch.lhs_mask)
            outputs["lhs_logits"] = scores.masked_fill(masked, float("-inf"))
        return outputs


class ModelAndLoss(nn.Module):
    """A model and a loss function of its outputs and the batch, as one module whose forward pass ends in a scalar."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], torch.Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the loss (a scalar) and the model's outputs with `loss` (detached) added."""
        outputs = self.model(batch)
        loss = self.loss_fn(outputs, batch)
        return loss, {**outputs, "loss": loss.detach()}


class TwhinModelAndLoss(nn.Module):
    """A TwhinModel (or its sharded form) and the loss of its edges.

    The loss is `world size * sum(edge's loss * edge's weight * relation's weight) / edges of all ranks in this step`,
    an edge's loss being the mean over the sides that are replaced. Both the tables' and the operators' gradients are
    averaged over ranks, so they are those of the step's mean loss at any world size and with any split of the edges.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        model_config: TwhinModelConfig,
        sides: Sides = "both",
        amp: bool = False,
    ) -> None:
        """Wrap `model`.

        Args:
            model: A TwhinModel, sharded or not.
            loss: An edge's loss on one side.
            model_config: Gives the relations' weights.
            sides: Which sides of an edge are replaced (`negatives.sides`).
            amp: Score in bfloat16 (`runtime.enable_amp`); tables and loss stay as they are.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.sides: Sides = sides
        self.amp = amp
        self.relation_weight: torch.Tensor
        weights = torch.tensor([relation.weight for relation in model_config.relations], dtype=torch.float32)
        self.register_buffer("relation_weight", weights, persistent=False)

    def forward(self, batch: EdgeBatch) -> tuple[torch.Tensor, Outputs]:
        """Return the loss and what it was made of.

        Args:
            batch: This rank's edges; `batch.global_edges` counts those of all ranks.

        Returns:
            The scalar to call `backward` on; and the model's outputs with, detached, `loss` (that scalar; the mean of
            it over ranks is the step's loss), `edge_loss [G, C]`, `relation_loss [R]` (sums over this rank's edges of
            the edge's loss times its weight, without the relation's weight) and `relation_edges [R]` (sums of edge
            weights: `relation_loss / relation_edges` is a relation's mean loss, after summing both over ranks).
        """
        with torch.autocast(batch.weight.device.type, dtype=torch.bfloat16, enabled=self.amp):
            outputs = self.model(batch, self.sides)
        sides = ("lhs", "rhs") if self.sides == "both" else (self.sides,)
        losses = [self.loss(outputs["logits"], outputs[f"{side}_logits"]) for side in sides]
        edge_loss = torch.stack(losses).mean(0)
        relation_weight = self.relation_weight.to(edge_loss.device)
        weighted = edge_loss * batch.weight
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        total = (weighted * relation_weight[batch.relation].unsqueeze(1)).sum()
        loss = world_size * total / max(batch.global_edges, 1)
        by_relation = torch.zeros_like(relation_weight)
        return loss, {
            **outputs,
            "loss": loss.detach(),
            "edge_loss": edge_loss.detach(),
            "relation_loss": by_relation.index_add(0, batch.relation, weighted.detach().sum(1)),
            "relation_edges": by_relation.index_add(0, batch.relation, batch.weight.sum(1)),
        }


def _take(vectors: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return `vectors[index]`: `[U, D]` and `[G, N]` to `[G, N, D]`."""
    return vectors.index_select(0, index.reshape(-1)).reshape(*index.shape, vectors.shape[1])


def _mask(scores: torch.Tensor, batch: EdgeBatch, pairs: torch.Tensor) -> torch.Tensor:
    """Return the mask `bool [G, C, n + K]`: `pairs`, and the window's candidates that are padding."""
    width = batch.in_batch.shape[1]
    padding = torch.arange(width, device=scores.device) >= batch.num_in_batch[:, None]
    masked = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    masked[:, :, :width] = padding.unsqueeze(1)
    masked[pairs[:, 0], pairs[:, 1], pairs[:, 2]] = True
    return masked
