"""Progress: what a run has counted and measured so far, saved with each checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.twhin_model import Outputs
from twhin_pipeline.sharding.distributed import Ranks

LOSSES_SCHEMA = pa.schema(
    [("step", pa.int64()), ("epoch", pa.int64()), ("loss", pa.float64()), ("edges_per_second", pa.float64())]
)
METRICS_SCHEMA = pa.schema([("step", pa.int64()), ("metric", pa.string()), ("value", pa.float64())])


class Interval:
    """Sums of the steps since the last log line: this rank's, added up over ranks when the line is written.

    The sums are in float64, so they do not depend on whether a run was interrupted within the interval.
    """

    def __init__(self, relations: list[str], ranks: Ranks) -> None:
        self.relations, self.ranks = relations, ranks
        # This rank's share of the summed loss, then a sum of losses and one of weights for each relation.
        self.sums = torch.zeros(1 + 2 * len(relations), dtype=torch.float64, device=ranks.device)
        self.losses: list[torch.Tensor] = []
        self.unchecked: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        self.steps, self.edges = 0, 0
        self.seconds = 0.0
        self.mark = time.monotonic()

    def add(self, step: int, loss: torch.Tensor, outputs: Outputs, batch: EdgeBatch) -> None:
        """Add a step: its loss (a scalar whose mean over ranks is the step's) and its relations' losses."""
        share = loss.double() * (batch.global_edges / self.ranks.world_size)
        self.sums += torch.cat([share[None], outputs["relation_loss"].double(), outputs["relation_edges"].double()])
        self.unchecked.append((step, loss, outputs["relation_loss"]))
        self.steps += 1
        self.edges += batch.global_edges

    def check_finite(self) -> None:
        """Raise UserError, naming step and relation, where a loss since the last check is not finite."""
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked or bool(torch.isfinite(torch.stack([loss for _, loss, _ in unchecked])).all()):
            return
        step, loss, by_relation = next(entry for entry in unchecked if not math.isfinite(float(entry[1])))
        names = [
            name for name, value in zip(self.relations, by_relation.tolist(), strict=True) if not math.isfinite(value)
        ]
        raise UserError(
            f"the loss is {float(loss)} at step {step}, in relation {', '.join(names) or 'none alone (their sum)'}; "
            "lower the learning rates of its tables and of translation_optimizer, or lengthen their ramp; look at edge "
            "weights too"
        )

    @property
    def rate(self) -> float:
        """Edges per second of all ranks since the interval began."""
        return self.edges / max(self.seconds + time.monotonic() - self.mark, 1e-9)

    def restart(self) -> None:
        """Let the clock run from now."""
        self.mark = time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Leave `seconds`, just spent on something else, out of the rate."""
        self.mark += seconds

    def close(self, step: int, epoch: int) -> dict[str, float]:
        """Return the interval's line, summed over ranks, and begin the next interval."""
        self.check_finite()
        total, *rest = self.ranks.sum(self.sums.tolist())
        losses, weights = rest[: len(self.relations)], rest[len(self.relations) :]
        record: dict[str, float] = {"step": step, "epoch": epoch, "loss": total / max(self.edges, 1)}
        record["edges_per_second"] = self.rate
        for name, loss, weight in zip(self.relations, losses, weights, strict=True):
            if weight:
                record[f"loss/{name}"] = loss / weight
        self.sums.zero_()
        self.steps, self.edges, self.seconds, self.mark = 0, 0, 0.0, time.monotonic()
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return this rank's sums."""
        seconds = self.seconds + time.monotonic() - self.mark
        return {"sums": self.sums.tolist(), "steps": self.steps, "edges": self.edges, "seconds": seconds}

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Take over the sums of all ranks: each its own, or, at another world size, rank 0 everyone's."""
        same = len(states) == self.ranks.world_size
        mine = states[self.ranks.rank : self.ranks.rank + 1] if same else states if self.ranks.rank == 0 else []
        for state in mine:
            self.sums += torch.tensor(state["sums"], dtype=torch.float64, device=self.sums.device)
        self.steps, self.edges = states[0]["steps"], states[0]["edges"]
        self.seconds = states[0]["seconds"]


@dataclass
class Progress:
    """Counts and results of a run; JSON values."""

    step: int = 0
    edges: int = 0
    seconds: float = 0.0
    """Time in the loop, evaluations and checkpoints included."""
    losses: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    best_step: int | None = None
    best_epoch: int | None = None
    """The epoch, from 1, that the best step is in."""
    best_value: float | None = None
    evaluations_without_gain: int = 0
    mlflow_run_id: str | None = None
    rates: dict[str, float] = field(default_factory=dict)
    """The learning rates of the last update."""
    mark: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Let the clock run from now."""
        self.mark = time.monotonic()

    def advance(self, edges: int, interval: Interval) -> None:
        """Count a step."""
        now = time.monotonic()
        self.seconds, self.mark = self.seconds + now - self.mark, now
        self.step += 1
        self.edges += edges

    @property
    def evaluated_step(self) -> int | None:
        """The last step that was evaluated."""
        return int(self.validations[-1]["step"]) if self.validations else None

    def add_validation(
        self, metrics: dict[str, float], epoch: int, metric: str, higher_is_better: bool, complete: bool
    ) -> bool:
        """Add an evaluation at this step of an epoch (from 1); return whether it is the best so far by `metric`.

        One that was cut short saw other edges than the others, so it decides on nothing.
        """
        self.validations.append({"step": self.step, **metrics})
        if not complete:
            return False
        value, best = metrics[metric], self.best_value
        better = math.isfinite(value) and (best is None or (value > best if higher_is_better else value < best))
        if better:
            self.best_step, self.best_epoch, self.best_value = self.step, epoch, value
            self.evaluations_without_gain = 0
        else:
            self.evaluations_without_gain += 1
        return better

    def metric_rows(self) -> list[dict[str, Any]]:
        """Return the evaluations as rows of step, metric and value."""
        return [
            {"step": int(result["step"]), "metric": metric, "value": value}
            for result in self.validations
            for metric, value in result.items()
            if metric != "step"
        ]

    def details(self, config: TwhinConfig, epoch: int) -> dict[str, Any]:
        """Return what the model's manifest says of the run, whose last step was in `epoch` (from 1)."""
        losses = [record["loss"] for record in self.losses]
        return {
            "model": config.model.model_dump(mode="json"),
            "first_loss": losses[0],
            "final_loss": losses[-1],
            "best_loss": min(losses),
            "best_step": self.best_step,
            "chosen_step": self.step if self.best_step is None else self.best_step,
            "chosen_epoch": epoch if self.best_epoch is None else self.best_epoch,
            "best_validation": self.best_value,
            "validation_metric": config.training.selection_metric,
            "edges": self.edges,
            "seconds": round(self.seconds, 3),
            "edges_per_second": round(self.edges / max(self.seconds, 1e-9), 1),
            "steps": self.step,
            "mlflow_run_id": self.mlflow_run_id,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the clock. A metric that is not a number is left out of JSON as null."""
        state = asdict(self)
        del state["mark"]
        state["validations"] = [
            {key: value if math.isfinite(value) else None for key, value in result.items()}
            for result in self.validations
        ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        for key, value in state.items():
            setattr(self, key, value)
        self.validations = [
            {key: math.nan if value is None else value for key, value in result.items()} for result in self.validations
        ]
