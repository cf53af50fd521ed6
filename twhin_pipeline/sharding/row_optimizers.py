"""Row optimizers: fused table updates without a process group, rule for rule as fbgemm's kernels make them.

They touch the rows of a sparse gradient only, so a step's cost is that of its batch and not of the table, and one
process alone trains the same vectors as sharded ranks do. A gradient of all rows updates the full table in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import Optimizer

from twhin_pipeline.kernels import parallel, radix, vector_kernels
from twhin_pipeline.kernels.parallel import ROWS_A_THREAD, ParallelLoop
from twhin_pipeline.model.rows import added_up, addresses


class RowOptimizer(Optimizer):
    """Applies `update` to the rows of each parameter's sparse gradient. All state is there from the start."""

    kernel: ParallelLoop | None = None
    """A compiled loop for float32 on the CPU, with `momentum1` for its state: the same rule in one pass over a row."""

    def __init__(self, params: Iterable[torch.nn.Parameter], **options: Any) -> None:
        super().__init__(params, options)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param].update(self.init_state(param))

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of the table `param [N, D]`, by torchrec's names: `[N, ...]`, or a number."""
        return {}

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Update the state of U rows.

        Args:
            state: As `init_state` made it, of these rows alone (`[U, ...]`, or a number); to be changed in place.
            grad: `float32 [U, D]`; not to be changed.
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
                state = self.state[param]
                rows, values = param.grad._indices()[0], param.grad._values()
                if self.kernel is not None and param.device.type == "cpu" and param.dtype == torch.float32:
                    gradients = RowGradients.of(rows, values)
                    gradients.update(self.kernel, param.detach(), state["momentum1"], 1, group["lr"], group["eps"])
                    continue
                rows, grad = summed_rows(rows, values)
                grad = grad.float()
                if len(rows) == len(param):
                    param.sub_(self.update(state, grad, group).to(param.dtype))
                    continue
                touched = {name: value.index_select(0, rows) if value.ndim else value for name, value in state.items()}
                change = self.update(touched, grad, group).to(param.dtype)
                for name, value in touched.items():
                    if value.ndim:
                        state[name].index_copy_(0, rows, value)
                param.index_add_(0, rows, change, alpha=-1)


@dataclass(frozen=True)
class RowGradients:
    """Gradients of a table's rows, float32 on the CPU: those of one row are added up while it is updated."""

    rows: np.ndarray
    """`int64 [U]`, ascending, each once."""
    start: np.ndarray
    """`int64 [U + 1]` where each row's gradients begin in `address`."""
    address: np.ndarray
    """`int64 [M]` where in memory each gradient begins."""
    values: Sequence[torch.Tensor]
    """The tensors at these addresses, kept alive."""

    @classmethod
    def of(cls, rows: torch.Tensor, *values: torch.Tensor) -> RowGradients:
        """Make them from `rows`, int64 `[M]`, and their gradients, `float32 [m, D]` each, M in all."""
        contiguous = [part.contiguous() for part in values]
        address = torch.cat([addresses(part) for part in contiguous]).numpy()
        if _ascending(rows):
            return cls(rows.numpy(), np.arange(len(rows) + 1), address, contiguous)
        distinct, _, place = radix.unique(rows.numpy())
        start, grouped = np.empty(len(distinct) + 1, np.int64), np.empty(len(rows), np.int64)
        vector_kernels.grouped(place, address, start, grouped)
        return cls(distinct, start, grouped, contiguous)

    @classmethod
    def merged(cls, rows: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> RowGradients:
        """Make them from lists of `rows`, int64 `[m]`, ascending, each once in a list, and `float32 [m, D]` of each."""
        contiguous = [part.contiguous() for part in values]
        address = torch.cat([addresses(part) for part in contiguous]).numpy()
        cut = np.cumsum([0, *map(len, rows)])
        distinct, start = np.empty(len(address), np.int64), np.empty(len(address) + 1, np.int64)
        ordered = np.empty_like(address)
        count = vector_kernels.merged(torch.cat(list(rows)).numpy(), cut, address, distinct, start, ordered)
        return cls(distinct[:count], start[: count + 1], ordered, contiguous)

    def update(
        self, kernel: ParallelLoop, weight: torch.Tensor, momentum: torch.Tensor, scale: float, lr: float, eps: float
    ) -> None:
        """Update a table and its state by their sums times `scale`."""
        arrays = weight.numpy(), momentum.numpy(), self.rows, self.start, self.address
        kernel(len(self.rows), ROWS_A_THREAD, *arrays, float(scale), float(lr), float(eps))


def summed_rows(rows: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distinct `rows`, ascending, and the sums of their gradients.

    A batch looks up ascending ids, each once, so its gradient is returned as it is: sorting it would cost as much as
    the update.

    Args:
        rows: `int64 [M]`.
        values: `[m, D]` each, M in all.

    Returns:
        `int64 [U]` and `[U, D]`.
    """
    if _ascending(rows):
        return rows, values[0] if len(values) == 1 else torch.cat(values)
    if rows.device.type == "cpu" and values[0].dtype == torch.float32:
        distinct, _, place = (torch.from_numpy(x) for x in radix.unique(rows.numpy()))
        return distinct, added_up(place, values, len(distinct))
    unique, place = rows.unique(return_inverse=True)
    total = values[0].new_zeros(len(unique), values[0].shape[1])
    return unique, total.index_add_(0, place, torch.cat(values))


def _ascending(rows: torch.Tensor) -> bool:
    return bool((rows[1:] > rows[:-1]).all())


class RowSgd(RowOptimizer):
    """`w -= lr * g`. Options: `lr`."""

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return `lr * grad`."""
        return group["lr"] * grad


class RowAdagrad(RowOptimizer):
    """`m += g²; w -= lr * g / (sqrt(m) + eps)`, an accumulator an element. Options: `lr`, `eps`."""

    kernel = parallel.adagrad

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `momentum1 float32 [N, D]`."""
        return {"momentum1": torch.zeros_like(param, dtype=torch.float32, requires_grad=False)}

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the scaled gradient."""
        root = state["momentum1"].addcmul_(grad, grad).sqrt().add_(group["eps"])
        return torch.div(grad, root, out=root).mul_(group["lr"])


class RowwiseAdagrad(RowOptimizer):
    """`m += mean(g²); w -= lr * g / (sqrt(m) + eps)`, an accumulator a row. Options: `lr`, `eps`."""

    kernel = parallel.rowwise_adagrad

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `momentum1 float32 [N]`."""
        return {"momentum1": torch.zeros(param.shape[0], dtype=torch.float32, device=param.device)}

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the scaled gradient."""
        root = state["momentum1"].add_(grad.square().mean(1)).sqrt().add_(group["eps"])
        return grad * (group["lr"] / root).unsqueeze(1)


class RowAdam(RowOptimizer):
    """Adam whose moments rest while a row has no gradient. Options: `lr`, `beta1`, `beta2`, `eps`."""

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the moments `momentum1` and `exp_avg_sq`, `float32 [N, D]`, and the number of steps, `step []`."""
        zeros = torch.zeros_like(param, dtype=torch.float32, requires_grad=False)
        return {"momentum1": zeros, "exp_avg_sq": zeros.clone(), "step": torch.zeros(())}

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the bias-corrected step."""
        step = float(state["step"].add_(1))
        beta1, beta2 = group["beta1"], group["beta2"]
        first = state["momentum1"].lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = second.div(1 - beta2**step).sqrt_().add_(group["eps"])
        return torch.div(first, root, out=root).mul_(group["lr"] / (1 - beta1**step))


class RowRmsprop(RowOptimizer):
    """`m = decay * m + (1 - decay) * g²; w -= lr * g / (sqrt(m / (1 - decay^step)) + eps)`, in every row at each step.

    Without a gradient a row does not move and its m falls by itself, which is made up for when it has one again.
    Options: `lr`, `decay`, `eps`.
    """

    def init_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return m, `momentum1 float32 [N, D]`; the steps up to which it is, `last_step [N]`; and `step []`."""
        return {
            "momentum1": torch.zeros_like(param, dtype=torch.float32, requires_grad=False),
            "last_step": torch.zeros(len(param), device=param.device),
            "step": torch.zeros(()),
        }

    def update(self, state: dict[str, torch.Tensor], grad: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """Return the step."""
        step, decay = float(state["step"].add_(1)), group["decay"]
        fallen = decay ** (step - state["last_step"])
        state["last_step"].fill_(step)
        mean = state["momentum1"].mul_(fallen.unsqueeze(1)).addcmul_(grad, grad, value=1 - decay)
        root = (mean / (1 - decay**step)).sqrt_().add_(group["eps"])
        return torch.div(grad, root, out=root).mul_(group["lr"])
