"""Releases and their drift as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twhin_pipeline.errors import UserError
from twhin_pipeline.lifecycle.decisions import HELD, decisions
from twhin_pipeline.lifecycle.drift import Drift
from twhin_pipeline.store import Store, releases
from twhin_pipeline.store.releases import Release
from twhin_pipeline.words import PUBLISHED

Shown = tuple[list[str], list[tuple[str, ...]]]
HEADLINES = ("filtered_mrr", "recall@20", "auc")
"""Figures that the table has, where they were measured; `--json` has all."""


def listed(store: Store) -> list[dict[str, Any]]:
    """Return the releases, oldest snapshot first: name, snapshot, created, state, since, by, reason, figures, model,
    and why it is pinned, if it is.

    The state is `current`; `former`, which it was before; `held`, where a gate held it back; `waiting`, where nothing
    has been decided; or `maps only`, whose other tables retention has removed.
    """
    return _rows(store, releases.names(store), decisions(store))


def of_snapshot(store: Store, snapshot: str) -> dict[str, Any] | None:
    """Return the row of a snapshot's newest release; None where it has none."""
    every = [name for name in releases.names(store) if name.rpartition("-")[0] == snapshot]
    return _rows(store, [max(every)], decisions(store, snapshot))[0] if every else None


def state_in_words(store: Store, snapshot: str) -> str:
    """Say on one line which release a snapshot has, whether it is current or held, and why."""
    row = of_snapshot(store, snapshot)
    if row is None:
        return f"none yet; `twhin publish --snapshot {snapshot}` makes one"
    earlier = ""
    made = releases.read(store, row["release"]).tables
    if made.get("evaluation") != store.manifest("evaluation", snapshot).version:
        earlier = ", and of earlier tables than these"
    if row["state"] == "waiting":
        return f"{row['release']} is not decided about yet{earlier}; `twhin decide --snapshot {snapshot}` does so"
    if row["state"] == "former":
        last = releases.history(store)[-1]
        return f"{row['release']} was current{earlier}; {last.release} is now: {last.reason}"
    state = "held by a gate" if row["state"] == HELD else row["state"]
    return f"{row['release']} is {state}{earlier}: {row['reason']}"


def _rows(store: Store, names: Sequence[str], decided: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    moves, pinned = releases.history(store), releases.pins(store)
    last = {move.release: move for move in moves}
    rows = []
    for name in names:
        release = releases.read(store, name)
        move = last.get(name)
        decision = decided.get(name, {})
        state = decision.get("decision", "waiting") if move is None else "former"
        if move is not None and moves[-1].release == name:
            state = "current"
        state = state if _has_tables(store, release) else "maps only"
        rows.append(
            {
                "release": name,
                "snapshot": release.snapshot,
                "created": release.created,
                "state": state,
                "since": move.at if move else None,
                "by": move.by if move else None,
                "reason": move.reason if move else decision.get("reason"),
                "figures": dict(release.figures),
                "model": release.model_uri,
                "pinned": pinned[name].reason if name in pinned else None,
            }
        )
    return rows


def _has_tables(store: Store, release: Release) -> bool:
    kept = [name for name in release.tables if name != PUBLISHED][:1]
    return all(release.tables[name] in store.versions_of(name, release.snapshot) for name in kept)


def moves(store: Store) -> list[dict[str, str]]:
    """Return every move of `current`, the first one first."""
    return [{"release": m.release, "at": m.at, "by": m.by, "reason": m.reason} for m in releases.history(store)]


def shown(rows: Sequence[dict[str, Any]]) -> Shown:
    """Return `listed` as a table for people."""
    figures = [name for name in HEADLINES if any(name in row["figures"] for row in rows)]
    header = ["release", "state", *figures, "since", "by", "reason"]
    return header, [
        (
            row["release"],
            row["state"] + (", pinned" if row["pinned"] is not None else ""),
            *(_number(row["figures"].get(name)) for name in figures),
            row["since"] or "",
            row["by"] or "",
            row["reason"] or "",
        )
        for row in rows
    ]


def pivoted(rows: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the table `drift` with a row for each entity type, or relation, and a column for each metric.

    Of a figure with a confidence interval, `<metric>_low` and `<metric>_high` are columns too.
    """
    result: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["kind"] == kind:
            of_name = result.setdefault(row["name"], {"name": row["name"]})
            of_name[row["metric"]] = row["value"]
            if row["low"] is not None:
                of_name |= {f"{row['metric']}_low": row["low"], f"{row['metric']}_high": row["high"]}
    return list(result.values())


def two(store: Store, before: str | None, after: str | None) -> tuple[Release, Release]:
    """Return the two releases to compare: those named, else the newest and the last one before it that was current.

    Raises:
        UserError: There are no two, or none of that name.
    """
    every = [releases.read(store, name) for name in releases.names(store)]
    made = sorted(every, key=lambda one: (one.created, one.name))
    if not made:
        raise UserError(f"{store.root}: no release yet; `twhin run` makes one when its checks have passed")
    later = made[-1] if after is None else releases.read(store, after)
    if before is None:
        older = made[: made.index(later)]
        if not older:
            raise UserError(f"{store.root}: no release before {later.name} to compare it with (`twhin releases`)")
        seen = releases.trusted(store)  # what consumers had; a run that was tried again may have made others
        before = next((one.name for one in reversed(older) if one.name in seen), older[-1].name)
    return releases.read(store, before), later


def drift_shown(found: Sequence[Drift], k: int) -> Shown:
    """Return the drift as a table for people."""
    header = [
        "entity", "kept", "new", "departed", "cosine", "5 % below", "after rotation", "distance", "length",
        f"same {k} neighbors", "consumer AUC", "on new", "mapped",
    ]  # fmt: skip
    return header, [
        (
            one.entity,
            f"{one.kept:,}",
            f"{one.added:,}",
            f"{one.departed:,}",
            *map(
                _number,
                (one.cosine, one.cosine_p05, one.aligned_cosine, one.distance, one.length, one.neighbors),
            ),
            *map(
                _number,
                (one.consumer.auc, one.consumer.auc_new, one.consumer.auc_mapped) if one.consumer else [None] * 3,
            ),
        )
        for one in found
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
