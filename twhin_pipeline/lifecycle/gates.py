"""Gates: what a release must pass before it becomes the current one by itself. Each is one line with a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from twhin_pipeline.config.promotion import PromotionConfig
from twhin_pipeline.lifecycle.challenge import ALL, MRR
from twhin_pipeline.lifecycle.comparison import ENTITY, RELATION, K
from twhin_pipeline.store.releases import Release

Values = Mapping[tuple[str, str, str], Mapping[str, float | None]]
"""Rows of the table `drift` by kind, name and metric."""


@dataclass(frozen=True)
class Gate:
    """One thing that was looked at."""

    name: str
    about: str
    """The entity type or relation; empty where it is the release as a whole."""
    passed: bool
    value: float | None
    limit: float | None
    text: str
    """What was found, in words."""


def gates(
    options: PromotionConfig, rows: Values, details: Mapping[str, Any], current: Release | None, snapshot: str
) -> list[Gate]:
    """Return every gate of a release, those that it failed among them.

    Args:
        options: The limits.
        rows: The table `drift` of the release's snapshot.
        details: Of that table's manifest.
        current: The release that is current now; None: the first one passes.
        snapshot: The new release's.
    """
    result = [Gate("automatic", "", options.automatic, None, None, _automatic(options.automatic))]
    if current is None:
        return [*result, Gate("first", "", True, None, None, "nothing is current yet")]
    return [
        *result,
        *_of_whole(details, current, snapshot),
        *_of_quality(options, rows, details),
        *_of_drift(options, rows),
    ]


def _automatic(automatic: bool) -> str:
    return "releases are promoted by their gates" if automatic else "promotion.automatic is false"


def _of_whole(details: Mapping[str, Any], current: Release, snapshot: str) -> Iterator[Gate]:
    newer = current.snapshot > snapshot
    order = "newer than" if newer else "not newer than"
    yield Gate(
        "order", "", not newer, None, None, f"the current release's snapshot, {current.snapshot}, is {order} this"
    )
    same = details.get("compared_with") == current.name
    yield Gate(
        "compared", "", same, None, None,
        f"compared with {details.get('compared_with')}" + ("" if same else f", but {current.name} is current now"),
    )  # fmt: skip
    lacks = details.get("lacks", [])
    yield Gate(
        "complete", "", not lacks, None, None,
        f"beside the current release it has {', '.join(lacks)}" if lacks else "it has all that the current release has",
    )  # fmt: skip


def _of_quality(options: PromotionConfig, rows: Values, details: Mapping[str, Any]) -> Iterator[Gate]:
    metric = details.get("metric", MRR)
    change = rows.get((RELATION, ALL, f"{metric}_change"))
    if change is None or change["value"] is None or change["high"] is None or change["low"] is None:
        text = "; ".join(details.get("notes", [])) or "no held-out edge that both models could rank"
        yield Gate("quality", ALL, True, None, -options.largest_loss, text)
        return
    new, before = (rows[RELATION, ALL, name]["value"] for name in (metric, f"{metric}_current"))
    passed = change["high"] >= -options.largest_loss
    name = "filtered MRR" if metric == MRR else metric.capitalize()
    yield Gate(
        "quality", ALL, passed, change["value"], -options.largest_loss,
        f"{name} {new:.4f} beside {before:.4f} of the current release on the same {details.get('edges', 0):,} "
        f"edges: {change['value']:+.1%} ({options.confidence:.0%} interval {change['low']:+.1%} to "
        f"{change['high']:+.1%})",
    )  # fmt: skip


def _of_drift(options: PromotionConfig, rows: Values) -> Iterator[Gate]:
    limits = options.drift
    known = (
        (
            "departed", limits.largest_departed, "departed_share",
            "{:.1%} of the current release's ids have no training edge any more",
        ),
        ("new", limits.largest_new, "new_share", "{:.1%} of its ids are new"),
        (
            "neighbors", limits.least_neighbors, f"neighbors@{K}",
            f"{{:.1%}} of an id's {K} nearest are its nearest again",
        ),
        ("cosine", limits.least_cosine, "cosine", "{:.3f} is the mean cosine to the earlier vectors"),
    )  # fmt: skip
    for entity in dict.fromkeys(name for kind, name, _ in rows if kind == ENTITY):
        for name, given, metric, text in known:
            limit, value = limit_of(given, entity), _value(rows, entity, metric)
            if limit is not None and value is not None:
                passed = value >= limit if name in ("neighbors", "cosine") else value <= limit
                yield Gate(name, entity, passed, value, limit, f"{entity}: {text.format(value)}")
        limit = limit_of(limits.largest_consumer_loss, entity)
        before, mapped = (_value(rows, entity, metric) for metric in ("consumer_loss", "consumer_loss_mapped"))
        if limit is not None and before is not None and mapped is not None:
            rise = mapped / max(before, 1e-12) - 1
            yield Gate(
                "consumer", entity, rise <= limit, rise, limit,
                f"{entity}: a consumer's log loss is {mapped:.4f} through the map, before {before:.4f} ({rise:+.1%})",
            )  # fmt: skip


def _value(rows: Values, entity: str, metric: str) -> float | None:
    return rows.get((ENTITY, entity, metric), {}).get("value")


def limit_of(limit: float | Mapping[str, float] | None, entity: str) -> float | None:
    """Return the limit for an entity type; None where there is none."""
    return limit.get(entity) if isinstance(limit, Mapping) else limit
