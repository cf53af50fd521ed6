"""Calibration: from a relation's scores to probabilities, and the threshold that reaches a precision or a recall.

A score orders edges, and its level says little: only the loss `bce` trains it. Stage `evaluate` fits, for each
relation, a strictly increasing map from scores to log-odds (`evaluation/calibrate.py`), and the table `calibration`
keeps it. Here it is read and applied, with numpy alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Manifest, Store
from twhin_pipeline.vectors.model_files import model_version
from twhin_pipeline.words import CALIBRATION, MODELS

NONE = "none"
"""The method of a relation that is not calibrated."""
SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("method", pa.string()),
        ("edges", pa.int64()),
        ("negatives", pa.int32()),
        ("scores", pa.list_(pa.float64())),
        ("log_odds", pa.list_(pa.float64())),
    ]
)
THRESHOLDS, RELIABILITY = "thresholds", "reliability"
"""Parts of the table."""
THRESHOLDS_SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("probability", pa.float64()),
        ("precision", pa.float64()),
        ("recall", pa.float64()),
        ("edges", pa.int64()),
    ]
)
RELIABILITY_SCHEMA = pa.schema(
    [
        ("relation", pa.string()),
        ("bin", pa.int32()),
        ("predicted", pa.float64()),
        ("uncalibrated", pa.float64()),
        ("observed", pa.float64()),
        ("pairs", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Calibration:
    """One relation's map from scores to log-odds: linear between knots, and beyond them as at the ends.

    The probability is that of an edge where, for each real edge of a head, `negatives` others of the same head are
    asked, whose tails are drawn uniformly.
    """

    method: str
    """`platt` (one line), `piecewise`, `pooled` (fitted to all relations together) or `none`."""
    negatives: int
    scores: np.ndarray
    """Knots, float64 `[K]`, increasing; empty where the method is `none`."""
    values: np.ndarray
    """Log-odds at the knots, float64 `[K]`, increasing."""

    @property
    def is_fitted(self) -> bool:
        """Whether there is a map; without one the log-odds are the score itself."""
        return self.method != NONE

    @property
    def base_rate(self) -> float:
        """The share of edges among the pairs that it is fitted to."""
        return 1 / (1 + self.negatives)

    def log_odds(self, scores: np.ndarray) -> np.ndarray:
        """Return the log-odds of scores, float64 of the same shape."""
        scores = np.asarray(scores, np.float64)
        if not self.is_fitted:
            return scores
        slopes = np.diff(self.values) / np.diff(self.scores)
        segment = np.clip(np.searchsorted(self.scores, scores, "right") - 1, 0, len(slopes) - 1)
        return self.values[segment] + slopes[segment] * (scores - self.scores[segment])


def sigmoid(log_odds: np.ndarray) -> np.ndarray:
    """Return the probabilities of log-odds, float64 of the same shape."""
    # One exponential that cannot overflow serves both signs.
    small = np.exp(-np.abs(log_odds))
    return np.where(np.asarray(log_odds) >= 0, 1, small) / (1 + small)


def logit(probability: np.ndarray | float) -> np.ndarray:
    """Return the log-odds of probabilities; infinite at 0 and 1."""
    with np.errstate(divide="ignore"):
        return np.log(probability) - np.log1p(-np.asarray(probability, np.float64))


def shift(prior: float, base_rate: float) -> float:
    """Return what to add to log-odds, so that they hold at the base rate `prior` and not at `base_rate`.

    Bayes' rule: likelihood ratios stay, and prior odds are exchanged (Elkan, "The foundations of cost-sensitive
    learning", 2001, theorem 2; Saerens et al., 2002).

    Raises:
        UserError: `prior` is not between 0 and 1.
    """
    if not 0 < prior < 1:
        raise UserError(f"prior must be between 0 and 1, as the share of edges among all pairs; got {prior}")
    return float(logit(prior) - logit(base_rate))


@dataclass(frozen=True)
class Threshold:
    """A relation's probability above which pairs count as edges, and what is reached so."""

    relation: str
    probability: float
    precision: float
    """The share of edges among the pairs at or above it, at the base rate `prior`; rather too low than too high."""
    recall: float
    """The share of edges that are at or above it."""
    edges: int
    """How many held-out edges are: the evidence behind it."""
    prior: float
    """The share of edges among the pairs that are asked."""


class Calibrations:
    """The calibrations of a model's relations; of a store that an earlier version made there are none."""

    def __init__(
        self,
        by_relation: Mapping[str, Calibration] | None = None,
        thresholds: Callable[[], pa.Table] = THRESHOLDS_SCHEMA.empty_table,
    ) -> None:
        """Take them by relation; `thresholds` returns the part of the table, when it is asked for."""
        self.by_relation = dict(by_relation or {})
        self._read_thresholds = thresholds
        self._noted = False

    def are_of(self, relation: str) -> bool:
        """Tell whether a relation's scores have a map to probabilities."""
        found = self.by_relation.get(relation)
        return found is not None and found.is_fitted

    def log_odds(self, relation: str, scores: np.ndarray, prior: float | None = None) -> np.ndarray:
        """Return the log-odds of a relation's scores, float64 of the same shape; those of no map are the scores.

        A warning says so, once.

        Raises:
            UserError: `prior` is not between 0 and 1, or is given where there is no map.
        """
        found = self.by_relation.get(relation)
        if found is not None and found.is_fitted:
            return found.log_odds(scores) + (0 if prior is None else shift(prior, found.base_rate))
        why = "there are no validation edges" if found is not None else "there is no table `calibration` of it"
        if prior is not None:
            raise UserError(
                f"relation {relation} is not calibrated ({why}), so no prior can be taken into account; leave it out, "
                "or run `twhin evaluate` with validation edges"
            )
        if not self._noted:
            self._noted = True
            text = f"probabilities of {relation} are not calibrated ({why}): they are sigmoid(score)"
            warnings.warn(text, stacklevel=3)
        return np.asarray(scores, np.float64)

    @cached_property
    def _thresholds(self) -> pa.Table:
        return self._read_thresholds()

    def threshold(
        self, relation: str, *, precision: float | None = None, recall: float | None = None, prior: float | None = None
    ) -> Threshold:
        """Return the lowest threshold that reaches a precision, or the highest that reaches a recall.

        Raises:
            UserError: Not one of the two is given, it is not in (0, 1], no threshold reaches it, the relation had no
                held-out edge, or a prior is given where it is not calibrated.
        """
        if (precision is None) == (recall is None):
            raise UserError("give either a precision or a recall to reach")
        wanted, name = (precision, "precision") if precision is not None else (recall, "recall")
        if wanted is None or not 0 < wanted <= 1:
            raise UserError(f"{name} must be above 0 and at most 1, got {wanted}")
        rows = self._thresholds.filter(pc.equal(self._thresholds["relation"], relation))
        if not self.by_relation:
            raise UserError(
                "there is no table `calibration` of this model, so nothing is known of its thresholds; run `twhin run`"
            )
        if not rows.num_rows:
            raise UserError(f"relation {relation} had no held-out edge, so nothing is known of its thresholds")
        found = self.by_relation[relation]
        if prior is not None and not found.is_fitted:
            raise UserError(f"relation {relation} is not calibrated, so a prior cannot be taken into account")
        at = found.base_rate if prior is None else prior
        move = 0.0 if prior is None else shift(prior, found.base_rate)
        columns = {one: rows[one].to_numpy() for one in ("probability", "precision", "recall", "edges")}
        # Precision moves with the prior as every probability does: its odds are the prior odds times a ratio of rates.
        for one in ("probability", "precision"):
            columns[one] = sigmoid(logit(columns[one]) + move)
        reached = np.flatnonzero(columns[name] >= wanted)
        if not len(reached):
            best = {one: values[np.argmax(columns["precision"])] for one, values in columns.items()}
            raise UserError(
                f"no threshold of {relation} reaches a precision of {wanted:g} at the base rate {at:.4g}; the best is "
                f"{best['precision']:.3f}, at probability {best['probability']:.4g}, with a recall of "
                f"{best['recall']:.3f}"
            )
        # Of those that reach it, the one with the most of the other figure.
        other = columns["recall" if precision is not None else "probability"]
        chosen = reached[np.argmax(other[reached])]
        rest = {one: float(columns[one][chosen]) for one in ("probability", "precision", "recall")}
        return Threshold(relation, **rest, edges=int(columns["edges"][chosen]), prior=at)


def open_calibrations(store: Store, relations: Manifest) -> Calibrations:
    """Return the calibrations of the model behind exported vectors; none where an earlier version made these.

    A model that was trained once more on all edges has those of the model that was evaluated.

    Args:
        store: As its reader sees it.
        relations: The manifest of `embeddings/relations`.
    """
    snapshot = relations.snapshot
    evaluated = _evaluated(store, relations)
    own = store.readable(CALIBRATION, snapshot)  # of a release, the one that was published with it
    for version in [own, *reversed(store.versions_of(CALIBRATION, snapshot))]:
        if version is None:
            continue
        manifest = store.manifest(CALIBRATION, snapshot, version)
        verdict = store.verdict(CALIBRATION, snapshot, version)
        if (verdict is None or verdict.accepted) and manifest.parents[MODELS[0]] == evaluated:
            return read(store, manifest)
    return Calibrations()


def _evaluated(store: Store, relations: Manifest) -> str | None:
    """Return the version of the table `twhin_model` that was evaluated for these vectors."""
    version = model_version(relations)
    if MODELS[0] in relations.parents:
        return version
    base = store.seen_as(None)
    if version not in base.versions_of(MODELS[1], relations.snapshot):  # retention has removed it
        return None
    return base.manifest(MODELS[1], relations.snapshot, version).parents.get(MODELS[0])


def read(store: Store, manifest: Manifest) -> Calibrations:
    """Read a version of the table."""
    rows = [row for path in store.files_of(manifest) for row in _rows(store, path)]
    return Calibrations(
        {
            row["relation"]: Calibration(
                row["method"], row["negatives"], np.asarray(row["scores"], float), np.asarray(row["log_odds"], float)
            )
            for row in rows
        },
        lambda: store.read_part(manifest, THRESHOLDS),
    )


def _rows(store: Store, path: str) -> list[dict]:
    with store.parquet(path) as file:
        return file.read().to_pylist()
