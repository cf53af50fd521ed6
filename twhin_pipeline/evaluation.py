"""Evaluation: ranks the held-out edges and writes the table `evaluation` (docs/metrics.md defines every metric)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import torch

from twhin_pipeline import database
from twhin_pipeline.baselines import popular_ranks, read_degrees
from twhin_pipeline.classification import auc, rce, sample_negatives, score_sampled
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.known_edges import read_known
from twhin_pipeline.model_files import ModelTables
from twhin_pipeline.rank_metrics import rank_metrics, retrieval_metrics
from twhin_pipeline.ranking import CandidateSet, Counts, rank_edges
from twhin_pipeline.relation_scores import SIDES, RelationScores, other, to_tensor
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


@dataclass(frozen=True)
class Measured:
    """One relation's test edges, measured: by side, and as retrieval where that is asked for."""

    name: str
    edges: int
    model: dict[str, Scored]
    baseline: dict[str, Scored]
    retrieved: Retrieved | None


@dataclass(frozen=True)
class HeldOut:
    """Parquet files (`lhs`, `rhs`, `rel`) of the edges to rank, of the training edges, and of edges seen in tuning."""

    split: str
    test: list[str]
    train: list[str]
    validation: list[str]

    @property
    def seen(self) -> list[str]:
        """What the model or its tuning has seen, which retrieval leaves out."""
        return [*self.train, *self.validation]

    @classmethod
    def open(cls, store: Store, snapshot: str) -> HeldOut:
        """Take the test edges, or the validation edges where there are no test edges."""
        train = store.files("training_set/positives", snapshot)
        for split in ("test", "validation"):
            manifest = store.manifest(f"held_out/{split}", snapshot)
            if manifest.rows:
                tuning = store.files("held_out/validation", snapshot) if split == "test" else []
                return cls(split, store.files_of(manifest), train, tuning)
        return cls("none", [], train, [])


def evaluate(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Measure the model of a snapshot on its held-out edges and write the table `evaluation`.

    Raises:
        UserError: The model or its data is missing, or they do not belong together.
    """
    started = time.monotonic()
    tables = ModelTables.open(store, snapshot)
    versions = _parents(tables, config, snapshot)
    held_out = HeldOut.open(store, snapshot)
    device = torch.device("cuda" if config.launch.device != "cpu" and torch.cuda.is_available() else "cpu")
    scorer = tables.scorer().to(device)
    vectors = {
        name: to_tensor(_rows(tables.table(name), name, store.manifest(f"vocabulary/{name}", snapshot)), device)
        for name in tables.names
    }
    measured = []
    with database.connect(config, store) as con:
        for index, relation in enumerate(config.model.relations):
            scores = RelationScores(scorer, index, vectors[relation.lhs], vectors[relation.rhs])
            found = _measure(con, relation.name, index, scores, held_out, config.evaluation)
            if found is not None:
                measured.append(found)
    table = _table(measured, config.evaluation)
    with store.replace("evaluation", snapshot, config_hash=config.hash(), parents=versions) as draft:
        draft.write(table)
        draft.details = {
            "split": held_out.split,
            "note": _note(config, held_out, measured),
            "edges": sum(m.edges for m in measured),
            "seconds": round(time.monotonic() - started, 3),
            "device": device.type,
            "metrics": _overall(table, "value"),
            "baseline": _overall(table, "baseline"),
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
    name: str,
    relation: int,
    scores: RelationScores,
    held_out: HeldOut,
    options: EvaluationConfig,
) -> Measured | None:
    """Measure one relation, or return None where none of its edges is held out."""
    if not held_out.test:
        return None
    found = con.execute(
        "SELECT lhs, rhs FROM read_parquet(?) WHERE rel = ? ORDER BY lhs, rhs", [held_out.test, relation]
    ).fetchnumpy()
    edges = {side: np.asarray(found[side], np.int64) for side in SIDES}
    total = len(edges["lhs"])
    if not total:
        return None
    rng = np.random.default_rng([options.seed, relation])
    chosen = np.arange(total)
    if options.max_edges is not None and options.max_edges < total:
        chosen = np.sort(rng.choice(total, options.max_edges, replace=False))
    everything = list(dict.fromkeys([*held_out.seen, *held_out.test]))
    model, baseline = {}, {}
    retrieved: Retrieved | None = None
    for side in SIDES:
        queries, targets = edges[other(side)][chosen], edges[side][chosen]
        filters = [read_known(con, everything, relation, other(side), queries)]
        degrees = read_degrees(con, held_out.train, relation, side, scores.num_entities(side))
        candidates = CandidateSet.sample(scores.num_entities(side), options.candidates, rng)
        drawn, valid = sample_negatives(scores.num_entities(side), queries, filters[0], options.auc_negatives, rng)
        true, false = score_sampled(scores, side, queries, targets, drawn, options.block_size)
        # Where these are all tails of their heads and all candidates, retrieval is the same scores with another filter.
        same = side == "rhs" and bool(options.recall_at) and candidates.rows is None and len(chosen) == total
        if same:
            filters.append(read_known(con, held_out.seen, relation, "lhs", queries))
        ours = rank_edges(scores, side, queries, targets, candidates, filters, options.block_size)
        theirs = popular_ranks(degrees, queries, targets, candidates, filters)
        model[side] = Scored(ours[0].ranks, ours[1].ranks, true, false[valid])
        baseline[side] = Scored(theirs[0].ranks, theirs[1].ranks, degrees[targets], degrees[drawn[valid]])
        if same:
            retrieved = Retrieved(queries, ours[2], theirs[2])
    if options.recall_at and retrieved is None:
        retrieved = _retrieve(con, relation, scores, held_out, edges, options, rng)
    return Measured(name, len(chosen), model, baseline, retrieved)


def _retrieve(
    con: duckdb.DuckDBPyConnection,
    relation: int,
    scores: RelationScores,
    held_out: HeldOut,
    edges: dict[str, np.ndarray],
    options: EvaluationConfig,
    rng: np.random.Generator,
) -> Retrieved:
    """Rank all test tails of some heads in the whole catalogue: of heads that have at most `max_edges` together."""
    heads, counts = np.unique(edges["lhs"], return_counts=True)
    if options.max_edges is not None:
        order = rng.permutation(len(heads))
        enough = np.searchsorted(np.cumsum(counts[order]), options.max_edges, "right")
        heads = heads[order[: max(1, enough)]]
    chosen = np.isin(edges["lhs"], heads)
    queries, targets = edges["lhs"][chosen], edges["rhs"][chosen]
    seen = [read_known(con, held_out.seen, relation, "lhs", heads)]
    everything = CandidateSet(scores.num_entities("rhs"))
    degrees = read_degrees(con, held_out.train, relation, "rhs", scores.num_entities("rhs"))
    model = rank_edges(scores, "rhs", queries, targets, everything, seen, options.block_size)
    baseline = popular_ranks(degrees, queries, targets, everything, seen)
    return Retrieved(queries, model[1], baseline[1])


def _table(measured: list[Measured], options: EvaluationConfig) -> pa.Table:
    """One row per relation (then all together), side and metric."""
    rows: list[dict] = []
    for name, group in [*((m.name, [m]) for m in measured), *([(ALL, measured)] if measured else [])]:
        for side in (*SIDES, BOTH):
            sides = SIDES if side == BOTH else (side,)
            value = _scored_metrics([m.model[s] for m in group for s in sides], options)
            baseline = _scored_metrics([m.baseline[s] for m in group for s in sides], options)
            # A degree is no probability, so it has no log loss.
            baseline["rce"] = None
            edges = sum(m.edges for m in group)
            rows += _table_rows(name, side, edges, value, baseline)
        retrieved = [m.retrieved for m in group if m.retrieved is not None]
        if retrieved:
            query = _distinct(r.query for r in retrieved)
            ours, theirs = _joined([r.model for r in retrieved]), _joined([r.baseline for r in retrieved])
            found = [retrieval_metrics(query, counts, options.recall_at) for counts in (ours, theirs)]
            rows += _table_rows(name, "rhs", len(query), *found)
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _table_rows(
    relation: str, side: str, edges: int, value: Mapping[str, float | None], baseline: Mapping[str, float | None]
) -> list[dict]:
    return [
        {"relation": relation, "side": side, "metric": m, "value": value[m], "baseline": baseline[m], "edges": edges}
        for m in value
        if value[m] is not None
    ]


def _scored_metrics(scored: list[Scored], options: EvaluationConfig) -> dict[str, float | None]:
    filtered = np.concatenate([s.filtered for s in scored])
    raw = np.concatenate([s.raw for s in scored])
    true, false = np.concatenate([s.true for s in scored]), np.concatenate([s.false for s in scored])
    found: dict[str, float | None] = {}
    found |= rank_metrics("filtered", filtered, options.hits_at)
    found |= rank_metrics("raw", raw, options.hits_at)
    return found | {"auc": auc(true, false), "rce": rce(true, false)}


def _joined(counts: list[Counts]) -> Counts:
    return Counts(np.concatenate([c.above for c in counts]), np.concatenate([c.tied for c in counts]))


def _distinct(groups: Iterable[np.ndarray]) -> np.ndarray:
    """Concatenate queries of several relations so that the same entity is another query in another relation."""
    numbered, offset = [], 0
    for query in groups:
        names, number = np.unique(query, return_inverse=True)
        numbered.append(number + offset)
        offset += len(names)
    return np.concatenate(numbered)


def _overall(table: pa.Table, column: str) -> dict[str, float]:
    """Return the metrics of all relations: of both sides where they have two, else of tails."""
    found = {}
    for row in table.to_pylist():
        if row["relation"] == ALL and row["side"] in ("rhs", BOTH) and row[column] is not None:
            found[row["metric"]] = row[column]
    return found


def _note(config: TwhinConfig, held_out: HeldOut, measured: list[Measured]) -> str:
    if held_out.split == "none":
        return "no edge is held out (split.validation and split.test are 0), so nothing was measured"
    names = {m.name for m in measured}
    without = [name for name in config.model.relation_names if name not in names]
    told = [f"no held-out edge of {', '.join(without)}"] if without else []
    if held_out.split == "validation":
        told.append("held_out/test is empty, so the validation edges were ranked")
    return "; ".join(told)
