"""Evaluation during training: the validation edges against the candidates sampled for them, or against every entity."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from twhin_pipeline import scratch
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.ancestors import SeenBefore
from twhin_pipeline.evaluation.classification import classification_metrics
from twhin_pipeline.evaluation.held_out import (
    HeldOut,
    Questions,
    read_edges,
    read_filters,
    read_retrieval,
    shares,
    some_edges,
    some_heads,
)
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.model.twhin_model import Outputs, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import gather_table, limit_norm, table_weights, unwrapped
from twhin_pipeline.store import Store, database
from twhin_pipeline.training.dataset import EdgesDataset
from twhin_pipeline.words import SIDES, Side

LOWER_IS_BETTER = {"loss"}


@dataclass(frozen=True)
class Validation:
    """The result of one evaluation, the same on every rank."""

    metrics: dict[str, float]
    """`loss`, `auc`, `rce` (percent) and `mrr` against sampled candidates, and the metric that ranks every entity."""
    edges: int
    """Edges that sampled candidates were scored for, else those that were ranked."""
    seconds: float
    cut_short: str = ""
    """How far it came where `eval_timeout_in_s` ended it early."""

    @property
    def complete(self) -> bool:
        """False where `eval_timeout_in_s` ended it early."""
        return not self.cut_short


def edge_scores(outputs: Outputs, batch: EdgeBatch, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of a batch's E real edges whose relation replaces `side`, and those of their candidates.

    Args:
        outputs: The model's, of this batch: `{side}_positive [G, C]`, and `{side}_logits [G, Q, N]` by query, -inf
            where masked.
        batch: Says which edges are real, and each one's query.
        side: `lhs` or `rhs`.

    Returns:
        `[E]` and `[E, N]`.
    """
    real = (batch.weight > 0) & getattr(batch, f"{side}_on").unsqueeze(1)
    chunk, position = real.nonzero(as_tuple=True)
    query = getattr(batch, f"{side}_query")[chunk, position]
    return outputs[f"{side}_positive"][chunk, position], outputs[f"{side}_logits"][chunk, query]


def sampled_reciprocal_ranks(positive: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Return the reciprocal ranks of edges `[E]` among their unmasked candidates `[E, N]`, a tie counting half.

    Returns:
        `float64 [E]`.
    """
    own = positive.unsqueeze(-1)
    return 1 / (1 + (candidates > own).sum(-1).double() + 0.5 * (candidates == own).sum(-1).double())


class Validator:
    """Evaluates on the validation set, always on the same edges against the same candidates."""

    def __init__(
        self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks, seen: SeenBefore | None = None
    ) -> None:
        """Open what is evaluated on: the candidates sampled for the validation set, unless `num_eval_steps` is 0, and,
        where the metric asks for it, the edges to rank against every entity. Edges that were `seen` before are left
        out of both.
        """
        self.ranks = ranks
        self.timeout = config.training.eval_timeout_in_s
        seen = seen or SeenBefore()
        training = config.training
        self.sampled = Sampled(config, store, snapshot, ranks, seen) if training.num_eval_steps else None
        self.ranking = FullRanking(config, store, snapshot, ranks, seen) if training.ranks_everything else None

    def evaluate(self, model: TwhinModelAndLoss) -> Validation:
        """Evaluate; all ranks together."""
        started = time.monotonic()
        metrics: dict[str, float] = {}
        edges, cut_short = 0, ""
        model.eval()
        try:
            if self.sampled is not None:
                metrics, edges, cut_short = self.sampled.evaluate(model, self.timeout)
            if self.ranking is not None:
                left = self.timeout - (time.monotonic() - started)
                value = self.ranking.measure(model.model, left)
                metrics[self.ranking.metric] = math.nan if value is None else value
                edges = edges or self.ranking.edges
                if value is None:
                    cut_short = f"before {self.ranking.metric} was known"
        finally:
            model.train()
        return Validation(metrics, edges, time.monotonic() - started, cut_short)


class Sampled:
    """Evaluates on the validation set's batches, against the candidates sampled for them."""

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks, seen: SeenBefore) -> None:
        self.ranks = ranks
        self.dataset = EdgesDataset(config, store, snapshot, "validation", ranks.rank, ranks.world_size, ranks.device)
        if len(seen):
            self.dataset.leave_out(seen.edges)
        limit = config.training.num_eval_steps
        self.steps = self.dataset.steps_per_epoch if limit < 0 else min(limit, self.dataset.steps_per_epoch)
        self.negatives = config.evaluation.auc_negatives

    @torch.no_grad()
    def evaluate(self, model: TwhinModelAndLoss, timeout: float) -> tuple[dict[str, float], int, str]:
        """Return the metrics, the edges, and how far it came where `timeout` seconds ended it early.

        The ranks agree at each step whether the time is up.
        """
        started = time.monotonic()
        scores = SampledScores(self.ranks)
        loss, edges, reciprocal, ranked, steps = 0.0, 0, 0.0, 0, 0
        self.dataset.load_state_dict({"epoch": 0, "chunks_done": 0})
        batches = iter(self.dataset)
        try:
            while steps < self.steps and not self.ranks.any(time.monotonic() - started > timeout):
                batch = next(batches).to(self.ranks.device)
                value, outputs = model(batch)
                steps += 1
                loss += float(value) / self.ranks.world_size * batch.global_edges
                edges += batch.global_edges
                for side in batch.sides:
                    positive, candidates = edge_scores(outputs, batch, side)
                    ranks = sampled_reciprocal_ranks(positive, candidates)
                    reciprocal, ranked = reciprocal + float(ranks.sum()), ranked + len(ranks)
                    scores.add(positive, self._spaced(candidates))
        finally:
            batches.close()  # type: ignore[attr-defined]  # ends the thread that reads ahead
        loss, reciprocal, total = self.ranks.sum([loss, reciprocal, ranked])
        metrics = {
            "loss": loss / edges if edges else math.nan,
            **scores.metrics(),
            "mrr": reciprocal / total if total else math.nan,
        }
        return metrics, edges, "" if steps == self.steps else f"{steps} of {self.steps} batches"

    def _spaced(self, candidates: torch.Tensor) -> torch.Tensor:
        """Return the negatives of AUC and RCE: of each edge's unmasked candidates `[E, N]` some, evenly spaced."""
        count = min(self.negatives, candidates.shape[-1])
        columns = torch.linspace(0, max(candidates.shape[-1] - 1, 0), count, device=candidates.device).long()
        negative = candidates[:, columns].flatten()
        return negative[torch.isfinite(negative)]


class SampledScores:
    """Scores of edges and of sampled negatives, added on each rank batch by batch: 4 bytes a score.

    With both sides replaced that is 8 * (1 + `evaluation.auc_negatives`) bytes an edge, in the end all on rank 0.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.positive: list[np.ndarray] = []
        self.negative: list[np.ndarray] = []

    def add(self, positive: torch.Tensor, negative: torch.Tensor) -> None:
        """Add this rank's scores, of any shape."""
        for added, scores in ((self.positive, positive), (self.negative, negative)):
            added.append(scores.detach().float().cpu().flatten().numpy())

    def metrics(self) -> dict[str, float]:
        """Return `auc` and `rce` of all ranks' scores; all ranks together. NaN without a positive or a negative."""
        mine = [np.concatenate([np.zeros(0, np.float32), *added]) for added in (self.positive, self.negative)]
        gathered = self.ranks.gather_to_first(mine)
        values = None
        if gathered is not None:
            values = classification_metrics(*(np.concatenate(scores) for scores in zip(*gathered, strict=True)))
        values = self.ranks.broadcast(values)
        return {name: math.nan if value is None else value for name, value in values.items()}


class FullRanking:
    """Ranks validation edges against every entity, as `evaluation.evaluate` does, for one metric of model selection.

    True edges of training and validation do not count as rivals (retrieval leaves out training edges only); of test
    edges nothing is read. Rank 0 ranks: it holds the tables of the relations that have validation edges while it does,
    and what does not depend on the model from the beginning.
    """

    def __init__(
        self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks, seen: SeenBefore | None = None
    ) -> None:
        """Draw the edges (at most `training.eval_max_edges`, by `evaluation.seed`) and read what is known of them."""
        self.config, self.ranks = config, ranks
        self.metric = config.training.selection_metric
        self.retrieval = self.metric.startswith(("recall", "ndcg"))
        self.max_norm = config.model.max_norm
        # A table may have more rows than its vocabulary has entities.
        names = config.model.table_names
        self.sizes = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in names}
        self.questions: list[tuple[int, Questions]] = []
        if ranks.rank == 0:
            self.candidates = {
                name: CandidateSet(size, present_rows(store, snapshot, name)) for name, size in self.sizes.items()
            }
            self.questions = self._read(store, snapshot, seen or SeenBefore())
        used = {getattr(config.model.relations[r], side) for r, _ in self.questions for side in ("lhs", "rhs")}
        self.tables: list[str] = ranks.broadcast([name for name in names if name in used])

    @property
    def edges(self) -> int:
        """Validation edges that are ranked, on one side or both; known to rank 0."""
        of_relation = {relation: len(questions.targets) for relation, questions in self.questions}
        return sum(of_relation.values())

    def measure(self, model: nn.Module, timeout: float) -> float | None:
        """Return the metric of a model, sharded or not; all ranks together.

        None where `timeout` seconds were over before all relations were ranked; NaN where there is no edge to rank.

        Raises:
            UserError: A vector or a score is not finite.
        """
        deadline = time.monotonic() + timeout
        weights = table_weights(model)
        tables = {}
        for name in self.tables:
            table = gather_table(weights[name], self.ranks, self.sizes[name])
            if table is not None:
                tables[name] = limit_norm(table, self.max_norm).float()
        measured = self._measure(model, tables, deadline) if self.ranks.rank == 0 else None
        value: float | None = self.ranks.broadcast(measured)
        return value

    def _measure(self, model: nn.Module, tables: dict[str, torch.Tensor], deadline: float) -> float | None:
        scorer = unwrapped(model).scorer
        counts: list[Counts] = []
        with _full_precision():
            for rel, questions in self.questions:
                if time.monotonic() > deadline:
                    return None
                relation = self.config.model.relations[rel]
                scores = RelationScores(scorer, rel, tables[relation.lhs], tables[relation.rhs])
                counts.append(questions.rank(scores, self.config.evaluation.block_size)[1])
        if not counts:
            return float("nan")
        _, _, k = self.metric.partition("@")
        if self.retrieval:
            queries = distinct(questions.queries for _, questions in self.questions)
            return retrieval_metrics(queries, joined(counts), [int(k)])[self.metric]
        return rank_metrics("filtered", joined(counts).ranks, [int(k or 1)])[self.metric]

    def _read(self, store: Store, snapshot: str, seen: SeenBefore) -> list[tuple[int, Questions]]:
        """Return relations and what is ranked of them, in the order of the configuration."""
        held_out = HeldOut.for_selection(store, snapshot)
        relations = self.config.model.relations
        with scratch.folder("validation") as folder, database.connect(self.config, store) as con:
            held_out = held_out.without(con, seen.edges, folder)
            edges = read_edges(con, held_out.test, len(relations))
            limit = self.config.training.eval_max_edges
            allowed = shares(np.array([len(one["lhs"]) for one in edges]), limit).tolist()
            draw = some_heads if self.retrieval else some_edges
            seed = self.config.evaluation.seed
            chosen = {
                rel: draw(one, share, np.random.default_rng([seed, rel]))
                for rel, (one, share) in enumerate(zip(edges, allowed, strict=True))
                if share
            }
            if self.retrieval:
                tails = {rel: self.candidates[relations[rel].rhs] for rel in chosen}
                return list(read_retrieval(con, chosen, tails, held_out).items())
            sides = list(self.config.corrupted_sides.values())
            known = {
                side: read_filters(con, held_out.known, side, {n: one for n, one in chosen.items() if side in sides[n]})
                for side in SIDES
            }
        return [
            (n, Questions.of(side, one, self.candidates[getattr(relations[n], side)], [known[side][n]]))
            for n, one in chosen.items()
            for side in sides[n]
        ]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 on CUDA too, as `evaluate` does, whatever `runtime.enable_tensorfloat32` says of training."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
