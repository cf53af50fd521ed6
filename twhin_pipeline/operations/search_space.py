"""What `twhin tune` may try: the fields that `tune.search` names, and what must hold for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from twhin_pipeline.config import TwhinConfig, as_override, as_yaml_line, current_path, load_config, recipes
from twhin_pipeline.config.tune import Searched
from twhin_pipeline.errors import UserError, unknown
from twhin_pipeline.operations import recipe_search

if TYPE_CHECKING:
    import optuna

SECTIONS = ("model", "training", "train_data", "negatives", "loss", "runtime")
# These decide what trials are compared by, so they cannot differ between them.
JUDGES = ("selection_metric", "eval_max_edges", "num_eval_steps", "eval_timeout_in_s", "save_dir")


class Space(Protocol):
    """What a search may try."""

    @property
    def names(self) -> list[str]:
        """What is searched, in words."""

    @property
    def first(self) -> list[dict[str, Any]]:
        """Optuna's parameters of the trials that come first: the configuration's own values, if anything."""

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return a trial's fields, by path."""


class FieldSpace:
    """The fields that `tune.search` names."""

    def __init__(self, config: TwhinConfig) -> None:
        """Take a configuration with the recipe's values."""
        self.searched = config.tune.search
        present = {path: _configured(config, path, field) for path, field in self.searched.items()}
        self.first = [] if None in present.values() else [present]
        self.names = list(self.searched)

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return a trial's fields, by path."""
        return {path: _suggest(trial, path, field) for path, field in self.searched.items()}


def check(config: TwhinConfig, config_path: str, overrides: Sequence[str]) -> None:
    """Check that the section `tune` can be searched.

    Raises:
        UserError: There is nothing to search, a path is none of the configuration's, or the metric could not compare
            trials.
    """
    search = config.tune.search
    if not search and (config.recipe == recipes.NONE or not config.all_sources):
        recipe_search.refuse_no_recipe(recipes.NONE)
    for path in search:
        section, _, field = current_path(path).partition(".")
        if section not in SECTIONS:
            raise UserError(f"tune.search: {path}: {unknown('section to search', section, SECTIONS)}")
        if section == "training" and field in JUDGES:
            raise UserError(f"tune.search: {path}: must be the same for all trials; set it in the section training")
    values = {path: field.choices or [field.low, field.high] for path, field in search.items()}
    for number in range(max((len(those) for those in values.values()), default=0)):
        tried = [as_override(path, those[min(number, len(those) - 1)]) for path, those in values.items()]
        try:
            load_config(config_path, [*overrides, *tried])
        except UserError as error:
            raise UserError(f"tune.search: with {', '.join(tried)}: {error}; mend the path or its values") from error


def check_metric(config: TwhinConfig) -> None:
    """Check that trials can be compared by the validation metric, of a configuration with the recipe's values.

    Raises:
        UserError: They cannot.
    """
    metric = config.training.selection_metric
    if not config.tune.search and not config.training.ranks_everything:
        raise UserError(
            f"tune.search: is empty, and trials of different losses cannot be compared by {metric}; leave out "
            "training.selection_metric, or set it to recall@20 or filtered_mrr"
        )
    for path in config.tune.search:
        section, _, field = path.partition(".")
        if not config.training.ranks_everything and section == "negatives":
            why = "also decides on the validation set's candidates, so trials could not be compared"
            raise UserError(f"tune.search: {path}: {why}; set training.selection_metric to filtered_mrr")
        if metric == "loss" and (section == "loss" or field in ("temperature", "comparator")):
            why = "changes the loss itself, which training.selection_metric compares"
            raise UserError(f"tune.search: {path}: {why}; set it to filtered_mrr")


def _suggest(trial: optuna.trial.BaseTrial, path: str, field: Searched) -> Any:
    if field.choices is not None:
        # As text: Optuna's own choices are scalars only.
        return _decoded(field, trial.suggest_categorical(path, [as_yaml_line(choice) for choice in field.choices]))
    assert field.low is not None and field.high is not None
    if field.is_integer:
        return trial.suggest_int(path, int(field.low), int(field.high), log=field.log)
    return trial.suggest_float(path, field.low, field.high, log=field.log)


def _decoded(field: Searched, value: Any) -> Any:
    """Return a parameter of Optuna's as the field's value."""
    if field.choices is None:
        return value
    return next(choice for choice in field.choices if as_yaml_line(choice) == value)


def _configured(config: TwhinConfig, path: str, field: Searched) -> Any:
    """Return what the configuration has at a path, as Optuna's parameter; None where the search does not reach it."""
    node: Any = config.model_dump(mode="json")
    for key in path.split("."):
        if isinstance(node, list):
            named = {str(item.get("name", i)): item for i, item in enumerate(node) if isinstance(item, dict)}
            node = named.get(key, node[int(key)] if key.isdigit() and int(key) < len(node) else None)
        else:
            node = node.get(key) if isinstance(node, dict) else None
    if field.choices is not None:
        text = as_yaml_line(node)
        return text if text in [as_yaml_line(choice) for choice in field.choices] else None
    assert field.low is not None and field.high is not None
    fits = isinstance(node, (int, float)) and not isinstance(node, bool) and field.low <= node <= field.high
    return node if fits and (isinstance(node, int) or not field.is_integer) else None
