"""TwhinModel: scores of a batch's edges and candidates; and the wrappers that make it trainable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model import chunk_losses
from twhin_pipeline.model.all_candidates import AllCandidates, mask_logits
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import Loss, SumOfExponentials
from twhin_pipeline.model.operators import penalty
from twhin_pipeline.model.rows import RowLookup, Rows, dropout, pick, take
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.words import SIDES, Side, other

Outputs = dict[str, Any]


@dataclass(frozen=True)
class Counting:
    """What is counted of a step's scores, for a model that can then do without keeping them."""

    loss: SumOfExponentials
    weight: Mapping[Side, torch.Tensor]
    """`float32 [G, C]` of each side: what each edge's loss is multiplied by in their sum."""
    log_q: bool
    """Whether logits are corrected by how often a candidate is expected."""


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
        self.max_norm = model_config.max_norm
        self.dropout = model_config.embedding_dropout
        self.regularization = model_config.regularization
        self.types = {side: [getattr(relation, side) for relation in model_config.relations] for side in SIDES}
        self.shared: RowLookup | None = None
        """Where ranks look rows up in each other's memory."""
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

    def lookup(self, ids: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Look up rows of all tables at once; those longer than `model.max_norm` come scaled down to it.

        Args:
            ids: Table to `int64 [U_t]`.

        Returns:
            `float32 [U_t, D]` of each table, in the configuration's order.
        """
        if self.shared is not None:
            return self._short([rows.looked_up() for rows in self.shared.rows(ids)])
        rows = [ids[table] for table in self.tables]
        features = KeyedJaggedTensor(
            keys=self.tables,
            values=torch.cat(rows),
            lengths=torch.tensor([len(r) for r in rows], dtype=torch.int64, device=rows[0].device),
            stride=1,
        )
        found = self.embeddings(features)
        return self._short([found[table].values().float() for table in self.tables])

    def _short(self, vectors: list[torch.Tensor]) -> list[torch.Tensor]:
        if self.max_norm is None:
            return vectors
        return [v * (self.max_norm / v.norm(dim=1, keepdim=True).clamp(min=self.max_norm)) for v in vectors]

    def _rows(self, batch: EdgeBatch) -> tuple[list[Rows], torch.Tensor]:
        """Return the batch's rows of each table, and the penalty on them and on the operators, a scalar.

        A table that is whole on this CPU, or shared with the ranks beside it, is handed on itself, where its rows are
        used as they are: they are then copied once, to where they are used.
        """
        as_they_are = self.max_norm is None and not (self.regularization.entities or batch.everything)
        if as_they_are and not (self.training and self.dropout):
            if self.shared is not None:
                return self.shared.rows(batch.ids), self._operators_penalty(batch)
            if weights := self._whole_tables():
                rows = [Rows(weight, batch.ids[table]) for table, weight in weights.items()]
                return rows, self._operators_penalty(batch)
        vectors = self.lookup(batch.ids)
        total = self._operators_penalty(batch) + self._entities_penalty(vectors, batch)
        return [Rows(dropout(v, self.dropout) if self.training else v) for v in vectors], total

    def _whole_tables(self) -> dict[str, torch.Tensor]:
        """Return the tables' weights where all are whole on this CPU, of float32, with sparse gradients; else none."""
        if not isinstance(self.embeddings, EmbeddingCollection):
            return {}
        found = {}
        for table in self.tables:
            embedding = self.embeddings.embeddings[table]
            assert isinstance(embedding, nn.Embedding)
            weight = embedding.weight
            if embedding.sparse and weight.device.type == "cpu" and weight.dtype == torch.float32:
                found[table] = weight
        return found if len(found) == len(self.tables) else {}

    def forward(self, batch: EdgeBatch, counting: Counting | None = None) -> Outputs:
        """Score a batch's edges and, on the sides that its relations replace, their queries with their candidates.

        Args:
            batch: G chunks of C edges, Q queries a side, n window and K pool candidates.
            counting: What is counted. Where that can be had chunk by chunk (`chunk_losses`), scores are not kept.

        Returns:
            `logits [G, C]` and `probabilities [G, C]` of the edges, tails being predicted; `penalty`, a scalar; and of
            each of `batch.sides`, `{side}_positive [G, C]`, the edges' logits where that side is predicted (they differ
            with `model.reciprocal` only), and `{side}_logits [G, Q, n + K]` of the queries with each candidate, -inf
            where masked, without meaning in a chunk that does not replace the side. With `batch.everything`, in place
            of these logits, `{side}_everything`: a list of AllCandidates, of all chunks that replace the side. Padding
            has scores without meaning, and edges of weight 0.
        """
        rows, total = self._rows(batch)
        outputs: Outputs = {"penalty": total}
        # One gather for all, so that a step has one gradient of the batch's rows.
        pool_index = [] if batch.everything else [getattr(batch, f"{side}_pool_index") for side in batch.sides]
        heads, tails, *found = take(rows, batch.rhs_query_index, batch.lhs_query_index, *pool_index)
        pools: dict[Side, torch.Tensor] = dict(zip(batch.sides, found, strict=False))
        scorer, relation = self.scorer, batch.relation
        queries: dict[Side, torch.Tensor] = {"rhs": scorer.queries("rhs", heads, relation)}
        answers: dict[Side, torch.Tensor] = {}
        if scorer.reciprocal:
            answers["rhs"] = scorer.candidates("rhs", tails, relation)
            if "lhs" in batch.sides:
                queries["lhs"] = scorer.queries("lhs", tails, relation)
                answers["lhs"] = scorer.candidates("lhs", heads, relation)
        else:
            # One side's queries are the other's candidates.
            queries["lhs"] = answers["rhs"] = scorer.queries("lhs", tails, relation)
            answers["lhs"] = queries["rhs"]

        pairings = self._pairings(queries, pools)
        if counting is not None and self._counts_by_chunk(batch, queries, pools, pairings):
            counted = [self._counted(batch, queries, answers, pools, p, counting) for p in pairings]
            positive: dict[Side, torch.Tensor] = {}
            for pairing, (_, edges, *each) in zip(pairings, counted, strict=True):
                positive |= dict.fromkeys(pairing if scorer.reciprocal else SIDES, edges)
                outputs |= dict(zip((f"{side}_loss" for side in pairing if side in pools), each, strict=True))
            outputs["counted"] = torch.stack([total for total, *_ in counted]).sum()
            logits: dict[Side, torch.Tensor] = {}
        else:
            positive, logits = self._scores(batch, queries, answers, pools, pairings)
        outputs |= {"logits": positive["rhs"], "probabilities": positive["rhs"].sigmoid()}
        for side in batch.sides:
            outputs[f"{side}_positive"] = positive[side]
            if batch.everything:
                outputs[f"{side}_everything"] = self._everything(side, batch, rows, queries[side])
            elif side in logits:
                outputs[f"{side}_logits"] = self._masked(side, batch, logits[side])
        return outputs

    def _pairings(self, queries: Mapping[Side, torch.Tensor], pools: Mapping[Side, Any]) -> list[tuple[Side, ...]]:
        """Say which sides are scored together, of each such group the first one's queries with all of its answers."""
        if self.scorer.reciprocal:
            return [(side,) for side in SIDES if side in queries]
        return [("lhs",)] if list(pools) == ["lhs"] else [("rhs", "lhs")]

    def _candidates(
        self, side: Side, batch: EdgeBatch, pools: Mapping[Side, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a side's candidates: those in the batch, as rows of its answers `[G, n]`, and the pool, made ready."""
        inside = _query(batch, other(side)).gather(1, batch.in_batch)
        return inside, self.scorer.candidates(side, pools[side], batch.relation)

    def _scores(
        self,
        batch: EdgeBatch,
        queries: Mapping[Side, torch.Tensor],
        answers: Mapping[Side, torch.Tensor],
        pools: Mapping[Side, torch.Tensor],
        pairings: list[tuple[Side, ...]],
    ) -> tuple[dict[Side, torch.Tensor], dict[Side, torch.Tensor]]:
        """Score the edges, `[G, C]` by side, and, where there are pools, queries with candidates, `[G, Q, n + K]`."""
        positive: dict[Side, torch.Tensor] = {}
        logits: dict[Side, torch.Tensor] = {}
        for pairing in pairings:
            side, sides = pairing[0], [s for s in pairing if s in pools]
            given = [self._candidates(s, batch, pools) for s in sides]
            of_a, of_b = _query(batch, side), _query(batch, other(side))
            inside, ready = tuple(i for i, _ in given), tuple(pool for _, pool in given)
            found, *rest = self.scorer.edges(queries[side], answers[side], of_a, of_b, inside, ready)
            positive |= dict.fromkeys(pairing if self.scorer.reciprocal else SIDES, found)
            logits |= dict(zip(sides, rest, strict=True))
        return positive, logits

    def _counts_by_chunk(
        self,
        batch: EdgeBatch,
        queries: Mapping[Side, torch.Tensor],
        pools: Mapping[Side, torch.Tensor],
        pairings: list[tuple[Side, ...]],
    ) -> bool:
        """Tell whether `chunk_losses` can count, and is sooner done than scores that are kept."""
        return (
            chunk_losses.suits(len(batch.relation))
            and all(any(side in pools for side in pairing) for pairing in pairings)
            and all(batch.in_batch.shape[1] + pool.shape[1] for pool in pools.values())
            and self.scorer.multiplies(*queries.values(), *pools.values())
        )

    def _counted(
        self,
        batch: EdgeBatch,
        queries: Mapping[Side, torch.Tensor],
        answers: Mapping[Side, torch.Tensor],
        pools: Mapping[Side, torch.Tensor],
        pairing: tuple[Side, ...],
        counting: Counting,
    ) -> tuple[torch.Tensor, ...]:
        """Return the weighted sum of the losses on a pairing's sides, the edges' logits, and each side's losses."""
        candidates = []
        for side in pairing:
            if side in pools:
                inside, pool = self._candidates(side, batch, pools)
                log_q = getattr(batch, f"{side}_log_q") if counting.log_q else None
                mask, weight = getattr(batch, f"{side}_mask"), counting.weight[side]
                candidates.append(chunk_losses.Candidates(inside, pool, mask, log_q, weight))
        first = pairing[0]
        of_a, of_b = _query(batch, first), _query(batch, other(first))
        scale, real = self.scorer.scale, batch.num_in_batch
        a, b = queries[first], answers[first]
        return chunk_losses.losses(a, b, of_a, of_b, scale, counting.loss, real, *candidates)

    def _masked(self, side: Side, batch: EdgeBatch, logits: torch.Tensor) -> torch.Tensor:
        """Return `logits [G, Q, n + K]`, -inf where masked."""
        width = batch.in_batch.shape[1]
        padding = torch.arange(width, device=logits.device) >= batch.num_in_batch[:, None]
        # On a GPU to ask costs more than to mask.
        if logits.device.type != "cpu" or bool(padding.any()):
            logits.detach()[..., :width].masked_fill_(padding.unsqueeze(1), float("-inf"))
        mask_logits(logits, getattr(batch, f"{side}_mask").unbind(1))
        return logits

    def _everything(self, side: Side, batch: EdgeBatch, rows: list[Rows], queries: torch.Tensor) -> list[AllCandidates]:
        """Group the chunks that replace a side by their candidates: a type's, or, where it matters, a relation's.

        Memory is `N * D` a group; operators on candidates make a group of each relation in the step.
        """
        by_relation = self.scorer.candidates_by_relation(side)
        replaced = getattr(batch, f"{side}_on").tolist()
        groups: dict[tuple[str, int], list[int]] = {}
        for chunk, relation in enumerate(batch.relation.tolist()):
            if replaced[chunk]:
                groups.setdefault((self.types[side][relation], relation if by_relation else -1), []).append(chunk)
        found = []
        for (table, _), chunks in groups.items():
            chosen = torch.zeros(len(batch.relation), dtype=torch.bool, device=queries.device)
            chosen[chunks] = True
            relation = batch.relation[chunks[:1]]
            entities = rows[self.tables.index(table)].matrix
            if table in batch.sample:
                (entities,) = take(entities, batch.sample[table])
            candidates = self.scorer.candidates(side, entities.unsqueeze(0), relation).squeeze(0)
            log_q = batch.sample_log_q.get(table)
            found.append(AllCandidates.of_chunks(side, batch, chosen, queries, candidates, self.scorer.compare, log_q))
        return found

    def _entities_penalty(self, vectors: list[torch.Tensor], batch: EdgeBatch) -> torch.Tensor:
        """Return `model.regularization`'s penalty on the vectors that the batch's edges use, a scalar.

        Edges count alike, whatever their or their relation's weight (only those of weight 0 do not count): the weights
        say how much an edge is believed, not how large its vectors may be.
        """
        config = self.regularization
        if not config.entities:
            return vectors[0].new_zeros(())
        whole = torch.cat(vectors)
        real = batch.weight > 0
        index = torch.cat([batch.lhs_index[real], batch.rhs_index[real]])
        count = torch.bincount(index, minlength=len(whole))
        rows = count.nonzero().squeeze(1)
        each = penalty(F.embedding(rows, whole), config.norm, self.scorer.complex)
        return config.entities * (each * count[rows] if config.degree_weighted else each).sum()

    def _operators_penalty(self, batch: EdgeBatch) -> torch.Tensor:
        """Return the penalty on the operators that the batch's edges use, a scalar."""
        config = self.regularization
        if not config.operators:
            return batch.weight.new_zeros(())
        if config.degree_weighted:
            operators = self.scorer.penalty(batch.relation, config.norm) * (batch.weight > 0).sum(1)
        else:
            operators = self.scorer.penalty(batch.relation.unique(), config.norm)
        return config.operators * operators.sum()


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
    an edge's loss being the mean over the sides that its relation replaces. Both the tables' and the operators'
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
        """Return the loss and what it was made of.

        Args:
            batch: This rank's edges; `batch.global_edges` counts those of all ranks.

        Returns:
            The scalar to call `backward` on; and the model's outputs with, detached, `loss` (that scalar; the mean of
            it over ranks is the step's loss), `edge_loss [G, C]`, `relation_loss [R]` (sums over this rank's edges of
            the edge's loss times its weight, without the relation's weight) and `relation_edges [R]` (sums of edge
            weights: `relation_loss / relation_edges` is a relation's mean loss, after summing both over ranks).
        """
        relation_weight = self.relation_weight.to(batch.weight.device)
        on = {side: getattr(batch, f"{side}_on").float() for side in SIDES}
        share = {side: (on[side] / (on["lhs"] + on["rhs"]).clamp(min=1)).unsqueeze(1) for side in SIDES}
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        factor = world_size / max(batch.global_edges, 1)
        weight = batch.weight * relation_weight[batch.relation].unsqueeze(1)
        by_side = {side: weight * share[side] for side in SIDES}
        with self._autocast(batch.weight.device.type):
            outputs = self.model(batch, self._counting({side: by_side[side] * factor for side in batch.sides}))
        # Nothing, but of the graph: a rank without edges takes part in the backward pass.
        total = outputs["logits"][:0].sum()
        edge_loss = torch.zeros_like(batch.weight)
        for side in batch.sides:
            if "counted" in outputs:
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
        if "counted" in outputs:
            loss = loss + outputs["counted"]
        by_relation = torch.zeros_like(relation_weight)
        return loss, {
            **outputs,
            "loss": loss.detach(),
            "edge_loss": edge_loss,
            "relation_loss": by_relation.index_add(0, batch.relation, (edge_loss * batch.weight).sum(1)),
            "relation_edges": by_relation.index_add(0, batch.relation, batch.weight.sum(1)),
        }

    def _counting(self, weight: Mapping[Side, torch.Tensor]) -> Counting | None:
        """Return what is to be counted of the scores; None where they are wanted themselves, as in validation."""
        if not (self.training and torch.is_grad_enabled()) or self.loss.by_sum is None:
            return None
        return Counting(self.loss.by_sum, weight, self.loss.config.log_q)

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


def _query(batch: EdgeBatch, side: Side) -> torch.Tensor:
    """Return each edge's query on a side, int64 `[G, C]`: its kept entity, which is an answer of the other side."""
    return batch.lhs_query if side == "lhs" else batch.rhs_query
