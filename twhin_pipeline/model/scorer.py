"""Scorer: `f(lhs, relation, rhs)`, the one definition for training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.comparators import COMPARATORS, Dot
from twhin_pipeline.model.operators import OPERATORS, Operator, penalty
from twhin_pipeline.words import Side


class Scorer(nn.Module):
    """Compares queries with candidates, with the operators' parameters for all R relations.

    A *side* is the one that is predicted: of "rhs", queries are heads and candidates are tails; of "lhs", queries are
    tails and candidates are heads. Either way the score is `compare(operator_rel(head), tail)`. With
    `model.reciprocal`, a relation has a second operator of the same kind for its heads, whose score is
    `compare(operator'_rel(tail), head)` (Kazemi and Poole, 2018; Lacroix et al., 2018, section 3.3).
    """

    def __init__(self, model_config: TwhinModelConfig) -> None:
        super().__init__()
        self.relations = model_config.relation_names
        self.reciprocal = model_config.reciprocal
        self.comparator = COMPARATORS[model_config.comparator](model_config.temperature)
        self._operator_of = [relation.operator for relation in model_config.relations]
        names = list(dict.fromkeys(self._operator_of))
        # A relation's number among those of the same operator: the row of its parameters.
        slots = [self._operator_of[:i].count(name) for i, name in enumerate(self._operator_of)]
        counts = [self._operator_of.count(name) for name in names]
        # Second operators are rows of the same parameter, behind the first ones: every step trains all parameters.
        rows = 2 if self.reciprocal else 1
        self.operators = nn.ModuleDict(
            {
                name: OPERATORS[name](count * rows, model_config.embedding_dim)
                for name, count in zip(names, counts, strict=True)
            }
        )
        if model_config.operator_init == "random":
            for name in names:
                self._operator(name).randomize(model_config.init_scale / model_config.embedding_dim**0.5)
        self._kind: torch.Tensor
        self._slot: torch.Tensor
        self._second: torch.Tensor
        kinds = [names.index(name) for name in self._operator_of]
        second = [slot + counts[kind] for slot, kind in zip(slots, kinds, strict=True)]
        self.register_buffer("_kind", torch.tensor(kinds), persistent=False)
        self.register_buffer("_slot", torch.tensor(slots), persistent=False)
        self.register_buffer("_second", torch.tensor(second), persistent=False)

    @property
    def complex(self) -> bool:
        """Whether any relation's operator takes vectors for complex ones."""
        return any(OPERATORS[name].complex for name in self.operators)

    @property
    def device(self) -> torch.device:
        """Where the operators' parameters are."""
        return self._slot.device

    def candidates_by_relation(self, side: Side) -> bool:
        """Tell whether a side's candidates depend on the relation: those of "lhs" do, unless `model.reciprocal`."""
        return side == "lhs" and not self.reciprocal

    def queries(self, side: Side, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Prepare the vectors of queries.

        Args:
            side: The side that is predicted.
            x: `[G, Q, D]`: heads for "rhs", tails for "lhs".
            relation: `int64 [G]`, each the relation of a row of vectors.

        Returns:
            `[G, Q, D]`.
        """
        if side == "rhs":
            x = self._operate(x, relation, self._slot)
        elif self.reciprocal:
            x = self._operate(x, relation, self._second)
        return self.comparator.prepare(x)

    def candidates(self, side: Side, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Prepare the vectors of candidates.

        Args:
            side: The side that is predicted.
            x: `[G, N, D]`: tails for "rhs", heads for "lhs". Where `candidates_by_relation` is false, `[..., D]`.
            relation: `int64 [G]`, each the relation of a row of vectors; not read where `candidates_by_relation` is
                false.

        Returns:
            As `x`.
        """
        if self.candidates_by_relation(side):
            x = self._operate(x, relation, self._slot)
        return self.comparator.prepare(x)

    def wanted(self, side: Side, x: torch.Tensor, relation: torch.Tensor) -> torch.Tensor:
        """Return the vectors that edges want at `side` (not prepared): what scores high against their other end.

        Args:
            side: The side whose vectors are wanted.
            x: `[G, N, D]`: heads for "rhs", tails for "lhs".
            relation: `int64 [G]`, each the relation of a row of vectors.

        Returns:
            `[G, N, D]`.
        """
        if side == "rhs":
            return self._operate(x, relation, self._slot)
        if self.reciprocal:
            return self._operate(x, relation, self._second)
        return self._operate(x, relation, self._slot, towards_heads=True)

    def compare(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Score each of `queries [..., Q, D]` with each of `candidates [..., N, D]`, both prepared: `[..., Q, N]`."""
        return self.comparator.compare(queries, candidates)

    def pairs(self, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Score `queries [..., D]` with `candidates [..., D]`, prepared, one to one: logits `[...]`."""
        return self.comparator.pairs(queries, candidates)

    def edges(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        of_a: torch.Tensor,
        of_b: torch.Tensor,
        inside: tuple[torch.Tensor, ...] = (),
        pools: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        """Score pairs of two matrices' rows in each chunk, and all of their rows with candidates.

        Args:
            a: `[G, P, D]`, prepared.
            b: `[G, Q, D]`, prepared.
            of_a: `int64 [G, C]` the pairs' rows of `a`.
            of_b: `int64 [G, C]` the pairs' rows of `b`.
            inside: Nothing; or `int64 [G, n]`, the rows of `b` that are candidates of `a`'s; or besides, the rows of
                `a` that are candidates of `b`'s.
            pools: As many, `[G, K, D]`, prepared: the candidates that follow those.

        Returns:
            Logits `float32 [G, C]`, and as many `[G, P, n + K]` and `[G, Q, n + K]` as there are pools.
        """
        # Compiled loops, which only training needs: who scores alone does without numba.
        from twhin_pipeline.model.products import products
        from twhin_pipeline.model.rows import pick

        if self.multiplies(a, b, *pools):
            return products(a, b, of_a, of_b, self.scale, inside, pools)
        own, *of_other = pick(a, of_a, *inside[1:])
        answer, *of_own = pick(b, of_b, *inside[:1])
        logits = [self.pairs(own, answer).float()]
        for x, window, pool in zip((a, b), (*of_own, *of_other), pools, strict=False):
            logits.append(self.compare(x, torch.cat([window.to(pool.dtype), pool], dim=1)).float())
        return tuple(logits)

    @property
    def scale(self) -> float:
        """The factor on products of prepared vectors, where `multiplies`."""
        return 1 / self.comparator.temperature

    def multiplies(self, *vectors: torch.Tensor) -> bool:
        """Tell whether a logit is the product of two vectors times `scale`, taken in float32 on the CPU."""
        return (
            isinstance(self.comparator, Dot)
            and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in vectors)
            and not torch.is_autocast_enabled("cpu")
        )

    def score(self, lhs: torch.Tensor, relation: torch.Tensor | int, rhs: torch.Tensor) -> torch.Tensor:
        """Score edges one to one, from plain vectors: tails for their heads, which matters with `model.reciprocal`.

        Args:
            lhs: `[..., D]`.
            relation: `int64 [...]`, or one number for all edges.
            rhs: `[..., D]`.

        Returns:
            Logits `[...]`.
        """
        shape = torch.broadcast_shapes(lhs.shape, rhs.shape)
        relation = torch.as_tensor(relation, device=lhs.device).expand(shape[:-1]).reshape(-1)
        heads = self.queries("rhs", lhs.expand(shape).reshape(-1, 1, shape[-1]), relation)
        return self.pairs(heads.reshape(shape), self.candidates("rhs", rhs, relation))

    def penalty(self, relation: torch.Tensor, norm: Literal["n3", "l2"]) -> torch.Tensor:
        """Return the penalty on each relation's operator (both of them with `model.reciprocal`).

        Args:
            relation: `int64 [G]`.
            norm: As in `operators.penalty`.

        Returns:
            `[G]`; 0 where the operator has nothing to penalize.
        """
        total = torch.zeros(len(relation), device=relation.device)
        for kind, name in enumerate(self.operators):
            operator = self._operator(name)
            weight = operator.penalized()
            if weight is None:
                continue
            chosen = (self._kind[relation] == kind).nonzero().squeeze(1)
            slots = [self._slot, self._second] if self.reciprocal else [self._slot]
            values = [penalty(weight[slot[relation[chosen]]], norm, operator.complex) for slot in slots]
            total = total.to(weight.dtype).index_add(0, chosen, torch.stack(values).sum(0))
        return total

    def state_rows(self) -> dict[str, torch.Tensor]:
        """Return each relation's operator parameters, `[P]` on the CPU (zeros where it has none), in order.

        P depends on the operator; with `model.reciprocal` the second operator's follow the first's.
        """
        rows_of = {}
        rows = {name: self._operator(name).rows().cpu() for name in self.operators}
        for relation, name, slot, second in zip(
            self.relations, self._operator_of, self._slot.tolist(), self._second.tolist(), strict=True
        ):
            rows_of[relation] = torch.cat([rows[name][s] for s in ((slot, second) if self.reciprocal else (slot,))])
        return rows_of

    def load_rows(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Take each relation's operator parameters, as `state_rows` returns them.

        Raises:
            UserError: A relation is missing, or has another number of parameters.
        """
        missing = [relation for relation in self.relations if relation not in rows]
        if missing:
            raise UserError(f"no operator parameters for {', '.join(missing)}; train a model with these relations")
        for relation, expected in self.state_rows().items():
            if len(rows[relation]) != len(expected):
                raise UserError(
                    f"relation {relation} has {len(expected)} operator parameters, but the model to load "
                    f"has {len(rows[relation])}; train a model with this operator, dimension and model.reciprocal"
                )
        for name in self.operators:
            mine = [relation for relation, of in zip(self.relations, self._operator_of, strict=True) if of == name]
            stacked = torch.stack([torch.as_tensor(rows[relation]) for relation in mine])
            # [R, P], or [R, 2P] to [2R, P]: all first operators, then all second ones.
            self._operator(name).load_rows(torch.cat(stacked.chunk(2, 1)) if self.reciprocal else stacked)

    @classmethod
    def from_rows(cls, model_config: TwhinModelConfig, rows: Mapping[str, torch.Tensor]) -> Scorer:
        """Return a scorer with the operator parameters `rows`. Raises UserError where `load_rows` does."""
        scorer = cls(model_config)
        scorer.load_rows(rows)
        return scorer

    def _operate(
        self, x: torch.Tensor, relation: torch.Tensor, slots: torch.Tensor, *, towards_heads: bool = False
    ) -> torch.Tensor:
        """Apply each relation's operator, with the parameters at its row of `slots` [R], to `x [G, N, D]`.

        `towards_heads`: apply its inverse, or adjoint, instead.
        """
        slot = slots[relation]
        applied = [
            self._operator(name).towards_heads if towards_heads else self._operator(name) for name in self.operators
        ]
        if len(applied) == 1:
            return applied[0](x, slot)
        out = x
        for kind, operator in enumerate(applied):
            # Every operator is applied, to no vectors if need be: each rank's backward pass then has all parameters.
            chosen = (self._kind[relation] == kind).nonzero().squeeze(1)
            # In autocast a matrix product gives another type.
            out = out.index_copy(0, chosen, operator(x[chosen], slot[chosen]).to(out.dtype))
        return out

    def _operator(self, name: str) -> Operator:
        operator = self.operators[name]
        assert isinstance(operator, Operator)
        return operator
