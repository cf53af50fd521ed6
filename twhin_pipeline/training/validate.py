"""Evaluation during training: the validation edges against the candidates sampled for them, or against every entity."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.metrics import create_metrics
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.twhin_model import Outputs, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset
from twhin_pipeline.training.selection import FullRanking
from twhin_pipeline.words import Side

LOWER_IS_BETTER = {"loss"}


@dataclass(frozen=True)
class Validation:
    """What one evaluation found, the same on every rank."""

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
    """Return the scores of a batch's E real edges whose relation corrupts `side`, and those of their candidates.

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

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> None:
        """Open what is evaluated on: the candidates sampled for the validation set, unless `num_eval_steps` is 0, and,
        where the metric asks for it, the edges to rank against every entity.
        """
        self.ranks = ranks
        self.timeout = config.training.eval_timeout_in_s
        self.sampled = Sampled(config, store, snapshot, ranks) if config.training.num_eval_steps else None
        self.ranking = FullRanking(config, store, snapshot, ranks) if config.training.ranks_everything else None

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

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self.dataset = EdgesDataset(config, store, snapshot, "validation", ranks.rank, ranks.world_size)
        limit = config.training.num_eval_steps
        self.steps = self.dataset.steps_per_epoch if limit < 0 else min(limit, self.dataset.steps_per_epoch)
        self.negatives = config.evaluation.auc_negatives
        self.metrics = create_metrics(ranks.device)

    @torch.no_grad()
    def evaluate(self, model: TwhinModelAndLoss, timeout: float) -> tuple[dict[str, float], int, str]:
        """Return the metrics, the edges, and how far it came where `timeout` seconds ended it early.

        The ranks agree at each step whether the time is up.
        """
        started = time.monotonic()
        self.metrics.reset()
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
                    self._classify(positive, candidates)
        finally:
            batches.close()  # type: ignore[attr-defined]  # ends the thread that reads ahead
        loss, reciprocal, total = self.ranks.sum([loss, reciprocal, ranked])
        computed = self.metrics.compute() if steps else {"auc": math.nan, "rce": math.nan}
        metrics = {
            "loss": loss / edges if edges else math.nan,
            "auc": float(computed["auc"]),
            "rce": float(computed["rce"]),
            "mrr": reciprocal / total if total else math.nan,
        }
        return metrics, edges, "" if steps == self.steps else f"{steps} of {self.steps} batches"

    def _classify(self, positive: torch.Tensor, candidates: torch.Tensor) -> None:
        """Add edges to AUC and RCE, and with each some of its unmasked candidates, evenly spaced."""
        count = min(self.negatives, candidates.shape[-1])
        columns = torch.linspace(0, max(candidates.shape[-1] - 1, 0), count, device=candidates.device).long()
        negative = candidates[:, columns].flatten()
        negative = negative[torch.isfinite(negative)]
        labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
        self.metrics.update(torch.cat([positive, negative]).sigmoid(), labels)
