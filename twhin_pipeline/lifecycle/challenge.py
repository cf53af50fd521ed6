"""The new model beside the current release's, on the same held-out edges.

Both rank the same edges among the same candidates: entities that both have trained. Edges that either was trained on,
or started from a model that was, are left out. Whether a difference is more than chance says a paired bootstrap over
edges (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; for rankings Sakai, SIGIR 2006).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import torch

from twhin_pipeline import scratch
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.evaluation import ancestors
from twhin_pipeline.evaluation.ancestors import Origin
from twhin_pipeline.evaluation.held_out import Edges, HeldOut, Questions, read_edges, read_filters, shares, taken
from twhin_pipeline.evaluation.ranking import CandidateSet
from twhin_pipeline.model.relation_scores import RelationScores, to_tensor
from twhin_pipeline.store import Store, database, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.vectors.model_files import ModelTables
from twhin_pipeline.words import SIDES, Side

Array = np.ndarray[Any, Any]
RESAMPLES = 2_000
MRR = "filtered_mrr"
ALL = "all"
"""What the table calls all relations together."""


@dataclass(frozen=True)
class Challenge:
    """A figure of one relation's edges, or of all of them, by both models."""

    relation: str
    metric: str
    """`filtered_mrr`, or `hits@k`: the share of the tails that are among the first k, known ones left out."""
    edges: int
    new: float
    current: float
    change: float
    """The new one's, less the current one's, as a share of the current one's."""
    low: float
    high: float
    """The confidence interval of `change`."""


@dataclass(frozen=True)
class Outcome:
    """What both models made of the edges: `all` first, then each relation; none where no edge is left."""

    challenges: list[Challenge]
    notes: list[str]
    left_out: int
    """Held-out edges that one of the two had been trained on."""


def challenge(
    con: duckdb.DuckDBPyConnection, config: TwhinConfig, store: Store, snapshot: str, current: Release
) -> Outcome:
    """Rank a snapshot's held-out edges by its model and by the current release's.

    Args:
        con: A connection that can read the store.
        config: The configuration, relations resolved.
        store: Where both are.
        snapshot: The new model's.
        current: The release to compare with.

    Raises:
        UserError: A table of either is gone.
    """
    opened = releases.opened(store, current)
    models = [ModelTables.open(store, snapshot), ModelTables.open(opened, current.snapshot)]
    device = torch.device("cuda" if config.launch.device != "cpu" and torch.cuda.is_available() else "cpu")
    relations = _shared_relations(models)
    if not relations:
        return Outcome([], ["the current release has no relation of the new one"], 0)
    entities = {getattr(config.model.relations[rel], side) for rel, _ in relations.values() for side in SIDES}
    rows = {name: _rows(con, store, snapshot, opened, current, name) for name in sorted(entities)}
    scores = _scores(models, relations, rows, config, device)
    held_out = HeldOut.open(store, snapshot)
    origins = [*ancestors.origins_of(models[0].manifest), Origin.of_model(opened, models[1].manifest, store)]
    notes = []
    with scratch.folder("compare") as folder:
        seen = ancestors.find(con, config, store, snapshot, origins, held_out.test)
        if seen.unknown:
            notes.append(f"edges that a model was trained on could not be left out: {'; '.join(seen.unknown)}")
        held_out = held_out.without(con, seen.edges, folder)
        edges = _edges(con, config, held_out, relations, rows)
        ranks = _ranks(con, config, held_out, edges, scores, rows)
    if not ranks:
        notes.append("no held-out edge is between entities that both models have trained")
    challenges = []
    for metric in dict.fromkeys((MRR, quality_metric(config))):
        by_name = {name: values(ranks[rel], metric) for name, (rel, _) in relations.items() if rel in ranks}
        if by_name:
            together = [np.concatenate([of_relation[model] for of_relation in by_name.values()]) for model in (0, 1)]
            by_name = {ALL: together, **by_name}
        confidence = config.promotion.confidence
        challenges += [compared(name, new, before, confidence, metric) for name, (new, before) in by_name.items()]
    return Outcome(challenges, notes, len(seen))


def quality_metric(config: TwhinConfig) -> str:
    """Return the metric by which releases are compared: that of `promotion.metric`, else as the model is chosen.

    A model that is chosen by Recall, NDCG or Hits at k is compared by Hits at k, any other by MRR.
    """
    if config.promotion.metric != "auto":
        return config.promotion.metric
    chosen = re.fullmatch(r"(?:filtered_hits|recall|ndcg)@(\d+)", config.training.selection_metric)
    return MRR if chosen is None else f"hits@{chosen[1]}"


def values(ranks: Mapping[Side, list[Array]], metric: str) -> list[Array]:
    """Return a figure for each edge, float `[E]` for each model, from its filtered ranks by side.

    `filtered_mrr`: the mean of its reciprocal ranks. `hits@k`: whether its tail is among the first k; its head, where
    only heads are searched for.
    """
    if metric == MRR:
        return [np.mean([1 / of_side[model] for of_side in ranks.values()], axis=0) for model in (0, 1)]
    k = int(metric.removeprefix("hits@"))
    searched = ranks.get("rhs", ranks.get("lhs"))
    assert searched is not None
    return [(searched[model] <= k).astype(np.float64) for model in (0, 1)]


def compared(relation: str, new: Array, current: Array, confidence: float, metric: str = MRR) -> Challenge:
    """Compare two models' figures of the same edges, float `[E]` each.

    The interval is the percentiles of `RESAMPLES` resamples of the edges, each resample the same for both.
    """
    from scipy import stats

    def change(a: Array, b: Array, axis: int = -1) -> Any:
        return a.mean(axis=axis) / np.maximum(b.mean(axis=axis), 1e-12) - 1

    low = high = float(change(new, current))
    if len(new) > 1 and not np.array_equal(new, current):
        result = stats.bootstrap(
            (new, current), change, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
            batch=max(1, 2_000_000 // len(new)), confidence_level=confidence, rng=np.random.default_rng(0),
        )  # fmt: skip
        low, high = (float(end) for end in result.confidence_interval)
    return Challenge(
        relation, metric, len(new), float(new.mean()), float(current.mean()), float(change(new, current)), low, high
    )


def _shared_relations(models: list[ModelTables]) -> dict[str, tuple[int, int]]:
    """Return the numbers, in the new model and in the current one, of the relations that both have."""
    named = [
        {(one.name, one.lhs, one.rhs): number for number, one in enumerate(tables.config.relations)}
        for tables in models
    ]
    return {key[0]: (number, named[1][key]) for key, number in named[0].items() if key in named[1]}


def _rows(
    con: duckdb.DuckDBPyConnection, store: Store, snapshot: str, opened: Store, current: Release, entity: str
) -> tuple[Array, Array]:
    """Return the rows, in the new model and in the current one, of the ids that both have trained: int64 `[n]` each."""
    asset = f"embeddings/{entity}"
    files = [database.scan(store, asset, snapshot), database.scan(opened, asset, current.snapshot)]
    trained = [f"(SELECT CAST(id AS VARCHAR) AS id, row FROM {one} WHERE trained_edges > 0)" for one in files]
    with database.explained(f"{store.root}, {asset}"):
        found = con.execute(
            f"SELECT a.row AS new, b.row AS current FROM {trained[0]} a JOIN {trained[1]} b USING (id) ORDER BY a.row"
        ).fetchnumpy()
    return found["new"].astype(np.int64), found["current"].astype(np.int64)


def _scores(
    models: list[ModelTables],
    relations: Mapping[str, tuple[int, int]],
    rows: Mapping[str, tuple[Array, Array]],
    config: TwhinConfig,
    device: torch.device,
) -> dict[int, list[RelationScores]]:
    """Return both models' scores by the new model's number of a relation. Rows are those of the new model in both."""
    new, current = models
    tables: list[dict[str, torch.Tensor]] = [{name: to_tensor(new.table(name), device) for name in rows}, {}]
    for name, (here, there) in rows.items():
        vectors = current.table(name)
        placed = np.zeros((len(new.table(name)), vectors.shape[1]), np.float32)
        placed[here] = vectors[there]
        tables[1][name] = to_tensor(placed, device)
    scorers = [model.scorer().to(device) for model in models]
    result = {}
    for number, then in relations.values():
        relation = config.model.relations[number]
        result[number] = [
            RelationScores(scorer, rel, of[relation.lhs], of[relation.rhs])
            for scorer, rel, of in zip(scorers, (number, then), tables, strict=True)
        ]
    return result


def _edges(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    held_out: HeldOut,
    relations: Mapping[str, tuple[int, int]],
    rows: Mapping[str, tuple[Array, Array]],
) -> dict[int, Edges]:
    """Read the edges between entities that both models have trained; of more than `compared_edges`, some."""
    everything = read_edges(con, held_out.test, len(config.model.relations))
    kept: dict[int, Edges] = {}
    for number, _ in relations.values():
        relation, edges = config.model.relations[number], everything[number]
        known = [_contains(rows[getattr(relation, side)][0], edges[side]) for side in SIDES]
        both = np.flatnonzero(known[0] & known[1])
        if len(both):
            kept[number] = taken(edges, both)
    counts = np.array([len(edges["lhs"]) for edges in kept.values()], np.int64)
    rng = np.random.default_rng([config.evaluation.seed, 2])
    return {
        number: taken(edges, np.sort(rng.choice(len(edges["lhs"]), int(count), replace=False)))
        for (number, edges), count in zip(kept.items(), shares(counts, config.promotion.compared_edges), strict=True)
    }


def _contains(ordered: Array, values: Array) -> Array:
    """Tell which `values` `[E]` are among `ordered` ones: bool `[E]`."""
    if not len(ordered):
        return np.zeros(len(values), bool)
    place = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[place] == values


def _ranks(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    held_out: HeldOut,
    edges: Mapping[int, Edges],
    scores: Mapping[int, list[RelationScores]],
    rows: Mapping[str, tuple[Array, Array]],
) -> dict[int, dict[Side, list[Array]]]:
    """Return both models' filtered ranks by relation and corrupted side, float `[E]` each."""
    found: dict[int, dict[Side, list[Array]]] = {number: {} for number in edges}
    for side in SIDES:
        asked = {
            number: one
            for number, one in edges.items()
            if side in config.corrupted_sides[config.model.relations[number].name]
        }
        known = read_filters(con, held_out.known, side, asked)
        for number, one in asked.items():
            entity = getattr(config.model.relations[number], side)
            candidates = _candidates(config, scores[number][0].num_entities(side), rows[entity][0])
            questions = Questions.of(side, one, candidates, [known[number]])
            ranked = [questions.rank(model, config.evaluation.block_size)[1].ranks for model in scores[number]]
            found[number][side] = ranked
    return {number: by_side for number, by_side in found.items() if by_side}


def _candidates(config: TwhinConfig, size: int, rows: Array) -> CandidateSet:
    """Take the entities that both models have trained, or `evaluation.candidates` of them."""
    most = config.evaluation.candidates
    if most is not None and most < len(rows):
        rows = np.sort(np.random.default_rng(config.evaluation.seed).choice(rows, most, replace=False))
    return CandidateSet(size, rows)
