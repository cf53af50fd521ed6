"""The benchmark of minimal configurations: its goals, its oracle, and what its configurations leave to the recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from twhin_pipeline.config import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import default_graphs
import defaults
from default_graphs import ALL, MRR, RECALL, Goal, Graph
from defaults import Figure, Run

SHOP = default_graphs.GRAPHS["shop"]


def run(*figures: Figure, seed: int = 0, seconds: float = 10.0) -> Run:
    return Run(seed, seconds, seconds / 2, 3, list(figures), "store")


def row(relation: str, side: str, metric: str, value: float, edges: int = 500, **more: float | None) -> dict:
    return {"relation": relation, "side": side, "metric": metric, "value": value, "edges": edges, **more}


@pytest.mark.parametrize("name", default_graphs.GRAPHS)
def test_a_configuration_has_the_graph_alone_and_loads(name, tmp_path):
    graph = default_graphs.GRAPHS[name]
    data = default_graphs.configuration(graph, tmp_path, seed=3)
    assert set(data) <= {"sources", "model", "split", "training", "negatives"}
    assert data["training"] == {"refit": False, "seed": 3} and data["negatives"] == {"seed": 3}
    assert set(data["model"]) == {"embeddings", "relations"}
    assert all(set(entry) == {"name"} for entry in data["model"]["embeddings"]["tables"])
    assert all(set(entry) == {"name", "lhs", "rhs"} for entry in data["model"]["relations"])
    (tmp_path / "twhin.yaml").write_text(yaml.safe_dump(data))
    assert load_config(str(tmp_path / "twhin.yaml")).recipe == "auto"


@pytest.mark.parametrize("what", defaults.ABLATION)
def test_every_change_of_the_ablation_fits_the_configuration_of_the_shop(what, tmp_path):
    path = tmp_path / "twhin.yaml"
    path.write_text(yaml.safe_dump(default_graphs.configuration(SHOP, tmp_path, 0)))
    as_it_is, changed = load_config(str(path)), load_config(str(path), defaults.ABLATION[what])
    assert (as_it_is.model_dump(exclude_unset=True) == changed.model_dump(exclude_unset=True)) == (what == "the recipe")


@pytest.mark.parametrize("name", default_graphs.GENERATED)
def test_every_generated_graph_is_written_with_files_that_its_configuration_names(name, tmp_path):
    graph = default_graphs.GENERATED[name].make(tmp_path, 0.01)
    assert all((tmp_path / source["path"]).is_file() for source in graph.sources)
    (tmp_path / "twhin.yaml").write_text(yaml.safe_dump(default_graphs.configuration(graph, tmp_path, 0)))
    assert load_config(str(tmp_path / "twhin.yaml")).model.table_names == list(graph.tables)
    assert (graph.truth is None) or (tmp_path / graph.truth).is_file()


def test_figures_are_of_large_relations_on_their_side_and_miss_baselines_that_were_not_measured():
    rows = [
        row("view", "rhs", RECALL, 0.6, baseline=0.2, item_knn=0.5, als=0.55, compared=0.61),
        row("view", "rhs", "ndcg@20", 0.9, baseline=0.9),
        row("cart", "rhs", RECALL, 0.4, edges=199, baseline=0.2),
        row("buy", "rhs", RECALL, 0.3, edges=900, baseline=0.1, item_knn=None, als=float("nan")),
        row(ALL, "rhs", RECALL, 0.5, edges=1600, baseline=0.2),
    ]
    details = {"metrics": {RECALL: 0.51}, "baseline": {RECALL: 0.19}, "edges": 1599, "sides": "both"}
    assert defaults.figures_of(rows, details, SHOP) == [
        Figure(ALL, RECALL, 1599, 0.51, {"popularity": 0.19}),
        Figure("buy", RECALL, 900, 0.3, {"popularity": 0.1}),
        Figure("view", RECALL, 500, 0.6, {"popularity": 0.2, "item_knn": 0.5, "als": 0.55}, 0.61),
    ]


def test_without_a_metric_of_its_own_a_relation_has_recall_between_two_types_and_mrr_within_one():
    graph = Graph((), (), ("user", "item"), (("follows", "user", "user"), ("fav", "user", "item")))
    rows = [
        row(name, side, metric, value)
        for name in ("follows", "fav")
        for side, metric, value in (("rhs", RECALL, 0.1), ("lhs", MRR, 0.2), ("rhs", MRR, 0.3), ("both", MRR, 0.25))
    ]
    details = {"metrics": {}, "sides": {"follows": "both", "fav": "rhs"}}
    found = [(f.relation, f.metric, f.value) for f in defaults.figures_of(rows, details, graph)]
    assert found == [("follows", MRR, 0.25), ("fav", RECALL, 0.1)]


def test_lines_are_means_over_seeds_and_ratios_are_of_the_same_test_edges():
    runs = [
        run(Figure("view", RECALL, 500, 0.5, {"popularity": 0.25, "als": 0.4}, compared=0.6, oracle=0.8)),
        run(Figure("view", RECALL, 500, 0.7, {"popularity": 0.25, "als": 0.4}, compared=0.8, oracle=0.8), seconds=30),
    ]
    (line,) = defaults.lines_of("shop", runs)
    assert line.ours == pytest.approx(0.6) and line.spread == pytest.approx(0.02**0.5) and line.seconds == 20
    assert (line.popularity, line.item_knn, line.als, line.oracle) == (0.25, None, 0.4, 0.8)
    assert line.ratios == pytest.approx({"popularity": 2.4, "als": 1.75, "oracle": 0.75})
    assert line.ratio(default_graphs.BASELINES) == pytest.approx(1.75) and line.ratio(["item_knn"]) is None
    assert defaults.lines_of("shop", runs[:1])[0].spread is None


def test_goals_compare_with_a_number_with_the_best_of_baselines_and_with_the_oracle():
    figures = (
        Figure(ALL, RECALL, 900, 0.65, {"popularity": 0.1, "item_knn": 0.5, "als": 0.6}, oracle=0.7),
        Figure("view", RECALL, 500, 0.5, {"popularity": 0.1, "item_knn": 0.5, "als": 0.4}, oracle=0.6),
        Figure("buy", RECALL, 400, 0.39, {"popularity": 0.1, "item_knn": 0.3, "als": 0.4}),
        Figure("cart", RECALL, 300, 0.4, {}),
    )
    lines = defaults.lines_of("shop", [run(*figures)])
    judged = [(goal.text, goal.reached) for goal in defaults.outcomes("shop", SHOP.goals, lines)]
    assert [reached for _, reached in judged] == [False, True, False, None]
    assert judged[0][0] == "all: recall@20 is 0.929 times the oracle, goal 0.94"
    assert judged[2][0] == "buy: recall@20 is 0.975 times the best of popularity, item-kNN, ALS, goal 0.98"
    judged = [(goal.text, goal.reached) for goal in defaults.outcomes("x", [Goal(ALL, 0.65), Goal(ALL, 0.7)], lines)]
    assert judged == [("all: recall@20 is 0.6500, goal 0.65", True), ("all: recall@20 is 0.6500, goal 0.7", False)]
    judged = [
        (goal.text.partition(":")[0], goal.reached) for goal in defaults.outcomes("x", [default_graphs.TO_BEST], lines)
    ]
    assert judged == [("view", True), ("buy", False), ("cart", None)]
    judged = [(goal.text, goal.reached) for goal in defaults.outcomes("x", [default_graphs.TO_ORACLE], lines)]
    assert judged == [("view: recall@20 is 0.833 times the oracle, goal 0.92", False)]
    assert defaults.outcomes("x", [Goal("share", 0.5)], lines)[0].reached is None


def test_the_tables_have_every_figure_and_the_difference_to_the_recipe():
    figures = [
        Figure(ALL, RECALL, 900, 0.6, {"als": 0.5}),
        Figure("view", RECALL, 500, 0.5, {"als": 0.4}, oracle=0.6, inferred=0.55),
    ]
    lines = defaults.lines_of("shop", [run(*figures)])
    assert defaults.table(lines).splitlines()[3] == (
        "| shop | view | 500 | recall@20 | 0.5000 | – | – | 0.4000 | 0.6000 | 0.5500 | 1.250 | 0.909 | 10 |"
    )
    worse = defaults.lines_of("shop", [run(Figure(ALL, RECALL, 900, 0.55, {}), seconds=7)])
    shown = defaults.ablation_table({"the recipe": lines, "less": worse}).splitlines()
    assert shown[2:] == [
        "| the recipe | 0.600 | 0.500 | – | – | 10 |",
        "| less | 0.550 (-0.050) | – | – | – | 7 |",
    ]


def test_absent_data_is_skipped_and_exit_code_2_says_that_none_is_left(tmp_path, capsys):
    code = defaults.main(["shop", "gowalla", "--data", str(tmp_path), "--home", str(tmp_path / "home")])
    shown = capsys.readouterr()
    assert code == 2 and shown.err.startswith("defaults: no graph's data is there")
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["shop", "gowalla"]
    assert defaults.main(["shops", "--home", str(tmp_path / "home")]) == 2
    assert "no graph is named 'shops'" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


def test_a_run_that_fails_is_named_with_its_last_lines_and_exit_code_1(tmp_path, capsys):
    given = ["--generated", "steep", "--scale", "0.05", "--home", str(tmp_path / "home"), "--set", "training.epochs=1"]
    code = defaults.main([*given, "--json", str(tmp_path / "figures.json")])
    assert code == 1
    report = json.loads((tmp_path / "figures.json").read_text())
    assert report["lines"] == [] and "exit code" in report["failed"]["steep"]
    assert "training.epochs" in report["failed"]["steep"] and "failed       steep" in capsys.readouterr().out


def test_the_picture_is_a_png_with_a_panel_for_each_metric(tmp_path):
    figures = [Figure("view", RECALL, 500, 0.5, {"als": 0.4}, oracle=0.6), Figure("follows", MRR, 500, 0.2, {})]
    sizes = []
    for shown in (figures, figures[:1]):
        defaults.picture(defaults.lines_of("a", [run(*shown), run(*shown, seed=1)]), tmp_path / "bars.png")
        content = (tmp_path / "bars.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[20:24], "big"))
    assert sizes[0] > sizes[1]
