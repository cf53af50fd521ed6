"""Rows picked out of a matrix, with a backward pass that adds up all of their gradients at once; and dropout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from twhin_pipeline.kernels import parallel, vector_kernels
from twhin_pipeline.kernels.parallel import ROWS_A_THREAD


@dataclass(frozen=True)
class Rows:
    """A table's rows that a batch uses."""

    matrix: torch.Tensor
    """`[N, D]`: the table; or only the rows, already looked up; or, for rows at an `address`, a tensor without memory
    that represents them in autograd and receives their gradient."""
    ids: torch.Tensor | None = None
    """`int64 [U]` the rows of the table, each once; None where `matrix` holds only these rows, in order."""
    address: torch.Tensor | None = None
    """`int64 [U]` where each row begins in this process's memory, if the rows are not in `matrix`."""
    gradient_memory: Callable[[int, int], torch.Tensor] | None = None
    """Returns memory of the requested shape for the gradients of all rows that are taken in one call."""

    def looked_up(self) -> torch.Tensor:
        """Return the rows, `[U, D]`; a table's gradient is sparse."""
        if self.address is not None:
            # Without `gradient_memory`, which is for the gradients of all tables' rows.
            return take([replace(self, gradient_memory=None)], torch.arange(len(self.address)))[0]
        return self.matrix if self.ids is None else F.embedding(self.ids, self.matrix, sparse=True)


class EmbeddingTables(Protocol):
    """The tables of a model: looks up a batch's rows, and updates them by the gradients of what it returned.

    `sharding` has the implementations: unsharded, sharded by torchrec, and in memory that ranks share.
    """

    module: nn.Module
    """Holds the vectors: its parameters and state dict are `embeddings.<table>.weight`."""

    def rows(self, ids: Mapping[str, torch.Tensor]) -> list[Rows]:
        """Return the rows `ids` (table to `int64 [U_t]`, ascending, each once) of each table, in the configuration's
        order.
        """
        ...


def take(x: torch.Tensor | Sequence[Rows], *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `x[i]` for each index: for `x [U, D]` and `i` int64 `[...]`, `[..., D]`.

    Several indices into the same matrix cost one gradient of its size, not one each. `x` may be the rows of several
    tables, concatenated: on the CPU each row is then copied once, and its gradients are added up in one pass.

    Raises:
        IndexError: A row does not exist.
    """
    if isinstance(x, torch.Tensor):
        x = [Rows(x)]
    taken: tuple[torch.Tensor, ...]
    if all(part.matrix.device.type == "cpu" and part.matrix.dtype == torch.float32 for part in x):
        taken = _TakeByAddress.apply(x, *(part.matrix for part in x), *index)
        return taken
    vectors = x[0].looked_up() if len(x) == 1 else torch.cat([part.looked_up() for part in x])
    taken = _Take.apply(vectors, *index)
    return taken


def pick(x: torch.Tensor, *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `x[g, i[g]]` for each chunk g and each index: for `x [G, Q, D]` and `i` int64 `[G, C]`, `[G, C, D]`."""
    return take(x.flatten(0, 1), *(i + starts(x) for i in index))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *index: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*index)
        ctx.shape = x.shape
        return tuple(x.index_select(0, i.flatten()).view(*i.shape, x.shape[1]) for i in index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        total = gradients[0].new_zeros(ctx.shape)
        # At once: on CUDA each call sorts its index.
        index = torch.cat([i.flatten() for i in ctx.saved_tensors])
        add_to_rows(total, index, torch.cat([gradient.reshape(-1, ctx.shape[1]) for gradient in gradients]))
        return total, *(None for _ in gradients)


class _TakeByAddress(torch.autograd.Function):
    """`_Take` of matrices in the CPU's memory: rows and their gradients are read by their addresses."""

    @staticmethod
    def forward(ctx: Any, parts: Sequence[Rows], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        matrices, index = inputs[: len(parts)], inputs[len(parts) :]
        size, rows = matrices[0].shape[1], [part.ids for part in parts]
        contiguous, row_addresses = [], []  # the matrices must stay alive while they are read
        for part, matrix in zip(parts, matrices, strict=True):
            contiguous.append(matrix if part.address is not None else matrix.contiguous())
            row_addresses.append(addresses(contiguous[-1], part.ids) if part.address is None else part.address)
        address = torch.cat(row_addresses)
        place = torch.cat([i.flatten() for i in index])
        out = matrices[0].new_empty(len(place), size)
        parallel.gather(len(place), ROWS_A_THREAD, address.index_select(0, place).numpy(), out.numpy())
        ctx.save_for_backward(place, *(row for row in rows if row is not None))
        ctx.indexed = [row is not None for row in rows]
        ctx.shapes = [matrix.shape for matrix in matrices]
        ctx.lengths = [len(matrix) if row is None else len(row) for matrix, row in zip(matrices, rows, strict=True)]
        ctx.sizes = [i.numel() for i in index]
        ctx.gradient_memory = parts[0].gradient_memory or torch.empty
        ctx.set_materialize_grads(False)
        return tuple(part.view(*i.shape, size) for part, i in zip(out.split(ctx.sizes), index, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> Any:
        place, *rows = ctx.saved_tensors
        # An output that nothing used has no gradient.
        used = [(p, g) for p, g in zip(place.split(ctx.sizes), gradients, strict=True) if g is not None]
        if not used:
            return None, *(None for _ in ctx.shapes), *(None for _ in gradients)
        vectors = [g.reshape(-1, ctx.shapes[0][1]) for _, g in used]
        total = ctx.gradient_memory(sum(ctx.lengths), ctx.shapes[0][1])
        add_up(torch.cat([p for p, _ in used]), vectors, total)
        of_parts = []
        for part, shape, indexed in zip(total.split(ctx.lengths), ctx.shapes, ctx.indexed, strict=True):
            if indexed:
                part = torch.sparse_coo_tensor(rows.pop(0).unsqueeze(0), part, shape, check_invariants=False)
            of_parts.append(part)
        return None, *of_parts, *(None for _ in gradients)


def added_up(place: torch.Tensor, rows: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Return `float32 [count, D]`, the sums that `add_up` writes."""
    total = torch.empty(count, rows[0].shape[1])
    add_up(place, rows, total)
    return total


def add_up(place: torch.Tensor, rows: Sequence[torch.Tensor], total: torch.Tensor) -> None:
    """Add up rows on the CPU. Each row is read once, and each sum is in the order of its rows.

    Args:
        place: `int64 [M]`, each below U: the sum that a row belongs to.
        rows: `float32 [m, D]` each, M in all.
        total: `float32 [U, D]`, written: 0 where no row belongs.
    """
    rows = [part.contiguous() for part in rows]
    address = torch.cat([addresses(part) for part in rows])
    start, grouped = np.empty(len(total) + 1, np.int64), np.empty(len(place), np.int64)
    vector_kernels.grouped(place.numpy(), address.numpy(), start, grouped)
    parallel.sums(len(total), ROWS_A_THREAD, grouped, start, total.numpy())


def addresses(matrix: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Return the memory addresses (int64) of the rows of `matrix [N, D]`: of all, or of `rows` (int64 `[U]`)."""
    if rows is None:
        rows = torch.arange(len(matrix))
    elif len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(matrix):
        raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of a table that has {len(matrix)}")
    return rows * (matrix.shape[1] * matrix.element_size()) + matrix.data_ptr()


def starts(x: torch.Tensor) -> torch.Tensor:
    """Return where each chunk's rows begin in `x.flatten(0, 1)`, of `x [G, Q, D]`: int64 `[G, 1]`."""
    return torch.arange(len(x), device=x.device).unsqueeze(1) * x.shape[1]


def add_to_rows(total: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """Add `rows [M, D]` to the rows `index` (int64 `[M]`) of `total [U, D]`, in an order that every run repeats."""
    if _adds_in_order(total):
        total.index_add_(0, index, rows)
    else:
        total += torch.ops.aten.embedding_dense_backward(rows, index, len(total), -1, False)


def _adds_in_order(total: torch.Tensor) -> bool:
    """Tell whether `index_add_` does: on CUDA its order differs from run to run, and an embedding's gradient's not."""
    return total.device.type == "cpu"


def dropout(x: torch.Tensor, p: float) -> torch.Tensor:
    """Set elements to 0 with probability `p` and divide the others by 1 - p (p to 1 in 65,536): `x`'s shape.

    On the CPU torch draws a number an element, which takes longer than the arithmetic; here one draw serves four.
    """
    if p == 0 or x.device.type != "cpu":
        return F.dropout(x, p)
    level = round(p * 2**16)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = drawn[: x.numel()].view(x.shape) >= level - 2**15
    return x * (kept * (1 / (1 - level / 2**16)))
