"""Row optimizers: fused table updates without a process group, rule for rule as fbgemm's kernels make them.

They touch the rows of a sparse gradient only, so a step's cost is that of its batch and not of the table, and one
process alone trains the same vectors as sharded ranks do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer


class RowOptimizer(Optimizer):
    """Applies `update` to the rows of each parameter's sparse gradient. All state is there from the start."""

    def __init__(self, params: Iterable[torch.nn.Parameter], **options: Any) -> None:
        super().__init__(params, options)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].update(self.init_state(param))

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of the table `param [N, D]`, by the names that torchrec gives it."""
        return {}

    def update(
        self, state: dict[str, torch.Tensor], rows: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Bring the state of some rows up to date.

        Args:
            state: As `init_state` made it; changed in place.
            rows: `int64 [U]`, unique.
            grad: `float32 [U, D]`.
            group: The options, `lr` among them.

        Returns:
            What to subtract from the rows, `[U, D]`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the rows that have a gradient."""
        assert closure is None, "a step inside the backward pass cannot evaluate the loss again"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad.coalesce()
                rows = grad.indices()[0]
                change = self.update(self.state[param], rows, grad.values().float(), group)
                param.index_add_(0, rows, change.to(param.dtype), alpha=-1)


class RowSgd(RowOptimizer):
    """`w -= lr * g`. Options: `lr`."""

    def update(
        self, state: dict[str, torch.Tensor], rows: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Return `lr * grad`."""
        return group["lr"] * grad


class RowAdagrad(RowOptimizer):
    """`m += g²; w -= lr * g / (sqrt(m) + eps)`, an accumulator an element. Options: `lr`, `eps`."""

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `momentum1 float32 [N, D]`."""
        return {"momentum1": torch.zeros_like(param, dtype=torch.float32, requires_grad=False)}

    def update(
        self, state: dict[str, torch.Tensor], rows: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Return the scaled gradient."""
        total = state["momentum1"][rows] + grad.square()
        state["momentum1"][rows] = total
        return group["lr"] * grad / (total.sqrt() + group["eps"])


class RowwiseAdagrad(RowOptimizer):
    """`m += mean(g²); w -= lr * g / (sqrt(m) + eps)`, an accumulator a row. Options: `lr`, `eps`."""

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `momentum1 float32 [N]`."""
        return {"momentum1": torch.zeros(param.shape[0], dtype=torch.float32, device=param.device)}

    def update(
        self, state: dict[str, torch.Tensor], rows: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Return the scaled gradient."""
        total = state["momentum1"][rows] + grad.square().mean(1)
        state["momentum1"][rows] = total
        return grad * (group["lr"] / (total.sqrt() + group["eps"])).unsqueeze(1)


class RowAdam(RowOptimizer):
    """Adam whose moments rest while a row has no gradient. Options: `lr`, `beta1`, `beta2`, `eps`."""

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the moments `momentum1` and `exp_avg_sq`, `float32 [N, D]`, and the number of steps, `step []`."""
        zeros = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        return {"momentum1": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}

    def update(
        self, state: dict[str, torch.Tensor], rows: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]
    ) -> torch.Tensor:
        """Return the bias-corrected step."""
        state["step"] += 1
        step, beta1, beta2 = float(state["step"]), group["beta1"], group["beta2"]
        first = torch.lerp(state["momentum1"][rows], grad, 1 - beta1)
        second = torch.lerp(state["exp_avg_sq"][rows], grad.square(), 1 - beta2)
        state["momentum1"][rows], state["exp_avg_sq"][rows] = first, second
        root = (second / (1 - beta2**step)).sqrt() + group["eps"]
        return group["lr"] * first / (1 - beta1**step) / root
