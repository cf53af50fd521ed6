"""A model and its loss as one module, whose forward pass ends in a scalar to call `backward` on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.candidate_scores import FusedLoss
from twhin_pipeline.model.losses import Loss
from twhin_pipeline.model.rows import pick
from twhin_pipeline.words import SIDES, Side

Outputs = dict[str, Any]


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
    an edge's loss being the mean over the sides that its relation corrupts. Both the tables' and the operators'
    gradients are averaged over ranks, so they are those of the step's mean loss at any world size and with any split of
    the edges.

    In training mode `model.regularization`'s penalty is added: `world size * sum of penalties / edges of all ranks`. It
    is the same at any world size where it is degree-weighted; if not, an entity or a relation counts once for each rank
    that has an edge of it.
    """

    def __init__(self, model: nn.Module, loss: Loss, model_config: TwhinModelConfig, *, amp: bool = False) -> None:
        """Wrap `model`.

        Args:
            model: A TwhinModel, sharded or not.
            loss: An edge's loss on one side.
            model_config: Gives the relations' weights.
            amp: Score in bfloat16 (`runtime.enable_amp`); tables and loss stay as they are.
        """
        super().__init__()
        self.model = model
        self.loss = loss
        self.amp = amp
        self.relation_weight: torch.Tensor
        weights = torch.tensor([relation.weight for relation in model_config.relations], dtype=torch.float32)
        self.register_buffer("relation_weight", weights, persistent=False)

    def forward(self, batch: EdgeBatch) -> tuple[torch.Tensor, Outputs]:
        """Return the loss and what it was computed from.

        Args:
            batch: This rank's edges; `batch.global_edges` counts those of all ranks.

        Returns:
            The scalar to call `backward` on; and the model's outputs with, detached, `loss` (that scalar; the mean of
            it over ranks is the step's loss), `edge_loss [G, C]`, `relation_loss [R]` (sums over this rank's edges of
            the edge's loss times its weight, without the relation's weight) and `relation_edges [R]` (sums of edge
            weights: `relation_loss / relation_edges` is a relation's mean loss, after summing both over ranks).
        """
        relation_weight = self.relation_weight.to(batch.weight.device)
        corrupted = {side: getattr(batch, f"{side}_on").float() for side in SIDES}
        num_sides = (corrupted["lhs"] + corrupted["rhs"]).clamp(min=1)
        share = {side: (corrupted[side] / num_sides).unsqueeze(1) for side in SIDES}
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        factor = world_size / max(batch.global_edges, 1)
        weight = batch.weight * relation_weight[batch.relation].unsqueeze(1)
        by_side = {side: weight * share[side] for side in SIDES}
        with self._autocast(batch.weight.device.type):
            outputs = self.model(batch, self._fused_loss({side: by_side[side] * factor for side in batch.sides}))
        # 0, but part of the graph: a rank without edges takes part in the backward pass.
        total = outputs["logits"][:0].sum()
        edge_loss = torch.zeros_like(batch.weight)
        for side in batch.sides:
            if "fused_loss" in outputs:
                side_loss = outputs[f"{side}_loss"]
            elif batch.everything:
                side_total, side_loss = self._of_everything(side, outputs, by_side[side])
                total = total + side_total
            else:
                side_loss = self._of_candidates(side, outputs, batch)
                total = total + (side_loss * by_side[side]).sum()
            edge_loss += side_loss.detach() * share[side]
        if self.training:
            total = total + outputs["penalty"]
        loss = factor * total
        if "fused_loss" in outputs:
            loss = loss + outputs["fused_loss"]
        by_relation = torch.zeros_like(relation_weight)
        return loss, {
            **outputs,
            "loss": loss.detach(),
            "edge_loss": edge_loss,
            "relation_loss": by_relation.index_add(0, batch.relation, (edge_loss * batch.weight).sum(1)),
            "relation_edges": by_relation.index_add(0, batch.relation, batch.weight.sum(1)),
        }

    def _fused_loss(self, weight: Mapping[Side, torch.Tensor]) -> FusedLoss | None:
        """Return the loss to compute without keeping scores; None where the scores are needed, as in validation."""
        if not (self.training and torch.is_grad_enabled()) or self.loss.by_sum is None:
            return None
        return FusedLoss(self.loss.by_sum, weight, self.loss.config.log_q)

    def _of_candidates(self, side: Side, outputs: Outputs, batch: EdgeBatch) -> torch.Tensor:
        """Return the edges' loss `[G, C]` on a side, from the logits of all candidates in the batch."""
        negative = outputs[f"{side}_logits"]
        if self.loss.config.log_q:
            log_q = getattr(batch, f"{side}_log_q").unsqueeze(1)
            negative = negative - self.loss.candidate_temperature * log_q
        pooled = self.loss.pool(negative)
        query = getattr(batch, f"{side}_query")
        if pooled.dim() == 2:
            return self.loss.edge(outputs[f"{side}_positive"], pooled.gather(1, query))
        return self.loss.edge(outputs[f"{side}_positive"], *pick(pooled, query))

    def _of_everything(self, side: Side, outputs: Outputs, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted sum of the edges' losses on a side, and, detached, each edge's loss `[G, C]`."""

        total = weight.new_zeros(())
        edge_loss = torch.zeros_like(weight)
        for group in outputs[f"{side}_everything"]:
            positive = outputs[f"{side}_positive"].flatten()[group.edge]
            autocast = self._autocast(weight.device.type)
            part, losses = group.loss(positive, weight.flatten()[group.edge], self.loss, autocast)
            total = total + part
            edge_loss.view(-1)[group.edge] = losses
        return total, edge_loss

    def _autocast(self, device: str) -> torch.autocast:
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.amp)
