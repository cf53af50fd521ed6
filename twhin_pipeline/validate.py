"""Evaluation during training: the validation edges against the candidates sampled for them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.dataset import EdgesDataset
from twhin_pipeline.distributed import Ranks
from twhin_pipeline.metrics import create_metrics
from twhin_pipeline.model import Outputs, TwhinModelAndLoss
from twhin_pipeline.store import Store

HIGHER_IS_BETTER = {"loss": False, "auc": True, "rce": True, "mrr": True}


@dataclass(frozen=True)
class Validation:
    """What one evaluation found, the same on every rank."""

    metrics: dict[str, float]
    """`loss`, `auc`, `rce` (percent), `mrr`."""
    steps: int
    total_steps: int
    edges: int
    seconds: float

    @property
    def complete(self) -> bool:
        """False where `eval_timeout_in_s` ended it early."""
        return self.steps == self.total_steps


def sampled_reciprocal_ranks(outputs: Outputs, real: torch.Tensor, sides: tuple[str, ...]) -> torch.Tensor:
    """Return the reciprocal ranks of edges among their unmasked candidates, a tie counting half.

    Args:
        outputs: `logits [G, C]`, and `lhs_logits`, `rhs_logits` `[G, C, N]` with -inf where masked.
        real: bool `[G, C]`, false at padding; E edges are real.
        sides: Which of `lhs` and `rhs`.

    Returns:
        `float64 [len(sides) * E]`.
    """
    ranks = []
    for side in sides:
        positive = outputs["logits"][real].unsqueeze(-1)
        negative = outputs[f"{side}_logits"][real]
        ranks.append(1 + (negative > positive).sum(-1).double() + 0.5 * (negative == positive).sum(-1).double())
    return 1 / torch.cat(ranks)


class Validator:
    """Evaluates on the validation set, always on the same edges against the same candidates."""

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self.timeout = config.training.eval_timeout_in_s
        self.sides = ("lhs", "rhs") if config.negatives.sides == "both" else (config.negatives.sides,)
        self.dataset = EdgesDataset(config, store, snapshot, "validation", ranks.rank, ranks.world_size)
        limit = config.training.num_eval_steps
        self.steps = self.dataset.steps_per_epoch if limit < 0 else min(limit, self.dataset.steps_per_epoch)
        self.negatives = config.evaluation.auc_negatives
        self.metrics = create_metrics(ranks.device)

    @torch.no_grad()
    def evaluate(self, model: TwhinModelAndLoss) -> Validation:
        """Evaluate; all ranks together. They agree at each step whether the time is up."""
        started = time.monotonic()
        self.metrics.reset()
        loss, edges, reciprocal, ranked, steps = 0.0, 0, 0.0, 0, 0
        self.dataset.load_state_dict({"epoch": 0, "chunks_done": 0})
        model.eval()
        batches = iter(self.dataset)
        try:
            while steps < self.steps and not self.ranks.any(time.monotonic() - started > self.timeout):
                batch = next(batches).to(self.ranks.device)
                value, outputs = model(batch)
                steps += 1
                loss += float(value) / self.ranks.world_size * batch.global_edges
                edges += batch.global_edges
                real = batch.weight > 0
                ranks = sampled_reciprocal_ranks(outputs, real, self.sides)
                reciprocal, ranked = reciprocal + float(ranks.sum()), ranked + len(ranks)
                self._classify(outputs, real)
        finally:
            batches.close()  # type: ignore[attr-defined]  # ends the thread that reads ahead
            model.train()
        loss, reciprocal, total = self.ranks.sum([loss, reciprocal, ranked])
        computed = self.metrics.compute() if steps else {"auc": math.nan, "rce": math.nan}
        metrics = {
            "loss": loss / edges if edges else math.nan,
            "auc": float(computed["auc"]),
            "rce": float(computed["rce"]),
            "mrr": reciprocal / total if total else math.nan,
        }
        return Validation(metrics, steps, self.steps, edges, time.monotonic() - started)

    def _classify(self, outputs: Outputs, real: torch.Tensor) -> None:
        """Add the batch to AUC and RCE: each edge once, and some of its unmasked candidates, evenly spaced."""
        positive = outputs["probabilities"][real]
        parts = []
        for side in self.sides:
            logits = outputs[f"{side}_logits"]
            count = min(self.negatives, logits.shape[-1])
            columns = torch.linspace(0, max(logits.shape[-1] - 1, 0), count, device=logits.device).long()
            parts.append(logits[..., columns][real].flatten())
        negative = torch.cat([part[torch.isfinite(part)] for part in parts]).sigmoid()
        labels = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)])
        self.metrics.update(torch.cat([positive, negative]), labels)
