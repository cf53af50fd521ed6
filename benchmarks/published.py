"""Training steps beside those of the published TwHIN model's way, on a generated graph: a ratio, in one process.

    python benchmarks/published.py [--edges 1000000] [--candidates 100] [--repeats 5] [--least-share .5]

The published way, written anew here with the same data and dimension: each edge's two ends are bags of length 0 or 1 in
every table, whose vectors are summed; candidates are drawn from the batch, and scored one relation at a time; weighted
binary cross-entropy. Ours is `Trainer.step` with half of the candidates from the chunk and half from the entity type,
true edges among them masked, and a softmax. Both on all cores, a repeat of each after the other.

Before each repeat it measures how many edges a second the machine could do at most, by their matrix products and rows
alone (`training.floor`). With `--least-share` the exit code is 1 where the best repeat reaches a smaller share of that
bound, and 3 where the machine is too busy to tell; `make bench` is such a call. A quiet machine reaches 63 to 80 %, so
.5 fails where a step takes 1.6 times as long. The ratio to the published way is no gate: it doubles on a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchrec
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from torch import nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from training import DIM, LR, RELATIONS, SNAPSHOT, config_of, floor, read

from twhin_pipeline.config import load_config
from twhin_pipeline.operations.generate import generate
from twhin_pipeline.sharding.distributed import process_group
from twhin_pipeline.sharding.placement import init_tables
from twhin_pipeline.store import Store
from twhin_pipeline.training.reporting import make_reporter
from twhin_pipeline.training.trainer import Trainer

TABLES = ("user", "item")
NEGATIVE_WEIGHT = 1.0
BUSY = 0.5
"""A load of so many processes a core, before we begin, is other work that would be measured too."""


class PublishedModel(nn.Module):
    """Bags over every table, summed; a translation a relation; candidates of the batch, a relation at a time."""

    def __init__(self, rows: dict[str, int], candidates: int) -> None:
        super().__init__()
        self.candidates = candidates
        # As DistributedModelParallel has them: fbgemm's tables, their optimizer fused.
        self.bags = FusedEmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows[name], embedding_dim=DIM, feature_names=[name])
                for name in TABLES
            ],
            optimizer_type=RowWiseAdagrad,
            optimizer_kwargs={"lr": LR, "eps": 1e-10},
            location=EmbeddingLocation.HOST,
        )
        for weight in self.bags.state_dict().values():
            nn.init.normal_(weight, std=DIM**-0.5)
        self.translation = nn.Embedding(len(RELATIONS), DIM)

    def forward(self, nodes: KeyedJaggedTensor, relation: torch.Tensor) -> torch.Tensor:
        """Return the loss of B edges, whose `[2B]` ends are `nodes`, heads and tails in turn."""
        found = self.bags(nodes)
        ends = torch.stack([found[name] for name in TABLES]).sum(0).view(len(relation), 2, DIM)
        heads, tails = ends[:, 0] + self.translation(relation), ends[:, 1]
        positive = (heads * tails).sum(1)
        negative = []
        for number in relation.unique().tolist():
            here = (relation == number).nonzero().squeeze(1)
            own_heads, own_tails = heads[here], tails[here]
            for queries, others in ((own_heads, own_tails), (own_tails, own_heads)):
                drawn = torch.randperm(len(here)).repeat(math.ceil(self.candidates / len(here)))[: self.candidates]
                negative.append((queries @ others[drawn].T).flatten())
        scores = torch.cat([positive, *negative])
        labels = torch.zeros_like(scores)
        labels[: len(positive)] = 1
        weight = torch.full_like(scores, NEGATIVE_WEIGHT / (2 * self.candidates))
        weight[: len(positive)] = 1
        return nn.functional.binary_cross_entropy_with_logits(scores, labels, weight, reduction="sum") / len(positive)


def bags(lhs: torch.Tensor, rhs: torch.Tensor, kinds: torch.Tensor) -> KeyedJaggedTensor:
    """Return the ends of B edges as bags: `kinds` bool `[2B]` tells items from users."""
    ends = torch.stack([lhs, rhs], 1).flatten()
    lengths = torch.cat([(~kinds).int(), kinds.int()])
    return KeyedJaggedTensor(keys=list(TABLES), values=torch.cat([ends[~kinds], ends[kinds]]), lengths=lengths)


def published_steps(store: Store, candidates: int, batch: int) -> Iterator[int]:
    """Take steps, and yield each one's number of edges."""
    edges = read(store, "training_set/positives")
    order = np.random.default_rng(0).permutation(len(edges["lhs"]))
    lhs, rel, rhs = (torch.from_numpy(edges[name][order].astype(np.int64)) for name in ("lhs", "rel", "rhs"))
    model = PublishedModel({name: store.manifest(f"vocabulary/{name}", SNAPSHOT).rows for name in TABLES}, candidates)
    optimizer = torch.optim.Adagrad(model.translation.parameters(), lr=LR)
    to_item = torch.tensor([tail == "item" for _, _, tail in RELATIONS])
    for start in itertools.cycle(range(0, len(lhs) - batch + 1, batch)):
        part = slice(start, start + batch)
        kinds = torch.stack([torch.zeros(batch, dtype=torch.bool), to_item[rel[part]]], 1).flatten()
        loss = model(bags(lhs[part], rhs[part], kinds), rel[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield batch


def our_steps(trainer: Trainer) -> Iterator[int]:
    """Take steps, and yield each one's number of edges."""
    while True:
        trainer.dataset.load_state_dict({"epoch": 0, "chunks_done": 0})
        for batch in trainer.dataset:
            trainer.step(batch)
            yield batch.num_edges


def speed(steps: Iterator[int], seconds: float) -> float:
    """Return the edges a second of some seconds of steps."""
    started, edges = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        edges += next(steps)
    return edges / (time.perf_counter() - started)


def refuse_busy() -> None:
    """Exit with 3 where other work on the machine would make slow what is not."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores:
        print(f"the machine is busy (load {load:.1f} on {cores} cores): its speed says nothing; try again later")
        sys.exit(3)


def prepare(home: Path, edges: int, candidates: int, batch: int, say: Callable[[str], None]) -> tuple[Path, Store]:
    """Generate a graph and make its training set."""
    store, path = Store(str(home / "store")), home / "edges.parquet"
    config_path = config_of(home / "config.yaml", path, candidates, 1, batch)
    say(f"generating {edges:,} edges, and preparing them …")
    generate(str(path), users=edges // 10, items=edges // 50, edges=edges, seed=1)
    for stage in ("ingest", "vocabulary", "sample"):
        command = [sys.executable, "-m", "twhin_pipeline.cli", stage, "--config", str(config_path)]
        command += ["--home", store.root, "--snapshot", SNAPSHOT]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return config_path, store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edges", type=int, default=1_000_000)
    parser.add_argument("--candidates", type=int, default=100, help="for each edge and side")
    parser.add_argument("--batch", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each side in a repeat")
    parser.add_argument("--least-share", type=float, help="exit with 1 where the best share of the bound is below")
    options = parser.parse_args()
    if options.least_share is not None:
        refuse_busy()
    home = Path(tempfile.mkdtemp(prefix="twhin-bench-"))
    try:
        config_path, store = prepare(home, options.edges, options.candidates, options.batch, print)
        config = load_config(str(config_path))
        with process_group(config) as ranks:
            trainer = Trainer(config, store, SNAPSHOT, ranks, make_reporter(1), str(home / "checkpoints"))
            init_tables(trainer.sharded, 0)
            sides = {"ours": our_steps(trainer), "published": published_steps(store, options.candidates, options.batch)}
            for steps in sides.values():
                speed(steps, 1)
            ratios, shares = [], []
            for repeat in range(options.repeats):
                load = os.getloadavg()[0]
                bound = floor(options.candidates).edges_per_second(options.candidates)
                found = {name: speed(steps, options.seconds) for name, steps in sides.items()}
                ratios.append(found["ours"] / found["published"])
                shares.append(found["ours"] / bound)
                told = ", ".join(f"{name} {value:,.0f} edges/s" for name, value in found.items())
                print(
                    f"repeat {repeat + 1}: {told}: {ratios[-1]:.2f} times, {shares[-1]:.0%} of the bound "
                    f"(load before: {load:.1f})",
                    flush=True,
                )
    finally:
        shutil.rmtree(home, ignore_errors=True)
    share = max(shares)
    print(
        f"median {statistics.median(ratios):.2f} times, at best {share:.0%} of the bound, "
        f"{options.candidates} candidates, torchrec {torchrec.__version__}"
    )
    if options.least_share is not None and share < options.least_share:
        sys.exit(
            f"training reaches {share:.0%} of the bound, less than {options.least_share:.0%}: a step became slower"
        )


if __name__ == "__main__":
    main()
