"""TwhinModel: scores of a batch's edges and candidates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.all_candidates import AllCandidates
from twhin_pipeline.model.anchors import Anchor, pull
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.candidate_scores import CandidateScores, FusedLoss
from twhin_pipeline.model.model_and_loss import ModelAndLoss, Outputs, TwhinModelAndLoss
from twhin_pipeline.model.penalties import entities_penalty, operators_penalty
from twhin_pipeline.model.rows import EmbeddingTables, Rows, dropout, take
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.words import SIDES, Side

__all__ = ["ModelAndLoss", "Outputs", "TwhinModel", "TwhinModelAndLoss"]


class TwhinModel(nn.Module):
    """TwHIN (El-Kishky et al., 2022): one embedding table per entity type, and a scorer.

    How the tables are stored, looked up and updated is up to its EmbeddingTables (package `sharding`).
    """

    def __init__(
        self, model_config: TwhinModelConfig, tables: EmbeddingTables, device: torch.device | str = "cpu"
    ) -> None:
        """Make the scorer, and take the tables.

        Args:
            model_config: Tables, relations and the scorer.
            tables: Look up the vectors of `model_config`'s tables.
            device: Where the scorer is.
        """
        super().__init__()
        self.table_names = model_config.table_names
        self.dim = model_config.embedding_dim
        self.init_scale = model_config.init_scale
        self.max_norm = model_config.max_norm
        self.dropout = model_config.embedding_dropout
        self.regularization = model_config.regularization
        self.types = {side: [getattr(relation, side) for relation in model_config.relations] for side in SIDES}
        self.anchors: Mapping[str, Anchor] = {}
        """By table, what holds its known ids in training; set once the tables are filled."""
        self.use_tables(tables)
        self.scorer = Scorer(model_config).to(device)

    def use_tables(self, tables: EmbeddingTables) -> None:
        """Look rows up in `tables` from now on, such as the same tables after they were sharded."""
        self.tables = tables
        self.embeddings = tables.module

    def lookup(self, ids: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Look up rows of all tables at once; those longer than `model.max_norm` are scaled down to it.

        Args:
            ids: Table to `int64 [U_t]`, ascending, each once.

        Returns:
            `float32 [U_t, D]` of each table, in the configuration's order.
        """
        vectors = [rows.looked_up() for rows in self.tables.rows(ids)]
        if self.max_norm is None:
            return vectors
        return [v * (self.max_norm / v.norm(dim=1, keepdim=True).clamp(min=self.max_norm)) for v in vectors]

    def _rows(self, batch: EdgeBatch) -> tuple[list[Rows], torch.Tensor]:
        """Return the batch's rows of each table, and the penalty on them and on the operators, a scalar.

        Where nothing changes the vectors before they are used, the tables decide how rows are read: they may be copied
        once, directly from the table to where they are used.
        """
        anchors = self.anchors if self.training else {}
        changed = self.max_norm is not None or (self.training and self.dropout) or anchors
        if not (changed or self.regularization.entities or batch.everything):
            return self.tables.rows(batch.ids), operators_penalty(self.regularization, self.scorer, batch)
        vectors = self.lookup(batch.ids)
        for i, table in enumerate(self.table_names):
            if table in anchors and anchors[table].frozen:
                vectors[i] = anchors[table].frozen_rows(batch.ids[table], vectors[i])
        total = operators_penalty(self.regularization, self.scorer, batch)
        total = total + entities_penalty(self.regularization, self.scorer, vectors, batch)
        total = total + pull(anchors, self.table_names, vectors, batch)
        return [Rows(dropout(v, self.dropout) if self.training else v) for v in vectors], total

    def forward(self, batch: EdgeBatch, fused_loss: FusedLoss | None = None) -> Outputs:
        """Score a batch's edges and, on the sides that its relations corrupt, their queries with their candidates.

        Args:
            batch: G chunks of C edges, Q queries a side, n window and K pool candidates.
            fused_loss: What to compute instead of the candidates' scores, where that is possible (`chunk_losses`).

        Returns:
            `logits [G, C]` and `probabilities [G, C]` of the edges, tails being predicted; `penalty`, a scalar; and for
            each of `batch.sides`, `{side}_positive [G, C]`, the edges' logits where that side is predicted (they differ
            with `model.reciprocal` only), and `{side}_logits [G, Q, n + K]` of the queries with each candidate, -inf
            where masked, without meaning in a chunk that does not corrupt the side. With `batch.everything`, in place
            of these logits, `{side}_everything`: a list of AllCandidates, of all chunks that corrupt the side. With
            `fused_loss`, where possible, in place of these logits, `fused_loss`, a scalar, and `{side}_loss [G, C]`.
            Padding has scores without meaning, and edges of weight 0.
        """
        rows, penalty = self._rows(batch)
        outputs: Outputs = {"penalty": penalty}
        # One gather for all, so that a step has one gradient of the batch's rows.
        pool_index = [] if batch.everything else [getattr(batch, f"{side}_pool_index") for side in batch.sides]
        heads, tails, *pools = take(rows, batch.rhs_query_index, batch.lhs_query_index, *pool_index)
        queries, answers = self._queries_and_answers(heads, tails, batch)
        scores = CandidateScores(self.scorer, batch, queries, answers, dict(zip(batch.sides, pools, strict=False)))
        logits: dict[Side, torch.Tensor] = {}
        if fused_loss is not None and scores.can_fuse():
            outputs["fused_loss"], positive, losses = scores.fused(fused_loss)
            outputs |= {f"{side}_loss": each for side, each in losses.items()}
        else:
            positive, logits = scores.logits()
        outputs |= {"logits": positive["rhs"], "probabilities": positive["rhs"].sigmoid()}
        for side in batch.sides:
            outputs[f"{side}_positive"] = positive[side]
            if batch.everything:
                outputs[f"{side}_everything"] = self._everything(side, batch, rows, queries[side])
            elif side in logits:
                outputs[f"{side}_logits"] = logits[side]
        return outputs

    def _queries_and_answers(
        self, heads: torch.Tensor, tails: torch.Tensor, batch: EdgeBatch
    ) -> tuple[dict[Side, torch.Tensor], dict[Side, torch.Tensor]]:
        """Return by side the prepared vectors of the batch's queries and of the entities that answer them.

        Args:
            heads: `[G, Q', D]` of each chunk, each once.
            tails: `[G, Q, D]`.
            batch: Its relations, and the sides that they corrupt.
        """
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
        return queries, answers

    def _everything(self, side: Side, batch: EdgeBatch, rows: list[Rows], queries: torch.Tensor) -> list[AllCandidates]:
        """Group the chunks that corrupt a side by their candidates: a type's, or, where it matters, a relation's.

        Memory is `N * D` a group; operators on candidates make a group of each relation in the step.
        """
        by_relation = self.scorer.candidates_by_relation(side)
        corrupted = getattr(batch, f"{side}_on").tolist()
        groups: dict[tuple[str, int], list[int]] = {}
        for chunk, relation in enumerate(batch.relation.tolist()):
            if corrupted[chunk]:
                groups.setdefault((self.types[side][relation], relation if by_relation else -1), []).append(chunk)
        candidate_groups = []
        for (table, _), chunks in groups.items():
            chosen = torch.zeros(len(batch.relation), dtype=torch.bool, device=queries.device)
            chosen[chunks] = True
            relation = batch.relation[chunks[:1]]
            entities = rows[self.table_names.index(table)].matrix
            if table in batch.sample:
                (entities,) = take(entities, batch.sample[table])
            candidates = self.scorer.candidates(side, entities.unsqueeze(0), relation).squeeze(0)
            log_q = batch.sample_log_q.get(table)
            candidate_groups.append(
                AllCandidates.of_chunks(side, batch, chosen, queries, candidates, self.scorer.compare, log_q)
            )
        return candidate_groups
