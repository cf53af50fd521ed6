"""Model selection by full ranking: a metric of `evaluation`, measured on validation edges while training runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.held_out import (
    HeldOut,
    Questions,
    read_edges,
    read_filters,
    read_retrieval,
    shares,
    some_edges,
    some_heads,
)
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.sharding.distributed import Ranks
from twhin_pipeline.sharding.placement import gather_table, limit_norm, table_weights, unwrapped
from twhin_pipeline.store import Store, database
from twhin_pipeline.words import SIDES


class FullRanking:
    """Ranks validation edges against every entity, as `evaluation.evaluate` does, for one metric.

    True edges of training and validation do not count as rivals (retrieval leaves out training edges only); of test
    edges nothing is read. Rank 0 ranks: it holds the tables of the relations that have validation edges while it does,
    and what does not depend on the model from the beginning.
    """

    def __init__(self, config: TwhinConfig, store: Store, snapshot: str, ranks: Ranks) -> None:
        """Draw the edges (at most `training.eval_max_edges`, by `evaluation.seed`) and read what is known of them."""
        self.config, self.ranks = config, ranks
        self.metric = config.training.early_stopping_metric
        self.retrieval = self.metric.startswith(("recall", "ndcg"))
        self.max_norm = config.model.max_norm
        # A table may have more rows than its vocabulary has entities.
        names = config.model.table_names
        self.sizes = {name: store.manifest(f"vocabulary/{name}", snapshot).rows for name in names}
        self.questions: list[tuple[int, Questions]] = []
        if ranks.rank == 0:
            self.questions = self._read(store, snapshot)
        used = {getattr(config.model.relations[r], side) for r, _ in self.questions for side in ("lhs", "rhs")}
        self.tables: list[str] = ranks.broadcast([name for name in names if name in used])

    @property
    def edges(self) -> int:
        """Validation edges that are ranked, on one side or both; known to rank 0."""
        of_relation = {relation: len(asked.targets) for relation, asked in self.questions}
        return sum(of_relation.values())

    def measure(self, model: nn.Module, timeout: float) -> float | None:
        """Return the metric of a model, sharded or not; all ranks together.

        None where `timeout` seconds were over before all relations were ranked; NaN where there is no edge to rank.

        Raises:
            UserError: A vector or a score is not finite.
        """
        deadline = time.monotonic() + timeout
        weights = table_weights(model)
        tables = {}
        for name in self.tables:
            whole = gather_table(weights[name], self.ranks, self.sizes[name])
            if whole is not None:
                tables[name] = limit_norm(whole, self.max_norm).float()
        found = self._measure(model, tables, deadline) if self.ranks.rank == 0 else None
        value: float | None = self.ranks.broadcast(found)
        return value

    def _measure(self, model: nn.Module, tables: dict[str, torch.Tensor], deadline: float) -> float | None:
        scorer = unwrapped(model).scorer
        counts: list[Counts] = []
        with _full_precision():
            for number, asked in self.questions:
                if time.monotonic() > deadline:
                    return None
                relation = self.config.model.relations[number]
                scores = RelationScores(scorer, number, tables[relation.lhs], tables[relation.rhs])
                counts.append(asked.rank(scores, self.config.evaluation.block_size)[1])
        if not counts:
            return float("nan")
        _, _, k = self.metric.partition("@")
        if self.retrieval:
            queries = distinct(asked.queries for _, asked in self.questions)
            return retrieval_metrics(queries, joined(counts), [int(k)])[self.metric]
        return rank_metrics("filtered", joined(counts).ranks, [int(k or 1)])[self.metric]

    def _read(self, store: Store, snapshot: str) -> list[tuple[int, Questions]]:
        """Return relations' numbers and what is asked of them, in the order of the configuration."""
        held_out = HeldOut.for_selection(store, snapshot)
        relations = self.config.model.relations
        with database.connect(self.config, store) as con:
            edges = read_edges(con, held_out.test, len(relations))
            limit = self.config.training.eval_max_edges
            allowed = shares(np.array([len(one["lhs"]) for one in edges]), limit).tolist()
            draw = some_heads if self.retrieval else some_edges
            seed = self.config.evaluation.seed
            chosen = {
                number: draw(one, share, np.random.default_rng([seed, number]))
                for number, (one, share) in enumerate(zip(edges, allowed, strict=True))
                if share
            }
            if self.retrieval:
                sizes = {number: self.sizes[relations[number].rhs] for number in chosen}
                return list(read_retrieval(con, chosen, sizes, held_out).items())
            sides = list(self.config.corrupted_sides.values())
            known = {
                side: read_filters(con, held_out.known, side, {n: one for n, one in chosen.items() if side in sides[n]})
                for side in SIDES
            }
        candidates = {name: CandidateSet(size) for name, size in self.sizes.items()}
        return [
            (n, Questions.of(side, one, candidates[getattr(relations[n], side)], [known[side][n]]))
            for n, one in chosen.items()
            for side in sides[n]
        ]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply in float32 on CUDA too, as `evaluate` does, whatever `runtime.enable_tensorfloat32` says of training."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
