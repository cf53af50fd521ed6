"""Promotion: a release becomes the one that consumers see, and the registry's `champion`."""

from __future__ import annotations

from twhin_pipeline.errors import UserError
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release


def promote(store: Store, name: str, by: str, reason: str) -> tuple[Release, str | None]:
    """Make a release the current one; MLflow's alias `champion` follows.

    Args:
        store: Where it is.
        name: The release's.
        by: Who decides.
        reason: Why; stored.

    Returns:
        The release, and why the alias could not follow, None where it did or the model is not registered.

    Raises:
        UserError: There is no such release, one of its tables is gone, or another process moves `current`.
    """
    from twhin_pipeline import tracking

    release = releases.promote(store, name, by, reason)
    if release.model_uri is None:
        return release, None
    try:
        tracking.set_champion(store, release.model_uri)
    except Exception as error:  # of the server: which release is current is in the store
        return release, f"the alias champion was not moved to {release.model_uri}: {tracking.reason(error)}"
    return release, None


def before_current(store: Store) -> str:
    """Return the release to roll back to: the last one that was current before the present one, and is another.

    Raises:
        UserError: There is none.
    """
    moves = [move.release for move in releases.history(store)]
    for name in reversed(moves):
        if name != moves[-1]:
            return name
    known = ", ".join(moves[-1:]) or "no release"
    raise UserError(f"{store.root}: nothing to roll back to; only {known} has ever been current (`twhin releases`)")
