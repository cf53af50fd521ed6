"""EdgeBatch: the tensors of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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

    memory: torch.Tensor | None = dataclasses.field(default=None, repr=False)
    """`uint8 [bytes]`: what all tensors are views of, after `pinned`."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> EdgeBatch:
        """Return a copy with every tensor on `device`: one transfer where the batch is `pinned`."""
        if self.memory is not None and torch.device(device).type == "cuda":
            return self._over(self.memory.to(device, non_blocking=non_blocking))
        return self._with({place: value.to(device, non_blocking=non_blocking) for place, value in self._tensors()})

    def pinned(self) -> EdgeBatch:
        """Return a copy in one piece of page-locked memory, which a GPU reads by itself and at once."""
        size = sum(_aligned(value.nbytes) for _, value in self._tensors())
        batch = self._over(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        for (_, value), (_, copy) in zip(self._tensors(), batch._tensors(), strict=True):
            copy.copy_(value)
        return batch

    def _tensors(self) -> Iterator[tuple[tuple[str, str | None], torch.Tensor]]:
        """Yield each tensor, after its place: its field, and its table where the field has one for each table."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, dict):
                yield from (((field.name, table), rows) for table, rows in value.items())
            elif isinstance(value, torch.Tensor) and field.name != "memory":
                yield (field.name, None), value

    def _with(self, tensors: dict[tuple[str, str | None], torch.Tensor], **changes: Any) -> EdgeBatch:
        """Return a copy with other tensors in the same places."""
        fields: dict[str, Any] = {name: {} for name in ("ids", "sample", "sample_log_q")}
        for (name, table), value in tensors.items():
            if table is None:
                fields[name] = value
            else:
                fields[name][table] = value
        return dataclasses.replace(self, **fields, **changes)

    def _over(self, memory: torch.Tensor) -> EdgeBatch:
        """Return a batch of tensors of the same shapes that are views of `memory`."""
        views, start = {}, 0
        for place, value in self._tensors():
            views[place] = memory[start : start + value.nbytes].view(value.dtype).view(value.shape)
            start += _aligned(value.nbytes)
        return self._with(views, memory=memory)

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


def _aligned(size: int) -> int:
    """Return the bytes from one tensor's begin to the next one's: any element type may begin there."""
    return -(-size // 16) * 16
