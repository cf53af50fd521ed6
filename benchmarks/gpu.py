"""Everything that needs a GPU, in one go and under nine minutes: tests, speed, bounds, a profile, and what it costs.

    python benchmarks/gpu.py [--json figures.json] [--parts rates steps …]

Parts, each in a process of its own with a time limit, so that one that fails leaves the others:

- `rates`: what this GPU does at best: copies from row to row, products of matrices, transfers from the host.
- `steps`: a training step on tables of `--rows` rows in the GPU's memory, with 1,000 candidates an edge and side, in
  float32, TensorFloat-32 and bfloat16; beside the bounds that its products and its rows' memory give at those rates.
- `profile`: the kernels that such a step spends its time in, and how long it waits for the host.
- `loader`: batches from files, assembled by 1, 2, 4 and 8 threads, without training.
- `blocks`: the loss over all entities as candidates, by the size of the blocks of scores.
- `cached`: the same step where tables stay in the host's memory, with a share of their rows in a cache on the GPU.
- `train`: `twhin train` on a generated graph, in float32 and bfloat16, and on this machine's cores: edges/s, and MRR.
- `tests`: `make test-gpu`'s.

It prints one table and writes it as JSON. With `--device cpu` it tries itself out where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from devices import configured, prepare
from training import DIM, RELATIONS, ROOT, SNAPSHOT, config_of, ours, read

from twhin_pipeline.config import TwhinConfig, load_config
from twhin_pipeline.config.training import LaunchConfig, LossConfig
from twhin_pipeline.model import all_candidates
from twhin_pipeline.model.all_candidates import AllCandidates
from twhin_pipeline.model.batch import EdgeBatch
from twhin_pipeline.model.losses import LOSSES
from twhin_pipeline.model.twhin_model import TwhinModel, TwhinModelAndLoss
from twhin_pipeline.sharding.distributed import process_group
from twhin_pipeline.sharding.optimizer import apply_optimizers, build_optimizer
from twhin_pipeline.sharding.placement import local_shards, maybe_shard_model, table_weights
from twhin_pipeline.sharding.unsharded_tables import UnshardedTables
from twhin_pipeline.store import Store
from twhin_pipeline.training.dataset import EdgesDataset

LIMITS_S = {
    "rates": 20, "steps": 45, "profile": 40, "blocks": 25, "cached": 35, "loader": 90, "train": 130, "tests": 175,
}  # fmt: skip
"""Seconds that a part may take. Together they fit into ten minutes, and into nine where some stay below."""
ITEMS_SHARE = 5
"""A table of users has so many times the rows of that of items."""
CHUNK = 1000


def rates(device: str) -> dict[str, float]:
    """Return GB/s of copying rows, TFLOP/s of products by element type, and GB/s from page-locked memory."""
    small = device == "cpu"
    rows = torch.randint(0, 20_000 if small else 20_000_000, (10_000 if small else 2_000_000,), device=device)
    table = torch.empty(20_000 if small else 20_000_000, DIM, device=device).normal_()
    out = torch.empty(len(rows), DIM, device=device)
    found = {"copied_gb_per_s": 2 * out.nbytes / seconds(lambda: torch.index_select(table, 0, rows, out=out)) / 1e9}
    groups = 2 if small else 64
    queries, others = torch.randn(groups, CHUNK, DIM, device=device), torch.randn(groups, DIM, CHUNK, device=device)
    flop = 2 * groups * CHUNK * CHUNK * DIM
    for name, kind, tf32 in (
        ("fp32", torch.float32, False),
        ("tf32", torch.float32, True),
        ("bf16", torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = queries.to(kind), others.to(kind)
        scores = torch.empty(groups, CHUNK, CHUNK, dtype=kind, device=device)
        found[f"{name}_tflops"] = flop / seconds(lambda a=a, b=b, scores=scores: torch.bmm(a, b, out=scores)) / 1e12
    if not small:
        host = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
        into = torch.empty_like(host, device=device)
        found["host_to_device_gb_per_s"] = host.nbytes / seconds(lambda: into.copy_(host, non_blocking=True)) / 1e9
    return found


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of `work` on its device."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait() -> None:
    """Wait until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Training:
    """A model on tables of so many rows, sharded as in training, that takes steps on random edges."""

    def __init__(self, config: TwhinConfig, rows: dict[str, int], device: torch.device, launch: LaunchConfig) -> None:
        model = TwhinModel(config.model, UnshardedTables(config.model, rows, device), device)
        self.sharded = maybe_shard_model(apply_optimizers(model, config.model), device, launch)
        for weight in table_weights(self.sharded).values():
            for _, shard in local_shards(weight):
                shard.normal_(
                    std=DIM**-0.5
                )  # what training draws on the CPU, the same for every sharding, takes minutes
        self.optimizer, self.schedule = build_optimizer(self.sharded, config.model, 1000)
        self.model = {
            amp: TwhinModelAndLoss(self.sharded, LOSSES[config.loss.name](config.loss), config.model, amp=amp).to(
                device
            )
            for amp in (False, True)
        }

    def step(self, batch: EdgeBatch, *, amp: bool = False) -> torch.Tensor:
        """Take a step, as `Trainer.step` does."""
        loss, _ = self.model[amp](batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()


def random_batch(config: TwhinConfig, rows: dict[str, int], edges: int, candidates: int, seed: int) -> EdgeBatch:
    """Return chunks of random edges: half of the candidates are in the chunk, half in the pool of each side."""
    draw = torch.Generator().manual_seed(seed)
    groups, pool = edges // CHUNK, candidates // 2
    names = config.model.table_names
    relation = torch.randint(len(RELATIONS), (groups,), generator=draw)
    base = {name: sum(rows[other] for other in names[:i]) for i, name in enumerate(names)}
    keys = []
    for shape in ((groups, CHUNK), (groups, pool)):
        for side in (1, 2):
            size = torch.tensor([rows[one[side]] for one in RELATIONS])[relation].unsqueeze(1)
            start = torch.tensor([base[one[side]] for one in RELATIONS])[relation].unsqueeze(1)
            keys.append((torch.rand(shape, generator=draw, dtype=torch.float64) * size).long() + start)
    unique, index = torch.cat([key.flatten() for key in keys]).unique(return_inverse=True)
    lhs, rhs, lhs_pool, rhs_pool = (
        part.view(key.shape) for part, key in zip(index.split([key.numel() for key in keys]), keys, strict=True)
    )
    cuts = torch.searchsorted(unique, torch.tensor([*(base[name] for name in names), sum(rows.values())]))
    own = torch.arange(CHUNK).expand(groups, CHUNK)
    window = torch.arange(min(pool, CHUNK))
    # An edge's own end is among the candidates of its chunk.
    mask = torch.cartesian_prod(torch.arange(groups), window)[:, [0, 1, 1]]
    zeros = torch.zeros(groups, len(window) + pool)
    return EdgeBatch(
        ids={name: unique[cuts[i] : cuts[i + 1]] - base[name] for i, name in enumerate(names)},
        relation=relation,
        lhs_index=lhs, rhs_index=rhs,
        weight=torch.ones(groups, CHUNK),
        in_batch=window.expand(groups, -1).contiguous(), num_in_batch=torch.full((groups,), len(window)),
        lhs_query_index=rhs, rhs_query_index=lhs, lhs_query=own.contiguous(), rhs_query=own.contiguous(),
        lhs_on=torch.ones(groups, dtype=torch.bool), rhs_on=torch.ones(groups, dtype=torch.bool),
        lhs_pool_index=lhs_pool, rhs_pool_index=rhs_pool, lhs_mask=mask, rhs_mask=mask,
        lhs_log_q=zeros, rhs_log_q=zeros,
        num_edges=groups * CHUNK, global_edges=groups * CHUNK,
    )  # fmt: skip


@contextmanager
def training(
    options: argparse.Namespace, rows: int, batch: int, **launch: Any
) -> Iterator[tuple[Training, list[EdgeBatch]]]:
    """Yield a model of so many rows in a process group of one rank, and batches on its device."""
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    with tempfile.TemporaryDirectory() as folder:
        path = config_of(Path(folder) / "config.yaml", Path(folder) / "edges.parquet", options.candidates, 1, batch)
        config = load_config(str(path), [f"launch.device={options.device}"])
    items = rows // (1 + ITEMS_SHARE)
    sizes = {"user": rows - items, "item": items}
    with process_group(config) as ranks:
        model = Training(config, sizes, ranks.device, LaunchConfig(device=options.device, **launch))
        made = [random_batch(config, sizes, batch, options.candidates, seed) for seed in range(4)]
        yield model, [batch.to(ranks.device) for batch in made]


def step_seconds(model: Training, batches: list[EdgeBatch], steps: int, *, amp: bool = False) -> float:
    """Return the time of a step, of several after one another, as training takes them."""
    for batch in batches:
        model.step(batch, amp=amp)
    wait()
    started = time.perf_counter()
    for turn in range(steps):
        model.step(batches[turn % len(batches)], amp=amp)
    wait()
    return (time.perf_counter() - started) / steps


def steps(options: argparse.Namespace) -> dict[str, Any]:
    """Return edges/s of steps by element type, and what the rows' memory and the products allow at the GPU's rates."""
    found: dict[str, Any] = {"rows": options.rows, "candidates": options.candidates}
    at_best = rates(options.device)
    if options.device != "cpu":
        torch.cuda.empty_cache()
    flop = 2 * 3 * 2 * DIM * options.candidates
    for size in options.batch:
        found[f"{size:,} edges a step"] = of_size = {}
        with training(options, options.rows, size) as (model, batches):
            looked_up = sum(len(rows) for rows in batches[0].ids.values()) / size
            # A row is copied for the forward pass (read, written), its gradient is written and read, the row updated.
            bound_by_rows = at_best["copied_gb_per_s"] * 1e9 / (looked_up * DIM * 4 * 6)
            for name, tf32, amp in (("fp32", False, False), ("tf32", True, False), ("bf16", False, True)):
                torch.backends.cuda.matmul.allow_tf32 = tf32
                speed = size / step_seconds(model, batches, options.steps, amp=amp)
                bound_by_products = at_best[f"{name}_tflops"] * 1e12 / flop
                of_size[name] = {
                    "edges_per_second": speed,
                    "bound_by_products": bound_by_products,
                    "bound_by_rows": bound_by_rows,
                    "share_of_both": speed * (1 / bound_by_products + 1 / bound_by_rows),
                }
            if options.device != "cpu":
                of_size["gib"] = torch.cuda.max_memory_allocated() / 2**30
        del model, batches
    return found


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds of a step, those in which the GPU works, and those of its longest kernels."""
    return {f"{size:,} edges a step": profile_of(options, size) for size in options.batch}


def profile_of(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Return the same for steps of one size."""
    kind = torch.profiler.ProfilerActivity
    on_gpu, count = options.device != "cpu", 10
    with training(options, options.rows // 4, size) as (model, batches):
        step = step_seconds(model, batches, count)
        with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if on_gpu else [kind.CPU]) as profiler:
            for turn in range(count):
                model.step(batches[turn % len(batches)])
            wait()
    events = profiler.key_averages()
    cuda = torch.autograd.DeviceType.CUDA
    named = {event.key for event in events if event.device_type != cuda}  # such as spans, which are no kernels
    spent = {}
    for event in events:
        if not on_gpu or (event.device_type == cuda and event.key not in named):
            micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            spent[f"{event.key[:90]} ({event.count / count:g} a step)"] = micro / count / 1e3
    longest = sorted(spent.items(), key=lambda one: -one[1])
    return {"step_ms": step * 1e3, "busy_ms": sum(spent.values()), "kernels_ms": dict(longest[:10])}


def blocks(options: argparse.Namespace) -> dict[str, Any]:
    """Return edges/s of the softmax loss over all entities and its gradients, by MiB of a block's scores."""
    small = options.device == "cpu"
    edges, entities = (500, 20_000) if small else (16_000, 500_000)
    device = torch.device(options.device)
    queries, candidates = (torch.randn(n, DIM, device=device, requires_grad=True) for n in (edges, entities))
    place = torch.arange(edges, device=device)
    mask = torch.stack([place, torch.randint(entities, (edges,), device=device)], dim=1)
    all_of = AllCandidates(queries, candidates, place, place, mask, lambda q, c: q @ c.T)
    positive, weight = torch.randn(edges, device=device, requires_grad=True), torch.ones(edges, device=device)
    loss, off = LOSSES["softmax"](LossConfig(name="softmax")), torch.autocast(device.type, enabled=False)
    found = {}
    for mib in (24, 64, 256, 1024):
        with mock.patch.object(all_candidates, "block_bytes", return_value=mib << 20):
            took = seconds(lambda: all_of.loss(positive, weight, loss, off)[0].backward(), 2)
        found[f"{mib} MiB"] = edges / took
    return found


def cached(options: argparse.Namespace) -> dict[str, Any]:
    """Return edges/s where the tables lie in the GPU's memory, and where they lie in the host's with a cache."""
    if options.device == "cpu":
        return {"left_out": "a CPU has no cache"}
    found: dict[str, Any] = {"rows": options.cached_rows, "share_in_cache": 0.2}
    size = options.cached_rows * DIM * 4 / 2**30
    edges = options.batch[0]
    for name, launch in (("on_gpu", {}), ("cached", {"hbm_gib": 0.6 * size + 1, "uvm_cache": 0.2})):
        with training(options, options.cached_rows, edges, **launch) as (model, batches):
            found[name] = edges / step_seconds(model, batches, options.steps)
            found[f"{name}_plan"] = "fused_uvm_caching" in str(model.sharded.sharding_plan_text)
    return found


def prepared(options: argparse.Namespace) -> tuple[Store, Path]:
    """Generate a graph and make its training set, once; return the store and its folder."""
    home: Path = options.home.resolve() / str(options.edges)
    home.mkdir(parents=True, exist_ok=True)
    store = Store(str(home / "store"))
    prepare(home, options.edges, configured(home, options.batch[0], "cpu", 100, {}), store)
    return store, home


def loader(options: argparse.Namespace) -> dict[str, Any]:
    """Return edges/s of an epoch's batches by the number of threads that assemble them."""
    store, home = prepared(options)
    path = configured(home, options.batch[0], "cpu", 100, {})
    found = {}
    for threads in (1, 2, 4, 8):
        if threads > len(os.sched_getaffinity(0)):
            continue
        config = load_config(str(path), [f"launch.reader_threads={threads}"])
        batches = iter(EdgesDataset(config, store, SNAPSHOT, device=options.device))
        next(batches)
        started, edges = time.perf_counter(), 0
        for batch in batches:
            edges += batch.num_edges
        found[f"{threads} threads"] = edges / (time.perf_counter() - started)
    return found


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Return edges/s and MRR of an epoch by `twhin train`, in float32 and bfloat16, and on the cores."""
    store, home = prepared(options)
    held_out = read(store, "held_out/test")
    found = {}
    sides = [(name, options.device, size) for size in options.batch for name in ("fp32", "bf16")]
    for name, device, size in [*sides, ("cores", "cpu", options.batch[0])]:
        path = configured(home, size, device, 100, {"enable_amp": name == "bf16"})
        outcome = ours(home, path, held_out)
        found[f"{name}, {size:,} edges a step"] = {"edges_per_second": outcome.edges_per_second, "mrr": outcome.mrr}
        keep(options, found)
    return found


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Return how many tests of `make test-gpu` passed and failed, and which failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rf", "tests/training/test_cuda.py"]
    # Wide lines: pytest cuts a failure's message off at the width of the terminal.
    wide = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=wide)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    numbers = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", last)}
    named = re.findall(r"^FAILED (\S+)(?: - (.{0,200}))?", done.stdout, re.MULTILINE)
    return {**numbers, "said": last, "failed_tests": [" ".join(one) for one in named]}


def keep(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write what a part has found so far: what is there when its time is over."""
    if options.json:
        options.json.write_text(json.dumps(found))


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "rates": lambda options: rates(options.device),
    "steps": steps,
    "profile": profile,
    "blocks": blocks,
    "cached": cached,
    "loader": loader,
    "train": train,
    "tests": tests,
}


def lines(name: str, found: dict[str, Any]) -> Iterator[str]:
    """Yield the rows of the table."""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from lines(f"{name}: {key}", value)
        else:
            shown = value if not isinstance(value, float) else f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
            yield f"{name}: {key}".ljust(70) + f" {shown}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--rows", type=int, default=100_000_000, help="of the tables of `steps`; a quarter in `profile`"
    )
    parser.add_argument("--cached-rows", type=int, default=10_000_000)
    parser.add_argument("--edges", type=int, default=10_000_000, help="of the graph of `loader` and `train`")
    parser.add_argument("--batch", type=int, nargs="+", default=[32_000, 256_000], help="edges a step")
    parser.add_argument("--candidates", type=int, default=1_000, help="of each edge and side in `steps`")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--home", type=Path, default=ROOT / ".twhin" / "benchmarks" / "gpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a part, in this process
    options = parser.parse_args()
    if options.one:
        keep(options, PARTS[options.one](options))
        return
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    found: dict[str, Any] = {
        "machine": {
            "gpu": gpu,
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
    }
    print(*lines("machine", found["machine"]), sep="\n", flush=True)
    for part in options.parts:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--one", part, "--json", str(out)]
            problem = {}
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMITS_S[part])
                if done.returncode:
                    problem = {"failed": done.stderr[-2000:]}
            except subprocess.TimeoutExpired:
                problem = {"failed": f"took longer than {LIMITS_S[part]} s"}
            found[part] = (json.loads(out.read_text()) if out.exists() else {}) | problem
        found[part]["seconds"] = time.monotonic() - started
        print(*lines(part, found[part]), sep="\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
    if any("failed" in found[part] for part in options.parts if part != "tests"):
        sys.exit("a part failed")


if __name__ == "__main__":
    main()
