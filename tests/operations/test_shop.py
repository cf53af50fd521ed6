"""A generated shop: the same files for a seed, drawn from the truth that is written beside them, and ready to run."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import load_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, source
from twhin_pipeline.operations.shop import AFTER, OUTSIDE, UNKNOWN_EVENT, generate_shop, load_truth, oracle_scores
from twhin_pipeline.store import Store

SMALL = {"users": 300, "products": 100, "communities": 5, "events_per_user": 30.0}


def read(folder, name="events"):
    """Return the columns of a file as lists."""
    text = csv.ConvertOptions(strings_can_be_null=True)
    path = Path(folder) / f"{name}.parquet"
    table = pq.read_table(path) if path.exists() else csv.read_csv(path.with_suffix(".csv"), convert_options=text)
    return table.to_pydict()


def events(folder):
    """Return the number of the user and of the product of each clean event, int64 `[E]`, and the events' types."""
    log = read(folder)
    rows = zip(log["user_id"], log["product_id"], log["event_type"], strict=True)
    clean = [row for row in rows if None not in row and row[2] != UNKNOWN_EVENT]
    user, product = (np.array([int(row[at].lstrip("uSKU_-")) for row in clean]) for at in (0, 1))
    return user, product, np.array([row[2] for row in clean])


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_shop(f"{tmp_path}/{name}", **SMALL, seed=seed)
    for file in ("events.csv", "follows.csv", "truth.npz"):
        first, again, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == again and first != other, file


def test_csv_and_parquet_hold_the_same_rows(tmp_path):
    made = [generate_shop(f"{tmp_path}/{kind}", **SMALL, format=kind) for kind in ("csv", "parquet")]
    for name in ("events", "follows"):
        assert read(tmp_path / "csv", name) == read(tmp_path / "parquet", name)
    assert made[0].events == made[1].events == len(read(tmp_path / "csv")["user_id"])
    assert made[0].follows == len(read(tmp_path / "csv", "follows")["follower"])


def test_the_log_is_in_order_of_time_within_the_days_asked_for_and_each_step_follows_its_view(tmp_path):
    generate_shop(f"{tmp_path}", **SMALL, days=3, start="2024-02-28", dirty=0.0, events=dict.fromkeys(AFTER, 0.5))
    log = read(tmp_path)
    times = log["event_time"]
    assert times == sorted(times)
    assert times[0] >= datetime(2024, 2, 28) and times[-1] < datetime(2024, 3, 2)
    assert datetime(2024, 3, 2) - times[-1] < timedelta(hours=2)
    seen = set()
    for kind, user, product in zip(log["event_type"], log["user_id"], log["product_id"], strict=True):
        assert AFTER[kind] is None or (AFTER[kind], user, product) in seen
        seen.add((kind, user, product))
    assert {kind for kind, _, _ in seen} == set(AFTER)


def test_every_user_has_an_event_and_their_mean_number_is_the_one_asked_for(tmp_path):
    generate_shop(f"{tmp_path}", users=4000, products=50, communities=5, events_per_user=20.0, sigma=1.0, dirty=0.0)
    count = np.bincount(events(tmp_path)[0], minlength=4000)
    assert len(count) == 4000 and count.min() >= 1
    assert count.mean() == pytest.approx(20, rel=0.08)
    assert np.log(count[count > 3]).std() == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize(("exponent", "background", "communities"), [(1.0, 0.15, 5), (0.0, 0.6, 3), (1.5, 0.0, 1)])
def test_events_are_drawn_with_the_probabilities_that_the_oracle_gives(tmp_path, exponent, background, communities):
    generate_shop(
        f"{tmp_path}", users=20, products=30, communities=communities, events_per_user=20_000.0, sigma=0.0,
        exponent=exponent, background=background,
    )  # fmt: skip
    truth = load_truth(f"{tmp_path}/truth.npz")
    user, product, kind = events(tmp_path)
    for name in ("view", "buy"):
        scores = oracle_scores(truth, np.arange(20), name)
        assert scores.sum(1) == pytest.approx(1)
        drawn = np.zeros((20, 30))
        np.add.at(drawn, (user[kind == name], product[kind == name]), 1)
        expected = scores * drawn.sum(1, keepdims=True)
        # The sum of squares of standardized counts is chi-square: mean and variance follow its degrees of freedom.
        used = expected > 5
        squares = ((drawn - expected) ** 2 / np.where(used, expected, 1))[used].sum()
        assert abs(squares - used.sum()) < 5 * np.sqrt(2 * used.sum())
        assert drawn[scores == 0].sum() == 0


def test_the_oracle_is_the_formula_of_the_plain_loop(tmp_path):
    generate_shop(f"{tmp_path}", **SMALL)
    truth = load_truth(f"{tmp_path}/truth.npz")
    users = np.array([7, 250, 7])
    for event in ("view", "cart"):
        found = oracle_scores(truth, users, event)
        for row, user in zip(found, users, strict=True):
            one, other = truth.user_communities[user]
            scores = []
            for community, popularity in zip(truth.product_community, truth.popularity, strict=True):
                chance = truth.background / 5
                chance += (1 - truth.background) * truth.mixture[user] * (community == one)
                chance += (1 - truth.background) * (1 - truth.mixture[user]) * (community == other)
                if event == "cart" and community not in (one, other):
                    chance *= OUTSIDE
                scores.append(chance * popularity / truth.popularity[truth.product_community == community].sum())
            assert row == pytest.approx(np.array(scores) / sum(scores))


def test_popularity_falls_with_the_exponent_asked_for_and_zero_is_flat(tmp_path):
    for exponent in (0.0, 1.3):
        generate_shop(f"{tmp_path}/{exponent}", **SMALL, exponent=exponent)
        popularity = np.sort(load_truth(f"{tmp_path}/{exponent}/truth.npz").popularity)[::-1]
        assert popularity == pytest.approx(np.arange(1, 101) ** -exponent)


def test_conversions_have_the_probabilities_asked_for_and_are_rarer_outside_a_users_communities(tmp_path):
    generate_shop(f"{tmp_path}", **{**SMALL, "events_per_user": 400.0}, events={"view": None, "cart": 0.4, "buy": 0.5})
    truth = load_truth(f"{tmp_path}/truth.npz")
    user, product, kind = events(tmp_path)
    inside = (truth.product_community[product][:, None] == truth.user_communities[user]).any(1)
    count = {name: (np.sum((kind == name) & inside), np.sum((kind == name) & ~inside)) for name in ("view", "cart")}
    assert count["cart"][0] / count["view"][0] == pytest.approx(0.4, abs=0.01)
    assert count["cart"][1] / count["view"][1] == pytest.approx(0.4 * OUTSIDE, abs=0.01)
    assert np.sum(kind == "buy") / sum(count["cart"]) == pytest.approx(0.5, abs=0.01)


def test_one_event_type_is_enough_and_a_type_whose_step_before_is_missing_follows_the_one_before_that(tmp_path):
    generate_shop(f"{tmp_path}/one", **SMALL, events={"buy": None})
    assert set(events(tmp_path / "one")[2]) == {"buy"}
    generate_shop(f"{tmp_path}/two", **SMALL, events={"buy": 1.0, "view": None}, background=0.0)
    kind = events(tmp_path / "two")[2]
    assert np.sum(kind == "buy") == pytest.approx(np.sum(kind == "view"), rel=0.02)


def test_dirty_rows_have_the_share_asked_for_and_zero_makes_none(tmp_path):
    generate_shop(f"{tmp_path}/dirty", **{**SMALL, "events_per_user": 200.0}, dirty=0.07)
    log = read(tmp_path / "dirty")
    rows = len(log["user_id"])
    assert log["user_id"].count(None) / rows == pytest.approx(0.03, rel=0.2)
    assert log["product_id"].count(None) / rows == pytest.approx(0.02, rel=0.2)
    assert log["event_type"].count(UNKNOWN_EVENT) / rows == pytest.approx(0.02, rel=0.2)
    generate_shop(f"{tmp_path}/clean", **SMALL, dirty=0.0)
    log = read(tmp_path / "clean")
    assert None not in log["user_id"] + log["product_id"] and UNKNOWN_EVENT not in log["event_type"]


def test_users_follow_others_mostly_of_their_first_community_each_once_and_never_themselves(tmp_path):
    generate_shop(f"{tmp_path}", users=2000, products=50, communities=10, follows_per_user=6.0)
    home = load_truth(f"{tmp_path}/truth.npz").user_communities[:, 0]
    names = read(tmp_path, "follows")
    pairs = np.array([[int(name[2:]) for name in names[side]] for side in ("follower", "followee")]).T
    assert len(np.unique(pairs, axis=0)) == len(pairs) == pytest.approx(12_000, rel=0.05)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert (home[pairs[:, 0]] == home[pairs[:, 1]]).mean() == pytest.approx(5 / 6 + 1 / 60, abs=0.02)


def test_follows_and_truth_may_be_left_out(tmp_path):
    made = generate_shop(f"{tmp_path}", **SMALL, follows_per_user=0.0, truth=False)
    assert made.follows == 0
    assert {path.name for path in tmp_path.iterdir()} == {"events.csv", "twhin.yaml"}


def test_three_hundred_communities_each_have_a_product(tmp_path):
    generate_shop(f"{tmp_path}", **{**SMALL, "products": 300, "communities": 300})
    assert sorted(load_truth(f"{tmp_path}/truth.npz").product_community) == list(range(300))


def test_the_configuration_beside_it_reads_the_log_and_rejects_the_dirty_rows_alone(tmp_path):
    made = generate_shop(f"{tmp_path}/shop", **SMALL)
    config = load_config(made.config)
    (snapshot,) = source.find_snapshots(config)
    manifest = raw_edges.ingest(config, Store(f"{tmp_path}/home"), snapshot)
    clean = len(events(tmp_path / "shop")[0])
    assert manifest.details["read"] - manifest.details["rejected"] == clean + made.follows
    assert manifest.details["edges_per_relation"]["follows"] == made.follows
    assert config.split.relations == ["view", "cart", "buy"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"users": 1}, "users must be between 2 and 100000000, got 1"),
        ({"communities": 301, "products": 400}, "communities must be between 1 and 300, got 301"),
        ({"communities": 200}, r"communities \(200\) must be at most products \(100\)"),
        ({"background": 1.5}, "background must be between 0 and 1, got 1.5"),
        ({"exponent": float("nan")}, "exponent must be between 0 and 10, got nan"),
        ({"events": {}}, "at least one event type"),
        ({"events": {"veiw": None}}, "unknown event type 'veiw'; did you mean 'view'"),
        ({"events": {"view": None, "buy": 1.5}}, "the probability of buy must be above 0 and at most 1, got 1.5"),
        ({"format": "tsv"}, "format must be csv or parquet, got 'tsv'"),
        ({"start": "yesterday"}, "start must be a date"),
        ({"seed": -1}, "seed must be between 0"),
    ],
)
def test_an_argument_out_of_range_is_one_clear_error_and_nothing_is_written(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        generate_shop(f"{tmp_path}/shop", **{**SMALL, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_shop_that_its_options_describe(tmp_path):
    options = "--users 50 --products 20 --communities 2 --days 5 --events view,cart=0.5 --follows-per-user 0 --seed 4"
    options += " --sigma 0.1 --exponent 0.5 --background 0.2 --events-per-user 9 --dirty 0 --start 2024-01-01"
    command = [sys.executable, "-m", "twhin_pipeline.cli", "generate", f"{tmp_path}/cli", "--shape", "shop"]
    done = subprocess.run([*command, *options.split(), "--format", "parquet"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = generate_shop(
        f"{tmp_path}/api", users=50, products=20, communities=2, days=5, events={"view": None, "cart": 0.5},
        follows_per_user=0.0, seed=4, sigma=0.1, exponent=0.5, background=0.2, events_per_user=9.0, dirty=0.0,
        start="2024-01-01", format="parquet",
    )  # fmt: skip
    assert read(tmp_path / "cli") == read(tmp_path / "api")
    assert f"{made.events:,} events, 0 follows; next: twhin run --config {tmp_path}/cli/twhin.yaml" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shape shop --within 0.5 --like x.yaml", "--shape shop does not use --within, --like"),
        ("--days 5", "--shape graph does not use --days"),
        ("--shape shop --events view=often", "--events: 'view=often' must look like cart=0.12"),
    ],
)
def test_an_option_of_the_other_shape_or_of_no_number_is_refused(tmp_path, options, message, capsys):
    assert run_arguments(["generate", f"{tmp_path}/x", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_defaults_that_the_help_tells_are_those_of_the_function(capsys):
    run_arguments(["generate", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    defaults = {name: p.default for name, p in inspect.signature(generate_shop).parameters.items()}
    for name in ("users", "communities", "exponent", "products", "days", "events_per_user", "sigma", "background"):
        text = words.split(f"--{name.replace('_', '-')} ")[1].split("Default: ")[1].split(". ")[0]
        stated = text.split("shop ")[-1].replace(",", "").rstrip(".")
        assert json.loads(stated) == defaults[name], name
