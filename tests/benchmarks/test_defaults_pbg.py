"""PyTorch-BigGraph beside our figures: its vectors are ranked as ours are; a failure is a line, and no column."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import small_store
from plain_evaluation import loop, make
from small_store import DIM, NUM, RELATIONS, SNAPSHOT, Small

from twhin_pipeline.errors import UserError
from twhin_pipeline.evaluation.evaluate import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import default_graphs
import defaults
import defaults_pbg
from default_graphs import ALL, MRR, RECALL, Graph
from defaults import Figure, Run

K = 20
STAND_IN = """
import json, sys
from pathlib import Path
import numpy as np

work = json.loads(Path(sys.argv[2]).read_text())
print("trained", flush=True)
if work["settings"]["num_epochs"] == 3:
    sys.exit("no memory")
edges, rng = np.load(work["edges"]), np.random.default_rng(0)
dim = work["settings"]["dimension"]
found = {name: rng.normal(size=(rows, dim)).astype(np.float32) for name, rows in work["entities"].items()}
shifts = rng.normal(size=(len(work["relations"]), dim)).astype(np.float32)
assert set(edges["rel"].tolist()) <= set(range(len(shifts))) and len(edges["lhs"]) == len(edges["rhs"]) > 0
np.savez(Path(work["home"]) / "vectors.npz", translation=shifts, **found)
"""
"""In place of PyTorch-BigGraph's interpreter: it takes a work file and leaves vectors, without training."""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """An interpreter that runs `STAND_IN` whatever script it gets."""
    script, python = tmp_path / "stand_in.py", tmp_path / "python"
    script.write_text(STAND_IN)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(0o755)
    return python


@cache
def drawn() -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(7)
    vectors = {name: rng.normal(size=(size, DIM)).astype(np.float32) for name, size in NUM.items()}
    vectors["item"][5] = vectors["item"][6]  # two tails are tied for every head
    return vectors, rng.normal(size=(len(RELATIONS), DIM)).astype(np.float32)


def plain_score(lhs: int, relation: int, rhs: int) -> float:
    """Return the cosine of a head and a moved tail, one edge at a time, rounded so that equal vectors are tied."""
    vectors, shifts = drawn()
    heads, tails = list(RELATIONS.values())[relation]
    head, tail = vectors[heads][lhs].astype(float), vectors[tails][rhs].astype(float) + shifts[relation]
    return round(float(head @ tail / np.sqrt((head @ head) * (tail @ tail))), 7)


def plain_recalls(small: Small, relation: int) -> list[float]:
    """Return each head's Recall@20 among tails without its training and validation edges, ties by expectation."""
    seen = {tuple(e) for split in ("train", "validation") for e in small.edges[split].tolist()}
    test = {tuple(e) for e in small.edges["test"].tolist() if e[1] == relation}
    recalls = []
    for lhs in sorted({edge[0] for edge in test}):
        tails = [t for t in range(NUM[list(RELATIONS.values())[relation][1]]) if (lhs, relation, t) not in seen]
        score = {tail: plain_score(lhs, relation, tail) for tail in tails}
        relevant = [tail for tail in tails if (lhs, relation, tail) in test]
        hits = 0.0
        for tail in relevant:
            above, tied = (sum(f(score[t], score[tail]) for t in tails) for f in (float.__gt__, float.__eq__))
            hits += min(1.0, max(0.0, (K - above) / tied))
        recalls.append(hits / len(relevant))
    return recalls


@pytest.mark.parametrize("sides", ["both", "rhs"])
def test_recall_and_filtered_mrr_of_known_vectors_equal_a_plain_loop(tmp_path, sides):
    small = make(tmp_path)
    config = small.config.model_copy(update={"negatives": small.config.negatives.model_copy(update={"sides": sides})})
    vectors, shifts = drawn()
    scores = [
        defaults_pbg.cosine_scores(vectors[lhs], vectors[rhs], shift)
        for (lhs, rhs), shift in zip(RELATIONS.values(), shifts, strict=True)
    ]
    rows, overall = defaults_pbg.ranked(config, small.store, SNAPSHOT, scores)
    found = {(row["relation"], row["side"], row["metric"]): row["value"] for row in rows}
    ranks = {key: [filtered for filtered, _ in pairs] for key, pairs in loop(small, plain_score).items()}
    recalls = {name: plain_recalls(small, number) for number, name in enumerate(RELATIONS)}
    for name in RELATIONS:
        for side in ("lhs", "rhs"):
            assert found[name, side, MRR] == pytest.approx(np.mean(1 / np.array(ranks[name, side])), rel=1e-5)
        both = np.array(ranks[name, "lhs"] + ranks[name, "rhs"])
        assert found[name, "both", MRR] == pytest.approx((1 / both).mean(), rel=1e-5)
        assert found[name, "rhs", RECALL] == pytest.approx(np.mean(recalls[name]), rel=1e-5)
        assert 0.2 < found[name, "rhs", RECALL] < 0.98
    every = np.concatenate(
        [ranks[name, side] for name in RELATIONS for side in ("lhs", "rhs") if sides in ("both", side)]
    )
    of_all = {MRR: (1 / every).mean(), RECALL: np.concatenate(list(recalls.values())).mean()}
    assert overall == pytest.approx(of_all, rel=1e-5)
    test = small.edges["test"][:, 1]
    assert {row["relation"]: row["edges"] for row in rows} == {
        name: int((test == number).sum()) for number, name in enumerate(RELATIONS)
    }


def test_vectors_come_from_the_training_edges_and_the_recipes_dimension_and_epochs(tmp_path, stand_in):
    small, said = make(tmp_path), []
    config = small.config.model_copy(update={"training": small.config.training.model_copy(update={"num_epochs": 4})})
    home = tmp_path / "pbg"
    rows, overall = defaults_pbg.measure(stand_in, config, small.store, SNAPSHOT, home, said.append)
    assert len(said) == 1 and said[0].startswith("PBG: 4 epochs of dimension 8 in ")
    assert len(rows) == 4 * len(RELATIONS) and set(overall) == {RECALL, MRR}
    work = json.loads((home / "work.json").read_text())
    assert work["settings"] == {"dimension": DIM, "num_epochs": 4, "workers": None} and work["entities"] == NUM
    assert work["relations"] == [[name, lhs, rhs] for name, (lhs, rhs) in RELATIONS.items()]
    edges = np.load(home / "edges.npz")
    trained = np.stack([edges[name] for name in ("lhs", "rel", "rhs")], 1)
    np.testing.assert_array_equal(trained, small.edges["train"])


def test_a_training_that_fails_is_one_line_with_its_log_and_a_sample_is_refused(tmp_path, stand_in):
    small = make(tmp_path)
    config = small.config.model_copy(update={"training": small.config.training.model_copy(update={"num_epochs": 3})})
    with pytest.raises(UserError, match=r"ended with exit code 1; see .*pbg\.log: no memory$"):
        defaults_pbg.measure(stand_in, config, small.store, SNAPSHOT, tmp_path / "pbg", print)
    sampled = small.config.model_copy(
        update={"evaluation": small.config.evaluation.model_copy(update={"max_edges": 5})}
    )
    with pytest.raises(UserError, match=r"leave evaluation\.max_edges"):
        defaults_pbg.measure(stand_in, sampled, small.store, SNAPSHOT, tmp_path / "pbg", print)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (subprocess.CalledProcessError(1, ["x/bin/python", "-m", "pip", "install", "a"]), "python -m pip install …"),
        (OSError("no space left"), "no space left"),
    ],
)
def test_what_cannot_be_installed_is_one_line_and_no_interpreter(monkeypatch, error, reason):
    def fail(home: Path, name: str) -> Path:
        raise error

    said: list[str] = []
    monkeypatch.setattr(defaults_pbg, "peer_python", fail)
    assert defaults_pbg.interpreter(said.append) is None
    assert len(said) == 1 and said[0].startswith("PBG: left out") and reason in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("epochs", [2, 3])
def test_our_figures_are_the_same_with_pbg_beside_them_and_where_its_training_fails(
    tmp_path, stand_in, monkeypatch, epochs
):
    def run_chain(config: Path, home: Path, overrides: list[str]) -> float:
        small = make(home.parent, recall_at=[K])
        evaluate(small.config, small.store, SNAPSHOT)
        home.symlink_to(small.store.root)
        return 1.0

    details = small_store.manifest_details
    monkeypatch.setattr(small_store, "manifest_details", lambda config: {**details(config), "seconds": 1.0})
    monkeypatch.setattr(defaults, "run_chain", run_chain)
    monkeypatch.setattr(defaults, "LEAST_EDGES", 1)
    relations = tuple((name, lhs, rhs) for name, (lhs, rhs) in RELATIONS.items())
    graph = Graph((), ({"path": "edges.csv"},), tuple(NUM), relations, metric=MRR, overall=True)
    said: list[str] = []
    given = [f"training.num_epochs={epochs}"]
    plain = defaults.measure("small", graph, tmp_path, tmp_path / "a", 0, given, said.append)
    with_it = defaults.measure("small", graph, tmp_path, tmp_path / "b", 0, given, said.append, stand_in)
    expected = plain.figures
    if epochs == 2:
        assert said[-1].startswith("PBG: 2 epochs")
        values = [figure.baselines["pbg"] for figure in with_it.figures]
        assert len(values) == 1 + len(RELATIONS) and all(0 < value < 1 for value in values)
        expected = [
            replace(figure, baselines={**figure.baselines, "pbg": value})
            for figure, value in zip(plain.figures, values, strict=True)
        ]
    else:
        assert said[-1].startswith("PBG: left out of small, seed 0: PyTorch-BigGraph ended with exit code 1")
    assert with_it.figures == expected


def lines(*figures: Figure) -> list[defaults.Line]:
    return defaults.lines_of("shop", [Run(0, 10.0, 5.0, 3, list(figures), "store")])


def test_the_table_has_a_column_and_a_ratio_of_pbg_only_where_it_was_measured_and_goals_stay_as_they_are():
    view = Figure("view", RECALL, 500, 0.5, {"als": 0.4}, compared=0.6, oracle=0.6, inferred=0.55)
    buy = Figure("buy", RECALL, 400, 0.3, {"als": 0.2})
    without = lines(view, buy)
    with_it = lines(
        *defaults.with_pbg([view], [Figure(ALL, RECALL, 900, 0.1, {}), Figure("view", RECALL, 500, 0.8, {})]), buy
    )
    names = "| graph | relation | test edges | metric | ours | popularity | item-kNN | ALS |"
    assert defaults.table(without).splitlines() == [
        f"{names} oracle | inferred | to the best | to inferred | seconds |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| shop | view | 500 | recall@20 | 0.5000 | – | – | 0.4000 | 0.6000 | 0.5500 | 1.500 | 0.909 | 10 |",
        "| shop | buy | 400 | recall@20 | 0.3000 | – | – | 0.2000 | – | – | 1.500 | – | 10 |",
    ]
    assert defaults.table(with_it).splitlines() == [
        f"{names} PBG | oracle | inferred | to the best | to PBG | to inferred | seconds |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| shop | view | 500 | recall@20 | 0.5000 | – | – | 0.4000 | 0.8000 | 0.6000 | 0.5500 | 1.500 | 0.625 | 0.909 "
        "| 10 |",
        "| shop | buy | 400 | recall@20 | 0.3000 | – | – | 0.2000 | – | – | – | 1.500 | – | – | 10 |",
    ]
    goals = default_graphs.GRAPHS["shop"].goals
    assert defaults.outcomes("shop", goals, with_it) == defaults.outcomes("shop", goals, without)


def test_the_picture_has_a_bar_of_pbg_where_it_was_measured(tmp_path):
    view = Figure("view", RECALL, 500, 0.5, {"als": 0.4})
    shown = []
    for figures in ([view], defaults.with_pbg([view], [Figure("view", RECALL, 500, 0.8, {})])):
        defaults.picture(lines(*figures), tmp_path / "bars.png")
        shown.append((tmp_path / "bars.png").read_bytes())
    assert shown[0] != shown[1] and all(content.startswith(b"\x89PNG") for content in shown)


def test_an_ablation_takes_no_pbg(tmp_path, capsys):
    assert defaults.main(["--ablation", "--pbg", "--home", str(tmp_path / "home")]) == 2
    assert "--picture and --pbg" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_pytorch_biggraph_itself_learns_a_small_log_and_stands_in_the_table(tmp_path, capsys):
    given = ["--generated", "flat", "--scale", ".2", "--pbg", "--home", str(tmp_path / "home")]
    given += ["--set", "launch.threads_per_process=1", "--json", str(tmp_path / "figures.json")]
    assert defaults.main(given) in (0, 1)
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["failed"] == {} and "| ALS | PBG |" in capsys.readouterr().out
    for line in report["lines"]:
        assert line["popularity"] < line["pbg"] < line["oracle"], line["relation"]
        assert line["ratios"]["pbg"] == pytest.approx(line["ours"] / line["pbg"])
