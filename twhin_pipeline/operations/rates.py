"""What a rank's device does a second, and how long a step takes at these rates: `twhin plan --rates`.

`twhin rates` measures them (`measure_rates`); for a machine that is not at hand they are written by hand, from its data
sheet. This module imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from twhin_pipeline import remote
from twhin_pipeline.errors import UserError
from twhin_pipeline.training.launch import environment

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig


# What has no rate takes so much of the time of what has one: waiting for the slowest rank, and the thread that reads
# batches. Found by benchmarks/plan.py.
REST = 0.1


class Rates(BaseModel):
    """Rates of one rank while all ranks of its node work: 10^9 a second, where a name does not say another unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    """What they were measured on, or whose data sheet they are from."""
    gflops: float = Field(gt=0, allow_inf_nan=False)
    """Operations (a product and its addition are two) of the products of queries with candidates; `by_chunk`, with the
    passes over their scores, and over the gradients of both."""
    pass_gbps: float = Field(gt=0, allow_inf_nan=False)
    """Bytes, read or written, of passes over vectors and scores."""
    gather_gbps: float = Field(gt=0, allow_inf_nan=False)
    """Bytes of rows gathered from random places of a table that is larger than the caches."""
    place_gbps: float = Field(gt=0, allow_inf_nan=False)
    """Bytes of vectors that rows looked up are copied to, and whose gradients are added up by row again: both, so a
    rate of about a third of `pass_gbps`."""
    update_gbps: float = Field(gt=0, allow_inf_nan=False)
    """Bytes of such rows whose gradients are merged and which are updated."""
    link_gbps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Bytes that a rank sends to the others of its node; needed where a node has several ranks."""
    network_gbps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Bytes that a rank sends to other nodes; needed where there are several."""
    exchange_us: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Microseconds of an exchange of next to nothing."""
    operation_us: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Microseconds of an operation on next to nothing, on a GPU its launch."""
    by_chunk: bool = False
    """Whether losses are taken chunk by chunk, within the caches, as on CPUs for a softmax over products."""
    shared_memory: bool = False
    """Whether ranks of one node can look rows up in each other's memory, as those on CPUs do."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of a rank, by what they go to."""

    products: float
    passes: float
    rows: float
    exchange: float
    launches: float
    """Of operations, however small."""
    rest: float

    @property
    def total(self) -> float:
        """The step's seconds: nothing of it is taken to overlap."""
        return self.products + self.passes + self.rows + self.exchange + self.launches + self.rest


@dataclass(frozen=True)
class Work:
    """What a rank does in a step, in operations, bytes and exchanges."""

    flop: float
    passed: float
    """Bytes of passes over vectors and scores, read or written."""
    row_bytes: float
    """Bytes of the rows looked up."""
    place_bytes: float
    """Bytes of the vectors of edges' ends and candidates, repeats included."""
    within: float
    """Bytes sent to the ranks of the same node."""
    beyond: float
    """Bytes sent to other nodes."""
    exchanges: int
    """How often it waits for the other ranks."""
    operations: int
    """Of torch, however small."""


def step_time(work: Work, rates: Rates) -> StepTime:
    """Return how long the work takes at these rates.

    Raises:
        UserError: Ranks exchange vectors over a link whose rate is not given.
    """
    exchange = work.exchanges * rates.exchange_us / 1e6
    for field, sent in (("link_gbps", work.within), ("network_gbps", work.beyond)):
        rate = getattr(rates, field)
        if sent and rate is None:
            raise UserError(f"rates of {rates.device}: {field} is missing, over which ranks exchange vectors; add it")
        exchange += sent / (rate * 1e9) if sent else 0.0
    products = work.flop / (rates.gflops * 1e9)
    passes = work.passed / (rates.pass_gbps * 1e9)
    rows = work.row_bytes * (1 / rates.gather_gbps + 1 / rates.update_gbps) / 1e9
    rows += work.place_bytes / (rates.place_gbps * 1e9)
    launches = work.operations * rates.operation_us / 1e6
    rest = REST * (products + passes + rows + exchange + launches)
    return StepTime(products, passes, rows, exchange, launches, rest)


def load(path: str) -> Rates:
    """Read a YAML or JSON file of rates. Raises UserError where it is none."""
    try:
        values: Any = yaml.safe_load(remote.text(path, 1 << 20, "a file of rates"))
    except (UserError, yaml.YAMLError) as error:
        raise UserError(f"--rates {path}: cannot be read ({error}); `twhin rates FILE` writes one") from error
    if not isinstance(values, Mapping):
        raise UserError(f"--rates {path}: must be a mapping of rates; `twhin rates FILE` writes one")
    try:
        return Rates.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(
            f"--rates {path}: {field}: {first['msg']}; the fields are {', '.join(Rates.model_fields)}"
        ) from error


def save(rates: Rates, path: str) -> None:
    """Write rates as YAML."""
    Path(path).write_text(yaml.safe_dump(rates.model_dump(exclude_none=True), sort_keys=False), encoding="utf-8")


def measured(config: TwhinConfig, config_path: str, overrides: list[str], path: str) -> Rates:
    """Measure the rates of `launch.nproc_per_node` ranks of this node for the shapes of `config`, and write them.

    Raises:
        UserError: A rank failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={config.launch.nproc_per_node}", "-m", "twhin_pipeline.operations.measure_rates"]
    command += ["--config", config_path, "--out", path]
    for override in overrides:
        command += ["--set", override]
    done = subprocess.run(
        command,
        env={**os.environ, **environment(config)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise UserError(f"rates: a rank failed; the end of what it said:\n{(done.stdout + done.stderr)[-2000:]}")
    return load(path)
