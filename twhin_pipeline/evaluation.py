"""Evaluation: ranks the held-out edges and writes the table `evaluation` (docs/metrics.md defines every metric)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import duckdb
import numpy as np
import pyarrow as pa
import torch

from twhin_pipeline import database, repeats
from twhin_pipeline.baselines import read_degrees
from twhin_pipeline.classification import auc, rce, sample_negatives, score_sampled
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.held_out import (
    Edges,
    HeldOut,
    Questions,
    read_edges,
    read_filters,
    read_retrieval,
    replaced_sides,
    some_edges,
    some_heads,
)
from twhin_pipeline.model_files import ModelTables
from twhin_pipeline.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.ranking import CandidateSet, Counts
from twhin_pipeline.relation_scores import SIDES, RelationScores, to_tensor
from twhin_pipeline.scorer import Side
from twhin_pipeline.sections.training import EvaluationConfig
from twhin_pipeline.store import Manifest, Store

SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("side", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("baseline", pa.float64()),
        ("edges", pa.int64()),
    ]
)
ALL, BOTH = "all", "both"


@dataclass(frozen=True)
class Scored:
    """What one scorer (the model, or the baseline) makes of the test edges of one relation and side.

    `raw` and `filtered` rank them; `true` `[E]` and `false` `[M]` are scores of edges and of sampled non-edges.
    """

    raw: np.ndarray
    filtered: np.ndarray
    true: np.ndarray
    false: np.ndarray


@dataclass(frozen=True)
class Retrieved:
    """Where `[E]` relevant tails are in the whole catalogue less the head's training edges; `query` `[E]` the heads."""

    query: np.ndarray
    model: Counts
    baseline: Counts


@dataclass
class Measured:
    """One relation's test edges and what is measured of them: by side, and as retrieval where that is asked for.

    `held_out` are all of its test edges, and `chosen` those that are ranked; `rng` draws these, then what each side
    needs, then retrieval's.
    """

    name: str
    scores: RelationScores
    held_out: Edges
    chosen: Edges
    rng: np.random.Generator
    model: dict[str, Scored] = field(default_factory=dict)
    baseline: dict[str, Scored] = field(default_factory=dict)
    retrieved: Retrieved | None = None

    @property
    def edges(self) -> int:
        """How many are ranked."""
        return len(self.chosen["lhs"])


def evaluate(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Measure the model of a snapshot on its held-out edges and write the table `evaluation`.

    Raises:
        UserError: The model or its data is missing, or they do not belong together.
    """
    started = time.monotonic()
    tables = ModelTables.open(store, snapshot)
    versions = _parents(tables, config, snapshot) | repeats.parents(config, store, snapshot)
    held_out = HeldOut.open(store, snapshot)
    device = torch.device("cuda" if config.launch.device != "cpu" and torch.cuda.is_available() else "cpu")
    scorer = tables.scorer().to(device)
    vectors = {
        name: to_tensor(_rows(tables.table(name), name, store.manifest(f"vocabulary/{name}", snapshot)), device)
        for name in tables.names
    }
    scores = [
        RelationScores(scorer, number, vectors[relation.lhs], vectors[relation.rhs])
        for number, relation in enumerate(config.model.relations)
    ]
    with database.connect(config, store) as con:
        measured = _measure(con, config.model.relation_names, scores, held_out, config.evaluation)
    again = repeats.measure(config, store, snapshot, scores)
    table = pa.concat_tables([_table(measured, config.evaluation), again], promote_options="default")
    metrics, baseline = _overall(measured, config)
    with store.replace("evaluation", snapshot, config_hash=config.hash(), parents=versions) as draft:
        draft.write(table)
        draft.details = {
            "split": held_out.split,
            "note": _note(config, held_out, measured),
            "edges": sum(m.edges for m in measured),
            "seconds": round(time.monotonic() - started, 3),
            "device": device.type,
            "chosen_step": tables.manifest.details.get("chosen_step"),
            "chosen_epoch": tables.manifest.details.get("chosen_epoch"),
            "sides": _sides(config),
            "metrics": metrics,
            "baseline": baseline,
        }
    return store.manifest("evaluation", snapshot)


def _parents(tables: ModelTables, config: TwhinConfig, snapshot: str) -> dict[str, str]:
    """Return the versions that are read. Raises UserError where the model was trained on other ones."""
    model = tables.manifest
    if tables.config.relation_names != config.model.relation_names:
        raise UserError(
            f"twhin_model of {snapshot} was trained with the relations {', '.join(tables.config.relation_names)}, not "
            f"with model.relations; train again with `twhin train --snapshot {snapshot}`"
        )
    vocabularies = [f"vocabulary/{name}" for name in tables.names]
    data = ["training_set/positives", "held_out/validation", "held_out/test", *vocabularies]
    return {"twhin_model": model.version, **tables.trained_on(data)}


def _rows(table: np.ndarray, name: str, vocabulary: Manifest) -> np.ndarray:
    if len(table) < vocabulary.rows:
        raise UserError(
            f"twhin_model's table {name} has {len(table)} rows and vocabulary/{name} {vocabulary.rows} ids; "
            f"train again with `twhin train --snapshot {vocabulary.snapshot}`"
        )
    return table[: vocabulary.rows]


def _measure(
    con: duckdb.DuckDBPyConnection,
    names: list[str],
    scores: list[RelationScores],
    held_out: HeldOut,
    options: EvaluationConfig,
) -> list[Measured]:
    """Measure the relations that have a test edge, in their order."""
    measured = {}
    for number, edges in enumerate(read_edges(con, held_out.test, len(names))):
        if len(edges["lhs"]):
            rng = np.random.default_rng([options.seed, number])
            chosen = some_edges(edges, options.max_edges, rng)
            measured[number] = Measured(names[number], scores[number], edges, chosen, rng)
    for side in SIDES:
        _measure_side(con, side, measured, held_out, options)
    if options.recall_at:
        _measure_retrieval(con, {n: m for n, m in measured.items() if m.retrieved is None}, held_out, options)
    return list(measured.values())


def _measure_side(
    con: duckdb.DuckDBPyConnection,
    side: Side,
    measured: Mapping[int, Measured],
    held_out: HeldOut,
    options: EvaluationConfig,
) -> None:
    """Rank one side of the relations' edges, and tell them from sampled ones.

    Where these are all tails of their heads, and all candidates, it is retrieval too: the same scores, another filter.
    """
    sizes = {n: m.scores.num_entities(side) for n, m in measured.items()}
    chosen = {n: m.chosen for n, m in measured.items()}
    same = {
        n: m.chosen
        for n, m in measured.items()
        if side == "rhs"
        and options.recall_at
        and m.edges == len(m.held_out["lhs"])
        and (options.candidates is None or options.candidates >= sizes[n])
    }
    known = read_filters(con, held_out.known, side, chosen)
    seen = read_filters(con, held_out.seen, side, same)
    counted = read_degrees(con, held_out.train, side, measured)
    for n, m in measured.items():
        candidates = CandidateSet.sample(sizes[n], options.candidates, m.rng)
        asked = Questions.of(side, m.chosen, candidates, [known[n], seen[n]] if n in same else [known[n]])
        degrees = counted[n].of_all(sizes[n])
        drawn, valid = sample_negatives(sizes[n], asked.queries, known[n], options.auc_negatives, m.rng)
        true, false = score_sampled(m.scores, side, asked.queries, asked.targets, drawn, options.block_size)
        ours, theirs = asked.rank(m.scores, options.block_size), asked.popular(degrees)
        m.model[side] = Scored(ours[0].ranks, ours[1].ranks, true, false[valid])
        m.baseline[side] = Scored(theirs[0].ranks, theirs[1].ranks, degrees[asked.targets], degrees[drawn[valid]])
        if n in same:
            m.retrieved = Retrieved(asked.queries, ours[2], theirs[2])


def _measure_retrieval(
    con: duckdb.DuckDBPyConnection, measured: Mapping[int, Measured], held_out: HeldOut, options: EvaluationConfig
) -> None:
    """Rank the tails of some of the relations' heads in the whole catalogue."""
    heads = {n: some_heads(m.held_out, options.max_edges, m.rng) for n, m in measured.items()}
    sizes = {n: m.scores.num_entities("rhs") for n, m in measured.items()}
    questions = read_retrieval(con, heads, sizes, held_out)
    counted = read_degrees(con, held_out.train, "rhs", measured)
    for n, m in measured.items():
        asked = questions[n]
        ours, theirs = asked.rank(m.scores, options.block_size), asked.popular(counted[n].of_all(sizes[n]))
        m.retrieved = Retrieved(asked.queries, ours[1], theirs[1])


def _table(measured: list[Measured], options: EvaluationConfig) -> pa.Table:
    """One row per relation (then all together), side and metric."""
    rows: list[dict] = []
    for name, group in [*((m.name, [m]) for m in measured), *([(ALL, measured)] if measured else [])]:
        for side in (*SIDES, BOTH):
            sides = SIDES if side == BOTH else (side,)
            found = _compared(
                [m.model[s] for m in group for s in sides], [m.baseline[s] for m in group for s in sides], options
            )
            rows += _table_rows(name, side, sum(m.edges for m in group), *found)
        found = _retrieval(group, options)
        rows += _table_rows(name, "rhs", sum(len(m.retrieved.query) for m in group if m.retrieved is not None), *found)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _table_rows(
    relation: str, side: str, edges: int, value: Mapping[str, float | None], baseline: Mapping[str, float | None]
) -> list[dict]:
    return [
        {"relation": relation, "side": side, "metric": m, "value": value[m], "baseline": baseline[m], "edges": edges}
        for m in value
        if value[m] is not None
    ]


def _compared(
    model: list[Scored], baseline: list[Scored], options: EvaluationConfig
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Return the metrics of the model and those of the baseline."""
    # A degree is no probability, so it has no log loss.
    return _scored_metrics(model, options), _scored_metrics(baseline, options) | {"rce": None}


def _retrieval(
    group: list[Measured], options: EvaluationConfig
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Return the retrieval metrics of the model and those of the baseline; none where it is left out."""
    retrieved = [m.retrieved for m in group if m.retrieved is not None]
    if not retrieved:
        return {}, {}
    query = distinct(r.query for r in retrieved)
    ours, theirs = joined([r.model for r in retrieved]), joined([r.baseline for r in retrieved])
    model, baseline = (retrieval_metrics(query, counts, options.recall_at) for counts in (ours, theirs))
    return {**model}, {**baseline}


def _scored_metrics(scored: list[Scored], options: EvaluationConfig) -> dict[str, float | None]:
    filtered = np.concatenate([s.filtered for s in scored])
    raw = np.concatenate([s.raw for s in scored])
    true, false = np.concatenate([s.true for s in scored]), np.concatenate([s.false for s in scored])
    found: dict[str, float | None] = {}
    found |= rank_metrics("filtered", filtered, options.hits_at)
    found |= rank_metrics("raw", raw, options.hits_at)
    return found | {"auc": auc(true, false), "rce": rce(true, false)}


def _overall(measured: list[Measured], config: TwhinConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of all relations, the model's and the baseline's: retrieval of tails, and of the others the
    mean over the queries of the sides that each relation replaces in training.
    """
    replaced = dict(zip(config.model.relation_names, replaced_sides(config), strict=True))
    queries = [(m, side) for m in measured for side in replaced[m.name]]
    if not queries:
        return {}, {}
    found = _compared([m.model[s] for m, s in queries], [m.baseline[s] for m, s in queries], config.evaluation)
    retrieved = _retrieval(measured, config.evaluation)
    model, baseline = (
        {k: v for k, v in (a | b).items() if v is not None} for a, b in zip(found, retrieved, strict=True)
    )
    return model, baseline


def _sides(config: TwhinConfig) -> str | dict[str, str]:
    """Tell which sides' queries the overall metrics average: one word where it is the same for all relations."""
    told = {
        name: BOTH if sides == SIDES else sides[0]
        for name, sides in zip(config.model.relation_names, replaced_sides(config), strict=True)
    }
    return told if len(set(told.values())) > 1 else next(iter(told.values()))


def _note(config: TwhinConfig, held_out: HeldOut, measured: list[Measured]) -> str:
    if held_out.split == "none":
        return "no edge is held out (split.validation and split.test are 0), so nothing was measured"
    names = {m.name for m in measured}
    without = [name for name in config.model.relation_names if name not in names]
    told = [f"no held-out edge of {', '.join(without)}"] if without else []
    if held_out.split == "validation":
        told.append("held_out/test is empty, so the validation edges were ranked")
    return "; ".join(told)
