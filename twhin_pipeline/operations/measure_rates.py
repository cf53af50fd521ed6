"""`twhin rates`: what this node's ranks do a second, measured by all of them at the same time, under torchrun."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.model import chunk_losses
from twhin_pipeline.model.losses import SumOfExponentials
from twhin_pipeline.model.rows import take
from twhin_pipeline.operations import plan, rates
from twhin_pipeline.operations.rates import Rates
from twhin_pipeline.sharding.distributed import Ranks, process_group
from twhin_pipeline.sharding.optimizer import row_optimizer

REPEATS = 31
# Larger than the caches, and small beside the memory of what trains.
TABLE_ROWS, TABLE_BYTES = 1_000_000, 2**30
MOST_ELEMENTS = 2**24
"""Of one tensor of scores or vectors: as many as a step on a CPU has; rates do not change beyond it."""


def measure(config: TwhinConfig, ranks: Ranks) -> Rates:
    """Measure this rank's rates, for the shapes of a step of `config`, while the others do; return their mean.

    All ranks call it together.
    """
    torch.manual_seed(ranks.rank)
    tables = config.model.embeddings.tables
    dim, device = config.model.embedding_dim, ranks.device
    step = plan.step_of(config, {table.name: table.num_embeddings or TABLE_ROWS for table in tables})
    by_chunk = device.type == "cpu" and plan.chunks_apart(config)
    by_chunk = by_chunk and chunk_losses.suits(step.edges // config.negatives.chunk_size)
    products = _chunks if by_chunk else _products
    mine = {"gflops": products(config, step, ranks), "pass_gbps": _passes(step.places * dim, ranks)}
    table = torch.nn.Parameter(torch.randn(min(TABLE_ROWS, TABLE_BYTES // (4 * dim)), dim, device=device))
    mine["gather_gbps"], mine["update_gbps"] = _rows(table, row_optimizer(tables[0].optimizer, table), step, ranks)
    mine["place_gbps"] = _places(table.detach(), step, ranks)
    mine["operation_us"] = _operation(ranks)
    if ranks.world_size > 1:
        mine["exchange_us"] = _exchange(ranks)
        mine["link_gbps"] = _link(step.looked_up * dim, ranks)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    means = {key: statistics.fmean(of_rank[key] for of_rank in ranks.gather(mine)) for key in mine}
    shared = ranks.world_size > 1 and device.type == "cpu"
    rounded = {key: float(f"{mean:.4g}") for key, mean in means.items()}
    return Rates(device=f"{ranks.world_size} x {name}", by_chunk=by_chunk, shared_memory=shared, **rounded)


def _products(config: TwhinConfig, step: plan.Step, ranks: Ranks) -> float:
    """Return the GFLOP/s of chunks' scores and of the gradients of their two sides."""
    size, dim, sides = config.negatives.chunk_size, config.model.embedding_dim, _sides(config)
    candidates = max(1, min(step.scores // (step.edges * sides), MOST_ELEMENTS // size))
    chunks = max(1, min(step.edges // size, MOST_ELEMENTS // (size * candidates)))
    kind = torch.bfloat16 if config.runtime.enable_amp else torch.float32
    queries = torch.randn(chunks, size, dim, device=ranks.device, dtype=kind)
    others = torch.randn(chunks, candidates, dim, device=ranks.device, dtype=kind)
    scores = queries @ others.mT
    of_queries, of_others = torch.empty_like(queries), torch.empty_like(others)

    def work() -> None:
        torch.bmm(queries, others.mT, out=scores)
        torch.bmm(scores, others, out=of_queries)
        torch.bmm(scores.mT, queries, out=of_others)

    return 3 * 2 * chunks * size * candidates * dim / _seconds(work, ranks) / 1e9


def _chunks(config: TwhinConfig, step: plan.Step, ranks: Ranks) -> float:
    """Return the GFLOP/s of losses taken chunk by chunk, and of their gradients."""
    size, dim, sides = config.negatives.chunk_size, config.model.embedding_dim, _sides(config)
    candidates = max(1, step.scores // (step.edges * sides))
    window = min(config.train_data.in_batch_negatives, size)
    chunks = max(1, min(step.edges // size, MOST_ELEMENTS // (size * dim)))
    a, b = (torch.randn(chunks, size, dim) * dim**-0.5 for _ in range(2))
    place = torch.arange(size).expand(chunks, size).contiguous()
    candidates_of_sides = [
        chunk_losses.Candidates(
            inside=place[:, :window].contiguous(),
            pool=torch.randn(chunks, candidates - window, dim) * dim**-0.5,
            mask=torch.zeros(0, 3, dtype=torch.int64),
            log_q=None,
            weight=torch.ones(chunks, size),
        )
        for _ in range(sides)
    ]
    real, by_sum = torch.full((chunks,), window), SumOfExponentials(own=True)

    def work() -> None:
        chunk_losses.losses(a, b, place, place, 1.0, by_sum, real, *candidates_of_sides)

    return sides * 3 * 2 * chunks * size * candidates * dim / _seconds(work, ranks) / 1e9


def _sides(config: TwhinConfig) -> int:
    """Return the number of sides that some relation corrupts."""
    return len({side for sides in config.corrupted_sides.values() for side in sides})


def _passes(elements: int, ranks: Ranks) -> float:
    """Return the GB/s, read and written, of a pass over so many floats."""
    x = torch.randn(min(MOST_ELEMENTS, elements), device=ranks.device)
    y = torch.empty_like(x)
    return 2 * 4 * len(x) / _seconds(lambda: torch.mul(x, 0.5, out=y), ranks) / 1e9


def _rows(
    table: torch.nn.Parameter, optimizer: torch.optim.Optimizer, step: plan.Step, ranks: Ranks
) -> tuple[float, float]:
    """Return the GB/s of a step's rows as they are gathered, and as they are updated, their gradients merged before."""
    # A rank asks for ascending rows, each once; those that several ask for are merged by the one that holds them.
    share = max(1, min(step.looked_up, len(table)) // ranks.world_size)
    rows_of_ranks = [torch.randint(len(table), (share,), device=table.device).unique() for _ in range(ranks.world_size)]
    rows = torch.cat(rows_of_ranks)
    gradient = torch.randn(len(rows), table.shape[1], device=table.device)
    table.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), gradient, table.shape, check_invariants=False)
    gigabytes = gradient.numel() * 4 / 1e9
    gathered = _seconds(lambda: table.detach().index_select(0, rows), ranks)
    return gigabytes / gathered, gigabytes / _seconds(optimizer.step, ranks)


def _places(table: torch.Tensor, step: plan.Step, ranks: Ranks) -> float:
    """Return the GB/s of a step's vectors that are copied from the rows looked up, and added up to their gradients."""
    looked_up = table[: step.looked_up].detach().requires_grad_()
    place = torch.randint(len(looked_up), (min(step.places, len(table)),), device=table.device)

    def work() -> None:
        (vectors,) = take(looked_up, place)
        torch.autograd.grad(vectors, looked_up, vectors.detach())

    return 4 * place.numel() * table.shape[1] / _seconds(work, ranks) / 1e9


def _operation(ranks: Ranks) -> float:
    """Return the microseconds of an operation on four numbers, its gradient's included."""
    x = torch.ones(4, device=ranks.device, requires_grad=True)

    def work() -> None:
        y = x
        for _ in range(50):
            y = y * 0.5
        y.sum().backward()

    return 1e6 * _seconds(work, ranks) / 100


def _exchange(ranks: Ranks) -> float:
    """Return the microseconds of an exchange of one number with each rank."""
    sent = torch.ones(ranks.world_size, device=ranks.device)
    received = torch.empty_like(sent)
    return 1e6 * _seconds(lambda: dist.all_to_all_single(received, sent), ranks)


def _link(elements: int, ranks: Ranks) -> float:
    """Return the GB/s that a rank sends to others while all of them exchange so many floats."""
    part = -(-min(elements, MOST_ELEMENTS) // ranks.world_size)
    sent = torch.randn(part * ranks.world_size, device=ranks.device)
    received = torch.empty_like(sent)
    seconds = _seconds(lambda: dist.all_to_all_single(received, sent), ranks)
    return 4 * part * (ranks.world_size - 1) / seconds / 1e9


def _seconds(work: Callable[[], object], ranks: Ranks) -> float:
    """Return the median time of `work`, which all ranks begin together."""
    times = []
    for turn in range(REPEATS + 2):
        ranks.barrier()
        started = time.perf_counter()
        work()
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        if turn >= 2:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and let rank 0 write the rates."""
    parser = argparse.ArgumentParser(
        prog="twhin_pipeline.operations.measure_rates", description="Measure a node's rates."
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE")
    options = parser.parse_args(arguments)
    config = load_config(options.config, options.set)
    with process_group(config) as ranks:
        measured = measure(config, ranks)
        if ranks.rank == 0:
            rates.save(measured, options.out)


if __name__ == "__main__":
    main()
