"""EdgeBatch: the tensors of one step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.words import SIDES, Side


@dataclasses.dataclass
class EdgeBatch:
    """G chunks of up to C edges: one rank's part of one step. A chunk has fewer edges where its weights end in 0.

    Rows are looked up once each. An *index* points into the concatenation, in the configuration's order of tables, of
    `ids`, so heads, tails and pools share one lookup. A rank without edges holds G = 0 and still takes part in a step.

    On side `lhs` (heads are corrupted) edges keep their tails, on `rhs` their heads. A chunk's edges that keep the same
    entity share a *query*, which is scored with the candidates once. A chunk's queries ascend by their index.
    """

    ids: dict[str, torch.Tensor]
    """Table to `int64 [U_t]`: its unique rows, ascending, for every table of the configuration."""
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
    lhs_query_index: torch.Tensor
    """`int64 [G, Q]` the tails of a chunk, each once; 0 at padding."""
    rhs_query_index: torch.Tensor
    """`int64 [G, Q']` the heads of a chunk, each once; 0 at padding."""
    lhs_query: torch.Tensor
    """`int64 [G, C]` each edge's query among the Q; 0 at padding."""
    rhs_query: torch.Tensor
    """`int64 [G, C]` each edge's query among the Q'; 0 at padding."""
    lhs_on: torch.Tensor
    """`bool [G]` whether the chunk's relation corrupts heads; where it does not, its pool is index 0 K times."""
    rhs_on: torch.Tensor
    """`bool [G]` whether the chunk's relation corrupts tails."""
    lhs_pool_index: torch.Tensor
    """`int64 [G, K]`, K may be 0."""
    rhs_pool_index: torch.Tensor
    """`int64 [G, K']`, K' may be 0."""
    lhs_mask: torch.Tensor
    """`int64 [M, 3]` (chunk, query, candidate) to be masked, by chunk; candidates count over `n + K`, or, with
    `everything`, over the rows of the side's type or its `sample`."""
    rhs_mask: torch.Tensor
    """`int64 [M', 3]`; candidates count over `n + K'`, or as above."""
    lhs_log_q: torch.Tensor
    """`float32 [G, n + K]` log of a candidate's expected number in the list; 0 at padding, and all 0 where `loss.log_q`
    is off."""
    rhs_log_q: torch.Tensor
    """`float32 [G, n + K']`."""
    num_edges: int
    """Real edges in this batch."""
    global_edges: int
    """Real edges of all ranks in this step: what a loss is divided by."""
    sides: tuple[Side, ...] = SIDES
    """The sides that some chunk corrupts; a side that is not among them has no pool, and is not scored."""
    everything: bool = False
    """Whether every entity of a side's type is a candidate (`global_negatives: all`): `ids` then hold all rows of those
    types, in order, or what the step's sample and edges need; and n = K = 0."""
    sample: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """With `sampled_per_step`: table to `int64 [N]`, places in the table's `ids` of the sampled entities,
    ascending. A table that is missing uses all of its entities."""
    sample_log_q: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """With `loss.log_q`: table to `float32 [N]`, the log of the probability that each is in the sample."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EdgeBatch:
        """Return a copy with every tensor on `device`."""

        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value

        fields = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for name in ("ids", "sample", "sample_log_q"):
            fields[name] = {table: move(rows) for table, rows in getattr(self, name).items()}
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
            lhs_query_index=nothing(0, 0),
            rhs_query_index=nothing(0, 0),
            lhs_query=nothing(0, 0),
            rhs_query=nothing(0, 0),
            lhs_on=nothing(0, dtype=torch.bool),
            rhs_on=nothing(0, dtype=torch.bool),
            lhs_pool_index=nothing(0, 0),
            rhs_pool_index=nothing(0, 0),
            lhs_mask=nothing(0, 3),
            rhs_mask=nothing(0, 3),
            lhs_log_q=nothing(0, 0, dtype=torch.float32),
            rhs_log_q=nothing(0, 0, dtype=torch.float32),
            num_edges=0,
            global_edges=global_edges,
        )
