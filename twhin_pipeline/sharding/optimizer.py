"""Optimizers: tables' updates fused into the backward pass, the operators' own, and both on schedules by group."""

from __future__ import annotations

from typing import Any

import torch
import torchrec
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim.optimizer import Optimizer
from torchrec.optim.fused import FusedOptimizer, FusedOptimizerModule
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from twhin_pipeline.config.model import TwhinModelConfig
from twhin_pipeline.config.optimizer import Adagrad, Adam, OptimizerConfig, Rmsprop, Sgd
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.twhin_model import TwhinModel
from twhin_pipeline.sharding.row_optimizers import RowAdagrad, RowAdam, RowRmsprop, RowSgd, RowwiseAdagrad
from twhin_pipeline.sharding.schedules import GroupSchedule, rate_at
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables

TRANSLATION = "translation"
"""The group of the operators' parameters; the configuration refuses a table of this name."""

# A row whose first gradient is 0 has accumulator 0, and with eps 0 its step would be 0 / 0. Far below any gradient
# that matters, so `eps: 0` (the published default) means what it says wherever there is a gradient.
MIN_EPS = 1e-10

# fbgemm's kernels are chosen by torchrec's classes; off-distributed the same rules are ours.
_FUSED: dict[str, type[Optimizer]] = {
    "sgd": torchrec.optim.SGD,
    "adagrad": torchrec.optim.Adagrad,
    "adam": torchrec.optim.Adam,
    "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
}
_ROWS: dict[str, type[Optimizer]] = {
    "sgd": RowSgd,
    "adagrad": RowAdagrad,
    "adam": RowAdam,
    "rowwise_adagrad": RowwiseAdagrad,
    "rmsprop": RowRmsprop,
}


def apply_optimizers(model: TwhinModel, model_config: TwhinModelConfig) -> TwhinModel:
    """Give each table, by its exact name, the optimizer that will step inside the backward pass.

    To be called before `maybe_shard_model`. Tables of equal settings share one kernel when sharded.

    Returns:
        `model`.

    Raises:
        UserError: A table that is to be sharded has an optimizer that no kernel does.
    """
    tables = model.tables
    assert isinstance(tables, UnshardedTables)
    for table in model_config.embeddings.tables:
        embedding = tables.table(table.name)
        weight = embedding.weight
        assert isinstance(weight, nn.Parameter)
        options = _table_options(table.optimizer)
        if weight.is_meta:
            if table.optimizer.name not in _FUSED:
                raise UserError(
                    f"model.embeddings.tables: the optimizer of {table.name!r} is {table.optimizer.name}, for which "
                    "fbgemm has no kernel; take rowwise_adagrad or adagrad, or train in one process "
                    "(launch.nproc_per_node 1)"
                )
            # torchrec puts tables of equal options into one kernel, which has one rate; schedules may differ.
            options["_batch_key"] = table.optimizer.model_dump_json()
            _apply_optimizer_in_backward(_FUSED[table.optimizer.name], [weight], options)
        else:
            embedding.sparse = True
            _apply_optimizer_in_backward(_ROWS[table.optimizer.name], [weight], options)
    return model


def row_optimizer(config: OptimizerConfig, weight: nn.Parameter) -> Optimizer:
    """Return the optimizer of one table's `weight [N, D]`, outside of any model."""
    return _ROWS[config.name]([weight], **_table_options(config))


def build_optimizer(
    model: nn.Module, config: TwhinModelConfig, total_steps: int | None = None
) -> tuple[CombinedOptimizer, GroupSchedule]:
    """Combine the fused table optimizers with the operators' own, and put every group on its schedule.

    The groups are the tables, by name, and `translation`, the operators' parameters. Call, each step,
    `optimizer.zero_grad()`, `loss.backward()`, `optimizer.step()`, `schedule.step()`.

    Args:
        model: After `apply_optimizers` and `maybe_shard_model`. A rank may hold no shard of a table, or of any.
        config: Tables, their optimizers, and `translation_optimizer`.
        total_steps: Steps of the full training, for schedules that depend on it (`linear_decay`).

    Raises:
        ValueError: A parameter is in no group or in two, or a table has no fused optimizer.
    """
    groups = {table.name: table.optimizer.schedule for table in config.embeddings.tables}
    groups[TRANSLATION] = config.translation_optimizer.schedule
    parameters = dict(model.named_parameters())
    members = assign_groups(list(parameters), config)
    dense = {name: parameters[name] for name, group in members.items() if group == TRANSLATION}
    unfused = [
        name for name in members if name not in dense and not hasattr(parameters[name], "_in_backward_optimizers")
    ]
    if unfused:
        raise ValueError(f"no optimizer on {', '.join(unfused)}; call apply_optimizers before the model is sharded")

    fused = model.fused_optimizer if isinstance(model, FusedOptimizerModule) else _fused_of(model, config)
    optimizers: list[KeyedOptimizer] = [fused]
    if dense:
        optimizers.append(_dense_optimizer(dense, config.translation_optimizer))
    rated = [(leaf, _tables_of(leaf, config)) for leaf in _leaves(fused)]

    def apply(rates: dict[str, float]) -> None:
        for leaf, tables in rated:
            for group, table in zip(leaf.param_groups, tables, strict=True):
                group["lr"] = rates[table]
            leaf.zero_grad()  # passes the rate to fbgemm's kernel; there are no gradients to set to zero
        for optimizer in optimizers[1:]:
            for group in optimizer.param_groups:
                group["lr"] = rates[TRANSLATION]

    return CombinedOptimizer(list(optimizers)), GroupSchedule(groups, apply, total_steps)


def assign_groups(names: list[str], config: TwhinModelConfig) -> dict[str, str]:
    """Return the group of each parameter of a TwhinModel.

    Raises:
        ValueError: A parameter is in no group or in two.
    """
    assigned = {}
    for name in names:
        groups = [table for table in config.table_names if name == f"embeddings.embeddings.{table}.weight"]
        groups += [TRANSLATION] if name.startswith("scorer.operators.") else []
        if len(groups) != 1:
            raise ValueError(
                f"parameter {name!r} belongs to {' and '.join(groups) or 'no group'}; it must belong to exactly one of "
                f"{', '.join([*config.table_names, TRANSLATION])}"
            )
        assigned[name] = groups[0]
    return assigned


class InBackwardOptimizer(FusedOptimizer):
    """The optimizers that step inside the backward pass of unsharded tables, with torchrec's keys and state names."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        """Gather the optimizers of `weights`, table to parameter."""
        optimizers = {table: weight._in_backward_optimizers[0] for table, weight in weights.items()}  # type: ignore[attr-defined]
        super().__init__(
            {f"embeddings.{table}.weight": weight for table, weight in weights.items()},
            {
                weight: {f"{table}.{name}": value for name, value in optimizers[table].state[weight].items()}
                for table, weight in weights.items()
            },
            [group for optimizer in optimizers.values() for group in optimizer.param_groups],
        )

    def step(self, closure: Any = None) -> None:
        """Do nothing: the step was made in the backward pass."""

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Do nothing: a gradient does not outlive the backward pass."""


def _fused_of(model: nn.Module, config: TwhinModelConfig) -> KeyedOptimizer:
    assert isinstance(model, TwhinModel)
    parameters = dict(model.embeddings.named_parameters())
    weights = {table: parameters[f"embeddings.{table}.weight"] for table in config.table_names}
    return CombinedOptimizer([("embeddings", InBackwardOptimizer(weights))])


def _leaves(optimizer: KeyedOptimizer) -> list[KeyedOptimizer]:
    if isinstance(optimizer, CombinedOptimizer):
        return [leaf for _, inner in optimizer.optimizers for leaf in _leaves(inner)]
    return [optimizer]


def _tables_of(leaf: KeyedOptimizer, config: TwhinModelConfig) -> list[str]:
    """Return, for each of a fused optimizer's groups, a table of it; all tables of a group have the same schedule."""
    table_of = {f"embeddings.{table}.weight": table for table in config.table_names}
    if any(key not in table_of for key in leaf.params):
        raise ValueError(f"fused parameters {', '.join(leaf.params)} are not tables of this configuration")
    table_by_id = {id(param): table_of[key] for key, param in leaf.params.items()}
    chosen = []
    for group in leaf.param_groups:
        tables = [table_by_id[id(param)] for param in group["params"]]
        if len({config.table(table).optimizer.model_dump_json() for table in tables}) != 1:
            raise ValueError(f"tables {', '.join(tables)} share a kernel and have different optimizers")
        chosen.append(tables[0])
    return chosen


def _table_options(config: OptimizerConfig) -> dict[str, Any]:
    """Return the keyword arguments of a table's optimizer, by fbgemm's names."""
    algorithm = config.algorithm
    # Only a start: `build_optimizer` applies the schedule's rates.
    options: dict[str, Any] = {"lr": rate_at(config.schedule, 0, total_steps=1)}
    if isinstance(algorithm, Adam):
        options |= {"beta1": algorithm.betas[0], "beta2": algorithm.betas[1], "eps": algorithm.eps}
    elif isinstance(algorithm, Rmsprop):
        options |= {"decay": algorithm.decay, "eps": algorithm.eps}
    elif not isinstance(algorithm, Sgd):
        options["eps"] = max(algorithm.eps, MIN_EPS)
    return options


def _dense_optimizer(params: dict[str, nn.Parameter], config: OptimizerConfig) -> KeyedOptimizerWrapper:
    """Return the operators' optimizer, its state complete, so that a checkpoint can be loaded before any step."""
    algorithm, rate = config.algorithm, rate_at(config.schedule, 0, total_steps=1)

    def make(values: Any) -> Optimizer:
        if isinstance(algorithm, Sgd):
            return torch.optim.SGD(values, lr=rate, momentum=algorithm.momentum)
        if isinstance(algorithm, Adam):
            return torch.optim.Adam(values, lr=rate, betas=algorithm.betas, eps=algorithm.eps)
        assert isinstance(algorithm, Adagrad), "the configuration refuses the others here"
        return torch.optim.Adagrad(values, lr=rate, eps=max(algorithm.eps, MIN_EPS))

    optimizer = KeyedOptimizerWrapper(params, make)
    optimizer.init_state()  # a step of zero gradients, which is not to be counted
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()
    for param in params.values():
        param.grad = None
    return optimizer
