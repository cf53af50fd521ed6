"""The state of optimizers, by table and by relation, as it is stored beside a model and taken over by a warm start.

Every optimizer keeps it under torchrec's names, in memory that can be filled in place, whatever the sharding.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.model.operators import Operator
from twhin_pipeline.model.scorer import Scorer
from twhin_pipeline.sharding.placement import unwrapped

States = dict[str, torch.Tensor | ShardedTensor]
"""By name, such as `momentum1`: `[N]` or `[N, D]` of a table, as the optimizer holds it."""
OPERATORS = "scorer.operators."


class OptimizerState:
    """The state of a model's optimizers, in their own memory."""

    def __init__(self, model: nn.Module, optimizer: Any, config: TwhinModelConfig) -> None:
        """Look it up.

        Args:
            model: The model, sharded or not.
            optimizer: As `build_optimizer` made it.
            config: Names the tables.
        """
        self.scorer, self.config = unwrapped(model).scorer, config
        self.optimizer = optimizer
        self.tables: dict[str, States] = {name: {} for name in config.table_names}
        """What each row of a table has."""
        self.scalars: dict[str, dict[str, torch.Tensor]] = {name: {} for name in config.table_names}
        """What a table has once, such as its number of steps."""
        self.operators: dict[str, dict[str, torch.Tensor]] = {}
        """What each element of the operators' parameters has, by state and parameter."""
        self.operator_scalars: dict[str, list[torch.Tensor]] = {}
        for key, states in optimizer.state_dict()["state"].items():
            table = key.removesuffix(".weight").rpartition(".")[2]
            for name, value in states.items():
                if OPERATORS in key:
                    self._add_operator(OPERATORS + key.partition(OPERATORS)[2], name, value)
                elif isinstance(value, ShardedTensor) or value.ndim:
                    self.tables[table][name.removeprefix(f"{table}.")] = value
                else:
                    self.scalars[table][name.removeprefix(f"{table}.")] = value

    def _add_operator(self, parameter: str, name: str, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return  # SGD without momentum has a buffer that is None
        if value.ndim:
            self.operators.setdefault(name, {})[parameter.removeprefix("scorer.")] = value
        else:
            self.operator_scalars.setdefault(name, []).append(value)

    def algorithm(self, table: str) -> str:
        """Return the name of a table's optimizer."""
        return self.config.table(table).optimizer.name

    def as_details(self, steps: int) -> dict[str, Any]:
        """Return what there is to know of it besides the numbers of rows: algorithms, and what is counted.

        Args:
            steps: That were taken in all, those before a warm start included.
        """
        return {
            "steps": steps,
            "tables": {
                name: {
                    "algorithm": self.algorithm(name),
                    "states": sorted(self.tables[name]),
                    "scalars": {key: float(value) for key, value in self.scalars[name].items()},
                }
                for name in self.config.table_names
            },
            "operators": {
                "algorithm": self.config.translation_optimizer.name,
                "states": sorted(self.operators),
                "scalars": {key: float(values[0]) for key, values in self.operator_scalars.items()},
            },
        }

    def count_steps(self, steps: int, scalars: Mapping[str, Mapping[str, float]]) -> None:
        """Go on counting from `steps`, and from each table's `scalars`."""
        # fbgemm's kernels count the steps that Adam's bias correction needs, and no state dict holds that count.
        self.optimizer.set_optimizer_step(steps)
        for table, values in scalars.items():
            for name, value in values.items():
                self.scalars[table][name].fill_(value)

    def operator_rows(self) -> dict[str, dict[str, torch.Tensor]]:
        """Return each state of the operators' parameters by relation: `[P]` on the CPU, as `Scorer.state_rows`."""
        return {name: self._like(values).state_rows() for name, values in self.operators.items()}

    @torch.no_grad()
    def load_operator_rows(self, rows: Mapping[str, Mapping[str, torch.Tensor]], scalars: Mapping[str, float]) -> None:
        """Take over states by relation, as `operator_rows` returns them; relations that `rows` lacks stay afresh."""
        for name, of_relations in rows.items():
            filled = self._like(self.operators[name])
            filled.load_rows({**filled.state_rows(), **of_relations})
            parameters = dict(filled.named_parameters())
            for parameter, value in self.operators[name].items():
                value.copy_(parameters[parameter])
        for name, number in scalars.items():
            for counted in self.operator_scalars[name]:
                counted.fill_(number)

    @torch.no_grad()
    def _like(self, values: Mapping[str, torch.Tensor]) -> Scorer:
        """Return a scorer whose parameters are `values`: what belongs to a relation is the same of both."""
        scorer = copy.deepcopy(self.scorer)
        for name, parameter in scorer.named_parameters():
            if name in values:
                parameter.copy_(values[name])
        assert all(isinstance(operator, Operator) for operator in scorer.operators.values())
        return scorer
