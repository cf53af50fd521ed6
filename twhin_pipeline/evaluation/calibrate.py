"""Fits each relation's map from scores to probabilities on validation edges, and measures it on the test's.

The pairs are validation edges and, for each, `evaluation.auc_negatives` others of the same head, whose tails are drawn
uniformly from the tails' type (true edges are drawn again): what `predict_relation` is asked. So the base rate is
1 / (1 + auc_negatives), whatever sides training corrupts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import numpy as np
import pyarrow as pa
from scipy import optimize

from twhin_pipeline.config.training import EvaluationConfig
from twhin_pipeline.evaluation.classification import rce, sample_negatives, score_sampled
from twhin_pipeline.evaluation.held_out import Edges, read_edges, read_filters, some_edges
from twhin_pipeline.model.relation_scores import RelationScores
from twhin_pipeline.vectors.calibration import (
    NONE,
    RELIABILITY_SCHEMA,
    SCHEMA,
    THRESHOLDS_SCHEMA,
    Calibration,
    sigmoid,
)

Pairs = tuple[np.ndarray, np.ndarray]
"""Scores of edges `[P]` and of sampled pairs `[N]`."""
LEAST_EDGES = 100
"""A relation with fewer validation edges has the map that is fitted to all relations together."""
MOST_EDGES = 20_000
"""Validation edges that one map is fitted to at most: the standard error of a share is then below .4 %."""
SEGMENTS = (1, 4, 12)
"""Segments of the maps that are tried; one is Platt's line."""
EDGES_PER_SEGMENT = 50
BINS = 15
"""Of the expected calibration error."""
_LEAST_RISE = 1e-3
"""Of the log-odds over a segment, so that the order of scores is kept."""
_TAIL = 0.005
"""The share of the pairs beyond the outermost knots."""
MOST_THRESHOLDS = 200
_NOTHING = np.empty(0)


def fit_all(
    con: duckdb.DuckDBPyConnection,
    names: Sequence[str],
    scores: Sequence[RelationScores],
    present: Sequence[np.ndarray | None],
    validation: Sequence[str],
    known: Sequence[str],
    options: EvaluationConfig,
) -> tuple[dict[str, Calibration], dict[str, int]]:
    """Fit the map of each relation.

    Args:
        con: Reads edges.
        names: The relations.
        scores: Of each relation.
        present: Of each relation, the rows of tails that may be drawn, int64 `[P]`; None: all.
        validation: Parquet files of the validation edges (`lhs`, `rhs`, `rel`).
        known: Parquet files of true edges, which are no negatives.
        options: The base rate, and the seed.

    Returns:
        By relation, its calibration, and how many validation edges there were to fit it to.
    """
    edges = dict(enumerate(read_edges(con, list(validation), len(names)) if validation else []))
    counts = {names[rel]: len(one["lhs"]) for rel, one in edges.items()}
    rngs = {rel: np.random.default_rng([options.seed, rel, 1]) for rel in edges}  # not those of the ranked edges
    asked = {rel: some_edges(one, MOST_EDGES, rngs[rel]) for rel, one in edges.items() if len(one["lhs"])}
    filters = read_filters(con, list(known), "rhs", asked)
    pairs = {}
    for rel, one in asked.items():
        drawn, valid = sample_negatives(
            scores[rel].num_entities("rhs"), one["lhs"], filters[rel], options.auc_negatives, rngs[rel], present[rel]
        )
        pairs[rel] = _scored(scores[rel], one, drawn, valid, options)
    together = _together(list(pairs.values()), np.random.default_rng([options.seed, len(names), 1]))
    pooled = fit(*together, options.auc_negatives) if pairs else None
    fitted = {}
    for rel, name in enumerate(names):
        if pooled is None:
            fitted[name] = uncalibrated(options.auc_negatives)
        elif counts[name] < LEAST_EDGES:
            fitted[name] = Calibration("pooled", pooled.negatives, pooled.scores, pooled.values)
        else:
            fitted[name] = fit(*pairs[rel], options.auc_negatives)
    return fitted, {name: counts.get(name, 0) for name in names}


def uncalibrated(negatives: int) -> Calibration:
    """Return the calibration of a relation without any: its probability is sigmoid(score)."""
    return Calibration(NONE, negatives, _NOTHING, _NOTHING)


def _scored(
    scores: RelationScores, edges: Edges, drawn: np.ndarray, valid: np.ndarray, options: EvaluationConfig
) -> Pairs:
    positive, negative = score_sampled(scores, "rhs", edges["lhs"], edges["rhs"], drawn, options.block_size)
    return positive, negative[valid]


def _together(pairs: Sequence[Pairs], rng: np.random.Generator) -> Pairs:
    """Return the pairs of all relations, or a sample of them that has `MOST_EDGES` edges."""
    if not pairs:
        return _NOTHING, _NOTHING
    positive, negative = (np.concatenate(part) for part in zip(*pairs, strict=True))
    share = min(1.0, MOST_EDGES / max(len(positive), 1))
    if share == 1:
        return positive, negative
    return positive[rng.random(len(positive)) < share], negative[rng.random(len(negative)) < share]


def fit(positive: np.ndarray, negative: np.ndarray, negatives: int) -> Calibration:
    """Fit a strictly increasing map from scores to log-odds, linear between knots, by maximum likelihood.

    With one segment it is Platt's (1999) scaling: a temperature and a bias. Maps of more segments have knots at
    quantiles of the scores, and no slope below a least one. Each number of segments is fitted to one half of the pairs
    and measured on the other, both ways; the best is then fitted to all of them. Targets are Platt's, (n + 1) / (n + 2)
    and 1 / (n + 2), so that scores which separate edges from the others do not make probabilities 0 and 1.

    Args:
        positive: Scores of edges, `[P]`.
        negative: Scores of sampled pairs, `[N]`.
        negatives: How many were to be sampled for each edge.

    Returns:
        The map; that of no method where there are no edges or no sampled pairs.
    """
    if not len(positive) or not len(negative):
        return uncalibrated(negatives)
    positive, negative = positive.astype(float), negative.astype(float)
    tried = [count for count in SEGMENTS if count == 1 or len(positive) >= 2 * count * EDGES_PER_SEGMENT]
    best = tried[0]
    if len(tried) > 1:
        rng = np.random.default_rng(0)
        first, second = rng.random(len(positive)) < 0.5, rng.random(len(negative)) < 0.5
        one, other = (positive[first], negative[second]), (positive[~first], negative[~second])
        losses = {count: _loss(_curve(*one, count), *other) + _loss(_curve(*other, count), *one) for count in tried}
        best = min(losses, key=lambda count: losses[count])
    knots, values = _curve(positive, negative, best)
    return Calibration("platt" if len(knots) == 2 else "piecewise", negatives, knots, values)


def _loss(curve: Pairs, positive: np.ndarray, negative: np.ndarray) -> float:
    """Return the sum of the log losses of pairs under a map."""
    found = Calibration("", 0, *curve)
    return float(np.logaddexp(0, -found.log_odds(positive)).sum() + np.logaddexp(0, found.log_odds(negative)).sum())


def _curve(positive: np.ndarray, negative: np.ndarray, segments: int) -> Pairs:
    """Return the knots and the log-odds there, float64 `[K]` each, of the likeliest map of so many segments."""
    knots = _knots(positive, negative, segments)
    both = np.concatenate([positive, negative])
    segment = np.clip(np.searchsorted(knots, both, "right") - 1, 0, len(knots) - 2)
    place = (both - knots[segment]) / np.diff(knots)[segment]
    count = len(knots) - 1
    smooth = [(len(positive) + 1) / (len(positive) + 2), 1 / (len(negative) + 2)]
    target = np.repeat(smooth, [len(positive), len(negative)])

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        # parameters: the log-odds at the first knot, then the rise over each segment
        values = np.cumsum(parameters)
        log_odds = values[segment] + parameters[1:][segment] * place
        residual = sigmoid(log_odds) - target
        # A segment's rise counts whole for the pairs beyond it, and by their place for those in it.
        inside = np.bincount(segment, residual * place, count)
        whole = np.bincount(segment, residual, count)
        beyond = np.cumsum(whole[::-1])[::-1] - whole
        gradient = np.concatenate([[residual.sum()], inside + beyond])
        value = (np.logaddexp(0, log_odds) - target * log_odds).sum()
        return value / len(both), gradient / len(both)

    start = np.concatenate([[np.log(len(positive) / len(negative)) - 1], np.full(count, 2 / count)])
    bounds = [(None, None), *[(_LEAST_RISE, None)] * count]
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 500})
    return knots, np.cumsum(found.x)


def _knots(positive: np.ndarray, negative: np.ndarray, segments: int) -> np.ndarray:
    """Return where segments meet, float64 increasing: quantiles of edges and sampled pairs, which count the same."""
    both = np.concatenate([positive, negative])
    weight = np.repeat([1 / len(positive), 1 / len(negative)], [len(positive), len(negative)])
    order = np.argsort(both)
    reached = np.cumsum(weight[order]) / 2
    places = np.searchsorted(reached, np.linspace(_TAIL, 1 - _TAIL, segments + 1))
    knots = np.unique(both[order][np.minimum(places, len(both) - 1)])
    if len(knots) > 1:
        return knots
    return np.array([knots[0] - 0.5, knots[0] + 0.5]) if len(knots) else np.array([0.0, 1.0])


def metrics(pairs: Sequence[tuple[Calibration, Pairs]]) -> dict[str, float | None]:
    """Return `calibrated_rce` and `ece` of one or several relations' pairs; nothing where one is not calibrated."""
    if not pairs or not all(calibration.is_fitted for calibration, _ in pairs):
        return {}
    positive, negative = log_odds(pairs)
    return {"calibrated_rce": rce(positive, negative), "ece": ece(sigmoid(positive), sigmoid(negative))}


def log_odds(pairs: Sequence[tuple[Calibration, Pairs]]) -> Pairs:
    """Return the calibrated log-odds of relations' edges and of sampled pairs, end to end."""
    each = [(found.log_odds(positive), found.log_odds(negative)) for found, (positive, negative) in pairs]
    positive, negative = (np.concatenate(part) for part in zip(*each, strict=True))
    return positive, negative


def reliability(positive: np.ndarray, negative: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Return the bins of a reliability diagram (DeGroot and Fienberg, 1983), which have equally many pairs each.

    Args:
        positive: Probabilities of edges, `[P]`; of `[P, 2]` the first orders the pairs, and both are averaged.
        negative: Likewise of sampled pairs, `[N]` or `[N, 2]`.
        bins: How many.

    Returns:
        Of each bin that has pairs: their mean probability `predicted`, the mean of the second ones `uncalibrated`, the
        share of edges `observed`, and `pairs`.
    """
    both = np.concatenate([positive, negative])
    both = both.reshape(len(both), -1)
    order = np.argsort(both[:, 0], kind="stable")
    is_edge = order < len(positive)
    rows = []
    for part in np.array_split(np.arange(len(order)), bins):
        if len(part):
            means = dict(zip(("predicted", "uncalibrated"), both[order[part]].mean(axis=0).tolist(), strict=False))
            rows.append({**means, "observed": float(is_edge[part].mean()), "pairs": len(part)})
    return rows


def ece(positive: np.ndarray, negative: np.ndarray, bins: int = BINS) -> float | None:
    """Return the expected calibration error: how far, on average, probabilities are from the share of edges.

    Naeini et al. (2015), with bins of equal mass (Nguyen and O'Connor, 2015): the mean over bins of
    \\|predicted - observed\\|, by their pairs. 0 is perfect. None where there is no pair.
    """
    rows = reliability(positive, negative, bins)
    pairs = sum(row["pairs"] for row in rows)
    return sum(row["pairs"] * abs(row["predicted"] - row["observed"]) for row in rows) / pairs if rows else None


def thresholds(positive: np.ndarray, negative: np.ndarray, negatives: int) -> dict[str, np.ndarray]:
    """Return what thresholds reach: at most `MOST_THRESHOLDS`, evenly spaced in recall, from the highest on.

    One more sampled pair is counted above each threshold than there is, so that no precision is 1 by luck alone.

    Args:
        positive: Probabilities of edges, `[P]`.
        negative: Probabilities of sampled pairs, `[N]`.
        negatives: How many there are to be for each edge; `precision` is at this ratio.

    Returns:
        `probability`, `precision`, `recall` float64 `[T]`, and `edges` int64 `[T]`, those at or above the threshold.
    """
    edges, others = np.sort(positive)[::-1], np.sort(negative)
    ranks = np.unique(np.ceil(np.linspace(0, 1, MOST_THRESHOLDS + 1)[1:] * len(edges)).astype(np.int64))
    probability = np.unique(edges[ranks - 1])[::-1]
    above = len(edges) - np.searchsorted(edges[::-1], probability)
    recall = above / max(len(edges), 1)
    false = (len(others) - np.searchsorted(others, probability) + 1) / (len(others) + 1)
    return {
        "probability": probability,
        "precision": recall / (recall + negatives * false),
        "recall": recall,
        "edges": above,
    }


def table(fitted: Mapping[str, Calibration], counts: Mapping[str, int]) -> pa.Table:
    """Return the rows of the table `calibration`."""
    return pa.Table.from_pylist(
        [
            {
                "relation": name, "method": one.method, "edges": counts[name], "negatives": one.negatives,
                "scores": one.scores.tolist(), "log_odds": one.values.tolist(),
            }
            for name, one in fitted.items()
        ],
        schema=SCHEMA,
    )  # fmt: skip


def parts(measured: Mapping[str, tuple[Calibration, Pairs]], overall: str, fresh: bool) -> tuple[pa.Table, pa.Table]:
    """Return the parts `thresholds` and `reliability` of the table.

    Args:
        measured: By relation, its calibration and the scores of held-out edges and of sampled pairs.
        overall: What the bins of all relations together are called.
        fresh: The edges are not those that the maps were fitted to; else there are no bins.
    """
    curves, bins = [THRESHOLDS_SCHEMA.empty_table()], [RELIABILITY_SCHEMA.empty_table()]
    groups = {name: [one] for name, one in measured.items()} | {overall: list(measured.values())}
    for name, group in groups.items():
        if not group:
            continue
        positive, negative = map(sigmoid, log_odds(group))
        if not len(positive) or not len(negative):
            continue
        if name != overall:
            reached = thresholds(positive, negative, group[0][0].negatives)
            columns = {"relation": [name] * len(reached["recall"]), **reached}
            curves.append(pa.table(columns, schema=THRESHOLDS_SCHEMA))
        if fresh and all(found.is_fitted for found, _ in group):
            raw = [sigmoid(np.concatenate([scores[kind] for _, scores in group])) for kind in (0, 1)]
            rows = reliability(np.stack([positive, raw[0]], 1), np.stack([negative, raw[1]], 1))
            numbered = [{"relation": name, "bin": number, **row} for number, row in enumerate(rows)]
            bins.append(pa.Table.from_pylist(numbered, schema=RELIABILITY_SCHEMA))
    return pa.concat_tables(curves), pa.concat_tables(bins)
