"""`twhin run --tune`: what is searched by recipe, how a budget is kept, and which values the run trains with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from twhin_pipeline import pipeline
from twhin_pipeline.cli import run_arguments
from twhin_pipeline.config import as_override, load_config, parse_config, recipes
from twhin_pipeline.config.recipes import Counts
from twhin_pipeline.errors import UserError
from twhin_pipeline.operations import generate, short_search
from twhin_pipeline.operations.recipe_search import RecipeSpace
from twhin_pipeline.operations.short_search import STARTUP_S, TRIALS, Plan, Progress, another_fits, make_plan
from twhin_pipeline.store import Store
from twhin_pipeline.training import launch

SNAPSHOT = "2025-01-01"
SHOP = Counts({"view": 80_000}, {"user": 3_000, "product": 2_000})
SOCIAL = Counts({"follows": 40_000, "blocks": 10_000}, {"user": 5_000})


def shop(**sections: Any) -> Any:
    data: dict[str, Any] = {
        "source": {"path": "unused.parquet"},
        "model": {
            "embeddings": {"tables": [{"name": "user"}, {"name": "product"}]},
            "relations": [{"name": "view", "lhs": "user", "rhs": "product"}],
        },
    }
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields}
    return parse_config(data)


def social() -> Any:
    return parse_config(
        {
            "source": {"path": "unused.parquet"},
            "model": {
                "embeddings": {"tables": [{"name": "user"}]},
                "relations": [{"name": name, "lhs": "user", "rhs": "user"} for name in ("follows", "blocks")],
            },
        }
    )


def drawn(space: RecipeSpace, count: int = 60) -> list[dict[str, Any]]:
    """Return the fields of the first trials and of random ones."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for values in space.first:
        study.enqueue_trial(values)
    return [space.suggest(study.ask()) for _ in range(count)]


def paths(trials: list[dict[str, Any]]) -> set[str]:
    return {path for fields in trials for path in fields}


OPTIMIZERS = {f"model.embeddings.tables.{name}.optimizer" for name in ("user", "product")}
DIMS = {f"model.embeddings.tables.{name}.embedding_dim" for name in ("user", "product")}


def test_interactions_are_searched_around_the_recipe_and_by_cosine_as_a_whole():
    trials = drawn(RecipeSpace(shop(), SHOP))
    assert trials[0] == {}  # the recipe itself
    assert trials[1]["model.comparator"] == "cosine" and trials[1]["loss.name"] == "bsl"
    assert trials[2] == {"model.comparator": "cosine", "model.temperature": 0.08, "model.init_scale": 0.065}
    assert paths(trials) == {
        "model.regularization", "model.embedding_dropout", "model.comparator", "model.temperature", "model.init_scale",
        "loss.name", "loss.positive_temperature", "loss.log_q", "negatives.sides", "negatives.mask", *OPTIMIZERS, *DIMS,
    }  # fmt: skip
    own = recipes.apply(shop(), SHOP).config
    for fields in trials:
        cosine = "model.comparator" in fields
        assert not (cosine and "model.regularization" in fields)  # a length that is divided out needs no penalty
        if "model.regularization" in fields:
            penalty = fields["model.regularization"]
            assert penalty["norm"] == "l2"
            assert (
                own.model.regularization.entities / 5.1 < penalty["entities"] < 5.1 * own.model.regularization.entities
            )
        for path in OPTIMIZERS & set(fields):
            [rate] = [fields[path]["rmsprop"]["lr"]]
            assert (0.004 if cosine else 0.01) / 3.1 < rate < (0.004 if cosine else 0.01) * 3.1
            assert fields[path]["learning_rate"]["linear_decay"]["learning_rate"] == rate
        assert 0 <= fields.get("model.embedding_dropout", 0) <= 0.5
        assert fields.get(min(DIMS), 128) == 128  # 64 is the recipe's


def test_a_graph_is_searched_by_penalty_dropout_rate_and_dimension():
    trials = drawn(RecipeSpace(social(), SOCIAL))
    assert trials[0] == {} and all(trials[1:])
    table = "model.embeddings.tables.user"
    assert paths(trials) == {
        "model.regularization", "model.embedding_dropout", f"{table}.optimizer", f"{table}.embedding_dim",
    }  # fmt: skip
    own = recipes.apply(social(), SOCIAL).config
    assert {t[f"{table}.embedding_dim"] for t in trials if f"{table}.embedding_dim" in t} == {
        own.model.embedding_dim // 2
    }
    halves = [t["model.regularization"] for t in trials if "model.regularization" in t]
    assert all(p["operators"] == pytest.approx(p["entities"] / 2, rel=0.02) for p in halves)


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({"model": {"embedding_dropout": 0.2}}, {"model.embedding_dropout"}),
        ({"model": {"regularization": {"norm": "n3", "entities": 0.01}}}, {"model.regularization"}),
        ({"model": {"comparator": "dot"}}, {"model.comparator", "model.temperature", "loss.name"}),
        ({"model": {"comparator": "cosine"}}, {"model.comparator", "model.regularization", "loss.name"}),
        ({"loss": {"name": "softmax"}}, {"loss.name", "loss.positive_temperature", "loss.log_q"}),
        ({"negatives": {"sides": "rhs"}}, {"negatives.sides"}),
        ({"training": {"selection_metric": "filtered_mrr"}}, {"negatives.sides"}),
    ],
)
def test_a_field_that_the_configuration_sets_is_not_searched(sections, fields):
    everything = paths(drawn(RecipeSpace(shop(), SHOP)))
    assert fields <= everything
    assert not fields & paths(drawn(RecipeSpace(shop(**sections), SHOP)))


def test_a_tables_own_optimizer_and_dimension_are_not_searched():
    tables = [{"name": "user", "embedding_dim": 32, "optimizer": {"adagrad": {"lr": 0.1}}}]
    tables.append({"name": "product", "embedding_dim": 32})
    searched = paths(drawn(RecipeSpace(shop(model={"embeddings": {"tables": tables}}), SHOP)))
    assert searched & (OPTIMIZERS | DIMS) == {"model.embeddings.tables.product.optimizer"}


def test_every_drawn_value_is_a_valid_override_of_the_file(tmp_path):
    file = tmp_path / "shop.yaml"
    file.write_text(yaml.safe_dump(shop().model_dump(exclude_unset=True, mode="json")))
    for fields in drawn(RecipeSpace(shop(), SHOP), 30):
        config = load_config(str(file), [as_override(path, value) for path, value in fields.items()])
        assert recipes.apply(config, SHOP).name == "interactions"


@pytest.mark.parametrize("budget_s", [30.0, 180.0, 3_600.0])
@pytest.mark.parametrize("edges", [2_000, 90_000, 50_000_000])
def test_a_plan_makes_room_for_several_trials(budget_s, edges):
    rate = 7e6
    plan = make_plan(edges, 64, 30, budget_s, rate)
    assert 3 <= plan.epochs <= 30 and (plan.edges is None or plan.edges < edges)
    if plan.edges is not None:
        assert plan.epochs == 3  # edges are left out only where few epochs of all of them would not fit
    seconds = STARTUP_S + plan.visits(edges) * 64 / rate
    if budget_s >= 120:
        assert 5 * seconds <= budget_s
    assert make_plan(edges, 64, 2, budget_s, rate).epochs <= 2
    if budget_s == 180 and edges == 90_000:
        assert plan == Plan(plan.epochs, None) and TRIALS * seconds <= budget_s


def test_no_trial_begins_that_would_end_after_the_budget():
    for cost in (1.0, 7.0, 19.0):
        seconds: list[float] = []
        while another_fits(60.0, seconds):
            seconds.append(cost)
        assert sum(seconds) <= 60 < sum(seconds) + cost
    assert another_fits(1.0, [])  # the recipe is measured in any case
    assert not another_fits(60.0, [30.0, 5.0])  # the longest of them is the estimate
    assert another_fits(60.0, [30.0, 5.0], counted=1)  # but for those of a plan that was given up


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.cosine = 0.5
        """What cosine adds to the metric."""

    def __call__(self) -> float:
        return self.now


def write_config(folder: Path, **sections: Any) -> str:
    edges = folder / "edges.parquet"
    if not edges.exists():
        generate.generate(str(edges), users=120, items=60, edges=2500, communities=4, within=0.95, seed=3)
    generated = yaml.safe_load(edges.with_suffix(".yaml").read_text())
    data = {
        "source": {**generated["source"], "path": str(edges), "snapshots": [SNAPSHOT]},
        "split": {"strategy": "random", "validation": 0.1, "test": 0.1},
        "model": {
            "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
            "relations": generated["model"]["relations"],
        },
        "training": {"num_epochs": 4, "refit": False},
        "launch": {"device": "cpu", "threads_per_process": 1, "data_threads": 1},
        "tune": {"minutes": 1.0},
    }
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields} if isinstance(fields, dict) else fields
    (folder / "config.yaml").write_text(yaml.safe_dump(data))
    return str(folder / "config.yaml")


def sampled_run(folder: Path, path: str, *overrides: str) -> pipeline.Run:
    run = pipeline.Run(load_config(path, overrides), path, list(overrides), Store(str(folder / "home")), SNAPSHOT)
    for name in ("ingest", "vocabulary", "sample"):
        pipeline.run_stage(run, pipeline.STAGES[name], lambda line: None)
    return run


@pytest.fixture
def fake(monkeypatch):
    """Stand for training: cosine is best; a trial takes 9 seconds; `stop` interrupts the trial of that number."""
    clock, seen, stop = Clock(), [], []

    def run(config, config_path, overrides, store, snapshot, *, log_dir, output, on_validation):
        resolved = recipes.apply(config, Counts.read(config, store, snapshot)).config
        if len(seen) in stop:
            stop.clear()
            raise launch.TrainingCancelled("stopped at step 3")
        value = 1 - abs(resolved.model.embedding_dropout - 0.2) + clock.cosine * (resolved.model.comparator == "cosine")
        positives = store.manifest("training_set/positives", snapshot)
        seen.append({"config": resolved, "value": value, "edges": positives.rows})
        clock.now += 9
        with store.replace("twhin_model", snapshot, config_hash=config.hash()) as draft:
            draft.details = {"best_validation": value}

    monkeypatch.setattr(launch, "run", run)
    return clock, seen, stop


def test_the_run_goes_on_with_the_best_values_within_its_budget(tmp_path, fake):
    clock, seen, _ = fake
    run, said = sampled_run(tmp_path, write_config(tmp_path)), []
    best = short_search.tuned(run, said.append, clock)
    outcome = best.config.tune.outcome
    assert len(seen) == outcome["trials"] == 6  # of 9 seconds in a minute
    assert seen[0]["value"] == outcome["recipe_value"] < outcome["value"] == max(trial["value"] for trial in seen)
    assert outcome["values"]["model.comparator"] == best.config.model.comparator == "cosine"
    assert {trial["config"].training.num_epochs for trial in seen} == {4} and best.config.training.num_epochs == 4
    assert any("the best values, now used" in line for line in said)
    for path, value in outcome["values"].items():
        assert as_override(path, value) in best.overrides
    assert short_search.unused(run) and not short_search.unused(best)
    printed = [line.removeprefix("  --set '").removesuffix("'") for line in said if line.startswith("  --set")]
    assert not short_search.unused(pipeline.Run(run.config, run.config_path, printed, run.store, SNAPSHOT))


def test_an_interrupted_search_goes_on_and_a_finished_one_is_not_made_again(tmp_path, fake):
    clock, seen, stop = fake
    path = write_config(tmp_path)
    run = sampled_run(tmp_path, path)
    stop.append(3)
    with pytest.raises(launch.TrainingCancelled):
        short_search.tuned(run, lambda line: None, clock)
    assert len(seen) == 3
    again = sampled_run(tmp_path, path)  # its stages before are made anew, as by `twhin run`
    first = short_search.tuned(again, lambda line: None, clock)
    assert len(seen) == first.config.tune.outcome["trials"] == 6
    assert short_search.tuned(again, lambda line: None, clock).overrides == first.overrides and len(seen) == 6
    other = sampled_run(tmp_path, path, "tune.seed=1")
    short_search.tuned(other, lambda line: None, clock)
    assert len(seen) == 12


def test_the_recipe_is_used_where_nothing_beats_it(tmp_path, fake):
    clock, seen, _ = fake
    clock.cosine = -0.5
    run, said = sampled_run(tmp_path, write_config(tmp_path, tune={"minutes": 0.3})), []
    best = short_search.tuned(run, said.append, clock)  # two trials: the recipe, and cosine, which is worse here
    assert len(seen) == 2 and best.config.tune.outcome["values"] == {}
    assert best.config.model_dump(exclude={"tune"}) == run.config.model_dump(exclude={"tune"})
    assert "none beat the recipe" in said[-1] and not short_search.unused(run)


@pytest.mark.parametrize("cosine", [0.5, -0.5])  # better than the recipe, or worse
def test_a_graph_whose_epochs_the_recipe_cut_short_trains_as_long_as_a_third_of_the_budget(
    tmp_path, fake, monkeypatch, cosine
):
    clock, seen, _ = fake
    clock.cosine = cosine
    path = Path(write_config(tmp_path))
    data = yaml.safe_load(path.read_text())
    del data["training"]["num_epochs"]
    path.write_text(yaml.safe_dump(data))
    edges = sampled_run(tmp_path, str(path)).store.manifest("training_set/positives", SNAPSHOT).rows
    for affordable in (5, 29, 30):
        counted = Store(str(tmp_path / "home")).manifest("raw_edges", SNAPSHOT).rows
        monkeypatch.setattr(recipes, "WORK", (affordable * counted + 1) * 64)
        run, said = sampled_run(tmp_path, str(path)), []
        seen.clear()
        best = short_search.tuned(run, said.append, clock)
        outcome, trained = best.config.tune.outcome, seen[0]["config"].training.num_epochs
        assert trained == min(make_plan(edges, 64, affordable, 60).epochs, affordable)
        if affordable == 30:  # all that a recipe has
            assert "num_epochs" not in outcome and "training.num_epochs=" not in str(best.overrides)
            continue
        dim = outcome["values"].get("model.embeddings.tables.user.embedding_dim", 64)
        # Of a trial's 9 seconds at least a quarter is training; a third of a minute is 20 seconds.
        expected = min(120, int(20 * trained * 64 / (9 / 4) / dim))
        assert outcome["num_epochs"] == best.config.training.num_epochs == expected > affordable
        assert f"training.num_epochs={expected}" in best.overrides
        assert f"  --set 'training.num_epochs={expected}'" in said
        assert outcome["values"] or cosine < 0
        again = short_search.tuned(run, lambda line: None, clock)
        assert again.overrides == best.overrides and not short_search.unused(best)


def test_trials_of_a_large_graph_train_on_a_part_of_its_edges(tmp_path, fake, monkeypatch):
    clock, seen, _ = fake
    monkeypatch.setattr(short_search, "FEWEST_EDGES", 100)
    monkeypatch.setattr(short_search, "WORK_PER_S", 1000.0)
    monkeypatch.setattr(short_search.Plan, "visits", lambda self, total: 10**12)  # the first trial changes no plan
    run = sampled_run(tmp_path, write_config(tmp_path, training={"num_epochs": 20}))
    short_search.tuned(run, lambda line: None, clock)
    assert {trial["edges"] for trial in seen} == {100}
    assert {trial["config"].training.num_epochs for trial in seen} == {3}


def test_a_plan_is_made_anew_by_what_the_first_trial_took(tmp_path, fake, monkeypatch):
    clock, seen, _ = fake
    monkeypatch.setattr(short_search, "WORK_PER_S", 1000.0)
    run = sampled_run(tmp_path, write_config(tmp_path, training={"num_epochs": 20}, tune={"minutes": 3.0}))
    before = make_plan(2000, 64, 20, 180, 1000.0)
    best = short_search.tuned(run, lambda line: None, clock)
    epochs = [trial["config"].training.num_epochs for trial in seen]
    assert epochs[0] == before.epochs < epochs[1] and set(epochs[1:]) == {epochs[1]}
    assert best.config.tune.outcome["trials"] == len(seen) - 1 and 9 * len(seen) <= 180
    # The recipe is the first trial of each plan: trials of two plans are not compared.
    assert seen[0]["value"] == seen[1]["value"] == best.config.tune.outcome["recipe_value"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"recipe": "none"}, r"tune\.search: is empty, and there is no recipe .*leave out recipe: none"),
        ({"split": {"validation": 0.0}}, r"no validation edge is held out.*set split\.validation"),
        ({"training": {"selection_metric": "mrr"}}, r"cannot be compared by mrr; .*recall@20"),
    ],
)
def test_what_cannot_be_searched_is_one_clear_error(tmp_path, fake, sections, message):
    clock, seen, _ = fake
    run = sampled_run(tmp_path, write_config(tmp_path, **sections))
    with pytest.raises(UserError, match=message):
        short_search.tuned(run, lambda line: None, clock)
    assert not seen and not (tmp_path / "home" / "tune").exists()


def test_no_recipe_is_an_error_before_anything_is_read(tmp_path, capsys):
    path = write_config(tmp_path, recipe="none")
    assert run_arguments(["run", "-c", path, "--home", str(tmp_path / "home"), "--tune", "1"]) == 2
    assert "tune.search: is empty" in capsys.readouterr().err
    assert not Store(str(tmp_path / "home")).assets()


@pytest.mark.long
def test_the_command_trains_with_the_best_values_and_records_them(tmp_path, capsys, monkeypatch):
    """End to end, from a recipe that is made hopeless, so that another value is the best."""
    optimizer = {"rmsprop": {"lr": 1.0e-09}}
    tables = [{"name": name, "optimizer": optimizer, "embedding_dim": 16} for name in ("user", "item")]
    path = write_config(
        tmp_path,
        tune={
            "search": {"model.embeddings.tables.user.optimizer.rmsprop.lr": {"choices": [1.0e-09, 0.01]}},
            "minutes": 5,
        },
        model={"embeddings": {"tables": tables}},
        training={"num_epochs": 3, "refit": True},
    )
    home = str(tmp_path / "home")
    monkeypatch.setattr(short_search, "another_fits", lambda budget, seconds, counted: len(seconds) < 6)
    monkeypatch.setattr(short_search, "CHANGE", 1e9)
    assert run_arguments(["run", "-c", path, "--home", home, "-s", SNAPSHOT, "--tune", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "the best values, now used" in shown and shown.count("trial ") >= 2
    store = Store(home)
    values = {"model.embeddings.tables.user.optimizer.rmsprop.lr": 0.01}
    for model in (store, store.seen_as("refit")):
        details = model.manifest("twhin_model", SNAPSHOT).details
        assert details["tuned"]["values"] == values and details["tuned"]["value"] > details["tuned"]["recipe_value"]
    assert details["tuned"]["trials"] == 6 and details["tuned"]["minutes"] > 0
    progress = Progress.read(Path(home) / "tune" / SNAPSHOT / "minutes.json")
    assert progress is not None and json.loads(json.dumps(progress.outcome)) == details["tuned"]
    assert run_arguments(["train", "-c", path, "--home", home, "-s", SNAPSHOT]) == 0
    assert "does not use the values that an earlier search found: --set" in capsys.readouterr().out
    assert "tuned" not in store.manifest("twhin_model", SNAPSHOT).details
