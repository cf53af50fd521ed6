"""Evaluation: ranks the held-out edges and writes the table `evaluation` (defined in docs/reference/metrics.md).

It also fits the maps from scores to probabilities, and writes them to the table `calibration`.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa
import torch

from twhin_pipeline import scratch
from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.config.training import EvaluationConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation import ancestors, calibrate, comparison, repeats
from twhin_pipeline.evaluation.advice import advice
from twhin_pipeline.evaluation.baselines import read_degrees
from twhin_pipeline.evaluation.classification import classification_metrics, sample_negatives, score_sampled
from twhin_pipeline.evaluation.held_out import (
    HeldOut,
    Questions,
    read_edges,
    read_filters,
    read_retrieval,
    some_edges,
    some_heads,
)
from twhin_pipeline.evaluation.measurements import Measured, Retrieved, Scored
from twhin_pipeline.evaluation.rank_metrics import distinct, joined, rank_metrics, retrieval_metrics
from twhin_pipeline.evaluation.ranking import CandidateSet, Counts
from twhin_pipeline.evaluation.results import SCHEMA, comparisons
from twhin_pipeline.graph.present import present_rows
from twhin_pipeline.model.relation_scores import RelationScores, to_tensor
from twhin_pipeline.store import Manifest, Store, database
from twhin_pipeline.vectors.calibration import RELIABILITY, THRESHOLDS, Calibration
from twhin_pipeline.vectors.model_files import ModelTables
from twhin_pipeline.words import BOTH, CALIBRATION, SIDES, Side, sides_word

ALL = "all"
Metrics = dict[str, float | None]
Columns = dict[str, Metrics]
"""By column of the table (`value`, `baseline`, …): metrics of one group of queries."""
UNKNOWN = "edges that an earlier model was trained on, from which this one started, could not be left out"
DETAIL = {"value": "metrics"}
"""What a column is called in the manifest's details, where it is another name."""


def evaluate(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Measure the model of a snapshot on its held-out edges and write the tables `evaluation` and `calibration`.

    Returns:
        The manifest of `evaluation`.

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
        RelationScores(scorer, rel, vectors[relation.lhs], vectors[relation.rhs])
        for rel, relation in enumerate(config.model.relations)
    ]
    with scratch.folder("evaluate") as folder, database.connect(config, store) as con:
        origins = ancestors.origins_of(tables.manifest)
        seen = ancestors.find(con, config, store, snapshot, origins, held_out.test)
        held_out = held_out.without(con, seen.edges, folder)
        of_types = {name: present_rows(store, snapshot, name) for name in tables.names}
        present: list[dict[Side, np.ndarray | None]] = [
            {"lhs": of_types[relation.lhs], "rhs": of_types[relation.rhs]} for relation in config.model.relations
        ]
        by_relation = _measure(con, config.model.relation_names, scores, present, held_out, config.evaluation)
        validation = _unseen_validation(con, config, store, snapshot, origins, held_out, f"{folder}/validation")
        fitted, counts = calibrate.fit_all(
            con, config.model.relation_names, scores, [one["rhs"] for one in present], validation,
            list(dict.fromkeys([*held_out.seen, *validation])), config.evaluation,
        )  # fmt: skip
        ranked = time.monotonic()
        sizes = {name: len(table) for name, table in vectors.items()}
        tails = {name: CandidateSet(size, of_types[name]) for name, size in sizes.items()}
        compared = comparison.compare(con, config, by_relation, held_out, sizes, tails, device)
    measured = list(by_relation.values())
    again = repeats.measure(config, store, snapshot, scores, tails)
    calibrated = {m.name: (fitted[m.name], (m.model["rhs"].positive, m.model["rhs"].negative)) for m in measured}
    _write_calibration(config, store, snapshot, versions, fitted, counts, calibrated, held_out.split)
    # Edges that the maps were fitted to say nothing of how good they are.
    probable = calibrated if held_out.split == "test" else {}
    table = pa.concat_tables([_table(measured, config.evaluation, probable), again])
    overall = _overall(measured, config)
    overall["value"] |= {k: v for k, v in calibrate.metrics(list(probable.values())).items() if v is not None}
    with store.replace("evaluation", snapshot, config_hash=config.hash(), parents=versions) as draft:
        draft.write(table)
        draft.details = {
            "split": held_out.split,
            "note": "; ".join([*_notes(config, held_out, measured), *compared.notes]),
            "edges": sum(m.edges for m in measured),
            "ancestors": seen.ancestors + len(seen.unknown),
            "ancestors_unknown": len(seen.unknown),
            "edges_left_out": len(seen),
            "edges_left_out_per_relation": seen.per_relation(config.model.relation_names),
            "notes": _of_ancestors(seen, held_out.split),
            "compared_edges": sum(m.compared.edges for m in measured if m.compared is not None),
            "seconds": round(time.monotonic() - started, 3),
            "baselines_seconds": round(time.monotonic() - ranked, 3),
            "als_settings": compared.settings,
            "device": device.type,
            "chosen_step": tables.manifest.details.get("chosen_step"),
            "chosen_epoch": tables.manifest.details.get("chosen_epoch"),
            "sides": _sides(config),
            **{DETAIL.get(column, column): figures for column, figures in overall.items()},
        }
        warnings = [note for note in draft.details["notes"] if note.startswith(UNKNOWN)]
        warnings += advice(comparisons(table, draft.details), config, tables.manifest.details)
        draft.details["warnings"] = warnings
    return store.manifest("evaluation", snapshot)


def _unseen_validation(
    con: duckdb.DuckDBPyConnection,
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    origins: Sequence[ancestors.Origin],
    held_out: HeldOut,
    folder: str,
) -> list[str]:
    """Return files of the validation edges that no model was trained on from which this one started."""
    if held_out.split != "test":
        return held_out.test
    seen = ancestors.find(con, config, store, snapshot, origins, held_out.validation)
    os.makedirs(folder)
    return HeldOut("validation", held_out.validation, [], []).without(con, seen.edges, folder).test


def _write_calibration(
    config: TwhinConfig,
    store: Store,
    snapshot: str,
    versions: dict[str, str],
    fitted: Mapping[str, Calibration],
    counts: Mapping[str, int],
    measured: Mapping[str, tuple[Calibration, calibrate.Pairs]],
    split: str,
) -> None:
    """Write the table `calibration`: the maps, and what thresholds reach on the edges that were measured."""
    without = [name for name, one in fitted.items() if not one.is_fitted]
    thresholds, bins = calibrate.parts(measured, ALL, fresh=split == "test")
    with store.replace(CALIBRATION, snapshot, config_hash=config.hash(), parents=versions) as draft:
        draft.write(calibrate.table(fitted, counts))
        draft.write(thresholds, f"{THRESHOLDS}.parquet")
        draft.write(bins, f"{RELIABILITY}.parquet")
        draft.details = {
            "negatives": config.evaluation.auc_negatives,
            "base_rate": 1 / (1 + config.evaluation.auc_negatives),
            "measured_on": split,
            "methods": dict(Counter(one.method for one in fitted.values())),
            "uncalibrated": without,
            "notes": [f"no validation edge, so probabilities are not calibrated: {', '.join(without)}"]
            if without
            else [],
        }


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
    present: list[dict[Side, np.ndarray | None]],
    held_out: HeldOut,
    options: EvaluationConfig,
) -> dict[int, Measured]:
    """Measure the relations that have a test edge, by index and in their order."""
    measured = {}
    for rel, edges in enumerate(read_edges(con, held_out.test, len(names))):
        if len(edges["lhs"]):
            rng = np.random.default_rng([options.seed, rel])
            chosen = some_edges(edges, options.max_edges, rng)
            measured[rel] = Measured(names[rel], scores[rel], edges, chosen, rng, present[rel])
    for side in SIDES:
        _measure_side(con, side, measured, held_out, options)
    if options.recall_at:
        _measure_retrieval(con, {n: m for n, m in measured.items() if m.retrieved is None}, held_out, options)
    return measured


def _measure_side(
    con: duckdb.DuckDBPyConnection,
    side: Side,
    measured: Mapping[int, Measured],
    held_out: HeldOut,
    options: EvaluationConfig,
) -> None:
    """Rank one side of the relations' edges, and score them and sampled ones.

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
        and (options.candidates is None or options.candidates >= m.catalogue(side).size)
    }
    known = read_filters(con, held_out.known, side, chosen)
    seen = read_filters(con, held_out.seen, side, same)
    counted = read_degrees(con, held_out.train, side, measured)
    for n, m in measured.items():
        m.candidates[side] = candidates = CandidateSet.sample(sizes[n], options.candidates, m.rng, m.present[side])
        questions = Questions.of(side, m.chosen, candidates, [known[n], seen[n]] if n in same else [known[n]])
        degrees = counted[n].of_all(sizes[n])
        drawn, valid = sample_negatives(
            sizes[n], questions.queries, known[n], options.auc_negatives, m.rng, m.present[side]
        )
        positive, negative = score_sampled(
            m.scores, side, questions.queries, questions.targets, drawn, options.block_size
        )
        of_model, of_popularity = questions.rank(m.scores, options.block_size), questions.popular(degrees)
        m.model[side] = Scored(of_model[0].ranks, of_model[1].ranks, positive, negative[valid])
        m.baseline[side] = Scored(
            of_popularity[0].ranks, of_popularity[1].ranks, degrees[questions.targets], degrees[drawn[valid]]
        )
        if n in same:
            m.retrieved = Retrieved(m.chosen, of_model[2], of_popularity[2])


def _measure_retrieval(
    con: duckdb.DuckDBPyConnection, measured: Mapping[int, Measured], held_out: HeldOut, options: EvaluationConfig
) -> None:
    """Rank the tails of some of the relations' heads in the whole catalogue."""
    heads = {n: some_heads(m.held_out, options.max_edges, m.rng) for n, m in measured.items()}
    sizes = {n: m.scores.num_entities("rhs") for n, m in measured.items()}
    questions = read_retrieval(con, heads, {n: m.catalogue("rhs") for n, m in measured.items()}, held_out)
    counted = read_degrees(con, held_out.train, "rhs", measured)
    for n, m in measured.items():
        of_model = questions[n].rank(m.scores, options.block_size)
        of_popularity = questions[n].popular(counted[n].of_all(sizes[n]))
        m.retrieved = Retrieved(heads[n], of_model[1], of_popularity[1])


def _table(
    measured: list[Measured],
    options: EvaluationConfig,
    calibrated: Mapping[str, tuple[Calibration, calibrate.Pairs]],
) -> pa.Table:
    """One row per relation (then all together), side and metric."""
    rows: list[dict] = []
    for name, group in [*((m.name, [m]) for m in measured), *([(ALL, measured)] if measured else [])]:
        edges = sum(m.edges for m in group)
        for side, sides in (("lhs", SIDES[:1]), ("rhs", SIDES[1:]), (BOTH, SIDES)):
            queries = [(m, s) for m in group for s in sides]
            rows += _table_rows(name, side, edges, _edges_compared(group), _ranked(queries, options))
        retrieved = [len(m.retrieved.edges["lhs"]) for m in group if m.retrieved is not None]
        heads = [len(m.compared.heads) for m in group if m.compared is not None]
        rows += _table_rows(name, "rhs", sum(retrieved), sum(heads), _retrieval(group, options))
        probable = [calibrated[m.name] for m in group if m.name in calibrated]
        rows += _table_rows(name, "rhs", edges, 0, {"value": calibrate.metrics(probable)})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _table_rows(relation: str, side: str, edges: int, compared_edges: int, columns: Columns) -> list[dict]:
    """Return a row for each metric that the model has; what another column lacks is null there."""
    rows = []
    for metric, value in columns["value"].items() if columns else ():
        if value is not None:
            row = {"relation": relation, "side": side, "metric": metric, "edges": edges}
            row |= {column: metrics.get(metric) for column, metrics in columns.items()}
            if row.get(comparison.MODEL) is not None:
                row["compared_edges"] = compared_edges
            rows.append(row)
    return rows


def _edges_compared(group: Sequence[Measured]) -> int:
    return sum(m.compared.edges for m in group if m.compared is not None)


def _compared_by(group: Sequence[Measured]) -> list[str]:
    """Return the columns of what ranked edges of every relation of the group: the model, item-kNN, ALS."""
    each = [set() if m.compared is None else set(m.compared.ranks) for m in group]
    common: set[str] = set.intersection(*each)
    return sorted(common) if common - {comparison.MODEL} else []


def _ranked(queries: Sequence[tuple[Measured, Side]], options: EvaluationConfig) -> Columns:
    """Return the metrics of ranks and sampled edges, by column."""
    columns = {
        "value": _scored_metrics([m.model[s] for m, s in queries], options),
        # A degree is no probability, so it has no log loss.
        "baseline": _scored_metrics([m.baseline[s] for m, s in queries], options) | {"rce": None},
    }
    for name in _compared_by([m for m, _ in queries]):
        ranks = np.concatenate([m.compared.ranks[name].filtered[s] for m, s in queries if m.compared is not None])
        metrics = rank_metrics("filtered", ranks, options.hits_at)
        columns[name] = {k: v for k, v in metrics.items() if k != "filtered_mean_rank"}
    return columns


def _retrieval(group: Sequence[Measured], options: EvaluationConfig) -> Columns:
    """Return the retrieval metrics by column; none where it is left out."""
    retrieved = [m.retrieved for m in group if m.retrieved is not None]
    if not retrieved:
        return {}
    query = distinct(r.edges["lhs"] for r in retrieved)

    def metrics(heads: np.ndarray, counts: Sequence[Counts]) -> Metrics:
        return {**retrieval_metrics(heads, joined(list(counts)), options.recall_at)}

    columns = {
        "value": metrics(query, [r.model for r in retrieved]),
        "baseline": metrics(query, [r.baseline for r in retrieved]),
    }
    compared = [m.compared for m in group if m.compared is not None]
    for name in _compared_by(group):
        counts = [c.ranks[name].retrieved for c in compared]
        columns[name] = metrics(distinct(c.heads for c in compared), [c for c in counts if c is not None])
    return columns


def _scored_metrics(scored: list[Scored], options: EvaluationConfig) -> dict[str, float | None]:
    filtered = np.concatenate([s.filtered for s in scored])
    raw = np.concatenate([s.raw for s in scored])
    positive = np.concatenate([s.positive for s in scored])
    negative = np.concatenate([s.negative for s in scored])
    metrics: dict[str, float | None] = {}
    metrics |= rank_metrics("filtered", filtered, options.hits_at)
    metrics |= rank_metrics("raw", raw, options.hits_at)
    return metrics | classification_metrics(positive, negative)


def _overall(measured: list[Measured], config: TwhinConfig) -> dict[str, dict[str, float]]:
    """Return the metrics of all relations by column: retrieval of tails, and of the others the mean over the queries of
    the sides that each relation corrupts in training.
    """
    corrupted = config.corrupted_sides
    queries = [(m, side) for m in measured for side in corrupted[m.name]]
    if not queries:
        return {"value": {}, "baseline": {}}
    ranked, retrieved = _ranked(queries, config.evaluation), _retrieval(measured, config.evaluation)
    return {
        column: {k: v for k, v in (metrics | retrieved.get(column, {})).items() if v is not None}
        for column, metrics in ranked.items()
    }


def _sides(config: TwhinConfig) -> str | dict[str, str]:
    """Return which sides' queries the overall metrics average: one word where it is the same for all relations."""
    words = {name: sides_word(sides) for name, sides in config.corrupted_sides.items()}
    return words if len(set(words.values())) > 1 else next(iter(words.values()))


def _of_ancestors(seen: ancestors.SeenBefore, split: str) -> list[str]:
    """Say what was left out because of the models that this one started from; nothing where there is none."""
    notes = [f"{UNKNOWN}: {one}" for one in seen.unknown]
    if seen.ancestors:
        notes.append(
            f"{len(seen):,} {split} edges were left out: the model started from {seen.ancestors:,} earlier model(s), "
            "which were trained on them"
        )
    return notes + list(seen.notes)


def _notes(config: TwhinConfig, held_out: HeldOut, measured: list[Measured]) -> list[str]:
    if held_out.split == "none":
        return ["no edge is held out (split.validation and split.test are 0), so nothing was measured"]
    names = {m.name for m in measured}
    without = [name for name in config.model.relation_names if name not in names]
    notes = [f"no held-out edge of {', '.join(without)}"] if without else []
    if held_out.split == "validation":
        notes.append("held_out/test is empty, so the validation edges were ranked")
    compared = [m.compared.edges for m in measured if m.compared is not None]
    if sum(compared) < sum(m.edges for m in measured) and compared:
        notes.append(f"item_knn and als rank {sum(compared):,} of the test edges (evaluation.baseline_edges)")
    return notes
