"""Small pictures as SVG, of so few characters that Dagster draws them on an asset's page without a click.

`plots.py` draws the large ones. A picture's address in Markdown must have fewer than 1,000 characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from twhin_pipeline.views.plots import COLOURS, LEAST_PROBABILITY, REST

MOST_CHARACTERS = 1_000
CURVE_POINTS, SCATTER_POINTS, GROUPS, BARS = 36, 60, 4, 15
WIDTH, HEIGHT = 99, 60
"""Of the drawing, in its own units: two digits a coordinate."""


def curve(steps: np.ndarray, values: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None = None) -> str:
    """Draw a loss by step, with its first and last value, and the validation loss beside it.

    Args:
        steps: Steps at which the loss was logged (int [T]).
        values: The loss there (float [T]).
        validation: Steps and losses on the validation set.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if not len(values):
        return _svg("")
    second = validation if validation is not None and len(validation[0]) else (np.zeros(0), np.zeros(0))
    every = np.concatenate([values, second[1]])
    low, high, last = float(every.min()), float(every.max()), float(max(steps[-1], *second[0], 1))
    lines = ""
    for colour, (at, loss) in zip(COLOURS, ((steps, values), second), strict=False):
        kept = np.unique(np.linspace(0, len(at) - 1, min(CURVE_POINTS // (1 + len(lines) // 99), len(at))).astype(int))
        x = np.round(WIDTH * at[kept] / last).astype(int)
        y = np.round(HEIGHT - 10 - (HEIGHT - 20) * (loss[kept] - low) / max(high - low, 1e-12)).astype(int)
        if len(kept):
            points = " ".join(f"{a},{b}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
            lines += f"<polyline points='{points}' fill='none' stroke='{colour}'/>"
    first, final = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    text = f"<text x='2' y='5'>{first}</text><text x='{WIDTH}' y='{HEIGHT - 2}' text-anchor='end'>{final}</text>"
    return _svg(lines + text)


def degrees(degree: np.ndarray) -> str:
    """Draw how many entities have at least so many edges, both axes logarithmic, with the most of both.

    Args:
        degree: Each entity's edges (int [N]); zeros are left out.
    """
    descending = np.sort(degree[degree > 0])[::-1]
    if not len(descending):
        return _svg("")
    last, total = float(descending[0]), len(descending)
    wanted = np.unique(np.geomspace(1, last, CURVE_POINTS).astype(np.int64))
    reached = np.searchsorted(-descending, -wanted, side="right")
    x = np.round(2 + (WIDTH - 4) * np.log(wanted) / max(np.log(last), 1e-12)).astype(int)
    y = np.round(8 + (HEIGHT - 16) * (1 - np.log(np.maximum(reached, 1)) / max(np.log(total), 1e-12))).astype(int)
    points = " ".join(f"{a},{b}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    text = f"<text x='2' y='5'>{total}</text><text x='{WIDTH}' y='{HEIGHT - 2}' text-anchor='end'>{int(last)}</text>"
    return _svg(f"<polyline points='{points}' fill='none' stroke='{COLOURS[0]}'/>{text}")


def bars(values: np.ndarray, marks: np.ndarray) -> str:
    """Draw the first values as bars from the left, each with a mark, such as the best baseline's.

    Args:
        values: Not negative (float [R]; NaN: no bar).
        marks: Likewise.
    """
    values, marks = values[:BARS], marks[:BARS]
    known = [value for value in (*values.tolist(), *marks.tolist()) if np.isfinite(value)]
    if not known:
        return _svg("")
    scale, high = (WIDTH - 4) / max(*known, 1e-12), HEIGHT // len(values)
    drawn = f"<path stroke='{COLOURS[0]}' stroke-width='{max(high - 2, 1)}' d='"
    drawn += "".join(f"M0,{high * i + high // 2}h{round(v * scale)}" for i, v in enumerate(values) if np.isfinite(v))
    drawn += f"'/><path stroke='{COLOURS[1]}' stroke-width='2' d='"
    drawn += "".join(f"M{round(v * scale)},{high * i}v{high}" for i, v in enumerate(marks) if np.isfinite(v))
    return _svg(drawn + "'/>")


def reliability(predicted: np.ndarray, observed: np.ndarray, pairs: np.ndarray) -> str:
    """Draw the share of edges among pairs by their probability, both as log-odds, and the diagonal.

    Args:
        predicted: Mean probability of each bin (float [B]).
        observed: Share of edges among its pairs (float [B]).
        pairs: How many pairs it has (int [B]).
    """
    predicted = np.clip(predicted, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    both = np.stack([predicted, np.clip(observed, 0.5 / pairs, 1 - 0.5 / pairs)])
    log_odds = np.log(both) - np.log1p(-both)
    low, high = float(log_odds.min()), float(log_odds.max())
    x, y = np.round(4 + (HEIGHT - 8) * (log_odds - low) / max(high - low, 1e-12)).astype(int)
    points = " ".join(f"{a},{HEIGHT - b}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    line = f"<path d='M4,{HEIGHT - 4}L{HEIGHT - 4},4' stroke='{REST}'/>"
    return _svg(f"{line}<polyline points='{points}' fill='none' stroke='{COLOURS[0]}' stroke-width='2'/>")


def scatter(points: np.ndarray, groups: Sequence[str]) -> str:
    """Draw some of the points, coloured by group: the largest groups, the others in grey.

    Args:
        points: Coordinates (float [N, 2]).
        groups: Each point's group ([N]).
    """
    if not len(points):
        return _svg("")
    names, member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    order = [i for i in np.argsort(-np.bincount(member, minlength=len(names)), kind="stable") if names[i]][:GROUPS]
    kept = np.unique(np.linspace(0, len(points) - 1, min(SCATTER_POINTS, len(points))).astype(int))
    low, high = points.min(axis=0), points.max(axis=0)
    place = (points[kept] - low) / np.maximum(high - low, 1e-12)
    x = np.round(2 + (WIDTH - 4) * place[:, 0]).astype(int)
    y = np.round(HEIGHT - 2 - (HEIGHT - 4) * place[:, 1]).astype(int)
    drawn = ""
    for colour, group in [(REST, None), *zip(COLOURS, order, strict=False)]:
        mine = ~np.isin(member[kept], order) if group is None else member[kept] == group
        if mine.any():
            dots = "".join(f"M{a},{b}z" for a, b in zip(x[mine].tolist(), y[mine].tolist(), strict=True))
            drawn += f"<path d='{dots}' stroke='{colour}'/>"
    return _svg(f"<g stroke-width='3' stroke-linecap='round'>{drawn}</g>")


DRIFT_BARS = (
    ("cosine", "cosine"),
    ("neighbors@10", "same neighbors"),
    ("consumer_auc", "consumer AUC, old vectors"),
    ("consumer_auc_new", "new vectors"),
    ("consumer_auc_mapped", "mapped vectors"),
)
"""What the picture of drift shows of an entity type: metric and label."""
DRIFT_TYPES = 3


def drift(types: Sequence[Mapping[str, Any]]) -> str:
    """Draw bars from 0 to 1 (the whole width) for each of `DRIFT_BARS`, one for each of the largest entity types.

    Behind the label are the bars' values, in the order of the bars.

    Args:
        types: By entity type `name`, `kept` and the metrics that were measured.
    """
    largest = sorted(types, key=lambda row: -float(row.get("kept", 0)))[:DRIFT_TYPES]
    drawn = ""
    for place, (metric, label) in enumerate(DRIFT_BARS):
        if any(row.get(metric) is not None for row in largest):
            values = " ".join(_decimal(row.get(metric)) for row in largest)
            drawn += f"<text y='{11 * place + 4}'>{label} {values}</text>"
    for number, (row, colour) in enumerate(zip(largest, COLOURS, strict=False)):
        measured = [(place, row[metric]) for place, (metric, _) in enumerate(DRIFT_BARS) if row.get(metric) is not None]
        lines = "".join(
            f"M0,{11 * place + 6 + 2 * number}h{round(WIDTH * min(max(float(value), 0), 1))}"
            for place, value in measured
        )
        drawn += f"<path d='{lines}' stroke='{colour}'/>"
        drawn += f"<text x='{number * WIDTH // DRIFT_TYPES}' y='59' fill='{colour}'>{_short(row['name'])}</text>"
    return _svg(f"<g stroke-width='1.5'>{drawn}</g>", 4)


def _decimal(value: float | None) -> str:
    """Return a figure of two decimals, without the 0 before them."""
    return "–" if value is None else f"{float(value):.2f}".replace("0.", ".", 1).replace("1.00", "1")


def _short(name: str) -> str:
    """Return the beginning of a name that has 12 characters, or fewer where an address writes them with many."""
    name = name[:12]
    while len(quote(escape(name))) > 24:
        name = name[:-1]
    return escape(name)


def _svg(inner: str, letters: int = 5) -> str:
    size = f"width='{4 * WIDTH}' height='{4 * HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'"
    return f"<svg xmlns='http://www.w3.org/2000/svg' {size} font-size='{letters}'>{inner}</svg>"
