"""Ranks test edges with PyKEEN. Runs in PyKEEN's own environment: `pykeen_evaluation.py work.json`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pykeen.evaluation import RankBasedEvaluator
from pykeen.models import DistMult, ERModel
from pykeen.nn.modules import Interaction
from pykeen.triples import CoreTriplesFactory

METRICS = {"mrr": "inverse_harmonic_mean_rank", "hits@10": "hits_at_10", "mean_rank": "arithmetic_mean_rank"}
TRIED = 512
"""Test edges that batch sizes are compared on."""


class Product(Interaction):
    """DistMult's score by a matrix product; PyKEEN's own holds each score's terms, `[B, N, D]`, and is slower."""

    def forward(self, h: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        # The largest is all entities' vectors.
        one, other, entities = sorted((h, r, t), key=torch.Tensor.numel)
        return torch.einsum("...d, ...d -> ...", one * other, entities)


def main(path: str) -> None:
    work = json.loads(Path(path).read_text())
    torch.set_num_threads(work["threads"])
    given = {name: torch.from_numpy(array) for name, array in np.load(work["arrays"]).items()}
    factory = CoreTriplesFactory(given["train"], num_entities=len(given["vectors"]), num_relations=len(given["rows"]))
    dim = given["vectors"].shape[1]
    if work["own_distmult"]:
        model = DistMult(triples_factory=factory, embedding_dim=dim, random_seed=0)
    else:
        shape = {"shape": dim}
        model = ERModel(
            triples_factory=factory,
            interaction=Product,
            entity_representations_kwargs=shape,
            relation_representations_kwargs=shape,
            random_seed=0,
        )
    with torch.no_grad():
        model.entity_representations[0]._embeddings.weight.copy_(given["vectors"])
        model.relation_representations[0]._embeddings.weight.copy_(given["rows"])
    model.eval()

    def evaluate(edges: torch.Tensor, batch_size: int) -> dict[str, Any]:
        # Only the metrics that are compared, so that it computes no others.
        hits = {"k": 10}
        evaluator = RankBasedEvaluator(
            metrics=["mrr", "hits_at_k", "mr"], metrics_kwargs=[None, hits, None], add_defaults=False
        )
        started, cpu = time.perf_counter(), time.process_time()
        result = evaluator.evaluate(
            model=model,
            mapped_triples=edges,
            additional_filter_triples=[given["train"], given["validation"]],
            batch_size=batch_size,
            slice_size=None,
            use_tqdm=False,
        )
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
            "metrics": {name: float(result.get_metric(f"both.realistic.{its}")) for name, its in METRICS.items()},
        }

    # A first call is not timed: it loads what later ones find loaded.
    some = given["test"][:: max(1, len(given["test"]) // TRIED)]
    evaluate(some[:64], 32)
    tried = {size: evaluate(some, size)["seconds"] for size in work["batch_sizes"]}
    print("seconds by batch size", tried, flush=True)
    fastest = min(tried, key=lambda size: tried[size])
    told = {**evaluate(given["test"], fastest), "batch_size": fastest, "tried": tried}
    Path(work["result"]).write_text(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
