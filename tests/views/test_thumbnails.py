"""Small pictures are valid SVG and, as an address in Markdown, short enough for Dagster to draw them on the page."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from twhin_pipeline._dagster.assets.metadata import thumbnail
from twhin_pipeline.views import thumbnails

RNG = np.random.default_rng(0)


def curve(steps: int, evaluations: int) -> str:
    at = np.arange(1, steps + 1) * 1_000
    validation = np.linspace(1_000, 1_000 * steps, evaluations), RNG.uniform(0.001, 9_999, evaluations)
    return thumbnails.curve(at, RNG.uniform(1e-7, 12_345, steps), validation)


def scatter(points: int, groups: int) -> str:
    names = [f"$group & <{i}>" for i in RNG.integers(0, groups, points)]
    return thumbnails.scatter(RNG.normal(size=(points, 2)), names)


def entity_type(name: str, kept: int, value: float) -> dict[str, Any]:
    return {"name": name, "kept": kept} | {metric: value for metric, _ in thumbnails.DRIFT_BARS}


PICTURES = {
    "no drift": thumbnails.drift([]),
    "drift of one type without a consumer": thumbnails.drift([{"name": "user", "kept": 3, "cosine": 0.5}]),
    "drift of many types": thumbnails.drift([entity_type(f"entity_type_{i}", i, 1.0) for i in range(9)]),
    "drift of many types that changed": thumbnails.drift([entity_type(f"entity_type{i}", i, -0.123) for i in range(9)]),
    "drift of types in any writing": thumbnails.drift(
        [entity_type("利用者と商品と店舗の一覧表", i, 1.0) for i in range(9)]
    ),
    "drift of types that need escapes": thumbnails.drift([entity_type("<&>" * 9, i, 1.0) for i in range(9)]),
    "no degree": thumbnails.degrees(np.zeros(3, np.int64)),
    "one degree": thumbnails.degrees(np.ones(3, np.int64)),
    "degrees of a large graph": thumbnails.degrees((1e8 / RNG.uniform(1, 1e8, 100_000)).astype(np.int64)),
    "no bar": thumbnails.bars(np.zeros(0), np.zeros(0)),
    "unknown bars": thumbnails.bars(np.array([np.nan]), np.array([np.nan])),
    "bars of zero": thumbnails.bars(np.zeros(2), np.zeros(2)),
    "many bars": thumbnails.bars(RNG.uniform(size=237), RNG.uniform(size=237)),
    "one bin": thumbnails.reliability(np.array([0.1]), np.array([0.2]), np.array([9])),
    "bins without edges, and of edges only": thumbnails.reliability(
        np.array([0.0, 0.5, 1.0]), np.array([0.0, 0.0, 1.0]), np.array([9, 9, 9])
    ),
    "bins of all probabilities": thumbnails.reliability(
        np.sort(RNG.uniform(size=15)), np.sort(RNG.uniform(size=15)), np.full(15, 10**6)
    ),
    "no loss": curve(0, 0),
    "one loss": curve(1, 0),
    "a long training": curve(5_000, 300),
    "no point": scatter(0, 1),
    "one point": scatter(1, 1),
    "one group": scatter(4_000, 1),
    "many groups": scatter(4_000, 40),
}


@pytest.mark.parametrize("svg", PICTURES.values(), ids=PICTURES)
def test_a_picture_is_drawn_and_short_enough(svg):
    ElementTree.fromstring(svg)
    assert len(thumbnail(svg, "map by commonest neighbour type").value) < thumbnails.MOST_CHARACTERS


def test_a_curve_has_the_first_and_the_last_loss_and_the_validation_beside_it():
    svg = thumbnails.curve(np.array([1, 2, 3]), np.array([2.5, np.nan, 0.25]), (np.array([2, 3]), np.array([1.0, 0.5])))
    tree = ElementTree.fromstring(svg)
    assert [one.text for one in tree.iter("{http://www.w3.org/2000/svg}text")] == ["2.5", "0.25"]
    training, validation = (one.get("points") for one in tree.iter("{http://www.w3.org/2000/svg}polyline"))
    assert training is not None and len(training.split()) == 2, "a loss that is no number is left out"
    assert validation is not None and len(validation.split()) == 2


def test_a_map_colours_the_largest_groups_and_draws_the_rest_in_grey():
    groups = [name for i, name in enumerate("abcdef") for _ in range(10 - i)] + [""] * 9
    svg = thumbnails.scatter(RNG.normal(size=(len(groups), 2)), groups)
    colours = [one.get("stroke") for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")]
    assert colours == [thumbnails.REST, *thumbnails.COLOURS[: thumbnails.GROUPS]]


def bars_of(svg: str) -> dict[str, list[str]]:
    """Return the lengths of the bars by the name of the entity type, which has the bars' colour."""
    tree = ElementTree.fromstring(svg)
    name = "{http://www.w3.org/2000/svg}"
    lengths = {one.get("stroke"): re.findall(r"h(\d+)", one.get("d") or "") for one in tree.iter(f"{name}path")}
    return {str(one.text): lengths[one.get("fill")] for one in tree.iter(f"{name}text") if one.get("fill")}


def test_a_bar_of_drift_is_as_long_as_its_value_and_the_largest_types_have_some():
    whole = thumbnails.WIDTH
    rows = [
        {"name": "shop", "kept": 5, "cosine": 1.0},
        {"name": "item", "kept": 60, "cosine": 0.5, "neighbors@10": 0.25, "consumer_auc": 1.0},
        {"name": "user", "kept": 90, "cosine": -0.5, "neighbors@10": 1.0, "consumer_auc": 1.2},
        {"name": "store", "kept": 4, "cosine": 1.0},
    ]
    svg = thumbnails.drift(rows)
    assert bars_of(svg) == {
        "user": ["0", str(whole), str(whole)],
        "item": [str(round(whole / 2)), str(round(whole / 4)), str(whole)],
        "shop": [str(whole)],
    }
    assert ">cosine -.50 .50 1</text>" in svg and ">same neighbors 1 .25 –</text>" in svg
    assert "consumer AUC, old vectors" in svg and "mapped" not in svg, "what nobody measured has no label"


def test_bars_and_texts_of_drift_are_each_in_a_place_of_its_own():
    rows = [entity_type(f"type_{i}", i, 0.5) for i in range(thumbnails.DRIFT_TYPES)]
    tree = ElementTree.fromstring(thumbnails.drift(rows))
    name = "{http://www.w3.org/2000/svg}"
    places = [int(y) for one in tree.iter(f"{name}path") for y in re.findall(r"M0,(\d+)h", one.get("d") or "")]
    baselines = [int(one.get("y") or 0) for one in tree.iter(f"{name}text") if not one.get("fill")]
    assert len(places) == len(set(places)) == len(rows) * len(thumbnails.DRIFT_BARS)
    for baseline in baselines:  # letters are 4 high, and some reach below their line
        assert not [y for y in places if baseline - 4 < y < baseline + 1]


def test_degrees_fall_from_all_entities_to_the_best_connected():
    svg = thumbnails.degrees(np.array([1, 1, 1, 2, 100]))
    assert ">5</text>" in svg and ">100</text>" in svg and "2,8 " in svg


def test_a_bar_is_as_long_as_its_value_and_its_mark_is_at_the_baselines():
    svg = thumbnails.bars(np.array([1.0, 0.5]), np.array([0.5, np.nan]))
    full = thumbnails.WIDTH - 4
    assert (
        f"h{full}M" in svg and f"h{round(full / 2)}'" in svg and svg.count("v") >= 1 and f"M{round(full / 2)},0v" in svg
    )
