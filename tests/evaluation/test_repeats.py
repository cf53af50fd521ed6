"""Edges that happen again are measured as by a plain loop, beside the test and never mixed with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small_store
from small_store import NUM, RELATIONS, SNAPSHOT

from twhin_pipeline.checks import checks
from twhin_pipeline.config import TwhinConfig, parse_config
from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate

ASKED = {"strategy": "temporal", "repeats": True}


def config_of(split, **options) -> TwhinConfig:
    data = small_store.config(evaluation={"recall_at": [3, 10], **options}).model_dump(exclude_none=True)
    data["source"]["columns"]["time"] = "at"
    return parse_config({**data, "split": split})


def made(tmp_path, split=None, chosen=60, **options):
    """Return a small store some of whose training edges happen again, and these."""
    small = small_store.make(tmp_path, config=config_of(split or ASKED, **options))
    train = small.edges["train"]
    again = train[np.random.default_rng(3).permutation(len(train))[:chosen]]
    again = again[again[:, 1] != 2]
    small_store.write_edges(small.store, "held_out/repeats", again)
    return small, again


def rows_of(small):
    return {(r["relation"], r["metric"]): r for r in small.store.read("evaluation", SNAPSHOT).to_pylist()
            if r["side"] == "rhs" and r["metric"].startswith("repeat_")}  # fmt: skip


def by_loop(again, score, k):
    """Return recall@k and NDCG@k of each head and relation, every entity a candidate."""
    found = {}
    for lhs, rel in sorted({(int(lhs), int(rel)) for lhs, rel, _ in again}):
        tails = {int(edge[2]) for edge in again if edge[0] == lhs and edge[1] == rel}
        size = NUM[list(RELATIONS.values())[rel][1]]
        order = sorted(range(size), key=lambda tail: -score(rel, lhs, tail))
        places = [place for place, tail in enumerate(order) if tail in tails]
        gain = sum(1 / math.log2(place + 2) for place in places if place < k)
        ideal = sum(1 / math.log2(place + 2) for place in range(min(len(tails), k)))
        found.setdefault(list(RELATIONS)[rel], []).append(
            (sum(place < k for place in places) / len(tails), gain / ideal)
        )
    return found


def test_repeats_are_ranked_among_all_entities_as_by_a_plain_loop(tmp_path):
    small, again = made(tmp_path)
    manifest = evaluate(small.config, small.store, SNAPSHOT)
    rows = rows_of(small)
    names = ["likes", "follows"]
    assert {name for name, _ in rows} == {*names, "all"}
    for k in (3, 10):
        each = by_loop(again, lambda rel, lhs, rhs: small_store.score(small, rel, lhs, rhs), k)
        for name in (*names, "all"):
            expected = np.array(each[name] if name != "all" else [one for n in names for one in each[n]])
            assert rows[name, f"repeat_recall@{k}"]["value"] == pytest.approx(expected[:, 0].mean())
            assert rows[name, f"repeat_ndcg@{k}"]["value"] == pytest.approx(expected[:, 1].mean())
            assert 0 <= rows[name, f"repeat_recall@{k}"]["baseline"] <= 1
    assert rows["all", "repeat_recall@3"]["edges"] == len(again)
    assert manifest.parents["held_out/repeats"] == small.store.manifest("held_out/repeats", SNAPSHOT).version
    assert not [metric for metric in manifest.details["metrics"] if metric.startswith("repeat")]
    assert checks.run("metrics_sound", small.config, small.store, SNAPSHOT, "evaluation").passed


def test_the_rows_of_the_test_are_the_same_whether_repeats_are_measured_or_not(tmp_path):
    small, _ = made(tmp_path / "a")
    plain, _ = made(tmp_path / "b", split={"strategy": "temporal"})
    for one in (small, plain):
        evaluate(one.config, one.store, SNAPSHOT)
    assert not rows_of(plain)
    tables = [one.store.read("evaluation", SNAPSHOT).to_pylist() for one in (small, plain)]
    assert [row for row in tables[0] if not row["metric"].startswith("repeat_")] == tables[1]


def test_some_heads_stand_for_all_and_without_recall_or_repeats_there_are_no_rows(tmp_path):
    small, again = made(tmp_path / "a", max_edges=5)
    evaluate(small.config, small.store, SNAPSHOT)
    likes = sum(again[:, 1] == 0)
    assert 0 < rows_of(small)["likes", "repeat_recall@3"]["edges"] <= 5 < likes
    for name, options in (("b", {"recall_at": []}), ("c", {"chosen": 0})):
        none, _ = made(tmp_path / name, **options)
        evaluate(none.config, none.store, SNAPSHOT)
        assert not rows_of(none)


def test_repeats_that_were_not_sampled_are_asked_for_by_name(tmp_path):
    small = small_store.make(tmp_path, config=config_of(ASKED))
    with pytest.raises(UserError, match=r"no table held_out/repeats .*twhin sample"):
        evaluate(small.config, small.store, SNAPSHOT)


@pytest.mark.parametrize("asked", [True, False])
def test_dagster_has_the_table_and_its_checks_only_where_it_is_asked_for(asked):
    import dagster as dg

    from twhin_pipeline._dagster.assets import training_set

    config = config_of(ASKED if asked else {"strategy": "temporal"})
    made = training_set.make(config, dg.StaticPartitionsDefinition([SNAPSHOT]))
    keys = {key.to_user_string() for one in made if not isinstance(one, dg.AssetChecksDefinition) for key in one.keys}
    named = {spec.name for one in made if isinstance(one, dg.AssetChecksDefinition) for spec in one.check_specs}
    assert ("held_out/repeats" in keys) == ("repeats_trained" in named) == asked
