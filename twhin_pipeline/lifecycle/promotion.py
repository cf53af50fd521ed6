"""Promotion: a release becomes the one that consumers see, and the registry's `champion`.

`decide` does so by gates, once for each new release; the table `promotion` keeps what it found. `promote` does as a
person says.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from twhin_pipeline.config import TwhinConfig
from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle.challenge import ALL
from twhin_pipeline.lifecycle.comparison import RELATION
from twhin_pipeline.lifecycle.decisions import HELD, PROMOTED
from twhin_pipeline.lifecycle.gates import Gate, Values, gates
from twhin_pipeline.store import Manifest, Store, catalog, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import DRIFT, PROMOTION, PUBLISHED

SCHEMA = pa.schema(
    [
        pa.field("gate", pa.string()),
        pa.field("about", pa.string()),
        pa.field("passed", pa.bool_()),
        pa.field("value", pa.float64()),
        pa.field("limit", pa.float64()),
        pa.field("text", pa.string()),
    ]
)


def decide(config: TwhinConfig, store: Store, snapshot: str) -> Manifest:
    """Promote a snapshot's newest release where it passes every gate; return the manifest of the table `promotion`.

    One that is current already stays so: a decision that was interrupted, or is made again, does not hold it back. One
    that was given up for another release waits for a person.

    Its details say the release, the decision (`promoted` or `held`), the reason, the headline (the release's filtered
    MRR, beside the current one's) and the release that was current.

    Raises:
        UserError: The snapshot has no release, or another process moves `current`.
    """
    published, drift = store.manifest(PUBLISHED, snapshot), store.manifest(DRIFT, snapshot)
    release = _release_of(store, published)
    current = releases.current(store)
    rows = {(row["kind"], row["name"], row["metric"]): row for row in store.read(DRIFT, snapshot).to_pylist()}
    is_current = current is not None and current.name == release.name
    if is_current:
        looked_at = [Gate("current", "", True, None, None, "it is the current release already")]
    else:
        looked_at = gates(config.promotion, rows, drift.details, current, snapshot)
        looked_at += _given_up(store, release)
    reason, headline = _reason(looked_at), _headline(rows, release)
    passed = all(gate.passed for gate in looked_at)
    notes = []
    if passed and not is_current:
        _, note = promote(store, release.name, releases.user(), reason)
        notes = [note] if note else []
    parents = {PUBLISHED: published.version, DRIFT: drift.version}
    with store.replace(PROMOTION, snapshot, config_hash=config.hash(), parents=parents) as draft:
        draft.write(pa.Table.from_pylist([_row(gate) for gate in looked_at], schema=SCHEMA))
        draft.details = {
            "release": release.name, "decision": PROMOTED if passed else HELD, "reason": reason, "headline": headline,
            "current_before": current.name if current else None, "by": releases.user(), "notes": notes,
        }  # fmt: skip
    catalog.refresh(store)
    return store.manifest(PROMOTION, snapshot)


def _given_up(store: Store, release: Release) -> list[Gate]:
    """Return the gate of a release that was current before: what a rollback decided, a stage does not undo."""
    moves = releases.history(store)
    if all(move.release != release.name for move in moves):
        return []
    text = f"it was current, and was given up for {moves[-1].release} ({moves[-1].reason})"
    return [Gate("given_up", "", False, None, None, text)]


def _row(gate: Gate) -> dict[str, Any]:
    return {
        "gate": gate.name, "about": gate.about, "passed": gate.passed, "value": gate.value, "limit": gate.limit,
        "text": gate.text,
    }  # fmt: skip


def _reason(looked_at: list[Gate]) -> str:
    """Say why a release is held back, by the gates that it failed; or what it showed."""
    failed = [gate for gate in looked_at if not gate.passed]
    if failed:
        return "; ".join(gate.text + (f", limit {_limit(gate)}" if gate.limit is not None else "") for gate in failed)
    shown = [gate.text for gate in looked_at if gate.name in ("first", "quality", "current")]
    count = "1 gate" if len(looked_at) == 1 else f"{len(looked_at)} gates"
    return f"passed {count}: {'; '.join(shown)}"


def _headline(rows: Values, release: Release) -> str:
    """Return the release's filtered MRR, beside the current one's on the same edges where both were measured."""
    new, before, change = (
        rows.get((RELATION, ALL, name), {}).get("value")
        for name in ("filtered_mrr", "filtered_mrr_current", "filtered_mrr_change")
    )
    if new is not None and before is not None and change is not None:
        return f"filtered MRR {new:.4f}, before {before:.4f} ({change:+.1%})"
    measured = release.figures.get("filtered_mrr")
    return "" if measured is None else f"filtered MRR {measured:.4f}"


def _limit(gate: Gate) -> str:
    assert gate.limit is not None
    return f"{gate.limit:+.1%}" if gate.name == "quality" else f"{gate.limit:g}"


def _release_of(store: Store, published: Manifest) -> Release:
    """Return the newest release of what was published."""
    if made := releases.of_published(store, published.snapshot, published.version):
        return made[-1]
    raise UserError(
        f"{store.root}: no release of snapshot {published.snapshot} as it was published last; make it with "
        f"`twhin publish --snapshot {published.snapshot}`"
    )


def promote(store: Store, name: str, by: str, reason: str) -> tuple[Release, str | None]:
    """Make a release the current one; MLflow's alias `champion` and the views in PostgreSQL follow.

    Args:
        store: Where it is.
        name: The release's.
        by: Who decides.
        reason: Why; stored.

    Returns:
        The release, and what could not follow and why, None where all did.

    Raises:
        UserError: There is no such release, one of its tables is gone, or another process moves `current`.
    """
    release = releases.promote(store, name, by, reason)
    notes = [note for note in (_move_champion(store, release), _switch_views(store, release)) if note is not None]
    return release, "; ".join(notes) or None


def _move_champion(store: Store, release: Release) -> str | None:
    from twhin_pipeline import tracking

    if release.model_uri is None:
        return None
    try:
        tracking.set_champion(store, release.model_uri)
    except Exception as error:  # of the server: which release is current is in the store
        return f"the alias champion was not moved to {release.model_uri}: {tracking.reason(error)}"
    return None


def _switch_views(store: Store, release: Release) -> str | None:
    from twhin_pipeline.vectors import postgres

    settings = postgres.settings_of(store)
    if settings is None:
        return None
    try:
        postgres.show(store, release, settings)
    except UserError as error:
        return f"the views in PostgreSQL show the release before: {error}"
    return None


def rollback(store: Store, name: str | None, by: str, reason: str) -> tuple[Release, str | None]:
    """Go back to a release that was current before. Arguments, results and errors are those of `promote`.

    Args:
        store: Where it is.
        name: The release's; None: the last one that was current before the present one, and is another.
        by: Who decides.
        reason: Why; stored as `rollback: <reason>`.

    Raises:
        UserError: The release was never current, or there is none to go back to.
    """
    releases.stated(reason)
    name = name or before_current(store)
    if name not in {move.release for move in releases.history(store)}:
        releases.read(store, name)  # says so where there is none of that name
        raise UserError(f"{name} was never current; make it so by `twhin promote {name} --reason …`")
    return promote(store, name, by, f"rollback: {reason}")


def before_current(store: Store) -> str:
    """Return the last release that was current before the present one, and is another.

    Raises:
        UserError: There is none.
    """
    moves = [move.release for move in releases.history(store)]
    for name in reversed(moves):
        if name != moves[-1]:
            return name
    known = f"only {moves[-1]} has" if moves else "no release has"
    raise UserError(f"{store.root}: nothing to roll back to; {known} ever been current (`twhin releases`)")
