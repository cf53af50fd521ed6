"""Schedules: the learning rate of every group at every step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping

from twhin_pipeline.config.optimizer import LearningRate


def rate_at(schedule: LearningRate, step: int, total_steps: int | None = None) -> float:
    """Return the learning rate of update number `step`, counted from 0.

    A ramp of n steps starts at 0 and has its full rate at step n. The cosine is that of SGDR without restarts
    (Loshchilov and Hutter, 2017). The linear decay of a training of n steps would have its final rate at step n, the
    one after its last.

    Args:
        schedule: What to follow.
        step: From 0.
        total_steps: How many steps the training has; only `linear_decay` needs it.

    Raises:
        ValueError: `linear_decay` without `total_steps`.
    """
    if schedule.constant is not None:
        return schedule.constant
    if schedule.piecewise_constant is not None:
        piecewise = schedule.piecewise_constant
        return piecewise.learning_rate_values[bisect.bisect_right(piecewise.learning_rate_boundaries, step)]
    if schedule.linear_ramp_to_constant is not None:
        ramp = schedule.linear_ramp_to_constant
        return ramp.learning_rate * min(1.0, step / ramp.num_ramp_steps)
    if schedule.linear_decay is not None:
        if total_steps is None:
            raise ValueError("linear_decay needs total_steps; pass them to build_optimizer")
        decay = schedule.linear_decay
        share = min(1.0, step / max(total_steps, 1))
        return decay.learning_rate + (decay.final_learning_rate - decay.learning_rate) * share
    cosine = schedule.linear_ramp_to_cosine
    assert cosine is not None, "LearningRate holds exactly one schedule"
    if step < cosine.num_ramp_steps:
        return cosine.learning_rate * step / cosine.num_ramp_steps
    done = min(1.0, (step - cosine.num_ramp_steps) / (cosine.final_num_steps - cosine.num_ramp_steps))
    above = cosine.learning_rate - cosine.final_learning_rate
    return cosine.final_learning_rate + above * 0.5 * (1.0 + math.cos(math.pi * done))


class GroupSchedule:
    """The learning rates of named groups of parameters, advanced together, one step an update."""

    def __init__(
        self,
        groups: Mapping[str, LearningRate],
        apply: Callable[[dict[str, float]], None],
        total_steps: int | None = None,
    ) -> None:
        """Start at step 0, whose rates are applied at once.

        Args:
            groups: Group to its schedule.
            apply: Applies the groups' rates.
            total_steps: How many steps the training has, where a schedule depends on it.
        """
        self._groups = dict(groups)
        self._apply = apply
        self._total_steps = total_steps
        self._step = 0
        self._apply(self.rates())

    def rates(self) -> dict[str, float]:
        """Return each group's rate for the next update, the same on every rank."""
        return {group: rate_at(schedule, self._step, self._total_steps) for group, schedule in self._groups.items()}

    def step(self) -> None:
        """Count an update, and apply the next one's rates."""
        self._step += 1
        self._apply(self.rates())

    def state_dict(self) -> dict[str, int]:
        """Return how many updates were made."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int], total_steps: int | None = None) -> None:
        """Continue from a saved state, and apply its rates.

        `total_steps` includes those made before; left out, it stays. It depends on how many processes share an epoch.
        """
        self._step = int(state["step"])
        self._total_steps = self._total_steps if total_steps is None else total_steps
        self._apply(self.rates())
