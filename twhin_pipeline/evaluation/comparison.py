"""The model beside item-kNN and ALS: fits them to the training edges, and ranks the same test edges by all three."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import duckdb
import numpy as np
import torch

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation.baselines import (
    MOST_EDGES,
    MOST_ENTITIES,
    MOST_PAIRS,
    NEIGHBORS,
    NeighborScores,
    fit_als,
    item_similarity,
    read_interactions,
)
from twhin_pipeline.evaluation.held_out import (
    Edges,
    HeldOut,
    Questions,
    of_some_heads,
    read_edges,
    read_filters,
    read_retrieval,
    shares,
    some_heads,
    taken,
)
from twhin_pipeline.evaluation.measurements import Compared, Measured, Ranks
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts, Scores
from twhin_pipeline.evaluation.results import MOST_FACTORS
from twhin_pipeline.training_set.known_edges import KnownEdges
from twhin_pipeline.words import SIDES

MODEL = "compared"
JUDGED_EDGES = 1_000
"""Validation edges that a setting of ALS is judged by at most."""


@dataclass
class Comparison:
    """The `settings` of ALS by pair of entity types, and `notes` about what was not computed."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Sample:
    """Of one relation's test edges, those that are compared: `ranked` and `retrieved` are positions, int64 `[P]`."""

    ranked: np.ndarray
    retrieved: np.ndarray
    questions: list[Questions]
    """Both sides of the ranked edges, then the tails of those that are retrieved, where these are other edges."""


def compare(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    measured: Mapping[int, Measured],
    held_out: HeldOut,
    sizes: Mapping[str, int],
    catalogue: Mapping[str, CandidateSet],
    device: torch.device,
) -> Comparison:
    """Rank test edges by each further baseline of `evaluation.baselines`, and set `compared` of `measured`.

    Args:
        con: Reads the edges.
        config: The configuration, relations resolved.
        measured: What the model was measured on, by relation.
        held_out: Where the edges are.
        sizes: The number of entities of each type.
        catalogue: Those of each type that are candidates.
        device: Where ALS's scores are made.
    """
    wanted = [name for name in config.evaluation.baselines if name != "popularity"]
    made = Comparison()
    if not wanted or not measured:
        return made
    samples = _samples(con, measured, held_out, config.evaluation.baseline_edges, config.evaluation.seed)
    validation = read_edges(con, held_out.validation, len(config.model.relations))
    pairs: dict[tuple[str, str], list[int]] = {}
    for rel, relation in enumerate(config.model.relations):
        pairs.setdefault((relation.lhs, relation.rhs), []).append(rel)
    for (heads, tails), relations in pairs.items():
        with_tests = [rel for rel in relations if rel in measured]
        if not with_tests:
            continue
        pair, shape = f"{heads} → {tails}", (sizes[heads], sizes[tails])
        judged = {n: validation[n] for n in relations if "als" in wanted}
        quality = _quality(con, config, judged, catalogue[tails], held_out)
        scores = _fit(con, config, held_out, relations, shape, wanted, quality, device, pair, made)
        for rel in with_tests if scores else ():
            one, sample = measured[rel], samples[rel]
            ranks = {MODEL: _of_model(one, sample)}
            for name, of_pair in scores.items():
                ranks[name] = _ranks(of_pair, sample, config.evaluation.block_size)
            edges = one.retrieved.edges["lhs"] if one.retrieved is not None else np.empty(0, np.int64)
            one.compared = Compared(len(sample.ranked), edges[sample.retrieved], ranks)
    return made


def _samples(
    con: duckdb.DuckDBPyConnection, measured: Mapping[int, Measured], held_out: HeldOut, limit: int | None, seed: int
) -> dict[int, _Sample]:
    """Draw the test edges to compare, relations in proportion, and read what their ranks leave out."""
    numbers = list(measured)
    ranked = _drawn({n: measured[n].chosen for n in numbers}, limit, seed)
    retrieved_of = {n: one.retrieved.edges for n, one in measured.items() if one.retrieved is not None}
    # Where retrieval is of the ranked edges, these are drawn once and ranked once.
    others = {n: edges for n, edges in retrieved_of.items() if not measured[n].retrieves_ranked}
    retrieved = {n: ranked[n] for n in retrieved_of if n not in others} | _drawn(others, limit, seed)
    edges = {n: taken(measured[n].chosen, ranked[n]) for n in numbers}
    known = {side: read_filters(con, held_out.known, side, edges) for side in SIDES}
    same = {n: edges[n] for n in retrieved if n not in others}
    seen = read_filters(con, held_out.seen, "rhs", same)
    tails = {n: measured[n].catalogue("rhs") for n in others}
    apart = read_retrieval(con, {n: taken(e, retrieved[n]) for n, e in others.items()}, tails, held_out)
    samples = {}
    for n in numbers:
        questions = []
        for side in SIDES:
            filters: list[KnownEdges] = [known[side][n]]
            if side == "rhs" and n in same:
                filters.append(seen[n])
            questions.append(Questions.of(side, edges[n], measured[n].candidates[side], filters))
        if n in apart:
            questions.append(apart[n])
        samples[n] = _Sample(ranked[n], retrieved.get(n, np.empty(0, np.int64)), questions)
    return samples


def _drawn(edges: Mapping[int, Edges], limit: int | None, seed: int) -> dict[int, np.ndarray]:
    """Draw heads of each relation, about `limit` edges in all, and return the positions of their edges."""
    counts = np.array([len(one["lhs"]) for one in edges.values()], np.int64)
    allowed = counts if limit is None else shares(counts, limit)
    return {
        n: np.arange(count)
        if share >= count
        else of_some_heads(one, int(share), np.random.default_rng([seed, n, len(SIDES)]))
        for (n, one), count, share in zip(edges.items(), counts.tolist(), allowed.tolist(), strict=True)
    }


def _fit(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    held_out: HeldOut,
    relations: list[int],
    shape: tuple[int, int],
    wanted: Sequence[str],
    quality: Callable[[Scores], float] | None,
    device: torch.device,
    pair: str,
    made: Comparison,
) -> dict[str, Scores]:
    """Fit what is wanted to all relations of a pair of entity types, unless they are too large for that."""
    [(edges,)] = con.execute(
        f"SELECT count(*) FROM read_parquet(?) WHERE rel IN ({', '.join(map(str, relations))})", [held_out.train]
    ).fetchall()
    reason = ""
    if not edges:
        reason = "no training edge"
    elif edges > MOST_EDGES:
        reason = f"{edges:,} training edges, more than {MOST_EDGES:,}"
    elif sum(shape) > MOST_ENTITIES:
        reason = f"{sum(shape):,} entities, more than {MOST_ENTITIES:,}"
    if reason:
        made.notes.append(f"{' and '.join(wanted)} not computed for {pair}: {reason}")
        return {}
    interactions = read_interactions(con, held_out.train, relations, shape)
    scores: dict[str, Scores] = {}
    if "item_knn" in wanted:
        pairs = int((np.diff(interactions.indptr).astype(np.int64) ** 2).sum())
        if pairs > MOST_PAIRS:
            made.notes.append(
                f"item_knn not computed for {pair}: {pairs:,} pairs of tails of one head, more than {MOST_PAIRS:,}"
            )
        else:
            scores["item_knn"] = NeighborScores(interactions, item_similarity(interactions, NEIGHBORS))
    if "als" in wanted:
        factors = min(MOST_FACTORS, config.model.embedding_dim)
        scores["als"], setting = fit_als(interactions, factors, config.evaluation.seed, quality, device)
        chosen_by = config.evaluation.chief_metric if quality is not None else "default: no validation edge"
        made.settings[pair] = {"factors": factors, **asdict(setting), "chosen_by": chosen_by}
    return scores


def _quality(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    edges: Mapping[int, Edges],
    tails: CandidateSet,
    held_out: HeldOut,
) -> Callable[[Scores], float] | None:
    """Return the judge of scores: how they rank the tails of validation edges, by `evaluation.chief_metric`."""
    counts = np.array([len(one["lhs"]) for one in edges.values()], np.int64)
    if not counts.sum():
        return None
    drawn = {
        n: some_heads(one, share, np.random.default_rng([config.evaluation.seed, n]))
        for (n, one), share in zip(edges.items(), shares(counts, JUDGED_EDGES).tolist(), strict=True)
        if share
    }
    without_test = HeldOut("validation", held_out.validation, held_out.train, [])
    questions = list(read_retrieval(con, drawn, dict.fromkeys(drawn, tails), without_test).values())
    metric, block_size = config.evaluation.chief_metric, config.evaluation.block_size

    def judge(scores: Scores) -> float:
        counts = joined([question.rank(scores, block_size)[1] for question in questions])
        if metric == "filtered_mrr":
            return rank_metrics("filtered", counts.ranks, [])[metric]
        k = int(metric.partition("@")[2])
        return retrieval_metrics(distinct(question.queries for question in questions), counts, [k])[metric]

    return judge


def _ranks(scores: Scores, sample: _Sample, block_size: int) -> Ranks:
    counts = [question.rank(scores, block_size) for question in sample.questions]
    filtered = {question.side: count[1].ranks for question, count in zip(sample.questions[:2], counts, strict=False)}
    retrieved = counts[-1][-1] if len(sample.retrieved) else None
    return Ranks(filtered, retrieved)


def _of_model(measured: Measured, sample: _Sample) -> Ranks:
    """Return what the model makes of the sample: the ranks are known."""
    filtered = {side: measured.model[side].filtered[sample.ranked] for side in SIDES}
    retrieved: Counts | None = None
    if measured.retrieved is not None:
        retrieved = measured.retrieved.model.at(sample.retrieved)
    return Ranks(filtered, retrieved)
