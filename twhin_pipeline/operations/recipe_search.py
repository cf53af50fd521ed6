"""What a search tries where `tune.search` is empty: the few values of the recipe that depend most on the graph.

A field that the configuration sets is not searched. Nor is one whose values could not be compared by the validation
metric. The recipe itself comes first. Then, for `interactions`, come other ways to compare vectors, each with the
recipe's values for it; what follows varies all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twhin_pipeline.config import TwhinConfig, recipes
from twhin_pipeline.config.recipes import Counts, Recipe
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    import optuna

RECIPE = "recipe"
COSINE = {"model.comparator": "cosine", "model.temperature": 0.08, "model.init_scale": 0.065}
SCORERS: dict[str, dict[str, Any]] = {
    "cosine and bsl": {
        **COSINE, "loss.name": "bsl", "loss.positive_temperature": 1.22, "loss.log_q": False, "negatives.mask": "known",
    },
    "cosine and softmax": COSINE,
}  # fmt: skip
"""Alternatives to `dot`: as in configs/gowalla.yaml, and the same with the recipe's loss."""
PENALTY_FACTOR, RATE_FACTOR = 5.0, 3.0
"""The most by which the recipe's value is multiplied or divided."""
MOST_DROPOUT, TEMPERATURES, DIMS = 0.5, (0.05, 0.2), (64, 128)


@dataclass(frozen=True)
class Parameter:
    """One value that is varied: what the recipe has, how Optuna draws one, and the fields that a drawn value sets."""

    own: Any
    draw: Callable[[optuna.trial.BaseTrial], Any]
    fields: Callable[[Any], dict[str, Any]]


class RecipeSpace:
    """The search space of a recipe.

    Raises:
        UserError: The configuration has no recipe, or sets all that would be searched.
    """

    def __init__(self, config: TwhinConfig, counts: Counts) -> None:
        """Take a configuration with its relations listed, but without the recipe's values, and the graph's counts."""
        recipe = recipes.apply(config, counts)
        refuse_no_recipe(recipe.name)
        self.fields: dict[str, dict[str, Any]] = {RECIPE: {}}
        """By the scorer's name, the fields that it sets."""
        if recipe.name == recipes.INTERACTIONS and recipe.config.model.comparator == "dot":
            configured = config.model_dump(exclude_unset=True)
            self.fields |= {
                name: fields
                for name, fields in SCORERS.items()
                if not any(_is_set(configured, path) for path in fields)
            }
        self.parameters = {
            name: _parameters(recipes.apply(_with(config, fields), counts), own=name != RECIPE, counts=counts)
            for name, fields in self.fields.items()
        }
        if not any(self.parameters.values()) and len(self.fields) == 1:
            raise UserError(
                f"tune.search: is empty, and the configuration sets every field that a search would vary of the recipe "
                f"{recipe.name}; leave some of them out, or name fields in tune.search"
            )

    @property
    def names(self) -> list[str]:
        """What is searched."""
        varied = dict.fromkeys(name for parameters in self.parameters.values() for name in parameters)
        return ["comparator and loss", *varied] if len(self.fields) > 1 else list(varied)

    @property
    def first(self) -> list[dict[str, Any]]:
        """Optuna's parameters of the trials that come first: the recipe, then each other scorer's own values."""
        return [
            {
                **({"scorer": scorer} if len(self.fields) > 1 else {}),
                **{name: parameter.own for name, parameter in parameters.items()},
            }
            for scorer, parameters in self.parameters.items()
        ]

    def suggest(self, trial: optuna.trial.BaseTrial) -> dict[str, Any]:
        """Return a trial's fields by path, without those that are the recipe's: none for the recipe itself."""
        scorer = RECIPE if len(self.fields) == 1 else trial.suggest_categorical("scorer", list(self.fields))
        fields = dict(self.fields[scorer])
        for parameter in self.parameters[scorer].values():
            value = parameter.draw(trial)
            if value != parameter.own:
                fields |= parameter.fields(value)
        return fields


def refuse_no_recipe(name: str) -> None:
    """Raise UserError where the recipe's name is `none`: it has no values to search."""
    if name == recipes.NONE:
        raise UserError(
            "tune.search: is empty, and there is no recipe whose values could be searched; name fields by their path, "
            "such as {model.temperature: {low: 0.02, high: 0.5, log: true}}, or leave out recipe: none"
        )


def _parameters(recipe: Recipe, *, own: bool, counts: Counts) -> dict[str, Parameter]:
    """Return what is varied around a recipe's values; `own` says that the temperature is the search's."""
    config, model = recipe.config, recipe.config.model
    chosen = {value.path for value in recipe.values if value.chosen}
    parameters: dict[str, Parameter] = {}

    if "model.regularization.entities" in chosen and model.regularization.entities > 0:
        penalty = model.regularization

        def penalized(factor: float) -> dict[str, Any]:
            values = {"entities": _short(penalty.entities * factor), "operators": _short(penalty.operators * factor)}
            return {"model.regularization": {"norm": penalty.norm, **values}}

        parameters["penalty"] = _scaled("penalty", PENALTY_FACTOR, penalized)
    if "model.embedding_dropout" in chosen:
        parameters["dropout"] = Parameter(
            model.embedding_dropout,
            lambda trial: trial.suggest_float("dropout", 0.0, MOST_DROPOUT),
            lambda value: {"model.embedding_dropout": _short(value)},
        )
    tables = _chosen_tables(recipe, "optimizer")
    if tables:

        def rates(factor: float) -> dict[str, Any]:
            optimizers = {name: model.table(name).optimizer.model_dump(exclude_unset=True) for name in tables}
            return {f"{_path_of(name)}.optimizer": _times(value, factor) for name, value in optimizers.items()}

        parameters["learning_rate"] = _scaled("learning_rate", RATE_FACTOR, rates)
    if set(_chosen_tables(recipe, "embedding_dim")) == set(model.table_names):
        dim = model.embedding_dim
        dims = sorted({dim, *DIMS} if recipe.name == recipes.INTERACTIONS else {dim // 2, dim})
        if max(counts.entities.values(), default=0) <= recipes.LARGE_TABLE:
            parameters["dim"] = Parameter(
                dim,
                lambda trial: trial.suggest_categorical("dim", dims),
                lambda value: {f"{_path_of(name)}.embedding_dim": value for name in model.table_names},
            )
    if model.comparator == "cosine" and (own or "model.temperature" in chosen):
        parameters["temperature"] = Parameter(
            model.temperature,
            lambda trial: trial.suggest_float("temperature", *TEMPERATURES, log=True),
            lambda value: {"model.temperature": _short(value)},
        )
    # Recall and NDCG are of tails whatever training corrupts; the other metrics follow it and could not be compared.
    of_tails = config.training.selection_metric.startswith(("recall@", "ndcg@"))
    if recipe.name == recipes.INTERACTIONS and "negatives.sides" in chosen and of_tails:
        parameters["sides"] = Parameter(
            config.negatives.sides,
            lambda trial: trial.suggest_categorical("sides", ["both", "rhs"]),
            lambda value: {"negatives.sides": value},
        )
    return parameters


def _scaled(name: str, most: float, fields: Callable[[float], dict[str, Any]]) -> Parameter:
    return Parameter(1.0, lambda trial: trial.suggest_float(name, 1 / most, most, log=True), fields)


def _chosen_tables(recipe: Recipe, field: str) -> list[str]:
    """Return the tables of which the recipe chose a field."""
    names = recipe.config.model.table_names
    for value in recipe.values:
        parts = value.path.split(".")
        if value.chosen and value.path.startswith("model.embeddings.tables.") and parts[-1] == field:
            which = ".".join(parts[3:-1])
            return list(names) if which == "*" else [name for name in names if name in which.split(",")]
    return []


def _path_of(table: str) -> str:
    return f"model.embeddings.tables.{table}"


def _times(optimizer: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return an optimizer's section with every rate in it multiplied."""
    return {
        key: _times(value, factor)
        if isinstance(value, Mapping)
        else _short(value * factor)
        if key in ("lr", "learning_rate")
        else value
        for key, value in optimizer.items()
    }


def _short(value: float) -> float:
    """Return a number with three significant digits: more would only be noise."""
    return float(f"{value:.3g}")


def _is_set(data: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


def _with(config: TwhinConfig, fields: Mapping[str, Any]) -> TwhinConfig:
    """Return the configuration with fields set, as an override does."""
    kept = {name: getattr(config, name) for name in ("source", "sources") if name in config.model_fields_set}
    data = config.model_dump(exclude_unset=True, exclude={"source", "sources"})
    for path, value in fields.items():
        node: Any = data
        *parents, last = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return TwhinConfig.model_validate({**data, **kept})
