"""Where a baseline is better by more than noise, a sentence says so with both figures, and another what to try."""

from __future__ import annotations

from typing import Any

import pytest
import small_store

from twhin_pipeline.evaluation.advice import MOST_LINES, advice, title
from twhin_pipeline.evaluation.results import Comparison


def config(**sections: Any) -> Any:
    """Return a configuration with negatives that are drawn evenly."""
    even = {"train_data": {"in_batch_negatives": 0}, "negatives": {"degree_share": 0.0}}
    return small_store.config(**{**even, "training": {"num_epochs": 20}, **sections})


def compared(relation: str = "buy", value: float = 0.078, edges: int = 412, **fields: Any) -> Comparison:
    given = {"baselines": {"popularity": 0.181}, "compared": value, "compared_edges": edges, **fields}
    return Comparison(relation, "recall@20", value, edges, **given)


def test_a_relation_below_a_baseline_is_named_with_both_figures():
    lines = advice([compared()], config(), {"chosen_epoch": 20})
    assert lines[0] == "buy: the model's Recall@20 of 0.078 is below popularity's 0.181"
    assert len(lines) == 2 and lines[1].startswith("Try: ")


def test_all_better_baselines_are_in_one_sentence_the_best_first():
    figures = {"popularity": 0.181, "item_knn": 0.553, "als": 0.601}
    [line, _] = advice([compared(baselines=figures)], config(), {})
    assert line == "buy: the model's Recall@20 of 0.078 is below ALS's 0.601, item-kNN's 0.553 and popularity's 0.181"


def test_a_sampled_comparison_gives_the_models_figure_of_the_same_edges():
    one = compared(value=0.10, baselines={"popularity": 0.2, "als": 0.3}, compared=0.12, compared_edges=300, edges=900)
    [line, _] = advice([one], config(), {})
    assert line == (
        "buy: the model's Recall@20 is below ALS's 0.300 (the model's 0.120) and popularity's 0.200 (the model's 0.100)"
    )


@pytest.mark.parametrize(
    "one",
    [
        compared(value=0.2),
        compared(edges=199),  # too few edges
        compared(value=0.6, edges=100_000, baselines={"als": 0.611}),  # less than 2 %
        compared(value=0.17, edges=250),  # less than the standard error
        compared(baselines={}),
        compared(edges=5_000, compared_edges=150, baselines={"als": 0.5}),  # too few of those that ALS ranked
    ],
)
def test_noise_and_better_models_are_not_warned_about(one):
    assert advice([one], config(), {}) == []


def test_more_than_noise_is_warned_about():
    for one in (compared(edges=200), compared(value=0.6, edges=100_000, baselines={"als": 0.613})):
        assert len(advice([one], config(), {})) == 2


def test_of_one_relation_all_together_are_not_a_second_warning():
    alone = advice([compared(), compared("all")], config(), {})
    several = advice([compared(), compared("view"), compared("all")], config(), {})
    assert len(alone) == 2 and several[2].startswith("all relations: the model's Recall@20")


def test_of_many_relations_some_have_a_line_and_the_others_are_counted():
    lines = advice([compared(f"r{i}") for i in range(30)], config(), {})
    assert len(lines) == MOST_LINES + 2
    assert lines[MOST_LINES] == "20 more relations are below a baseline; `twhin metrics` shows them"


def remedies(one: Comparison, loaded: Any, details: dict[str, Any]) -> str:
    return advice([one], loaded, details)[-1]


def test_more_epochs_are_advised_only_where_the_last_one_was_the_best():
    assert "training.num_epochs=40" in remedies(compared(), config(), {"chosen_epoch": 20})
    assert "training.num_epochs=40" in remedies(compared(), config(), {"chosen_epoch": None})
    assert "num_epochs" not in remedies(compared(), config(), {"chosen_epoch": 12})


def test_where_steps_ended_training_more_steps_are_advised_and_not_epochs():
    loaded = config(training={"num_epochs": 20, "num_train_steps": 500})
    text = remedies(compared(), loaded, {"chosen_epoch": 3, "chosen_step": 500})
    assert "training.num_train_steps=1000" in text and "num_epochs" not in text


def test_negatives_by_popularity_are_named_where_popularity_is_better_and_the_configuration_has_them():
    cause = "negatives in proportion to popularity"
    for sections in (
        {"train_data": {"in_batch_negatives": 5}},
        {"negatives": {"degree_share": 0.5}, "train_data": {"global_negatives": 10}},
    ):
        assert cause in remedies(compared(), config(**sections), {})
        assert cause not in remedies(compared(baselines={"als": 0.4}), config(**sections), {})
        corrected = {**sections, "loss": {"name": "softmax", "log_q": True}}
        assert cause not in remedies(compared(), config(**corrected), {})
    assert cause not in remedies(compared(), config(), {})


def recipe(name: str, **values: bool) -> dict[str, Any]:
    """Return the model's details with a recipe that chose these fields, or not."""
    paths = {path.replace("__", "."): chosen for path, chosen in values.items()}
    return {"recipe": {"name": name, "values": [{"path": p, "chosen": c} for p, c in paths.items()]}}


def test_fields_that_the_configuration_sets_over_the_recipe_are_named_where_they_decide():
    details = recipe(
        "interactions", model__comparator=False, loss__name=False, loss__log_q=True, training__num_epochs=False
    )
    text = remedies(compared(), config(), details)
    assert text.startswith(
        "Try: the recipe's own values: leave model.comparator and loss.name out of the configuration;"
    )
    assert "recipe" not in remedies(compared(), config(), recipe("interactions", model__comparator=True))


def test_a_recipe_that_is_switched_off_is_advised():
    assert "leave out recipe: none" in remedies(compared(), config(recipe="none"), recipe("none"))
    assert "recipe" not in remedies(compared(), config(), recipe("none")), "the published system has none"


def test_more_dimensions_are_advised_where_item_knn_is_far_ahead_of_the_model_and_of_als_of_its_dimension():
    def tried(dim: int = 64, **baselines: float) -> str:
        one = compared(value=0.45, edges=9_000, baselines=baselines)
        tables = [{"name": name, "embedding_dim": dim} for name in ("user", "item")]
        of_dim = config(model={"embeddings": {"tables": tables}})
        return advice([one], of_dim, {})[-1]

    assert "twice the dimension (embedding_dim: 128 of the tables)" in tried(item_knn=0.505, als=0.425)
    # ALS is ahead too, or is not known, or had fewer dimensions than the model.
    assert "twice the dimension" not in tried(item_knn=0.505, als=0.49)
    assert "twice the dimension" not in tried(item_knn=0.505)
    assert "twice the dimension" not in tried(128, item_knn=0.505, als=0.425)


def test_a_search_is_always_advised_and_more_data_where_a_fitted_baseline_is_better():
    assert "twhin run --tune 10" in remedies(compared(), config(), {})
    assert "more data" not in remedies(compared(), config(), {})
    assert "more data" in remedies(compared(baselines={"item_knn": 0.5}), config(), {})


def test_metrics_have_names_in_prose():
    assert [title(m) for m in ("recall@20", "filtered_mrr", "ndcg@5", "filtered_hits@10", "auc")] == [
        "Recall@20", "filtered MRR", "NDCG@5", "Hits@10", "auc",
    ]  # fmt: skip
