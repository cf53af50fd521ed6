"""The benchmark of daily retraining: its questions are the same for all variants, its figures are evaluation's."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twhin_pipeline.config import load_config, relations
from twhin_pipeline.embeddings import load_model
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch, train
from twhin_pipeline.training.reporting import SilentReporter
from twhin_pipeline.words import SIDES

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import retraining

pytestmark = pytest.mark.long

DAYS = ("2025-01-01", "2025-01-02", "2025-01-03")
CONFIG: dict[str, Any] = {
    "recipe": "none",
    "model": {
        "embeddings": {
            "tables": [{"name": name, "embedding_dim": 8, "optimizer": {"adagrad": {"lr": 0.3}}} for name in "ab"]
        },
        "relations": [
            {"name": "next", "lhs": "a", "rhs": "a"},
            {"name": "has", "lhs": "a", "rhs": "b", "sides": "rhs"},
        ],
    },
    "train_data": {"global_negatives": 30, "in_batch_negatives": 0, "per_replica_batch_size": 200},
    "validation_data": {"global_negatives": 30, "in_batch_negatives": 0},
    "split": {"test": 0.1},
    "evaluation": {"baselines": ["popularity"], "recall_at": [20], "floors": {"filtered_mrr": 0.99}},
    "promotion": {"largest_loss": 0.9},
    "launch": {"nproc_per_node": 1, "device": "cpu", "threads_per_process": 1, "data_threads": 1},
}
Edge = tuple[str, str, str]


def drawn(day: int) -> set[Edge]:
    """Most edges are those of the first day; each day some are gone, and some are new, also of new ids."""
    always, own = np.random.default_rng(0), np.random.default_rng(day + 1)
    edges = {(f"a{x}", "next", f"a{(x + y) % 60}") for x, y in always.integers(0, 60, (500, 2)) if y}
    edges |= {(f"a{x}", "has", f"b{x % 7}") for x in range(60)}
    kept = {edge for edge in sorted(edges) if own.random() > 0.1}
    more = {(f"a{x}", "next", f"a{y}") for x, y in own.integers(0, 60 + 4 * day, (60, 2)) if x != y}
    return kept | more | {(f"a{60 + x}", "has", f"b{x % 7}") for x in range(4 * day)}


@pytest.fixture
def trained_here() -> Iterator[None]:
    """Trainings run in the test's own process, untracked and silent: torchrun would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        _train_here(patch)
        yield


def _train_here(patch: pytest.MonkeyPatch) -> None:
    def here(config: Any, path: str, overrides: Any, store: Store, snapshot: str) -> None:
        train.run(relations.resolve(load_config(path, overrides), store, snapshot), store, snapshot)

    patch.setenv("TWHIN_NO_TRACKING", "1")
    patch.setattr(train, "make_reporter", lambda rank: SilentReporter())
    patch.setattr(launch, "run", here)


def written(folder: Path) -> Path:
    """Write three days of a small graph, and its configuration; return that one's path."""
    for day, name in enumerate(DAYS):
        columns = [list(column) for column in zip(*sorted(drawn(day)), strict=True)]
        pq.write_table(pa.table(dict(zip(("lhs", "rel", "rhs"), columns, strict=True))), folder / f"{name}.parquet")
    path = folder / "graph.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"source": {"path": "{snapshot}.parquet"}}))
    return path


@dataclass(frozen=True)
class Ran:
    """What the script has made of the small graph: all variants but the short cold one."""

    config: Path
    stores: list[Store]
    report: dict[str, Any]
    printed: str

    def chain(self, most_edges: int | None = None) -> retraining.Chain:
        return retraining.Chain(str(self.config), (), DAYS, most_edges)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("retraining")
    path, home, out = written(folder), folder / "stores", folder / "figures.json"
    given = ["--config", str(path), "--home", str(home), "--json", str(out), "--variants", "0", "1", "3", "4"]
    given += ["--epochs", "4", "--fewer", "2", "--pull", "0.5", "--edges", "0", "--well-known", "a1,a66"]
    printed = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        _train_here(patch)
        assert retraining.main(given) == 0
    stores = [Store(str(home / f"variant-{number}")) for number in range(4)]
    return Ran(path, stores, json.loads(out.read_text()), printed.getvalue())


NAMES = ["cold, 4 epochs", "warm, 4 epochs", "warm, 2 epochs", "warm, 2 epochs, pull 0.5"]


def test_every_variant_is_asked_the_same_and_starts_as_its_name_says(ran):
    first, *later = ran.report["days"]
    assert [(day["variant"], day["snapshot"]) for day in later] == [(name, at) for name in NAMES for at in DAYS[1:]]
    assert (first["snapshot"], first["started_from"], first["drift"]) == (DAYS[0], None, {})
    for day in later:
        before = DAYS[DAYS.index(day["snapshot"]) - 1]
        assert day["epochs"] == int(day["variant"].split()[1])
        assert day["started_from"] == (before if day["variant"].startswith("warm") else None)
        assert day["compared_with"] == before and set(day["drift"]) == {"a", "b"}
        assert list(day["stages"]) == list(retraining.pipeline.STAGES) and day["stages"]["train"] > 0
    for at in DAYS[1:]:
        of_day = [day for day in later if day["snapshot"] == at]
        for kind, count in (("held_out", "edges"), ("held_out", "new_edges"), ("next_edges", "edges")):
            assert len({day[kind].get(count) for day in of_day}) == 1
        assert len({day["held_out"]["mrr"] for day in of_day}) == len(NAMES), "the models differ"
    cosine = [day["drift"]["a"]["cosine"] for day in later if day["snapshot"] == DAYS[1]]
    assert cosine[3] > cosine[2] > cosine[0], "a pull holds more than a warm start alone, and that more than none"


def test_the_tables_show_every_day_and_the_neighbors_through_time(ran):
    for day in ran.report["days"]:
        assert ran.printed.count(f"| {day['variant']} | {day['snapshot']} |") >= 2
    assert "| warm, 2 epochs, pull 0.5 | 2025-01-03 | 2025-01-02 | a |" in ran.printed
    near = ran.report["neighbors"]
    assert [len(near["a66"][at]) for at in DAYS] == [0, 0, 3]
    model = load_model(ran.stores[2].root, DAYS[1])
    assert near["a1"][DAYS[1]] == [name for name, _ in model.neighbors("a", "a1", 3)]
    assert f"| a1 | {', '.join(near['a1'][DAYS[0]])} |" in ran.printed


def test_figures_of_held_out_edges_are_those_that_evaluation_gives_a_warm_model(ran):
    days = [day for day in ran.report["days"] if day["variant"] == "warm, 4 epochs"]
    for day in days:
        details = ran.stores[1].manifest("evaluation", day["snapshot"]).details
        assert details["ancestors"] == DAYS.index(day["snapshot"])
        assert day["held_out"]["edges"] == details["edges"]
        assert day["held_out"]["mrr"] == pytest.approx(details["metrics"]["filtered_mrr"], rel=1e-6)
        assert day["held_out"]["recall"] == pytest.approx(details["metrics"]["recall@20"], rel=1e-6)
    assert any(day["held_out"]["new_edges"] for day in days)


def test_held_out_edges_that_were_trained_on_before_are_not_asked(ran, monkeypatch):
    store = ran.stores[0]
    yesterday, today = (
        {tuple(edge.values()) for edge in store.read("held_out/test", at, ["rel", "lhs", "rhs"]).to_pylist()}
        for at in DAYS[:2]
    )
    assert yesterday & today and today - yesterday
    monkeypatch.setattr(retraining.Asked, "_before", lambda asked: store.files("held_out/test", DAYS[0]))
    with retraining.Asked(ran.chain(), store, DAYS[1]) as asked:
        assert asked.held_out()["edges"] == len(today - yesterday)


def plain_mrr(asked: retraining.Asked, day: int, after: int) -> tuple[int, float]:
    """Rank the edges that are new in the day after, one at a time, by ids."""
    rows = {}
    for entity in asked.trained:
        table = asked.store.read(f"vocabulary/{entity}", asked.snapshot, ["id", "row"]).to_pylist()
        rows[entity] = {one["id"]: one["row"] for one in table if asked.trained[entity][one["row"]]}
    entities = {"next": ("a", "a"), "has": ("a", "b")}

    def known(edges: set[Edge]) -> set[tuple[int, int, int]]:
        return {
            (("next", "has").index(rel), rows[entities[rel][0]][lhs], rows[entities[rel][1]][rhs])
            for lhs, rel, rhs in edges
            if lhs in rows[entities[rel][0]] and rhs in rows[entities[rel][1]]
        }

    true = known(drawn(day)) | known(drawn(after))
    new = sorted(known(drawn(after)) - known(drawn(day)))
    found = []
    for rel, lhs, rhs in new:
        for side in SIDES if rel == 0 else SIDES[1:]:
            of_type = "b" if rel == 1 else "a"
            scores = asked.scores[rel]
            query, target = (rhs, lhs) if side == "lhs" else (lhs, rhs)
            values = scores.compare(
                scores.encode_queries(side, np.array([query])), scores.encode_candidates(side, None)
            )[0].tolist()
            rivals = [
                values[row]
                for row in np.flatnonzero(asked.candidates[of_type].columns >= 0).tolist()
                if row != target and ((rel, row, query) if side == "lhs" else (rel, query, row)) not in true
            ]
            found.append(
                1 / (1 + sum(v > values[target] for v in rivals) + sum(v == values[target] for v in rivals) / 2)
            )
    return len(new), float(np.mean(found))


@pytest.mark.parametrize("day", [0, 1])
def test_edges_of_the_next_snapshot_are_ranked_as_by_a_plain_loop(ran, day):
    with retraining.Asked(ran.chain(), ran.stores[0], DAYS[day]) as asked:
        result = asked.of_next_snapshot()
        edges, mrr = plain_mrr(asked, day, day + 1)
    assert result["edges"] == edges > 20
    assert result["mrr"] == pytest.approx(mrr, rel=1e-5)


def test_a_limit_ranks_so_many_edges_and_the_same_ones_for_every_variant(ran):
    found = []
    for store in ran.stores[:2]:
        with retraining.Asked(ran.chain(12), store, DAYS[1]) as asked:
            found.append((asked.held_out(), asked.of_next_snapshot()))
            drawn_edges = asked._some([{side: np.arange(50) for side in SIDES}] * 2)
            assert sum(len(one["lhs"]) for one in drawn_edges.values()) <= 12
    for kind in (0, 1):
        assert found[0][kind]["edges"] == found[1][kind]["edges"] and 0 < found[0][kind]["edges"] <= 12


def test_the_second_night_has_one_edge_in_a_hundred_changed_and_starts_warm(tmp_path, trained_here, capsys):
    home, out = tmp_path / "nights", tmp_path / "nights.json"
    given = ["--nightly", "5000", "--epochs", "3", "--fewer", "3", "--home", str(home), "--json", str(out)]
    values = [f"--set=launch.{name}" for name in ("device=cpu", "threads_per_process=1", "data_threads=1")]
    assert retraining.main([*given, *values]) == 0
    first, second = (
        {tuple(row.values()) for row in pq.read_table(home / "edges" / f"{at}.parquet").to_pylist()}
        for at in retraining.DAYS
    )
    assert 20 < len(first - second) < 90 and 10 < len(second - first) <= 50
    days = json.loads(out.read_text())["days"]
    assert [(day["epochs"], day["started_from"]) for day in days] == [(3, None), (3, None), (1, "2025-01-01")]
    assert "times; the training alone" in capsys.readouterr().out


def test_what_does_not_fit_is_exit_code_2(tmp_path, capsys):
    home = tmp_path / "used"
    given = ["--config", str(written(tmp_path)), "--home", str(home)]
    assert retraining.main([*given, "--epochs", "2"]) == 2
    assert "--fewer 3: leaves no epoch of 2" in capsys.readouterr().err
    assert retraining.main([*given, "--snapshots", DAYS[0]]) == 2
    assert "needs two or more" in capsys.readouterr().err
    assert retraining.main([*given, "--variants", "9"]) == 2
    assert "--variants: there are 0 to 4" in capsys.readouterr().err
    (home / "file").write_text("")
    assert retraining.main(given) == 2
    assert "is not empty" in capsys.readouterr().err
