"""The relations of a run: those that the configuration lists, and those found in the source where it has a `"*"`.

A stage resolves its configuration at its entry, so below that all code sees plain relations. The hash of a resolved
configuration covers the relations found: it names what was learned, whether that was listed or found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.sections.model import EVERY_OTHER

if TYPE_CHECKING:
    from twhin_pipeline.store import Store


def resolve(config: TwhinConfig, store: Store, snapshot: str) -> TwhinConfig:
    """Return the configuration with the relations that `raw_edges` of the snapshot has; itself where it has no `"*"`.

    Raises:
        UserError: The snapshot has no `raw_edges`, or `split.relations` names none of its relations.
    """
    if config.model.every_other is None:
        return config
    found = store.manifest("raw_edges", snapshot).details.get("relations")
    if found is None:
        raise UserError(
            f"raw_edges of snapshot {snapshot} does not tell its relations, which model.relations '*' needs; make it "
            f"anew with `twhin ingest --snapshot {snapshot}`"
        )
    return with_found(config, found)


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
    model = config.model.model_dump()
    model["relations"] = [
        *(relation.model_dump() for relation in listed),
        *({**every_other.model_dump(), "name": name} for name in new),
    ]
    try:
        # The other sections stay as they are: a source knows the folder that its path is relative to.
        return TwhinConfig.model_validate({**dict(config), "model": model})
    except ValidationError as error:
        told = "; ".join(str(one["msg"]).removeprefix("Value error, ") for one in error.errors())
        raise UserError(f"with the {len(new)} relations found in the source for '*': {told}") from error
