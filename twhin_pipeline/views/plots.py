"""Pictures of tables and runs, as PNG. Each takes plain arrays and returns the file's bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Told apart by people who see colours differently (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
REST = "#B8B8B8"
LEAST_PROBABILITY = 1e-7
"""Drawn in the place of smaller ones, where the scale is that of log-odds."""
MOST_BARS, LONGEST_LABEL = 30, 62
MARKS = (("|", 220.0, 2.4), ("D", 36.0, 0.8), ("o", 46.0, 0.8))
"""Of baselines: shape, size and line width. They differ in shape too, for who sees colours differently."""
INK = "#333333"
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def degrees(counts: Mapping[str, np.ndarray]) -> bytes:
    """Draw how many entities of each type have at least so many edges, both axes logarithmic.

    Args:
        counts: Per entity type, its entities' degrees (int [N]); zeros are left out.
    """
    figure, axes = _figure(6.4, 4.0)
    for colour, (name, degree) in zip(_colours(len(counts)), counts.items(), strict=True):
        descending = np.sort(degree[degree > 0])[::-1]
        if not len(descending):
            continue
        # One point a distinct degree: the number of entities that reach it.
        values, first = np.unique(-descending, return_index=True)
        reached = np.append(first[1:], len(descending))
        label = f"{name} ({len(descending):,})"
        axes.plot(-values, reached, color=colour, label=label, marker="o", markersize=3.0, linewidth=1.4)
    axes.set(xscale="log", yscale="log", xlabel="edges of an entity (at least)", ylabel="entities")
    _log_ticks(axes)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def losses(
    steps: np.ndarray, values: np.ndarray, validation: tuple[np.ndarray, np.ndarray] | None = None, label: str = "loss"
) -> bytes:
    """Draw the training loss by step, and the validation loss beside it.

    Args:
        steps: Steps at which the loss was logged (int [T]).
        values: The loss there (float [T]).
        validation: Steps and losses on the validation set.
        label: The y axis.
    """
    figure, axes = _figure(6.4, 3.6)
    finite = np.isfinite(values)
    axes.plot(steps[finite], values[finite], color=COLOURS[0], linewidth=1.6, label="training")
    if validation is not None and len(validation[0]):
        axes.plot(*validation, color=COLOURS[1], linewidth=1.6, marker="o", markersize=4, label="validation")
        axes.legend(frameon=False, fontsize=9)
    axes.set(xlabel="step", ylabel=label)
    axes.xaxis.set_major_formatter(_THOUSANDS)
    return _png(figure)


def relation_metrics(
    relations: Sequence[str], model: np.ndarray, baselines: Mapping[str, np.ndarray], metric: str
) -> bytes:
    """Draw a metric of each relation as a bar, with a mark for each baseline.

    At most `MOST_BARS` are drawn, the first ones; a line says how many more there are.

    Args:
        relations: Names, in the order of the bars from the top ([R]).
        model: The model's values (float [R]).
        baselines: By name, the values of at most `MARKS` baselines (float [R]; NaN: no mark).
        metric: The x axis.
    """
    more = len(relations) - MOST_BARS
    relations, model = relations[:MOST_BARS], model[:MOST_BARS]
    marks = {name: values[:MOST_BARS] for name, values in baselines.items()}
    labels = [_short(name) for name in relations]
    # Long names take room from the bars, so the figure widens with them.
    figure, axes = _figure(6.4 + 0.05 * max(map(len, labels), default=0), 0.9 + 0.36 * max(2, len(relations)))
    place = np.arange(len(relations))
    bars = axes.barh(place, model, height=0.62, color=COLOURS[0], label="model")
    marked = [
        axes.scatter(values, place, marker=marker, s=size, linewidths=width, color=colour, label=name, zorder=3)
        for colour, (marker, size, width), (name, values) in zip(COLOURS[1:], MARKS, marks.items(), strict=False)
    ]
    for y, value in zip(place, model, strict=True):
        if np.isfinite(value):
            # At the right edge, where no mark can hide it.
            axes.annotate(f"{value:.3f}", (1, y), (4, 0), ("axes fraction", "data"), "offset points", va="center",
                          fontsize=8, color=COLOURS[0], annotation_clip=False)  # fmt: skip
    axes.set_yticks(place, labels, parse_math=False)
    axes.set_ylim(len(relations) - 0.4, -0.6)
    note = f"\nand {more:,} more relations, with fewer edges" if more > 0 else ""
    largest = float(np.nanmax([*model, *(value for values in marks.values() for value in values), 0.0]))
    axes.set(xlabel=metric + note, xlim=(0, max(1e-9, 1.05 * largest)))
    axes.grid(axis="y", visible=False)
    legend = [bars, *marked]
    figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), frameon=False, fontsize=9)
    return _png(figure)


def reliability(predicted: np.ndarray, uncalibrated: np.ndarray, observed: np.ndarray, pairs: np.ndarray) -> bytes:
    """Draw the share of edges among pairs of about the same probability; good probabilities are on the diagonal.

    Args:
        predicted: Mean probability of each bin (float [B]).
        uncalibrated: Mean of sigmoid(score) of the same pairs (float [B]).
        observed: Share of edges among them (float [B]).
        pairs: How many there are (int [B]).
    """
    figure, axes = _figure(5.6, 4.6)
    # The scale has no place for 0 and 1: where a bin has edges only, or none, half a pair stands in.
    share = np.clip(observed, 0.5 / pairs, 1 - 0.5 / pairs)
    predicted = np.clip(predicted, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
    raw = np.clip(uncalibrated, 1e-4, 1 - 1e-4)  # others are drawn at the edge
    every = np.concatenate([share, predicted, raw, [0.01, 0.9]])
    low, high = float(every.min()) / 2, (1 + float(every.max())) / 2
    axes.plot([low, high], [low, high], color=REST, linewidth=1.2, label="exact")
    axes.plot(raw, share, color=COLOURS[1], marker="s", markersize=4, linewidth=1.2, label="sigmoid(score)")
    axes.plot(predicted, share, color=COLOURS[0], marker="o", markersize=5, linewidth=1.6, label="calibrated")
    axes.set(xscale="logit", yscale="logit", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="mean probability of a bin's pairs", ylabel="share of edges among them")
    ticks = [tick for tick in (1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999) if low <= tick <= high]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9, loc="upper left")
    return _png(figure)


def map_2d(points: np.ndarray, groups: Sequence[str], title: str, kind: str) -> bytes:
    """Draw points coloured by group: the six largest groups, the others in grey.

    Args:
        points: Coordinates (float [N, 2]).
        groups: Each point's group ([N]).
        title: What the points are.
        kind: What a group is; the legend's title.
    """
    figure, axes = _figure(6.8, 5.0)
    # A pair of dollar signs would begin a formula.
    names, member = np.unique([str(group).replace("$", r"\$") for group in groups], return_inverse=True)
    order = np.argsort(-np.bincount(member, minlength=len(names)), kind="stable")
    shown = [i for i in order if names[i]][: len(COLOURS) - 1]
    size = float(np.clip(9_000 / max(1, len(points)), 3, 24))
    rest = ~np.isin(member, shown)
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.65}
    if rest.any():
        axes.scatter(*points[rest].T, color=REST, label=f"others ({rest.sum():,})", **style)
    for colour, group in zip(COLOURS, shown, strict=False):
        mine = member == group
        axes.scatter(*points[mine].T, color=colour, label=f"{names[group]} ({mine.sum():,})", **style)
    axes.set(xlabel="first principal component", ylabel="second principal component")
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8.5, title=kind
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([28])  # type: ignore[attr-defined]
            handle.set_alpha(1)
    return _png(figure)


def principal_components(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """Project vectors on their two principal components, by a singular value decomposition.

    Args:
        vectors: float [N, D], with D at least 2.

    Returns:
        Coordinates (float [N, 2]; the largest of each component is positive) and the share of variance they explain.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    # Of the D x D matrix: N may be large.
    spectrum, axes = np.linalg.eigh(centred.T @ centred)
    points = centred @ axes[:, ::-1][:, :2]
    points *= np.sign(points[np.abs(points).argmax(axis=0), [0, 1]] + 1e-300)
    return points, float(spectrum[::-1][:2].sum() / max(spectrum.sum(), 1e-300))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.grid(color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color("#999999")
    axes.tick_params(colors=INK, labelsize=8.5)
    return figure, axes


def _short(name: str) -> str:
    """Cut a long name in the middle: paths differ at their ends."""
    head = LONGEST_LABEL // 3
    return name if len(name) <= LONGEST_LABEL else f"{name[:head]}…{name[head + 1 - LONGEST_LABEL :]}"


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _log_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_major_formatter(_THOUSANDS)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
