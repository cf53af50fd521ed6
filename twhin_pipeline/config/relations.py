"""The relations of a run: those that the configuration lists, and those found in the source where it has a `"*"`.

A stage resolves its configuration at its entry, so below that all code sees plain relations. The hash of a resolved
configuration covers the relations found: it names what was learned, whether that was listed or found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from twhin_pipeline.config import TwhinConfig, recipes
from twhin_pipeline.config.model import EVERY_OTHER
from twhin_pipeline.errors import UserError

if TYPE_CHECKING:
    from twhin_pipeline.store import Store


def resolve(config: TwhinConfig, store: Store, snapshot: str) -> TwhinConfig:
    """Return the configuration as a stage after ingestion reads it: each relation listed, each field chosen.

    `"*"` becomes the relations that `raw_edges` of the snapshot has, and, once the vocabularies are there, the recipe
    fills in what the configuration leaves out (`recipes`). What is resolved already stays as it is.

    Raises:
        UserError: The snapshot has no `raw_edges`, `split.relations` names none of its relations, or the recipe's
            values contradict the configuration's.
    """
    return recipe(config, store, snapshot).config


def recipe(config: TwhinConfig, store: Store, snapshot: str) -> recipes.Recipe:
    """Return what `resolve` returns with the recipe's name, values and reasons. Raises UserError as `resolve` does."""
    listed = with_relations(config, store, snapshot)
    counts = recipes.Counts.read(listed, store, snapshot)
    if counts is None:
        return recipes.Recipe(recipes.NONE, "it is chosen when edges and vocabularies are made", listed)
    return recipes.apply(listed, counts)


def with_relations(config: TwhinConfig, store: Store, snapshot: str) -> TwhinConfig:
    """Return the configuration with the relations that `raw_edges` of the snapshot has; itself where it has no `"*"`.

    Raises:
        UserError: The snapshot has no `raw_edges`, or `split.relations` names none of its relations.
    """
    if config.model.every_other is None:
        return config
    result = store.manifest("raw_edges", snapshot).details.get("relations")
    if result is None:
        raise UserError(
            f"raw_edges of snapshot {snapshot} does not tell its relations, which model.relations '*' needs; make it "
            f"anew with `twhin ingest --snapshot {snapshot}`"
        )
    return with_found(config, result)


def with_found(config: TwhinConfig, found: Iterable[str]) -> TwhinConfig:
    """Return the configuration with `"*"` replaced by an entry for each relation of `found` that is not listed.

    Listed ones come first, in their order; the others follow sorted by name (by code points), so that the order depends
    on the names alone.

    Raises:
        UserError: A field names a relation that is in neither, or an entity type is left without a relation.
    """
    every_other = config.model.every_other
    if every_other is None:
        return config
    listed = [relation for relation in config.model.relations if relation.name != EVERY_OTHER]
    new = sorted(set(found) - {relation.name for relation in listed})
    if not listed and not new:
        raise UserError(
            "model.relations: none is listed, and none is found in the source for '*'; mend source.path or "
            "source.columns.rel"
        )
    data = config.model_dump(
        exclude_unset=True, exclude={"source", "sources"}
    )  # what is left out stays so: the recipe's
    # A source knows the folder that its path is relative to, which is no field.
    data |= {name: getattr(config, name) for name in ("source", "sources") if name in config.model_fields_set}
    data["model"]["relations"] = [
        *(relation.model_dump(exclude_unset=True) for relation in listed),
        *({**every_other.model_dump(exclude_unset=True), "name": name} for name in new),
    ]
    try:
        return TwhinConfig.model_validate(data)
    except ValidationError as error:
        message = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise UserError(f"with the {len(new)} relations found in the source for '*': {message}") from error
