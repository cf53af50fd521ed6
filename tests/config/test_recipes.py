"""Recipes: what the configuration leaves out follows from the graph, and what it says wins."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twhin_pipeline.config import TwhinConfig, load_config, parse_config, recipes, relations
from twhin_pipeline.config.recipes import AtFirst, Counts, Pairs
from twhin_pipeline.errors import UserError
from twhin_pipeline.graph import raw_edges, vocabulary
from twhin_pipeline.store import Store

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHOP = Counts({"view": 60_000, "buy": 4_000, "follows": 17_000}, {"user": 3_000, "item": 2_000})
SNAPSHOT = "2025-01-01"


def shop(**sections: Any) -> TwhinConfig:
    """Users view, buy and follow, with tables and relations alone; `sections` are merged over it."""
    model = {
        "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
        "relations": [
            {"name": "view", "lhs": "user", "rhs": "item"},
            {"name": "buy", "lhs": "user", "rhs": "item"},
            {"name": "follows", "lhs": "user", "rhs": "user"},
        ],
        **sections.pop("model", {}),
    }
    return parse_config({"source": {"path": "edges.csv"}, "model": model, **sections})


def test_users_and_items_get_the_recipe_of_interactions() -> None:
    recipe = recipes.apply(shop(), SHOP)
    assert recipe.name == "interactions"
    assert recipe.config.model.comparator == "dot"
    assert recipe.config.training.selection_metric == "recall@20"
    assert recipe.config.model.embeddings.tables[1].optimizer.name == "rmsprop"


def test_relations_within_one_type_get_the_recipe_of_graphs() -> None:
    recipe = recipes.apply(shop(), Counts({"view": 10, "buy": 0, "follows": 90}, SHOP.entities))
    assert recipe.name == "graph"
    assert {relation.operator for relation in recipe.config.model.relations} == {"complex_diagonal"}
    assert recipe.config.model.reciprocal
    assert recipe.config.training.selection_metric == "filtered_mrr"


def test_what_is_held_out_says_which_recipe_however_many_follows_stand_beside_it() -> None:
    mostly_follows = Counts({"view": 40_000, "buy": 0, "follows": 90_000}, SHOP.entities)
    events = shop(split={"relations": ["view", "buy"]})
    recipe = recipes.apply(events, mostly_follows)
    assert recipe.name == "interactions"
    assert recipe.reason.endswith("but 0% of those of relations that are held out")
    assert recipes.apply(shop(), mostly_follows).name == "graph"
    assert recipes.apply(shop(split={"relations": ["follows"]}), mostly_follows).name == "graph"
    assert recipes.apply(shop(split={"relations": ["follows"]}), SHOP).name == "interactions"
    by_time = shop(split={"strategy": "temporal"}, source={"path": "edges.csv", "columns": {"time": "time"}})
    assert recipes.apply(by_time, replace(mostly_follows, undated=frozenset({"follows"}))).name == "interactions"
    nothing_dated = frozenset({"view", "buy", "follows"})
    assert recipes.apply(by_time, replace(mostly_follows, undated=nothing_dated)).name == "graph"


def follows(**sections: Any) -> TwhinConfig:
    """Users who follow users."""
    model = {
        "embeddings": {"tables": [{"name": "user"}]},
        "relations": [{"name": "follows", "lhs": "user", "rhs": "user"}],
        **sections.pop("model", {}),
    }
    return parse_config({"source": {"path": "edges.csv"}, "model": model, **sections})


FOLLOWS = Counts({"follows": 119_670}, {"user": 8_000})


def test_one_relation_within_a_type_gets_a_popularity_for_each_side_and_is_judged_by_both() -> None:
    recipe = recipes.apply(follows(), FOLLOWS)
    assert recipe.name == "interactions"
    model, training = recipe.config.model, recipe.config.training
    assert (model.reciprocal, model.operator_init, model.embedding_dim) == (True, "identity", 64)
    assert [relation.operator for relation in model.relations] == ["translation"]
    # The operators have the popularity, so only the entities' vectors are held down.
    assert (model.regularization.norm, model.regularization.entities, model.regularization.operators) == ("l2", 0.02, 0)
    assert (training.selection_metric, training.num_epochs) == ("filtered_mrr", 30)
    assert "one relation says who is near whom" in recipe.reason
    # Also with a third of the edges, where users and items would get the weaker dropout.
    sparse = recipes.apply(follows(), Counts({"follows": 38_000}, FOLLOWS.entities)).config
    for config in (recipe.config, sparse):
        assert (config.model.embedding_dropout, config.negatives.mask) == (0.5, "known")
    (reason,) = (value.reason for value in recipe.values if value.path == "model.reciprocal")
    assert "popular as a tail and not as a head" in reason


def test_a_single_relation_within_a_type_is_not_bound_to_its_recipe() -> None:
    assert recipes.apply(follows(recipe="graph"), FOLLOWS).config.model.relations[0].operator == "complex_diagonal"
    assert not recipes.apply(follows(model={"reciprocal": False}), FOLLOWS).config.model.reciprocal


def test_users_with_items_keep_one_operator_a_relation_unless_edges_within_a_type_are_held_out() -> None:
    asked = recipes.apply(shop(), SHOP).config
    assert asked.model.reciprocal
    # The operators have the popularity, so they are not held down.
    assert (asked.model.regularization.entities, asked.model.regularization.operators) == (0.1, 0)
    unasked = recipes.apply(shop(split={"relations": ["view", "buy"]}), SHOP).config
    assert not unasked.model.reciprocal
    assert (unasked.model.regularization.entities, unasked.model.regularization.operators) == (0.05, 0.05)
    assert {config.training.selection_metric for config in (asked, unasked)} == {"recall@20"}


def test_users_and_items_train_all_their_epochs_and_keep_the_best() -> None:
    training = recipes.apply(shop(), SHOP).config.training
    assert (training.num_epochs, training.eval_every_n_epochs, training.early_stopping_patience) == (30, 3, None)


@pytest.mark.parametrize(
    ("counts", "dropout", "mask"),
    [
        (Counts({"view": 60_000, "buy": 9_000, "follows": 30_000}, {"user": 9_000, "item": 4_000}), 0.5, "known"),
        (Counts({"view": 300_000, "buy": 0, "follows": 0}, {"user": 200_000, "item": 3_000}), 0.3, "own"),
        (Counts({"view": 5_000_000, "buy": 0, "follows": 0}, {"user": 50_000, "item": 20_000}), 0.3, "own"),
    ],
    ids=["15 edges an entity", "3 edges an entity", "few epochs"],
)
def test_dropout_and_mask_follow_from_edges_an_entity_and_affordable_epochs(
    counts: Counts, dropout: float, mask: str
) -> None:
    chosen = recipes.apply(shop(), counts).config
    assert (chosen.model.embedding_dropout, chosen.negatives.mask) == (dropout, mask)


@pytest.mark.parametrize(
    "config",
    [
        shop(recipe="none"),
        parse_config(
            {
                "train_data": {"data_root": "x/*.parquet"},
                "model": {
                    "embeddings": {"tables": [{"name": "user"}, {"name": "item"}]},
                    "relations": [{"name": "view", "lhs": "user", "rhs": "item"}],
                },
            }
        ),
    ],
    ids=["none", "published"],
)
def test_without_a_recipe_nothing_changes(config: TwhinConfig) -> None:
    recipe = recipes.apply(config, SHOP)
    assert recipe.config is config
    assert recipe.values == []


def test_every_value_of_the_file_wins() -> None:
    said = {
        "model": {"comparator": "cosine", "temperature": 0.2, "embedding_dropout": 0.0},
        "loss": {"name": "margin"},
        "training": {"num_epochs": 7, "selection_metric": "loss", "num_eval_steps": 5},
        "train_data": {"per_replica_batch_size": 333},
    }
    chosen = recipes.apply(shop(**said), SHOP).config
    assert (chosen.model.comparator, chosen.model.temperature, chosen.model.embedding_dropout) == ("cosine", 0.2, 0.0)
    assert chosen.loss.name == "margin"
    assert (chosen.training.num_epochs, chosen.training.num_eval_steps) == (7, 5)
    assert chosen.train_data.per_replica_batch_size == 333
    assert chosen.negatives.chunk_size == 333


def test_values_that_depend_on_the_files_follow_them() -> None:
    cosine = recipes.apply(shop(model={"comparator": "cosine"}), SHOP).config
    assert cosine.model.temperature == pytest.approx(0.1)
    assert cosine.model.regularization.entities == 0
    # log_q is for losses that sum over all entities.
    assert not recipes.apply(shop(loss={"name": "bce"}), SHOP).config.loss.log_q
    # Who says where negatives come from says all of it.
    sampled = recipes.apply(shop(train_data={"in_batch_negatives": 10}), SHOP).config
    assert (sampled.train_data.global_negatives, sampled.train_data.in_batch_negatives) == (256, 10)


@pytest.mark.parametrize(
    ("directions", "dim"),
    [
        ({}, 64),
        ({"user": {"item": 64, "user": 65}}, 64),  # nothing of `follows` is held out
        ({"user": {"item": 65}}, 128),
        ({"item": {"user": 65}}, 64),  # no relation has them
    ],
)
def test_edges_with_more_directions_than_the_dimension_get_twice_as_many(
    directions: dict[str, dict[str, int]], dim: int
) -> None:
    counts = replace(SHOP, first=AtFirst(81_000, directions))
    recipe = recipes.apply(shop(split={"relations": ["view", "buy"]}), counts)
    assert recipe.config.model.embedding_dim == dim
    (why,) = (value.reason for value in recipe.values if value.path.endswith(".embedding_dim"))
    assert ("more than 64 directions" in why) == (dim == 128)
    assert recipe.config.training.num_epochs == 30
    asked = shop(model={"embeddings": {"tables": [{"name": "user", "embedding_dim": 32}, {"name": "item"}]}})
    assert recipes.apply(asked, counts).config.model.embedding_dim == 32, "the file's"


@pytest.mark.parametrize(
    ("edges", "penalty", "epochs"), [(2_000, 0.15, 120), (5_000, 0.15, 120), (11_250, 0.1, 66), (45_000, 0.05, 30)]
)
def test_few_edges_in_all_are_penalized_more_and_seen_more_often(edges: int, penalty: float, epochs: int) -> None:
    counts = Counts({"view": edges, "buy": 0, "follows": 0}, {"user": 200, "item": 100})
    chosen = recipes.apply(shop(split={"relations": ["view", "buy"]}), counts).config
    assert (chosen.model.regularization.entities, chosen.training.num_epochs) == (penalty, epochs)


@pytest.mark.parametrize(
    ("users", "penalty"),
    [(3_000, 0.05), (14_300, 0.1), (38_500, 0.25), (79_000, 0.3), (10**7, 0.3)],  # 32, 9.9, 4, 2 and 0.02 edges each
)
def test_the_fewer_edges_an_entity_has_the_more_each_one_penalizes_it(users: int, penalty: float) -> None:
    config = shop(split={"relations": ["view", "buy"]})
    chosen = recipes.apply(config, Counts(SHOP.edges, {"user": users, "item": 2_000})).config.model.regularization
    # Entities of few edges lean on what the operators say of popularity.
    assert (chosen.norm, chosen.entities, chosen.operators) == ("l2", penalty, penalty if users == 3_000 else 0)


@pytest.mark.parametrize("total", [150_000, 400_000])
def test_a_growing_graph_keeps_the_dimension_that_it_began_with(total: int) -> None:
    def dim(first: AtFirst | None, **edges: int) -> int:
        counts = Counts({"view": 0, "buy": 0, "follows": 0, **edges}, SHOP.entities, first=first)
        return recipes.apply(shop(), counts).config.model.embedding_dim

    assert dim(None, follows=total) == (512 if total == 150_000 else 256)
    assert dim(AtFirst(150_000, {}), follows=total) == 512
    assert dim(AtFirst(3_000_000, {}), follows=total) == 128
    assert dim(AtFirst(150_000, {"user": {"item": 65}}), view=total) == 128
    assert dim(AtFirst(150_000, {"user": {"item": 9}}), view=total) == 64


@pytest.mark.parametrize("recipe", ["auto", "none"])
def test_one_tables_dimension_is_that_of_all(recipe: str) -> None:
    tables = {"tables": [{"name": "user", "embedding_dim": 16}, {"name": "item"}]}
    chosen = recipes.apply(shop(recipe=recipe, model={"embeddings": tables}), SHOP).config
    assert [table.embedding_dim for table in chosen.model.embeddings.tables] == [16, 16]


def test_several_processes_get_an_optimizer_that_trains_in_them() -> None:
    chosen = recipes.apply(shop(launch={"nproc_per_node": 2}), SHOP).config
    assert {table.optimizer.name for table in chosen.model.embeddings.tables} == {"adagrad"}


def test_large_tables_get_one_number_of_state_a_row() -> None:
    large = Counts({"view": 10**8, "buy": 0, "follows": 0}, {"user": 10**7, "item": 10**6})
    chosen = recipes.apply(shop(), large).config
    assert {table.optimizer.name for table in chosen.model.embeddings.tables} == {"rowwise_adagrad"}


@given(
    view=st.integers(1, 10**9),
    follows=st.integers(0, 10**9),
    users=st.integers(1, 10**8),
    items=st.integers(1, 10**8),
)
@settings(max_examples=200, deadline=None)
def test_any_counts_give_a_valid_configuration_that_ends_by_epochs_and_is_looked_at(
    view: int, follows: int, users: int, items: int
) -> None:
    counts = Counts({"view": view, "buy": 0, "follows": follows}, {"user": users, "item": items})
    chosen = recipes.apply(shop(), counts).config
    steps = -(-(view + follows) // chosen.train_data.per_replica_batch_size) * chosen.training.num_epochs
    assert chosen.training.num_train_steps >= steps
    # A graph of any size logs and evaluates several times.
    assert chosen.training.train_log_every_n <= max(1, steps // 2)
    assert chosen.training.eval_every_n_epochs is not None
    assert chosen.training.eval_every_n_epochs <= max(1, chosen.training.num_epochs // 3)


def test_applying_a_recipe_again_changes_nothing() -> None:
    once = recipes.apply(shop(), SHOP).config
    assert recipes.apply(once, SHOP).config == once
    assert recipes.apply(once, SHOP).config.hash() == once.hash()


def test_relations_between_the_same_types_are_held_down_and_a_single_one_is_free() -> None:
    several = recipes.apply(shop(split={"relations": ["view", "buy"]}), SHOP).config.model.regularization
    assert several.operators == several.entities > 0
    alone = shop(model={"relations": [{"name": "view", "lhs": "user", "rhs": "item"}]})
    counts = Counts({"view": 60_000}, SHOP.entities)
    assert recipes.apply(alone, counts).config.model.regularization.operators == 0


def test_a_relation_within_a_type_counts_less_only_where_nothing_of_it_is_held_out() -> None:
    def weights(**sections: Any) -> dict[str, float]:
        return {
            relation.name: relation.weight for relation in recipes.apply(shop(**sections), SHOP).config.model.relations
        }

    assert weights(split={"relations": ["view", "buy"]}) == {"view": 1, "buy": 1, "follows": 0.3}
    assert weights(split={"relations": ["view", "follows"]}) == weights() == {"view": 1, "buy": 1, "follows": 1}


def test_a_relation_within_a_type_counts_in_full_where_entities_have_few_edges_of_those_held_out() -> None:
    def weight(viewed: int) -> float:
        counts = Counts({"view": viewed, "buy": 4_000, "follows": 17_000}, SHOP.entities)
        config = recipes.apply(shop(split={"relations": ["view", "buy"]}), counts).config
        assert config.negatives.mask == "known"  # by all its edges the graph is no sparse one
        return config.model.relations[2].weight

    assert [weight(21_000), weight(20_999)] == [0.3, 1]  # 25,000 edges, 5,000 entities


def test_what_is_known_by_another_relation_gets_less_dropout() -> None:
    def dropout(strategy: str, *, shared: int = 0, known: int = 0) -> float:
        """Of all 64,000 edges, and of the late 6,400 of them."""
        pairs = {"view": Pairs(60_000, shared, 6_000, known), "buy": Pairs(4_000, 0, 400, 0)}
        timed = {"path": "edges.csv", "columns": {"time": "at"}}
        config = shop(source=timed, split={"strategy": strategy, "relations": ["view", "buy"]})
        return recipes.apply(config, replace(SHOP, pairs=pairs)).config.model.embedding_dropout

    assert [dropout("random", shared=12_800), dropout("random", shared=12_799, known=6_000)] == [0.2, 0.5]
    assert [dropout("temporal", known=1_280), dropout("temporal", known=1_279, shared=60_000)] == [0.2, 0.5]


def test_only_what_is_held_out_says_whether_it_is_known_by_another_relation() -> None:
    pairs = {"view": Pairs(60_000, 4_000, 0, 0), "buy": Pairs(4_000, 4_000, 0, 0)}
    counts = replace(SHOP, pairs=pairs)
    found = [recipes.apply(shop(split={"relations": [name]}), counts).config.model.embedding_dropout for name in pairs]
    assert found == [0.5, 0.2]


def test_a_relation_without_times_is_not_asked_for_where_the_split_goes_by_time() -> None:
    undated = Counts(SHOP.edges, SHOP.entities, frozenset({"follows"}))
    timed = {"path": "edges.csv", "columns": {"time": "at"}}
    by_time = recipes.apply(shop(source=timed, split={"strategy": "temporal"}), undated).config
    assert not by_time.model.reciprocal
    assert {relation.name: relation.weight for relation in by_time.model.relations}["follows"] == 0.3
    at_random = recipes.apply(shop(split={"strategy": "random"}), undated).config
    assert at_random.model.reciprocal
    assert {relation.weight for relation in at_random.model.relations} == {1}


def test_the_relations_without_times_are_those_of_sources_without_times(tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_text("who,what,which,when\na,view,x,2025-01-01\nb,buy,y,2025-01-02\n")
    (tmp_path / "follows.csv").write_text("who,whom\na,b\n")
    columns = {"lhs": "who", "rel": "what", "rhs": "which", "time": "when"}
    sources = [
        {"path": str(tmp_path / "events.csv"), "columns": columns},
        {"path": str(tmp_path / "follows.csv"), "relation": "follows", "columns": {"lhs": "who", "rhs": "whom"}},
    ]
    config = parse_config({"sources": sources, "model": shop().model.model_dump(exclude_unset=True)})
    store = Store(str(tmp_path / "store"))
    raw_edges.ingest(config, store, SNAPSHOT)
    vocabulary.build(config, store, SNAPSHOT)
    counts = Counts.read(config, store, SNAPSHOT)
    assert counts is not None
    assert counts.undated == {"follows"}


def test_a_contradiction_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def contradicts(values: Any) -> None:
        values.choose("train_data.global_negatives", "all", "for this test")  # in_batch_negatives is left at 64

    monkeypatch.setattr(recipes, "_interactions", contradicts)
    with pytest.raises(
        UserError, match=r"recipe interactions: its values contradict the configuration's.*counted twice"
    ):
        recipes.apply(shop(), SHOP)


@pytest.mark.parametrize(
    ("file", "counts", "expected"),
    [
        (
            "gowalla",
            Counts({"visits": 1_027_370}, {"user": 29_858, "place": 40_981}),
            {"loss": "bsl", "dim": 64, "epochs": 120, "batch": 1000, "mask": "known", "n3": 0.0, "chunk": 1000},
        ),
        (
            "fb15k-237",
            Counts({f"r{i}": 310_116 // 237 for i in range(237)}, {"entity": 14_541}),
            {"loss": "softmax", "dim": 512, "epochs": 22, "batch": 500, "mask": "own", "n3": 0.05, "chunk": 50},
        ),
        (
            "wn18rr",
            Counts({f"r{i}": 93_003 // 11 for i in range(11)}, {"entity": 40_943}),
            {"loss": "softmax", "dim": 1024, "epochs": 22, "batch": 250, "mask": "own", "n3": 0.12, "chunk": 125},
        ),
    ],
)
def test_bundled_configurations_train_as_when_they_reached_their_figures(
    file: str, counts: Counts, expected: dict[str, Any]
) -> None:
    config = relations.with_found(load_config(str(CONFIGS / f"{file}.yaml")), counts.edges)
    chosen = recipes.apply(config, counts).config
    found = {
        "loss": chosen.loss.name,
        "dim": chosen.model.embedding_dim,
        "epochs": chosen.training.num_epochs,
        "batch": chosen.train_data.per_replica_batch_size,
        "mask": chosen.negatives.mask,
        "n3": chosen.model.regularization.entities,
        "chunk": chosen.negatives.chunk_size,
    }
    assert found == expected


def test_a_stage_resolves_the_recipe_once_edges_and_vocabularies_are_there(tmp_path: Path) -> None:
    store, config = Store(str(tmp_path)), shop()
    assert relations.recipe(config, store, SNAPSHOT).name == "none"
    with store.replace("raw_edges", SNAPSHOT, config_hash="test") as draft:
        draft.write(pa.table({"lhs": ["a"]}))
        draft.details = {"edges_per_relation": dict(SHOP.edges)}
    for name in ("user", "item"):
        assert relations.recipe(config, store, SNAPSHOT).name == "none"
        with store.replace(f"vocabulary/{name}", SNAPSHOT, config_hash="test") as draft:
            draft.write(pa.table({"row": range(SHOP.entities[name])}))
    assert relations.resolve(config, store, SNAPSHOT) == recipes.apply(config, SHOP).config


def test_the_explanation_has_every_value_and_says_which_the_file_set() -> None:
    recipe = recipes.apply(shop(training={"num_epochs": 3}), SHOP)
    text = recipe.explanation()
    assert all(value.path in text for value in recipe.values)
    (line,) = (line for line in text.splitlines() if line.startswith("training.num_epochs=3"))
    assert line.endswith("# set by the configuration")
    assert "training.num_epochs" in "\n".join(recipe.lines())
    assert recipe.as_details()["name"] == "interactions"
