"""What test_sharding.py runs under torchrun: trains tiny models on all ranks, and writes what it saw as JSON.

Run by hand: `torchrun --standalone --nproc-per-node 2 tests/support/ranks.py out.json`.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny
import torch
import torch.distributed as dist
from plain_batches import assemble, of_sample

from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.config.training import LaunchConfig, LossConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding import torchrec_tables
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.optimizer import _leaves, apply_optimizers, build_optimizer
from twhin_pipeline.sharding.placement import (
    init_tables,
    local_shards,
    log_sharded_tensor_content,
    maybe_shard_model,
    table_weights,
    unwrapped,
)
from twhin_pipeline.sharding.shared_tables import _Part
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.training.validation import SampledScores

# Beyond one block of initial vectors, so that shards begin and end inside blocks.
ROWS = {"user": 9001, "item": 5003}
STEPS = 5
RAMP = {"learning_rate": {"linear_ramp_to_constant": {"learning_rate": 0.2, "num_ramp_steps": 4}}}


def configured(optimizer: dict[str, Any], data_type: str = "fp32") -> TwhinConfig:
    """Both tables have the same algorithm; only the items' rate has a ramp."""
    tables = [
        {"name": name, "embedding_dim": tiny.DIM, "data_type": data_type, "optimizer": optimizer | schedule}
        for name, schedule in (("user", {}), ("item", RAMP))
    ]
    return tiny.config(
        embeddings={"tables": tables}, init_scale=1.0, translation_optimizer={"sgd": {"lr": 0.05, "momentum": 0.9}}
    )


def alone() -> TwhinConfig:
    """One table, so that under table_wise one of two ranks holds nothing."""
    return tiny.config(
        embeddings={
            "tables": [
                {"name": "item", "embedding_dim": tiny.DIM, "optimizer": {"rowwise_adagrad": {"lr": 0.1}} | RAMP}
            ]
        },
        relations=[{"name": "resembles", "lhs": "item", "rhs": "item"}],
        init_scale=1.0,
    )


def everything(config: TwhinConfig, sampled: int | None = None, **model: Any) -> TwhinConfig:
    """The same with every entity, or a step's sample, as candidates; heads of the second relation are not replaced."""
    section = config.model.model_dump() | model
    section["relations"][1]["sides"] = "rhs"
    train_data = {"global_negatives": "all", "in_batch_negatives": 0, "sampled_per_step": sampled}
    data = {"train_data": train_data, "source": {"path": "edges.parquet"}}
    return parse_config({**data, "model": section})


ROWWISE = {"rowwise_adagrad": {"lr": 0.1}}
CASES: dict[str, tuple[TwhinConfig, str, str]] = {
    "rowwise_adagrad row_wise": (configured(ROWWISE), "softmax", "row_wise"),
    "rowwise_adagrad table_wise": (configured(ROWWISE), "bce", "table_wise"),
    "adagrad row_wise": (configured({"adagrad": {"lr": 0.1}}), "bce", "row_wise"),
    "sgd table_wise": (configured({"sgd": {"lr": 0.1}}), "softmax", "table_wise"),
    "fp16 row_wise": (configured(ROWWISE, "fp16"), "softmax", "row_wise"),
    "all candidates row_wise": (everything(configured(ROWWISE)), "softmax", "row_wise"),
    "all candidates reciprocal": (
        everything(configured(ROWWISE), reciprocal=True, regularization={"entities": 0.1, "operators": 0.1}),
        "bce",
        "table_wise",
    ),
    "sampled candidates reciprocal": (
        everything(configured(ROWWISE), sampled=7, reciprocal=True),
        "softmax",
        "row_wise",
    ),
    "one table table_wise": (alone(), "softmax", "table_wise"),
    "rowwise_adagrad auto": (configured(ROWWISE), "softmax", "auto"),
}

# Cases that ranks of one machine train in shared memory, and others by exchanging vectors.
EXCHANGED = (
    "rowwise_adagrad row_wise",
    "rowwise_adagrad table_wise",
    "adagrad row_wise",
    "all candidates reciprocal",
    "one table table_wise",
)

HALVED = ("rowwise_adagrad row_wise", "rowwise_adagrad table_wise")


def train(config: TwhinConfig, loss_name: str, sharding: str, exchange: str = "fp32") -> dict[str, Any]:
    """Train a few steps, only rank 0 having edges in the first and the last but one; return what can be seen."""
    grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    model = apply_optimizers(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)
    launch = LaunchConfig(nproc_per_node=world_size, sharding=sharding, exchange=exchange)
    sharded = maybe_shard_model(model, "cpu", launch, edges_per_step=20)
    init_tables(sharded, seed=3)
    first = {table: gathered(weight) for table, weight in table_weights(sharded).items()}
    optimizer, schedule = build_optimizer(sharded, config.model)
    optimizer.load_state_dict(optimizer.state_dict())
    trainable = TwhinModelAndLoss(sharded, LOSSES[loss_name](LossConfig(name=loss_name)), config.model)
    whole = config.train_data.global_negatives == "all"
    losses, rates = [], []
    for step in range(STEPS):
        chunks = [chunk for part in range(2) for chunk in tiny.chunks(10 * step + part, config.model, whole)]
        if step in (0, STEPS - 2):
            chunks = chunks[:1]
        mine = [chunks[i] for i in np.array_split(np.arange(len(chunks)), world_size)[rank]]
        edges = sum(len(chunk.lhs) for chunk in chunks)
        batch = assemble(mine, config.model, edges, tiny.ROWS if whole else None)
        if config.train_data.sampled_per_step is not None:
            draw = np.random.default_rng(step)
            size = config.train_data.sampled_per_step
            drawn = {table: np.sort(draw.choice(rows, size, replace=False)) for table, rows in tiny.ROWS.items()}
            share = {table: np.full(size, np.log(size / rows)) for table, rows in tiny.ROWS.items()}
            batch = of_sample(batch, config.model, drawn, share)
        rates.append(schedule.rates())
        optimizer.zero_grad()
        loss, _ = trainable(batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        total = loss.detach().clone()
        if grouped:
            dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return {
        "losses": losses,
        "rates": rates,
        "first": first,
        "last": {table: gathered(weight) for table, weight in table_weights(sharded).items()},
        "relations": {name: row.tolist() for name, row in unwrapped(sharded).scorer.state_rows().items()},
        "held": {table: [len(shard) for _, shard in local_shards(w)] for table, w in table_weights(sharded).items()},
        "plan": sharded.sharding_plan_text,
        "counted": counted(sharded, optimizer),
        "compiled": compiled(sharded),
        "norms": {t: log_sharded_tensor_content("weight", t, w) for t, w in table_weights(sharded).items()},
    }


def exchanged() -> dict[str, Any]:
    """What is trained where ranks exchange vectors, though all are on this machine."""
    with mock.patch("twhin_pipeline.sharding.placement.share_tables", return_value="as asked"):
        return {name: train(*CASES[name]) for name in EXCHANGED}


def halved() -> dict[str, Any]:
    """The same, vectors and gradients being sent in half precision."""
    with mock.patch("twhin_pipeline.sharding.placement.share_tables", return_value="as asked"):
        return {name: train(*CASES[name], exchange="fp16") for name in HALVED}


def in_samples() -> dict[str, Any]:
    """The same, a table's rows being divided into samples as on CUDA."""
    with mock.patch.dict(torchrec_tables.SAMPLES, {"cpu": torchrec_tables.SAMPLES["cuda"]}):
        return exchanged()


def few() -> list[dict[str, Any]]:
    """What is trained, in shared memory and by exchanging vectors, where one rank holds the only row of a table."""
    with mock.patch.dict(tiny.ROWS, {"item": 1}):
        shared = train(configured(ROWWISE), "softmax", "row_wise")
        with mock.patch("twhin_pipeline.sharding.placement.share_tables", return_value="as asked"):
            return [shared, train(configured(ROWWISE), "softmax", "row_wise")]


def unmapped() -> dict[str, Any]:
    """What is trained where one rank cannot map the others' shards, which lie in shared memory by then."""
    opens = mock.Mock(side_effect=PermissionError("not allowed")) if dist.get_rank() == 1 else _Part.open
    with mock.patch.object(_Part, "open", opens):
        return train(*CASES["rowwise_adagrad row_wise"])


def counted(sharded: torch.nn.Module, optimizer: Any) -> list[int]:
    """The steps that this rank's kernels have counted, and those after a resumed run sets its own number."""
    if not dist.is_initialized():
        return []
    kernels = [leaf._emb_module for leaf in _leaves(sharded.fused_optimizer)]
    before = [int(kernel.iter) for kernel in kernels]
    optimizer.set_optimizer_step(40)
    return [*before, *(int(kernel.iter) for kernel in kernels)]


def compiled(sharded: torch.nn.Module) -> list[bool]:
    """For each of this rank's kernels, whether our loops take its place."""
    if not dist.is_initialized():
        return []
    kernels = [leaf._emb_module for leaf in _leaves(sharded.fused_optimizer)]
    return [isinstance(kernel.forward, partial) for kernel in kernels]


def gathered(weight: Any) -> list[list[float]]:
    """Every 97th row of a whole table, from all ranks' shards."""
    mine = [(first, shard.float().clone()) for first, shard in local_shards(weight)]
    parts: list[Any] = [mine]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
    shards = sorted((shard for part in parts for shard in part), key=lambda shard: shard[0])
    return torch.cat([shard for _, shard in shards])[::97].tolist()


def metrics() -> dict[str, float]:
    """AUC and RCE of 300 positives and 700 negatives, of which each rank has its own part: rank 1 has no positive."""
    grouped = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    generator = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(300, generator=generator) + 1, torch.randn(700, generator=generator)
    scores = SampledScores(Ranks(rank, world_size, torch.device("cpu"), dist.group.WORLD if grouped else None))
    scores.add(positive if rank == 0 else positive[:0], negative[rank::world_size])
    return scores.metrics()


def refusals() -> dict[str, str]:
    """The message that this rank gets where a plan cannot be made."""
    told = {}
    for name, config, launch in (
        ("memory", configured(ROWWISE), LaunchConfig(hbm_gib=1e-6)),
        ("adam", configured({"adam": {"lr": 0.1}}), LaunchConfig()),
        ("rmsprop", configured({"rmsprop": {"lr": 0.1}}), LaunchConfig()),
        ("bf16", configured(ROWWISE), LaunchConfig(exchange="bf16")),
    ):
        try:
            model = apply_optimizers(TwhinModel(config.model, UnshardedTables(config.model, tiny.ROWS)), config.model)
            maybe_shard_model(model, "cpu", launch)
        except UserError as error:
            told[name] = str(error)
    return told


def main() -> None:
    """Run everything on all ranks; rank 0 writes the list of what each rank saw."""
    tiny.ROWS.update(ROWS)
    dist.init_process_group("gloo")
    seen = {"cases": {name: train(*case) for name, case in CASES.items()}, "metrics": metrics(), "refused": refusals()}
    seen |= {
        "exchanged": exchanged(),
        "in_samples": in_samples(),
        "halved": halved(),
        "unmapped": unmapped(),
        "few": few(),
    }
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, seen)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(everything))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
