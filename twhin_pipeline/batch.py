"""EdgeBatch: the tensors of one step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from twhin_pipeline.sections.model import TwhinModelConfig


@dataclasses.dataclass
class EdgeBatch:
    """G chunks of up to C edges: what one rank takes in one step. A chunk has fewer edges where its weights end in 0.

    Rows are looked up once each. An *index* points into the concatenation, in the configuration's order of tables, of
    `ids`, so heads, tails and pools share one lookup. A rank without edges holds G = 0 and still takes part in a step.
    """

    ids: dict[str, torch.Tensor]
    """Table to `int64 [U_t]`: its unique rows, every table of the configuration being there."""
    relation: torch.Tensor
    """`int64 [G]` index into the configuration's relations."""
    lhs_index: torch.Tensor
    """`int64 [G, C]`; 0 at padding."""
    rhs_index: torch.Tensor
    """`int64 [G, C]`; 0 at padding."""
    weight: torch.Tensor
    """`float32 [G, C]`; 0 at padding."""
    in_batch: torch.Tensor
    """`int64 [G, n]` positions in the chunk; 0 at padding."""
    num_in_batch: torch.Tensor
    """`int64 [G]` how many of the n are real; the others are masked for every edge."""
    lhs_pool_index: torch.Tensor
    """`int64 [G, K]`, K may be 0."""
    rhs_pool_index: torch.Tensor
    """`int64 [G, K']`, K' may be 0."""
    lhs_mask: torch.Tensor
    """`int64 [M, 3]` (chunk, position, candidate) to be masked; candidates count over `n + K`."""
    rhs_mask: torch.Tensor
    """`int64 [M', 3]`; candidates count over `n + K'`."""
    num_edges: int
    """Real edges in this batch."""
    global_edges: int
    """Real edges of all ranks in this step: what a loss is divided by."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EdgeBatch:
        """Return a copy with every tensor on `device`."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        fields = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        fields["ids"] = {table: move(rows) for table, rows in self.ids.items()}
        return EdgeBatch(**fields)

    @classmethod
    def empty(cls, model_config: TwhinModelConfig, global_edges: int) -> EdgeBatch:
        """Return the batch of a rank that has no edges in this step, while all ranks together have `global_edges`."""

        def nothing(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype)

        return cls(
            ids={table: nothing(0) for table in model_config.table_names},
            relation=nothing(0),
            lhs_index=nothing(0, 0),
            rhs_index=nothing(0, 0),
            weight=nothing(0, 0, dtype=torch.float32),
            in_batch=nothing(0, 0),
            num_in_batch=nothing(0),
            lhs_pool_index=nothing(0, 0),
            rhs_pool_index=nothing(0, 0),
            lhs_mask=nothing(0, 3),
            rhs_mask=nothing(0, 3),
            num_edges=0,
            global_edges=global_edges,
        )
