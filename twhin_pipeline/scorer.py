"""Scorer: `f(lhs, relation, rhs)`, the one definition for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from twhin_pipeline.comparators import COMPARATORS
from twhin_pipeline.errors import UserError
from twhin_pipeline.operators import OPERATORS, Operator
from twhin_pipeline.sections.model import TwhinModelConfig


class Scorer(nn.Module):
    """`compare(operator_rel(lhs), rhs) / temperature`, with the operators' parameters for all R relations.

    `transform` makes ready a left-hand side and `prepare` a right-hand side; `compare` and `pairs` take those.
    """

    def __init__(self, model_config: TwhinModelConfig) -> None:
        super().__init__()
        self.relations = model_config.relation_names
        self.temperature = model_config.temperature
        self.comparator = COMPARATORS[model_config.comparator]()
        self._operator_of = [relation.operator for relation in model_config.relations]
        names = list(dict.fromkeys(self._operator_of))
        # A relation's number among those of the same operator: the row of its parameters.
        slots = [self._operator_of[:i].count(name) for i, name in enumerate(self._operator_of)]
        self.operators = nn.ModuleDict(
            {name: OPERATORS[name](self._operator_of.count(name), model_config.embedding_dim) for name in names}
        )
        self._kind: torch.Tensor
        self._slot: torch.Tensor
        kinds = torch.tensor([names.index(name) for name in self._operator_of])
        self.register_buffer("_kind", kinds, persistent=False)
        self.register_buffer("_slot", torch.tensor(slots), persistent=False)

    def transform(self, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Make ready left-hand sides: apply the relation's operator, then the comparator's preparation.

        Args:
            x: `[G, N, D]`.
            relation: `int64 [G]`, each the relation of a row of vectors.

        Returns:
            `[G, N, D]`.
        """
        slot = self._slot[relation]
        if len(self.operators) == 1:
            (operator,) = self.operators.values()
            return self.comparator.prepare(operator(x, slot))
        out = x
        for kind, operator in enumerate(self.operators.values()):
            # Every operator is applied, to no vectors if need be: each rank's backward pass then has all parameters.
            chosen = (self._kind[relation] == kind).nonzero().squeeze(1)
            out = out.index_copy(0, chosen, operator(x[chosen], slot[chosen]))
        return self.comparator.prepare(out)

    def prepare(self, x: torch.Tensor) -> torch.Tensor:
        """Make ready right-hand sides `x [..., D]`: `[..., D]`."""
        return self.comparator.prepare(x)

    def compare(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Score each of `a [..., P, D]` with each of `b [..., N, D]`, both made ready: logits `[..., P, N]`."""
        return self.comparator.compare(a / self.temperature, b)

    def pairs(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Score `a [..., D]` with `b [..., D]`, both made ready, one to one: logits `[...]`."""
        return self.comparator.pairs(a, b) / self.temperature

    def score(self, lhs: torch.Tensor, relation: torch.Tensor | int, rhs: torch.Tensor) -> torch.Tensor:
        """Score edges one to one, from plain vectors.

        Args:
            lhs: `[..., D]`.
            relation: `int64 [...]`, or one number for all edges.
            rhs: `[..., D]`.

        Returns:
            Logits `[...]`.
        """
        shape = torch.broadcast_shapes(lhs.shape, rhs.shape)
        relation = torch.as_tensor(relation, device=lhs.device).expand(shape[:-1]).reshape(-1)
        left = self.transform(lhs.expand(shape).reshape(-1, 1, shape[-1]), relation)
        return self.pairs(left.reshape(shape), self.prepare(rhs))

    def state_rows(self) -> dict[str, torch.Tensor]:
        """Return each relation's operator parameters, `[P]` on the CPU (zeros where it has none), in order."""
        rows = {name: self._operator(name).rows().cpu() for name in self.operators}
        slots = self._slot.tolist()
        return {
            relation: rows[name][slot]
            for relation, name, slot in zip(self.relations, self._operator_of, slots, strict=True)
        }

    def load_rows(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Take each relation's operator parameters, as `state_rows` gives them.

        Raises:
            UserError: A relation is missing.
        """
        missing = [relation for relation in self.relations if relation not in rows]
        if missing:
            raise UserError(f"no operator parameters for {', '.join(missing)}; train a model with these relations")
        for name in self.operators:
            mine = [relation for relation, of in zip(self.relations, self._operator_of, strict=True) if of == name]
            self._operator(name).load_rows(torch.stack([torch.as_tensor(rows[relation]) for relation in mine]))

    @classmethod
    def from_rows(cls, model_config: TwhinModelConfig, rows: Mapping[str, torch.Tensor]) -> Scorer:
        """Return a scorer with the operator parameters `rows`. Raises UserError where a relation is missing."""
        scorer = cls(model_config)
        scorer.load_rows(rows)
        return scorer

    def _operator(self, name: str) -> Operator:
        operator = self.operators[name]
        assert isinstance(operator, Operator)
        return operator
