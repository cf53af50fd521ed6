"""Pictures are PNG of the size asked for, draw what they are given, and bear odd data."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from twhin_pipeline.views import plots


def pixels(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return imread(io.BytesIO(png), format="png")[..., :3]


def has_colour(image: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(image - wanted).max(axis=-1) < 0.02).any())


def test_degrees_draw_a_line_for_each_entity_type():
    degrees = {name: np.random.default_rng(i).zipf(1.8, 300) for i, name in enumerate(("user", "item"))}
    image = pixels(plots.degrees(degrees))
    assert has_colour(image, plots.COLOURS[0]) and has_colour(image, plots.COLOURS[1])
    assert not has_colour(image, plots.COLOURS[2])


def test_entities_without_edges_leave_an_empty_picture():
    assert not has_colour(pixels(plots.degrees({"user": np.zeros(5, int)})), plots.COLOURS[0])


def test_a_loss_curve_draws_validation_where_there_is_one_and_bears_nan():
    steps, values = np.arange(20), np.append(np.linspace(3, 1, 19), np.nan)
    assert not has_colour(pixels(plots.losses(steps, values)), plots.COLOURS[1])
    assert has_colour(pixels(plots.losses(steps, values, (steps[::5], values[::5]))), plots.COLOURS[1])


def test_relations_have_bars_and_baselines_and_a_missing_baseline_has_none():
    model, none = np.array([0.2, 0.5]), np.array([np.nan, np.nan])
    three = {"popular": np.array([0.1, 0.4]), "item-kNN": np.array([0.3, 0.1]), "ALS": np.array([0.4, 0.45])}
    with_baselines = pixels(plots.relation_metrics(["a", "b"], model, three, "MRR"))
    without = pixels(plots.relation_metrics(["a", "b"], model, dict.fromkeys(three, none), "MRR"))
    alone = plots.relation_metrics(["a", "b"], model, {}, "MRR")
    body = (slice(60, None), slice(None))  # below the legend
    for colour in plots.COLOURS[1:4]:
        assert has_colour(with_baselines[body], colour) and not has_colour(without[body], colour)
        assert not has_colour(pixels(alone), colour)


def test_probabilities_are_drawn_beside_those_without_calibration_also_where_bins_have_edges_only_or_none():
    ends = np.array([0.0, 0.2, 1.0])
    pairs = np.array([9, 9, 9])
    image = pixels(plots.reliability(ends, np.array([0.3, 0.6, 0.9]), ends, pairs))
    assert has_colour(image, plots.COLOURS[0]) and has_colour(image, plots.COLOURS[1])


def test_a_map_colours_the_largest_groups_and_greys_the_rest():
    groups = [name for i, name in enumerate("abcdefgh") for _ in range(40 - i)]
    points = np.random.default_rng(0).normal(size=(len(groups), 2))
    image = pixels(plots.map_2d(points, groups, "points", "letter"))
    assert has_colour(image, plots.COLOURS[5]) and not has_colour(image, plots.COLOURS[6])


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    vectors = np.random.default_rng(0).normal(size=(200, 6)) * [5, 3, 1, 1, 1, 1] + 7
    points, share = plots.principal_components(vectors.astype(np.float32))
    reference = PCA(2).fit(vectors)
    np.testing.assert_allclose(np.abs(points), np.abs(reference.transform(vectors)), atol=1e-4)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum(), rel=1e-5)


def test_equal_vectors_have_a_place_too():
    points, share = plots.principal_components(np.ones((5, 4), np.float32))
    assert np.allclose(points, 0) and share == 0


def test_of_many_relations_the_first_have_bars_and_a_line_tells_the_rest(monkeypatch):
    told: list[Figure] = []
    monkeypatch.setattr(plots, "_png", told.append)
    plots.relation_metrics([f"/r{i}" for i in range(237)], np.linspace(1, 0, 237), {"popular": np.zeros(237)}, "MRR")
    [axes] = told[0].axes
    assert len(axes.patches) == plots.MOST_BARS == len(axes.get_yticklabels())
    assert axes.get_xlabel() == "MRR\nand 207 more relations, with fewer edges"
    assert told[0].get_figheight() < 13


def test_names_of_relations_are_no_formulas_and_long_ones_keep_their_ends():
    long = "/award/award_winner/awards_won./award/award_honor/" + "a" * 90 + "/winner"
    png = plots.relation_metrics(["$\\nothing$", "a$", long], np.ones(3), {"popular": np.zeros(3)}, "MRR")
    assert pixels(png).shape[1] < 1_200
    assert len(plots._short(long)) == plots.LONGEST_LABEL and plots._short(long).endswith("aaa/winner")
    plots.map_2d(np.zeros((2, 2)), ["$\\nothing$", "b"], "points", "kind")
