"""The whole chain through `twhin run`, on a small generated graph with planted communities, by two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twhin_pipeline.store import Store, releases
from twhin_pipeline.vectors.opening import load_model

SNAPSHOT = "2025-01-01"
OVERRIDES = [
    "model.embeddings.tables.user.embedding_dim=16",
    "model.embeddings.tables.item.embedding_dim=16",
    "training.num_epochs=8",
    "train_data.per_replica_batch_size=1000",
    "negatives.chunk_size=250",
    "launch.nproc_per_node=2",
    "launch.device=cpu",
    "launch.threads_per_process=1",
]


def twhin(*arguments: str, home: Path | str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command line as a person would, in a process of its own."""
    command = [sys.executable, "-m", "twhin_pipeline.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TWHIN_HOME": str(home)})
    assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def overrides(extra: list[str] | None = None) -> list[str]:
    """Return the flags that make a run small."""
    return [word for override in [*OVERRIDES, *(extra or [])] for word in ("--set", override)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str, str]:
    """Generate a graph and run the chain; returns the store's folder, the configuration and what was printed."""
    folder = tmp_path_factory.mktemp("chain")
    numbers = ["--users", "400", "--items", "200", "--edges", "12000", "--communities", "8"]
    twhin("generate", str(folder / "graph.parquet"), *numbers, home=folder / "home")
    config = str(folder / "graph.yaml")
    done = twhin("run", "--config", config, *overrides(), home=folder / "home")
    return folder / "home", config, done.stdout


def test_each_stage_says_one_line_and_the_summary_follows(made):
    _, _, shown = made
    lines = [line.split()[0] for line in shown.splitlines() if line.strip()]
    stages = [
        "ingest", "vocabulary", "sample", "train", "evaluate", "refit", "export", "index", "compare", "publish",
        "decide",
    ]  # fmt: skip
    assert [line for line in lines if line in stages] == stages
    for text in ("edges/s", "by 2 process(es)", "filtered_mrr", "popular", "make ui", "MLflow at http://", "/explore/"):
        assert text in shown
    last = shown.rstrip().splitlines()[-1]
    assert last.startswith(f"release   {SNAPSHOT}-") and " is current: " in last


def test_every_table_is_there_with_its_parents_current(made):
    home, _, _ = made
    store = Store(str(home))
    assert {
        "raw_edges", "raw_edges_rejected", "vocabulary/user", "vocabulary/item", "training_set/positives",
        "training_set/negatives", "held_out/validation", "held_out/test", "held_out/validation_negatives",
        "twhin_model", "evaluation", "embeddings/user", "embeddings/item", "embeddings/relations",
    } <= set(store.assets())  # fmt: skip
    assert {asset: store.stale(asset, SNAPSHOT) for asset in store.assets()} == {a: [] for a in store.assets()}
    assert (home / "catalog.duckdb").exists()


def test_the_model_has_learned_the_communities(made):
    """Ranks far above chance: the mean reciprocal rank of a random order of 200 items is about 0.03."""
    home, _, _ = made
    found = json.loads(twhin("metrics", "--json", home=home).stdout)["metrics"]
    mrr = {row["relation"]: row for row in found if row["metric"] == "filtered_mrr" and row["side"] == "both"}
    assert mrr["all"]["value"] > 1.3 * mrr["all"]["baseline"]
    assert mrr["all"]["value"] > 0.06
    model = load_model(str(home))
    communities = 8
    same = [
        int(str(near).split("_")[1]) % communities == int(item) % communities
        for item in range(40)
        for near, _ in model.neighbors("item", f"item_{item}", 5)
    ]
    assert np.mean(same) > 3 / communities


def test_the_registered_model_is_the_one_in_the_store(made, monkeypatch):
    home, _, shown = made
    assert "registered models:/" in shown
    monkeypatch.setenv("TWHIN_HOME", str(home))
    uri = next(word for word in shown.split() if word.startswith("models:/"))
    expected = load_model(str(home)).get_embedding("item", "item_1")
    np.testing.assert_array_equal(load_model(uri).get_embedding("item", "item_1"), expected)


def test_neighbors_from_the_shell_are_those_of_the_model(made):
    home, _, _ = made
    found = json.loads(twhin("neighbors", "item", "item_1", "-k", "3", "--json", home=home).stdout)
    expected = load_model(str(home)).neighbors("item", "item_1", 3)
    assert [(row["id"], pytest.approx(row["similarity"])) for row in found] == expected


def test_an_unknown_id_names_its_likes(made):
    home, _, _ = made
    done = twhin("neighbors", "item", "item_1x", home=home, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "item_1" in done.stderr and "Traceback" not in done.stderr
    done = twhin("neighbors", "itme", "item_1", home=home, check=False)
    assert done.returncode == 2 and "'item'" in done.stderr


def test_the_summary_shows_chosen_examples(made):
    home, config, _ = made
    shown = twhin("summary", "--config", config, "--examples", "item:item_0,item_3", home=home).stdout
    assert "item_0" in shown and "item_3" in shown
    done = twhin("summary", "--config", config, "--examples", "item:nosuch", home=home, check=False)
    assert done.returncode == 2 and "nosuch" in done.stderr
    done = twhin("summary", "--config", config, "--examples", "item_0", home=home, check=False)
    assert done.returncode == 2 and "package:vim,nginx" in done.stderr


def test_the_summary_as_json_holds_the_figures_of_the_run(made):
    home, config, _ = made
    arguments = ["summary", "--config", config, *overrides(), "--examples", "item:item_0", "--json"]
    figures = json.loads(twhin(*arguments, home=home).stdout)
    store = Store(str(home))
    assert figures["snapshot"] == SNAPSHOT and figures["configuration"] == config
    assert not figures["configuration_changed"]
    current = releases.current(store)
    assert current is not None and (figures["release"], figures["current"]) == (current.name, True)
    assert (figures["decision"], figures["reason"]) == ("promoted", releases.history(store)[-1].reason)
    assert figures["edges"] == store.manifest("raw_edges", SNAPSHOT).rows
    assert figures["entities"] == {
        name: store.manifest(f"vocabulary/{name}", SNAPSHOT).rows for name in ("user", "item")
    }
    details = store.manifest("twhin_model", SNAPSHOT).details
    assert figures["training"]["edges_per_second"] == details["edges_per_second"]
    assert figures["training"]["final_loss"] < figures["training"]["first_loss"]
    assert figures["metrics"] == json.loads(twhin("metrics", "--json", home=home).stdout)["metrics"]
    [example] = figures["neighbors"]["examples"]
    nearest = json.loads(twhin("neighbors", "item", "item_0", "-k", "5", "--json", home=home).stdout)
    assert example == {"id": "item_0", "nearest": nearest}
    assert pq.read_table(figures["embeddings"]["item"]).num_rows == figures["entities"]["item"]


def test_the_plan_takes_sizes_and_edges_from_the_store(made):
    home, config, _ = made
    found = json.loads(twhin("plan", "--config", config, *overrides(), "--json", home=home).stdout)
    store = Store(str(home))
    rows = {table["name"]: table["rows"] for table in found["tables"]}
    assert rows == {name: store.manifest(f"vocabulary/{name}", SNAPSHOT).rows for name in ("user", "item")}
    assert found["world_size"] == 2
    details = store.manifest("twhin_model", SNAPSHOT).details
    # Chunks of the last step may be short, so a step more or less an epoch.
    assert found["steps"] == pytest.approx(details["steps"], abs=8 * 2)


def test_a_failed_blocking_check_ends_the_run_before_the_next_stage(made, tmp_path):
    """A source in which most rows name an unknown relation must not be trained on."""
    _, config, _ = made
    relations = "model.relations=[{name: follows, lhs: user, rhs: user}, {name: fav, lhs: user, rhs: item}]"
    done = twhin("run", "--config", config, *overrides([relations]), home=tmp_path / "home", check=False)
    assert done.returncode == 2
    assert "edges_rejected_share" in done.stderr and "Traceback" not in done.stderr
    store = Store(str(tmp_path / "home"))
    held = store.newest("raw_edges", "2025-01-01")
    assert store.verdict("raw_edges", "2025-01-01", held.version).failed_checks == ["edges_rejected_share"]
    assert store.assets() == ["raw_edges_rejected"]
    # No later stage reads what was held back, whichever way it is started.
    later = twhin("vocabulary", "--config", config, *overrides([relations]), home=tmp_path / "home", check=False)
    assert later.returncode == 2
    assert "raw_edges of snapshot 2025-01-01 is held back, as its check edges_rejected_share failed" in later.stderr


@pytest.fixture(scope="module")
def knowledge_graph(tmp_path_factory) -> Path:
    """Write two snapshots of a graph whose relations only its data names, with a configuration that lists none.

    The first has the relations /r/a, it's b and $c$; the second lacks it's b and has /r/aa as well.
    """
    folder = tmp_path_factory.mktemp("knowledge")
    rng = np.random.default_rng(0)
    for snapshot, names in (("2025-01-01", ["/r/a", "it's b", "$c$"]), ("2025-02-01", ["/r/a", "/r/aa", "$c$"])):
        lhs = rng.integers(0, 60, 600 * len(names))
        rhs = (lhs + 10 * rng.integers(0, 6, len(lhs))) % 60
        rel = np.repeat(names, 600)
        columns = {"lhs": [f"/m/{i}" for i in lhs], "rel": rel, "rhs": [f"/m/{i}" for i in rhs]}
        pq.write_table(pa.table(columns), folder / f"edges-{snapshot}.parquet")
    config = {
        "source": {"path": f"{folder}/edges-{{snapshot}}.parquet", "min_kept_share": 0},
        "model": {
            "embeddings": {"tables": [{"name": "entity", "embedding_dim": 16}]},
            "relations": [{"name": "*", "lhs": "entity", "rhs": "entity", "operator": "diagonal"}],
        },
        "training": {"num_epochs": 2},
        "train_data": {"per_replica_batch_size": 500, "global_negatives": 16, "in_batch_negatives": 16},
        "negatives": {"chunk_size": 100},
        "launch": {"nproc_per_node": 2, "device": "cpu", "threads_per_process": 1},
    }
    (folder / "graph.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_relations_that_only_the_data_names_are_trained_measured_and_served(knowledge_graph):
    config, home = str(knowledge_graph / "graph.yaml"), knowledge_graph / "home"
    shown = twhin("run", "--config", config, "--snapshot", "2025-01-01", home=home).stdout
    assert "of 3 relations" in shown and "it's b" in shown and "registered models:/" in shown
    names = ["$c$", "/r/a", "it's b"]
    model = load_model(str(home))
    assert model.relations == names
    assert all(0 < model.predict_relation("/m/0", "/m/10", name) < 1 for name in names)
    measured = json.loads(twhin("metrics", "--json", home=home).stdout)["metrics"]
    assert {row["relation"] for row in measured} == {*names, "all"}
    store = Store(str(home))
    # The recipe is chosen when edges and vocabularies are there; the refit is of another configuration.
    chosen = [asset for asset in store.assets() if not asset.startswith(("raw_edges", "vocabulary", "refit"))]
    hashes = {store.manifest(asset, "2025-01-01").config_hash for asset in chosen}
    assert len(hashes) == 1


@pytest.mark.long
def test_a_later_snapshot_takes_operators_over_by_the_relations_names(knowledge_graph):
    config, home = str(knowledge_graph / "graph.yaml"), knowledge_graph / "home"
    earlier = ["--set", f"training.initial_checkpoint_dir={home}@2025-01-01"]
    shown = twhin("run", "--config", config, "--snapshot", "2025-02-01", *earlier, home=home).stdout
    assert "2 of 3 relations start from training.initial_checkpoint_dir" in shown
    assert load_model(str(home), "2025-02-01").relations == ["$c$", "/r/a", "/r/aa"]
    # Its consumers would miss a relation, so the release before stays current.
    assert "is held by a gate: " in shown and "no relation it's b" in shown
    assert load_model(str(home)).relations == ["$c$", "/r/a", "it's b"]
