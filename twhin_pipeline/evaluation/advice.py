"""Advice: says in words where the model is below a baseline, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twhin_pipeline.evaluation.results import ALL, MOST_FACTORS, Comparison

if TYPE_CHECKING:
    from twhin_pipeline.config import TwhinConfig

NAMES = {"popularity": "popularity", "item_knn": "item-kNN", "als": "ALS"}
MOST_LINES = 10
"""Relations with a line of their own."""
SEARCH = "twhin run --tune 10"
"""A search of ten minutes over the recipe's values."""
AHEAD = 1.05
"""So many times ALS's figure is far ahead of it."""
DECISIVE = ("model.comparator", "model.temperature", "loss.", "negatives.", "train_data.", "model.embeddings.tables")
"""Fields of a recipe that decide how good a model is; the configuration's own values may stand in their way."""


def advice(comparisons: Sequence[Comparison], config: TwhinConfig, model: Mapping[str, Any]) -> list[str]:
    """Say where the model is below a baseline by more than noise, and what to try.

    Args:
        comparisons: The model beside the baselines, as `figures.comparisons` returns them.
        config: The configuration that the model was trained with, the recipe's values filled in.
        model: The details of the model's manifest: `chosen_epoch`, `chosen_step`, `recipe`.

    Returns:
        A sentence for each relation, the largest first (and for all together), then one with remedies; nothing where
        the model is below none.
    """
    # Of one relation, all together say the same once more.
    alone = len(comparisons) == 2
    below = [one for one in comparisons if one.better and not (alone and one.relation == ALL)]
    if not below:
        return []
    lines = [_below(one) for one in below[:MOST_LINES]]
    if len(below) > MOST_LINES:
        lines.append(f"{len(below) - MOST_LINES:,} more relations are below a baseline; `twhin metrics` shows them")
    return [*lines, "Try: " + "; ".join(_remedies(below, config, model)) + "."]


def _below(one: Comparison) -> str:
    """Compare one relation's figures in a sentence."""
    name = "all relations" if one.relation == ALL else one.relation
    metric = title(one.metric)
    better = one.better
    ours = {one.model(baseline) for baseline in better}
    if len(ours) == 1:
        others = _listed([f"{NAMES[baseline]}'s {figure:.3f}" for baseline, figure in better.items()])
        return f"{name}: the model's {metric} of {ours.pop():.3f} is below {others}"
    others = _listed([f"{NAMES[b]}'s {figure:.3f} (the model's {one.model(b):.3f})" for b, figure in better.items()])
    return f"{name}: the model's {metric} is below {others}"


def title(metric: str) -> str:
    """Return a metric's name in prose."""
    name, at, k = metric.partition("@")
    words = {"recall": "Recall", "ndcg": "NDCG", "filtered_mrr": "filtered MRR", "filtered_hits": "Hits"}
    return words.get(name, name) + at + k


def _remedies(below: Sequence[Comparison], config: TwhinConfig, model: Mapping[str, Any]) -> list[str]:
    """Return what may help, the likeliest first."""
    remedies = []
    recipe = model.get("recipe") or {}
    kept = [
        value["path"]
        for value in recipe.get("values", [])
        if not value["chosen"] and value["path"].startswith(DECISIVE)
    ]
    if recipe.get("name") == "none" and config.recipe == "none":
        remedies.append("the recipe for such a graph (leave out recipe: none)")
    elif kept:
        remedies.append(f"the recipe's own values: leave {_listed(kept)} out of the configuration")
    by_popularity = config.train_data.in_batch_negatives > 0 or (
        config.train_data.global_negatives != 0 and config.negatives.degree_share > 0
    )
    if by_popularity and not config.loss.log_q and any("popularity" in one.better for one in below):
        remedies.append(
            "uniform negatives (train_data.in_batch_negatives: 0, negatives.degree_share: 0) or loss.log_q: true, "
            "since negatives in proportion to popularity push popular entities down"
        )
    epochs, steps = config.training.num_epochs, config.training.num_train_steps
    chosen, step = model.get("chosen_epoch"), model.get("chosen_step")
    if step is not None and step >= steps:
        remedies.append(
            f"more steps, such as --set training.num_train_steps={2 * steps}: this number ended the training"
        )
    elif chosen is None or chosen >= epochs:
        remedies.append(
            f"more epochs, such as --set training.num_epochs={2 * epochs}: the last one was the best so far"
        )
    dim = config.model.embedding_dim
    if dim <= MOST_FACTORS and any(_needs_dimensions(one) for one in below):
        remedies.append(
            f"twice the dimension (embedding_dim: {2 * dim} of the tables): item-kNN, which has none, is ahead of ALS "
            f"with {dim}, as where entities form more groups than {dim} numbers tell apart"
        )
    remedies.append(f"other settings, by a search: {SEARCH}")
    if any(name != "popularity" for one in below for name in one.better):
        remedies.append(
            "more data: a longer range of dates, or more relations between the same entities. Where item-kNN or ALS "
            "stays ahead, it is the better recommender for that relation"
        )
    return remedies


def _needs_dimensions(one: Comparison) -> bool:
    """Tell whether item-kNN is ahead of the model, and of ALS of the model's dimension by far."""
    als = one.baselines.get("als")
    return als is not None and one.better.get("item_knn", 0.0) > AHEAD * als


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
